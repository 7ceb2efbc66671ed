"""FSDP2 on two gloo processes (fsdp2_worker.py) equals one process.

Equality is to the last bit: every process computes whole layers from gathered tensors, and the mean
of two equal gradients is the gradient.
"""

import os
import subprocess
import sys
import time

import pytest
import torch
from filelock import FileLock
from peft import PeftModel

from tests.adapters import models
from tests.stacks import fsdp2_worker as worker

TIMEOUT = 120  # seconds for both processes together
RANKS = range(worker.PROCESSES)
END = {0: "succeeded", None: f"stopped: still running after {TIMEOUT} s or another's failure"}

pytestmark = pytest.mark.slow
every_bank = pytest.mark.parametrize("bank", list(worker.BANKS))
every_optimizer = pytest.mark.parametrize("optimizer", list(worker.OPTIMIZERS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes have left: ``{bank}_{rank}.pt`` and adapters by bank and optimizer.

    They run once, for all workers of pytest-xdist.
    """
    root = tmp_path_factory.getbasetemp()
    place = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "fsdp2"
    with FileLock(f"{place}.lock"):
        if not place.exists():
            place.mkdir()
            (place / "failure").write_text(run_processes(place))
    failure = (place / "failure").read_text()
    if failure:
        pytest.fail(failure, pytrace=False)
    return place


def run_processes(folder):
    """Run the workers to their end; return the output of all if one fails or hangs, else ""."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    logs = [folder / f"{rank}.log" for rank in RANKS]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-m", worker.__name__, str(rank), str(folder)]
        with log.open("wb") as output:
            processes.append(
                subprocess.Popen(
                    command, cwd=models.ROOT, env=environment, stdout=output, stderr=output
                )
            )
    ends = [END.get(code, f"exit code {code}") for code in wait(processes)]
    if set(ends) == {END[0]}:
        return ""
    return "\n".join(f"--- process {i} {ends[i]}\n{logs[i].read_text()}" for i in RANKS)


def wait(processes):
    """Exit codes once all have succeeded, one has failed or the time is over; none stays alive."""
    end = time.monotonic() + TIMEOUT
    codes = [None]
    while None in codes and not any(codes) and time.monotonic() < end:
        time.sleep(0.05)
        codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
        process.wait()
    return codes


def found(folder, bank):
    """What each process found, by rank."""
    return [torch.load(folder / f"{bank}_{rank}.pt") for rank in RANKS]


def trained(bank, optimizer):
    """One process; checked to have moved so far that masks have changed."""
    model = worker.fresh(bank).train()
    before = models.masks(model)
    worker.train(model, optimizer, worker.whole_batch())
    assert models.flips(before, models.masks(model)) > 50
    return model


@every_bank
def test_scores_are_sharded(bank, folder):
    first, second = (found(folder, bank)[rank]["shards"] for rank in RANKS)
    expected = {
        name: parameter.numel()
        for name, parameter in worker.fresh(bank).named_parameters()
        if name.endswith(".scores")
    }
    assert len(expected) == 4
    assert set(first) == set(second) == set(expected)
    for name, count in expected.items():
        assert first[name] + second[name] == count
        assert 0 < second[name] <= first[name] < count


@every_bank
def test_forward(bank, folder):
    model = worker.fresh(bank)
    expected = models.logits(model)
    for rank in RANKS:
        models.assert_equal(found(folder, bank)[rank]["untrained"], expected, f"rank {rank}")
    assert expected.std(dim=0).max() > 0.1, "the pictures hardly matter"
    assert all(0.3 < m.float().mean() < 0.7 for m in models.masks(model).values())
    with model.disable_adapter():
        models.assert_differs(models.logits(model), expected, "without masks")


@every_optimizer
@every_bank
def test_two_steps(bank, optimizer, folder):
    model = trained(bank, optimizer)
    first, second = (found(folder, bank)[rank][optimizer] for rank in RANKS)
    models.assert_same_tensors(first["state"], model.state_dict())
    assert second["state"] == {}
    expected = models.logits(model)
    models.assert_equal(first["logits"], expected)
    models.assert_equal(second["logits"], expected)


@every_bank
def test_halves_of_a_batch_make_the_step_of_the_whole(bank, folder):
    model = worker.fresh(bank).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = worker.train(model, "sgd", worker.whole_batch(), steps=1).state_dict()
    state = found(folder, bank)[0]["halves"]
    assert set(state) == set(expected)
    scores = [name for name in expected if name.endswith(".scores")]
    assert len(scores) == 4
    for name in scores:
        moved = float((expected[name] - before[name]).abs().max())
        assert moved > 0.1
        # Float32 sums in another order: a few of 2^24 parts of the largest step.
        torch.testing.assert_close(state[name], expected[name], rtol=0, atol=1e-5 * moved)


@every_optimizer
@every_bank
def test_saved_adapter(bank, optimizer, folder, tmp_path):
    model = trained(bank, optimizer)
    model.save_pretrained(str(tmp_path))
    for sharded in (folder / f"{bank}_{optimizer}", folder / f"{bank}_{optimizer}_from_shards"):
        for name in (models.WEIGHTS_FILE, "adapter_config.json"):
            assert (sharded / name).read_bytes() == (tmp_path / name).read_bytes(), name
        loaded = PeftModel.from_pretrained(worker.base(), str(sharded))
        models.assert_equal(models.logits(loaded), models.logits(model))


@every_bank
def test_loaded_bits_run_sharded(bank, folder):
    expected = models.logits(trained(bank, "adam"))
    for rank in RANKS:
        models.assert_equal(found(folder, bank)[rank]["loaded"], expected, f"rank {rank}")
