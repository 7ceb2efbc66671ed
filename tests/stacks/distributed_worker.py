"""One of two gloo processes that train, are interrupted and resume; test_distributed.py compares.

python -m tests.stacks.distributed_worker RANK FOLDER
"""

import functools
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pemn_surgery import pemnify
from tests.adapters import models
from tests.stacks import processes, trainings

PROCESSES = 2
STACKS = ("ddp", "fsdp2", "zero2", "zero3")
HAS_DEEPSPEED = find_spec("deepspeed") is not None


def train_by_trainer(stack, folder, stop=None, *, resume=False):
    """transformers' Trainer, which wraps in DDP or DeepSpeed by itself."""
    model = trainings.train("trainer" if stack == "ddp" else stack, folder, stop, resume=resume)
    if model is None or stack != "zero3":
        return model
    from deepspeed import zero

    with zero.GatheredParameters(list(model.parameters())):
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train_fsdp2(folder, stop=None, *, resume=False):
    """A loop of one's own over sharded scores, with torch's distributed checkpoints."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model = pemnify(trainings.llama(), trainings.masks_config()).train()
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    place, start = str(folder / "state"), 0
    if resume:
        load(model, optimizer, place)
        start = trainings.SAVED
    ids = models.tokens(0, trainings.ROWS)
    for step in range(start, trainings.STEPS):
        if step == trainings.SAVED:
            save(model, optimizer, place)
        if stop is not None and step == stop:
            return None
        batch = ids[2 * step + dist.get_rank() :: 2 * trainings.STEPS]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        model.save_pretrained(str(folder / "final"), state_dict=state)
    return state


def save(model, optimizer, place):
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=place)


def load(model, optimizer, place):
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=place)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


def state_of(trained):
    state = trained if isinstance(trained, dict) else trained.state_dict()
    return {name: value.detach().clone() for name, value in state.items()}


def findings(stack, folder):
    train = train_fsdp2 if stack == "fsdp2" else functools.partial(train_by_trainer, stack)
    whole = state_of(train(folder / "whole"))
    stopped = train(folder / "parts", stop=trainings.SAVED)
    dist.barrier()
    resumed = state_of(train(folder / "parts", resume=True))
    return {"whole": whole, "stopped": stopped, "resumed": resumed}


def main(rank, folder):
    torch.set_num_threads(1)
    # What torchrun sets; accelerate looks for an address although the processes have met.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "localhost"}
    os.environ |= {"MASTER_PORT": "29500", "DS_ACCELERATOR": "cpu"}
    meeting = f"file://{folder / 'rendezvous'}"  # a port could be taken by someone else
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    for stack in STACKS if HAS_DEEPSPEED else STACKS[:2]:
        torch.save(findings(stack, folder / stack), folder / f"{stack}_{rank}.pt")
    processes.leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
