"""A model of several dtypes over one bank: every masked weight has the type that its layer had."""

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn

from pemn_surgery import pemnify
from pemn_surgery.masks.attached import find_masked
from tests.adapters import models

SHARED = {name: models.BANKS[name] for name in models.SHARED}
FROM_MODEL = {
    "mp, own numbers": {"bank": "mp", "bank_init": "model"},
    "one_layer, own numbers": {"bank": "one_layer", "bank_init": "model"},
}
ALL = {**models.BANKS, **FROM_MODEL}
BF, F32, F16 = torch.bfloat16, torch.float32, torch.float16
NAMES = ["0", "1", "2"]


class Chain(nn.Sequential):
    """Three Linear layers, each fed in its own dtype, as mixed models do."""

    def forward(self, x):
        for layer in self:
            x = layer(x.to(layer.weight.dtype))
        return x


def chain(*dtypes):
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)]
    model = Chain(*layers)
    for layer, dtype in zip(layers, dtypes, strict=True):
        layer.to(dtype)
    return model


def inputs():
    return torch.linspace(-1, 1, 40).view(5, 8)


def dtypes(model):
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return [layer.weight.dtype for layer in inner]


def shake(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in models.mask_layers(model).values():
            scores = layer.pemn_masks["default"].scores
            scores.copy_(torch.randn(scores.shape, generator=generator))
    return model


def fills(model):
    return [find_masked(layer, "weight").fill() for layer in model.get_base_model()]


@pytest.mark.parametrize("kinds", [(BF, BF, F32), (F16, F32, F16), (BF, F16, BF), (F32, F32, F32)])
@pytest.mark.parametrize("name", ALL)
def test_every_weight_keeps_its_layers_type(name, kinds):
    """The fill is what a float32 model has there, rounded once; so is what comes of it."""
    wide = chain(*kinds)
    for layer in wide:
        layer.float()  # its values, rounded as in the model
    wide = shake(pemnify(wide, **ALL[name]))
    model = shake(pemnify(chain(*kinds), **ALL[name]))
    assert dtypes(model) == list(kinds)
    for fill, expected, kind in zip(fills(model), fills(wide), kinds, strict=True):
        models.assert_equal(fill.detach(), expected.detach().to(kind))
    for layer, fill in zip(model.get_base_model(), fills(model), strict=True):
        mask = models.mask_of_layer(find_masked(layer, "weight"), "default")
        scale = 2**0.5 if name == "own_generated" else 1
        models.assert_equal(layer.weight.detach(), fill.detach() * mask * scale)
    model(inputs()).float().sum().backward()
    for layer in models.mask_layers(model).values():
        assert float(layer.pemn_masks["default"].scores.grad.abs().sum()) > 0
    expected = model(inputs()).detach()
    merged = copy.deepcopy(model).merge_and_unload()
    assert dtypes(merged) == list(kinds)
    models.assert_equal(merged(inputs()).detach(), expected)
    restored = model.unload()
    assert dtypes(restored) == list(kinds)


@pytest.mark.parametrize("name", SHARED)
def test_one_bank_of_the_type_that_holds_all(name):
    def banks(*kinds):
        model = pemnify(chain(*kinds), **SHARED[name])
        found = {id(m.bank): m.bank for m in models.mask_layers(model).values()}
        assert len(found) == 1
        return next(iter(found.values())).values

    assert banks(BF, BF, F32).dtype == F32
    assert banks(BF, F16, BF).dtype == F32
    assert banks(BF, BF, BF).dtype == BF
    models.assert_equal(banks(BF, BF, F32), banks(F32, F32, F32))
    models.assert_equal(banks(F16, F16, F16), banks(F32, F32, F32).half())


CASTS = {
    "all to bfloat16": (lambda m: m.to(BF), [BF, BF, BF], BF),
    "all to float64": (lambda m: m.double(), [torch.float64] * 3, torch.float64),
    "all to half and back": (lambda m: m.half().float(), [F32] * 3, F32),
    "the head to bfloat16": (lambda m: m.get_base_model()[2].to(BF), [BF, BF, BF], BF),
    "the body to half": (lambda m: m.get_base_model()[0].half(), [F16, BF, F32], F32),
    "the body to float32": (lambda m: m.get_base_model()[:2].float(), [F32] * 3, F32),
    "to the same device": (lambda m: m.to("cpu"), [BF, BF, F32], F32),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", SHARED)
def test_casts_reach_what_they_name(name, cast):
    """Types as in a plain model; values are the bank's, rounded to the layer's present type."""
    model = shake(pemnify(chain(BF, BF, F32), **SHARED[name]))
    wide = [fill.clone() for fill in fills(pemnify(chain(F32, F32, F32), **SHARED[name]))]
    masks = list(models.masks(model).values())
    move, expected, of_bank = CASTS[cast]
    move(model)
    assert dtypes(model) == expected
    assert [layer.bias.dtype for layer in model.get_base_model()] == expected
    held = next(iter(models.mask_layers(model).values())).bank.values
    assert held.dtype == of_bank
    assert {id(layer.bank.values) for layer in models.mask_layers(model).values()} == {id(held)}
    for fill, values, kind in zip(fills(model), wide, expected, strict=True):
        once = values.half() if "back" in cast else values
        models.assert_equal(fill, once.to(kind))
    for layer, fill, mask in zip(model.get_base_model(), fills(model), masks, strict=True):
        models.assert_equal(layer.weight.detach(), fill.detach() * mask)


@pytest.mark.parametrize("how", ["deepcopy", "deepcopy of a cast"])
@pytest.mark.parametrize("name", SHARED)
def test_a_copy_has_its_own_types(name, how):
    model = shake(pemnify(chain(BF, BF, F32), **SHARED[name]))
    before = model(inputs()).detach()
    twin = copy.deepcopy(model)
    models.assert_equal(twin(inputs()).detach(), before)
    twin.half()
    assert dtypes(twin) == [F16] * 3
    assert next(iter(models.mask_layers(twin).values())).bank.values.dtype == F16
    assert dtypes(model) == [BF, BF, F32]
    models.assert_equal(model(inputs()).detach(), before)


@pytest.mark.parametrize("target", [(BF, BF, F32), (F32, F32, F32), (F16, F16, F16)])
@pytest.mark.parametrize("name", ALL)
def test_an_adapter_goes_to_a_model_of_other_types(name, target, tmp_path):
    """Equal to an adapter with the same masks that was made there."""
    if name in ("own", *FROM_MODEL) and target == (F16, F16, F16):
        pytest.skip("other numbers: float16 holds what bfloat16 rounds away")
    model = shake(pemnify(chain(BF, BF, F32), **ALL[name]))
    masks = models.masks(model)
    model.save_pretrained(tmp_path)
    base = chain(BF, BF, F32)
    for layer, kind in zip(base, target, strict=True):
        layer.to(kind)
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    assert dtypes(loaded) == list(target)
    models.assert_same_tensors(models.masks(loaded), masks)
    for layer, fill in zip(loaded.get_base_model(), fills(loaded), strict=True):
        mask = models.mask_of_layer(find_masked(layer, "weight"), "default")
        scale = 2**0.5 if name == "own_generated" else 1
        models.assert_equal(layer.weight.detach(), fill.detach() * mask * scale)
    loaded.load_adapter(str(tmp_path), "again")
    loaded.set_adapter("again")
    assert dtypes(loaded) == list(target)


@models.ignore_peft_on_transformers
@pytest.mark.parametrize("name", SHARED)
def test_t5_keeps_its_float32_projections(name):
    """T5 in float16 keeps ``wo`` in float32, since its products overflow."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    t5 = T5ForConditionalGeneration(config).bfloat16()
    for path, module in t5.named_modules():
        if path.endswith(".wo"):
            module.float()
    before = {name: parameter.dtype for name, parameter in t5.named_parameters()}
    assert set(before.values()) == {BF, F32}
    model = pemnify(t5, **SHARED[name], exclude_modules=["lm_head"])
    layers = models.mask_layers(model)
    assert sum(name.endswith(".wo.weight") for name in layers) == 2
    for target, layer in layers.items():
        assert layer.owner.weight.dtype == before[target], target
    ids = torch.arange(6).view(1, 6)
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)
    merged = model.merge_and_unload()
    assert {name: parameter.dtype for name, parameter in merged.named_parameters()} == before
