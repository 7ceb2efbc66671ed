"""accelerate's offload equals the model in memory, to the last bit.

On the CPU as execution device the hooks are as real as on an accelerator: offloaded tensors lie on
meta, and their values come in only while their module runs.
"""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel

from pemn_surgery import pemnify
from pemn_surgery.errors import UnsupportedModelError
from tests.adapters import models
from tests.stacks.fsdp2_worker import BANKS, base, fresh

CPU = torch.device("cpu")
OFFLOADS = {
    "cpu": lambda model, _, buffers: cpu_offload(model, CPU, offload_buffers=buffers),
    "disk": lambda model, folder, buffers: disk_offload(
        model, folder, CPU, offload_buffers=buffers
    ),
}

every_bank = pytest.mark.parametrize("bank", list(BANKS))
every_kind = pytest.mark.parametrize("kind", ["scores", "bits"])
every_offload = pytest.mark.parametrize("offload", list(OFFLOADS))
with_and_without_buffers = pytest.mark.parametrize("buffers", [False, True], ids=["", "buffers"])


@pytest.fixture
def pair(bank, kind, tmp_path):
    """Two equal models: with the scores that they train, or with bits from one file."""
    if kind == "scores":
        return fresh(bank).eval(), fresh(bank).eval()
    fresh(bank).save_pretrained(str(tmp_path / "adapter"))
    first, second = (PeftModel.from_pretrained(base(), str(tmp_path / "adapter")) for _ in "12")
    return first.eval(), second.eval()


def on_meta(tensors):
    return {name for name, tensor in tensors if tensor.is_meta}


def masks_of(model, kind):
    """Names of the tensors that hold masks."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    found = {name for name in named if name.endswith(f".{kind}")}
    assert len(found) == 4
    return found


def assert_same_logits(offloaded, model):
    """Twice: the second pass must not meet what the first has left behind."""
    expected = models.logits(model)
    for _ in range(2):
        models.assert_equal(models.logits(offloaded), expected)
    return expected


@with_and_without_buffers
@every_offload
@every_kind
@every_bank
def test_offloaded_model(bank, kind, offload, buffers, pair, tmp_path):
    model, offloaded = pair
    OFFLOADS[offload](offloaded, str(tmp_path / "disk"), buffers)
    parameters = {name for name, _ in model.named_parameters()}
    persistent = set(model.state_dict()) - parameters
    masks = masks_of(model, kind)
    assert masks <= (parameters if kind == "scores" else persistent)

    def check_places():
        assert on_meta(offloaded.named_parameters()) == parameters
        away = on_meta(offloaded.named_buffers())
        assert away >= persistent if buffers else not away

    check_places()
    expected = assert_same_logits(offloaded, model)
    check_places()
    with model.disable_adapter(), offloaded.disable_adapter():
        unmasked = assert_same_logits(offloaded, model)
    models.assert_differs(unmasked, expected, "without masks")
    models.assert_equal(models.logits(offloaded), expected, "masked again")
    check_places()


@every_kind
@every_bank
def test_one_layer_on_disk(bank, kind, pair, tmp_path):
    """As ``device_map`` of from_pretrained does: one layer is offloaded, the rest stays."""
    model, offloaded = pair
    inner = "base_model.model."
    devices: dict[str, str | int | torch.device] = {
        f"{inner}{name}": CPU for name, _ in base().named_children()
    }
    devices[f"{inner}conv1"] = "disk"
    dispatch_model(offloaded, devices, CPU, offload_dir=str(tmp_path / "disk"), force_hooks=True)
    away = on_meta(offloaded.named_parameters())
    assert away == {name for name, _ in model.named_parameters() if f"{inner}conv1." in name}
    assert away
    assert_same_logits(offloaded, model)
    assert on_meta(offloaded.named_parameters()) == away


@pytest.mark.parametrize("verb", ["merge_and_unload", "unload"])
def test_an_offloaded_model_is_not_merged(verb):
    model = pemnify(torch.nn.Sequential(torch.nn.Linear(4, 4)), bank="rp")
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match=r"0.* is offloaded by accelerate"):
        getattr(model, verb)()


def test_a_bank_does_not_replace_offloaded_weights():
    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    cpu_offload(base, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="offload the result"):
        pemnify(base, bank="rp")
    assert type(base[0]) is torch.nn.Linear
