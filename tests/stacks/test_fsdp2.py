"""FSDP2 on two gloo processes (fsdp2_worker.py) equals one process.

Equality is to the last bit: every process computes whole layers from gathered tensors, and the mean
of two equal gradients is the gradient.
"""

import pytest
import torch
from peft import PeftModel

from tests.adapters import models
from tests.stacks import fsdp2_worker as worker
from tests.stacks import processes

TIMEOUT = 120  # seconds for both processes together
RANKS = range(worker.PROCESSES)

pytestmark = pytest.mark.slow
every_bank = pytest.mark.parametrize("bank", list(worker.BANKS))
every_optimizer = pytest.mark.parametrize("optimizer", list(worker.OPTIMIZERS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes have left: ``{bank}_{rank}.pt`` and adapters by bank and optimizer."""
    return processes.run_once(tmp_path_factory, worker.__name__, worker.PROCESSES, TIMEOUT)


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
