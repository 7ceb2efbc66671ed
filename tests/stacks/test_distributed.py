"""On two gloo processes, interrupted and resumed runs equal uninterrupted ones, bit for bit."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from pemn_surgery import pemnify
from tests.adapters import models
from tests.stacks import distributed_worker as worker
from tests.stacks import processes, trainings

TIMEOUT = 300  # seconds for both processes together

pytestmark = [pytest.mark.slow, models.ignore_peft_on_transformers]
without = pytest.mark.skipif(not worker.HAS_DEEPSPEED, reason="deepspeed is not installed")
every_stack = pytest.mark.parametrize(
    "stack",
    [pytest.param(name, marks=without if "zero" in name else ()) for name in worker.STACKS],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return processes.run_once(tmp_path_factory, worker.__name__, worker.PROCESSES, TIMEOUT)


@every_stack
def test_resumed_equals_uninterrupted(stack, folder):
    for rank in range(worker.PROCESSES):
        found = torch.load(folder / f"{stack}_{rank}.pt")
        assert found["stopped"] is None
        if rank == 0 or stack != "fsdp2":
            models.assert_same_tensors(found["resumed"], found["whole"])
            assert sum(name.endswith(".scores") for name in found["whole"]) == 15


@every_stack
def test_saved_adapters(stack, folder):
    place = folder / stack
    files = [place / part / "final" / models.WEIGHTS_FILE for part in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert all("scores" not in name for name in load_file(files[0]))
    loaded = PeftModel.from_pretrained(trainings.llama(), files[0].parent)
    fresh = pemnify(trainings.llama(), trainings.masks_config())
    assert models.flips(models.masks(fresh), models.masks(loaded)) > 100
    state = torch.load(folder / f"{stack}_0.pt")["whole"]
    fresh.load_state_dict(state, strict=False)
    models.assert_same_tensors(models.masks(loaded), models.masks(fresh))
