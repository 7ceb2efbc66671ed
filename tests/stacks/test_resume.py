"""In every training stack, an interrupted and resumed run equals the uninterrupted one."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.adapters import models
from tests.stacks import trainings

pytestmark = [
    pytest.mark.slow,
    models.ignore_peft_on_transformers,
]


@pytest.mark.parametrize("stack", trainings.STACKS)
def test_resumed_equals_uninterrupted(stack, tmp_path):
    whole = trainings.train(stack, tmp_path / "whole")
    assert trainings.train(stack, tmp_path / "parts", stop=trainings.SAVED) is None
    resumed = trainings.train(stack, tmp_path / "parts", resume=True)
    expected = whole.state_dict()
    assert sum(name.endswith(".scores") for name in expected) == 15
    models.assert_same_tensors(resumed.state_dict(), expected)
    files = [tmp_path / part / "final" / models.WEIGHTS_FILE for part in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert_trained(whole, files[0].parent)


def assert_trained(model, folder):
    """The masks have moved, and what was saved gives the same outputs."""
    fresh = trainings.pemnify(trainings.llama(), trainings.masks_config())
    assert models.flips(models.masks(fresh), models.masks(model)) > 100
    assert all("scores" not in name for name in load_file(folder / models.WEIGHTS_FILE))
    ids = models.tokens(7)
    loaded = PeftModel.from_pretrained(trainings.llama(), folder)
    with torch.no_grad():
        found = loaded.eval()(input_ids=ids).logits
        models.assert_equal(found, model.eval()(input_ids=ids).logits)
