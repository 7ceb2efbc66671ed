"""freeze: the same outputs whatever of the weights is in memory."""

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn

from pemn_surgery import freeze, pemnify
from pemn_surgery.coding import bits
from pemn_surgery.errors import ConfigError
from pemn_surgery.kernels import library
from pemn_surgery.kernels.bit_rows import BitRows
from pemn_surgery.kernels.look_up import Packed
from pemn_surgery.masks.freezing import FEW, PackedForward
from tests.adapters import models
from tests.oracles import assert_same

compiled = pytest.mark.skipif(library.kernels() is None, reason="nothing is compiled")
WIDE = {"bank": "rp", "ratio": 0.03, "aligned": True}


class Net(nn.Module):
    """Two linear layers that can be looked up, and a head with too few rows for it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(40, 96), nn.Linear(96, 64, bias=False)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def model_of(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = pemnify(Net().to(dtype), seed=1, **(WIDE | options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scores"):
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


def saved(model, folder):
    model.save_pretrained(str(folder))
    torch.manual_seed(0)
    base = Net().to(next(model.parameters()).dtype)
    return PeftModel.from_pretrained(base, str(folder)).eval()


def looked_up(model, monkeypatch):
    """Which layers look up, by the rows of what was packed."""
    seen = []
    for kind in (Packed, BitRows):

        def watched(packed, inputs, plain=kind.__call__):
            seen.append(packed.count)
            return plain(packed, inputs)

        monkeypatch.setattr(kind, "__call__", watched)
    return seen


@compiled
def test_packed_layers_give_the_outputs_of_dense_ones(tmp_path, monkeypatch):
    model = saved(model_of(), tmp_path)
    x = torch.randn(FEW, 40)
    with torch.no_grad():
        expected = model(x)
        said = freeze(model, "packed")
        assert said == {
            "first.weight": "packed",
            "second.weight": "packed",
            "head.weight": "packed",
        }
        seen = looked_up(model, monkeypatch)
        for inputs in (x, x[:1], x[0], x.view(2, FEW // 2, 40)):
            torch.testing.assert_close(
                model(inputs), expected[: max(inputs.numel() // 40, 1)].view(*inputs.shape[:-1], 5),
                rtol=1e-5, atol=1e-5,
            )  # fmt: skip
        assert seen == [96, 64, 5] * 4
        layers = models.mask_layers(model)
        assert freeze(model, "dense") == dict.fromkeys(said, "dense")
        assert_same(model(x), expected)
        assert freeze(model, "lean") == dict.fromkeys(said, "lean")
        assert_same(model(x), expected)
        assert len(seen) == 12
    assert not any("forward" in layer.owner.__dict__ for layer in layers.values())


@compiled
def test_many_inputs_and_gradients_make_the_weight(tmp_path, monkeypatch):
    model = saved(model_of(), tmp_path)
    x = torch.randn(FEW + 1, 40)
    with torch.no_grad():
        expected = model(x)
    freeze(model)
    seen = looked_up(model, monkeypatch)
    with torch.no_grad():
        assert_same(model(x), expected)
    given = x[:2].clone().requires_grad_()
    model(given).sum().backward()
    assert given.grad.abs().sum() > 0
    assert seen == []


@compiled
def test_training_masks_are_not_looked_up(monkeypatch):
    model = model_of()
    freeze(model)
    seen = looked_up(model, monkeypatch)
    with torch.no_grad():
        model(torch.randn(2, 40))
    assert seen == []


@compiled
def test_adapters_are_switched_edited_and_deleted(tmp_path, monkeypatch):
    first = model_of()
    first.save_pretrained(str(tmp_path / "a"))
    model = saved(model_of(), tmp_path / "one")
    model.load_adapter(str(tmp_path / "a"), "b")
    layers = models.mask_layers(model)
    with torch.no_grad():
        for layer in layers.values():  # the other adapter differs
            layer.mask_of("b").bits.copy_(bits.pack(torch.rand(layer.shape) < 0.3))
    x = torch.randn(2, 40)
    expected = {}
    with torch.no_grad():
        for name in ("default", "b"):
            model.set_adapter(name)
            expected[name] = model(x)
        assert not torch.allclose(*expected.values())
        freeze(model)
        seen = looked_up(model, monkeypatch)
        for name in ("default", "b", "default"):
            model.set_adapter(name)
            torch.testing.assert_close(model(x), expected[name], rtol=1e-5, atol=1e-5)
        assert seen == [96, 64, 5] * 3
        mask = layers["first.weight"].mask_of("default")
        mask.bits.copy_(bits.pack(torch.ones(96, 40, dtype=torch.bool)))
        changed = model(x)
        assert not torch.allclose(changed, expected["default"])
        with model.disable_adapter():
            bare = model(x)
        freeze(model, "dense")
        torch.testing.assert_close(changed, model(x), rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            assert_same(model(x), bare)
        freeze(model)
        model.delete_adapter("b")
        model(x)
    held = layers["first.weight"].owner.__dict__["forward"]
    assert set(held.packed) == {"default"}


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_types(dtype, tmp_path, monkeypatch):
    model = saved(model_of(dtype), tmp_path)
    x = torch.randn(2, 40, dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        freeze(model)
        seen = looked_up(model, monkeypatch)
        found = model(x)
        rows = [96, 64] if dtype is torch.bfloat16 else [96, 64, 5]
        assert (found.dtype, seen) == (dtype, rows)
        rough = {"rtol": 0.05, "atol": 0.05} if dtype is torch.bfloat16 else {}
        torch.testing.assert_close(found, expected, **rough)
        with torch.autocast("cpu", torch.bfloat16):
            halved = model(x)
        assert halved.dtype == torch.bfloat16
        torch.testing.assert_close(halved.float(), expected.float(), rtol=0.05, atol=0.05)
        if dtype is torch.float32:
            with pytest.raises(RuntimeError, match="dtype"):
                model(x.bfloat16())


@compiled
def test_copies_and_merges(tmp_path):
    model = saved(model_of(), tmp_path)
    x = torch.randn(2, 40)
    with torch.no_grad():
        expected = model(x)
        freeze(model)
        other = copy.deepcopy(model)
        mask = models.mask_layers(other)["first.weight"].mask_of("default")
        mask.bits.copy_(bits.pack(torch.zeros(96, 40, dtype=torch.bool)))
        assert not torch.allclose(other(x), expected)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        held = models.mask_layers(other)["first.weight"].owner.__dict__["forward"]
        assert isinstance(held, PackedForward)
        assert held.child is models.mask_layers(other)["first.weight"]
        merged = model.merge_and_unload()
        assert_same(merged(x), expected)


@compiled
@pytest.mark.parametrize("bank", ["mp", "rp", "one_layer"])
def test_banks_of_any_kind_are_packed(bank, tmp_path, monkeypatch):
    model = saved(
        model_of(bank=bank, ratio=0.03 if bank == "rp" else None, aligned=False), tmp_path
    )
    x = torch.randn(3, 40)
    with torch.no_grad():
        expected = model(x)
        assert set(freeze(model).values()) == {"packed"}
        seen = looked_up(model, monkeypatch)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert seen == [96, 64, 5]


def test_own_weights_are_lean():
    assert set(freeze(pemnify(Net(), bank="own")).values()) == {"lean"}


@compiled
def test_what_torch_records_is_the_weight(tmp_path):
    model = saved(model_of(), tmp_path)
    x, other = torch.randn(2, 40), torch.randn(2, 40)
    with torch.no_grad():
        expected = model(other)
        freeze(model)
        traced = torch.jit.trace(model.base_model.model, x, check_trace=False)
        assert "look_up" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(other), expected, rtol=1e-5, atol=1e-5)
        mapped = torch.func.vmap(model.base_model.model)(other)
        torch.testing.assert_close(mapped, expected, rtol=1e-5, atol=1e-5)


def test_without_compiled_code_all_is_lean(monkeypatch):
    monkeypatch.setattr(library, "kernels", lambda: None)
    assert set(freeze(model_of()).values()) == {"lean"}


def test_a_mode_that_there_is_not():
    with pytest.raises(ConfigError, match="needs one of packed, lean, dense"):
        freeze(model_of(), "fast")


def test_other_forms_and_scales_make_the_weight(tmp_path, monkeypatch):
    model = saved(model_of(scale="sqrt_density"), tmp_path)
    x = torch.randn(2, 40)
    with torch.no_grad():
        expected = model(x)
        freeze(model)
        seen = looked_up(model, monkeypatch)
        assert_same(model(x), expected)
    assert seen == []
