"""One of two FSDP2 processes: runs sharded models and leaves what came out for test_fsdp2.py.

python -m tests.stacks.fsdp2_worker RANK FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pemn_surgery import pemnify
from tests.adapters import models
from tests.stacks import processes

PROCESSES = 2
BANKS = {
    "own": {"bank": "own", "selector": "threshold", "score_init": "kaiming_uniform"},
    "rp": {"bank": "rp", "ratio": 0.1},
    "flips": {
        **{"bank": "own", "selector": "threshold", "score_init": "kaiming_uniform"},
        **{"form": "flip", "support": 0.5},
    },
}
OPTIMIZERS = {  # rates at which masks really change within two steps
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=10.0, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02),
}


def base():
    """Seven channels: no weight of a convolution splits evenly over two processes.

    The norms amplify, so that pictures rather than the head's bias decide the logits.
    """
    model = models.net(channels=7)
    for norm in (model.bn1, model.bn2):
        torch.nn.init.constant_(norm.weight, 8.0)
    return model


def fresh(bank):
    return pemnify(base(), **BANKS[bank])


def train(model, optimizer, batch, steps=2):
    x, y = batch
    opt = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return model


def whole_batch():
    return models.images(), models.labels()


def half_batch(rank):
    """Every other picture; halves of one size, so that the mean of their means is the mean."""
    return tuple(tensor[rank::PROCESSES] for tensor in whole_batch())


def shard(model, mesh):
    """FSDP2 over each convolution, and over the rest (norms, head) as one group."""
    inner = model.get_base_model()
    for layer in (inner.conv1, inner.conv2, inner.conv3):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gathered(model):
    """The whole state dict on rank 0, an empty one elsewhere; every process must ask."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def score_shards(model):
    """How many scores of each mask this process holds."""
    return {
        name: parameter.to_local().numel()
        for name, parameter in model.named_parameters()
        if name.endswith(".scores") and isinstance(parameter, DTensor)
    }


def findings(bank, rank, mesh, folder):
    """Everything that test_fsdp2.py compares with one process."""
    untrained = shard(fresh(bank), mesh)
    found = {"shards": score_shards(untrained), "untrained": models.logits(untrained)}
    for optimizer in OPTIMIZERS:
        model = train(shard(fresh(bank), mesh).train(), optimizer, whole_batch())
        state = gathered(model)
        found[optimizer] = {"state": state, "logits": models.logits(model)}
        if rank == 0:
            model.save_pretrained(str(folder / f"{bank}_{optimizer}"), state_dict=state)
        # Without a gathered state dict every process takes part, and one writes.
        shards = folder / f"{bank}_{optimizer}_from_shards"
        model.save_pretrained(str(shards), is_main_process=rank == 0)
    halves = train(shard(fresh(bank), mesh).eval(), "sgd", half_batch(rank), steps=1)
    found["halves"] = gathered(halves)
    dist.barrier()  # rank 0 has written its files
    loaded = PeftModel.from_pretrained(base(), str(folder / f"{bank}_adam"))
    found["loaded"] = models.logits(shard(loaded, mesh))
    return found


def main(rank, folder):
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'rendezvous'}"  # a port could be taken by someone else
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for bank in BANKS:
        torch.save(findings(bank, rank, mesh, folder), folder / f"{bank}_{rank}.pt")
    processes.leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
