"""Fine-tuned checkpoints to adapters, against oracles that go element by element."""

import copy
import json
import pickle
import warnings
from fractions import Fraction

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from pemn_surgery import PemnConfig, from_finetuned, keep_weights, measure_errors, pemnify, plan
from pemn_surgery.adapters.checks import signs_follow
from pemn_surgery.adapters.files.adapter_file import read_adapter_file
from pemn_surgery.adapters.finetuned.convert import nearest_mask, nearest_signs
from pemn_surgery.coding import bits
from pemn_surgery.errors import (
    AlreadyPemnifiedError,
    ArchitectureError,
    ConfigError,
    FinetunedMismatchError,
    FingerprintError,
    MaskNotLoadedError,
    MetaTensorError,
    NothingToMaskError,
    UnsupportedModelError,
)
from pemn_surgery.masks import sign_delta
from pemn_surgery.masks.rows import Rows
from pemn_surgery.planning.roles import rows_of
from tests.adapters import models
from tests.oracles import assert_same

METHODS = ("mask", "sign_delta")
every_method = pytest.mark.parametrize("method", METHODS)


def finetuned_of(model, seed=0, size=0.05):
    """A copy in which every float tensor has moved, statistics included."""
    generator = torch.Generator().manual_seed(4000 + seed)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in twin.state_dict().items():
            if tensor.is_floating_point():
                step = torch.randn(tensor.shape, generator=generator) * size
                tensor.add_(step.abs() if "var" in name else step)
            else:
                tensor.add_(7)
    return twin


def make(method, seed=0, **options):
    base = models.net()
    finetuned = finetuned_of(base, seed)
    return base, finetuned, from_finetuned(copy.deepcopy(base), finetuned, method, **options)


# ------------------------------------------------------------------------------- slow oracles


def mask_oracle(base, finetuned):
    """M = 1 iff |F - W| <= |F|, in exact fractions."""
    pairs = zip(base.flatten().tolist(), finetuned.flatten().tolist(), strict=True)
    kept = [abs(Fraction(f) - Fraction(w)) <= abs(Fraction(f)) for w, f in pairs]
    return torch.tensor(kept, dtype=torch.bool).view(base.shape)


def outputs_of(layer, shape):
    """For every weight (row by row) the output that it belongs to, from what each layer computes.

    A weight belongs to the output channels that change when it is changed.
    """
    kind = type(layer).__name__
    places = [tuple(place) for place in torch.cartesian_prod(*map(torch.arange, shape)).tolist()]
    if kind == "Conv1D":  # transformers: (in, out)
        return [place[1] for place in places]
    if kind.startswith("ConvTranspose"):
        of_group = layer.in_channels // layer.groups
        return [place[0] // of_group * shape[1] + place[1] for place in places]
    if kind == "Experts" and layer.is_transposed:  # (experts, in, out)
        return [place[0] * shape[2] + place[2] for place in places]
    if kind == "Experts":  # (experts, out, in)
        return [place[0] * shape[1] + place[1] for place in places]
    return [place[0] for place in places]


def sign_oracle(base, finetuned, outputs):
    """Signs and scales one by one in double precision."""
    differences = [
        f - w for w, f in zip(base.flatten().tolist(), finetuned.flatten().tolist(), strict=True)
    ]
    signs = [difference > 0 for difference in differences]
    rows = {}
    for output, difference in zip(outputs, differences, strict=True):
        rows.setdefault(output, []).append(abs(difference))
    scales = [sum(rows[output]) / len(rows[output]) for output in sorted(rows)]
    return torch.tensor(signs).view(base.shape), torch.tensor(scales, dtype=torch.float64)


def delta_oracle(weight, signs, scales, outputs):
    """W + s where the sign is one, W - s where it is zero, rounded once to W's type."""
    values = []
    triples = zip(weight.flatten(), signs.flatten().tolist(), outputs, strict=True)
    for value, sign, output in triples:
        scale = scales[output].detach()
        wide = value.to(torch.promote_types(value.dtype, scale.dtype))
        values.append((wide + (scale if sign else -scale)).to(weight.dtype))
    return torch.stack(values).view(weight.shape)


class Experts(nn.Module):
    """A raw weight of three dimensions."""

    def __init__(self, experts, out, inputs, *, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        shape = (experts, inputs, out) if is_transposed else (experts, out, inputs)
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        weight = self.weight if self.is_transposed else self.weight.transpose(1, 2)
        return torch.einsum("bi,eio->beo", x, weight)


def hugging_face_conv1d(out, inputs):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out, inputs)


LAYERS = {
    "linear": lambda: nn.Linear(5, 3),
    "one output": lambda: nn.Linear(5, 1),
    "one input": lambda: nn.Linear(1, 4),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2)),
    "conv2d grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv2d depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, (3, 2)),
    "transposed 1d": lambda: nn.ConvTranspose1d(3, 3, 2),
    "transposed grouped": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "transposed depthwise": lambda: nn.ConvTranspose2d(4, 4, 3, groups=4),
    "Conv1D of transformers": lambda: hugging_face_conv1d(3, 5),
    "square Conv1D of transformers": lambda: hugging_face_conv1d(4, 4),
    "experts": lambda: Experts(2, 3, 5, is_transposed=False),
    "experts transposed": lambda: Experts(2, 3, 5, is_transposed=True),
    "embedding": lambda: nn.Embedding(7, 3),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(LAYERS))
def test_rows_are_the_outputs_of_every_kind_of_layer(kind):
    layer = LAYERS[kind]()
    weight = layer.weight.detach()
    rows = rows_of(layer, tuple(weight.shape))
    outputs = outputs_of(layer, tuple(weight.shape))
    scales = torch.arange(1.0, rows.count + 1)
    assert rows.count == len(set(outputs))
    assert torch.Size(rows.view).numel() == weight.numel()
    spread = rows.spread(scales).expand(rows.view).reshape(-1)
    assert [int(value) - 1 for value in spread] == outputs


def test_rows_of_transposed_convolutions_are_what_they_compute():
    """One weight changed, one output channel changes."""
    layer = nn.ConvTranspose1d(4, 6, 2, groups=2)
    rows = rows_of(layer, tuple(layer.weight.shape))
    outputs = rows.spread(torch.arange(6)).expand(rows.view).reshape(-1)
    x = torch.randn(1, 4, 5)
    before = layer(x).detach()
    for place in range(layer.weight.numel()):
        changed = copy.deepcopy(layer)
        with torch.no_grad():
            changed.weight.view(-1)[place] += 1
        differing = (changed(x) != before).any(dim=2)[0].nonzero().flatten().tolist()
        assert differing == [int(outputs[place])]


def test_rows_of_conditional_convolutions():
    from timm.layers import CondConv2d

    layer = CondConv2d(4, 6, 3, num_experts=2)
    rows = rows_of(layer, tuple(layer.weight.shape))
    assert (rows.count, rows.inner) == (12, 36)


# -------------------------------------------------------------------- the two ways, elementwise

FLOATS = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 32, torch.float64: 64}
dtypes = st.sampled_from(list(FLOATS))
small = st.integers(-6, 6).map(lambda n: n / 4)  # ties and zeros are common among these


@given(
    values=st.lists(st.tuples(small | st.floats(-3, 3), small | st.floats(-3, 3)), min_size=1),
    base_type=dtypes,
    tuned_type=dtypes,
)
def test_mask_is_the_nearest(values, base_type, tuned_type):
    base = torch.tensor([w for w, _ in values]).to(base_type)
    finetuned = torch.tensor([f for _, f in values]).to(tuned_type)
    assert_same(nearest_mask(base, finetuned), mask_oracle(base, finetuned))


def test_mask_ties_keep_the_base():
    base = torch.tensor([0.0, -0.0, 2.0, -2.0, 2.0, 2.0, 0.0])
    finetuned = torch.tensor([3.0, -3.0, 1.0, -1.0, 0.999, -1.0, 0.0])
    assert nearest_mask(base, finetuned).tolist() == [True, True, True, True, False, False, True]


def test_mask_of_the_largest_numbers():
    top = torch.finfo(torch.float32).max
    base = torch.tensor([top, top, -top])
    finetuned = torch.tensor([top, -top, top])
    assert nearest_mask(base, finetuned).tolist() == [True, False, False]


@given(
    kind=st.sampled_from(list(LAYERS)), base_type=dtypes, tuned_type=dtypes, seed=st.integers(0, 99)
)
def test_signs_and_scales_are_the_nearest(kind, base_type, tuned_type, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = LAYERS[kind]()
    shape = tuple(layer.weight.shape)
    base = torch.randn(shape, generator=generator).to(base_type)
    moved = torch.randn(shape, generator=generator) * (torch.rand(shape) > 0.2)  # some stay
    finetuned = (base.float() + moved).to(tuned_type)
    signs, scales = nearest_signs(base, finetuned, rows_of(layer, shape))
    wanted_signs, wanted_scales = sign_oracle(base, finetuned, outputs_of(layer, shape))
    assert_same(signs, wanted_signs)
    assert scales.dtype == torch.float32
    torch.testing.assert_close(scales.double(), wanted_scales, rtol=1e-5, atol=1e-7)


def test_no_other_signs_or_scale_are_nearer():
    """All sign patterns of a row, each with the least-squares scale that is best for it."""
    generator = torch.Generator().manual_seed(5)
    base, finetuned = torch.randn(2, 1, 6, dtype=torch.float64, generator=generator)
    signs, scale = nearest_signs(base, finetuned, Rows(1, 1, 1, 6))
    difference = finetuned - base
    found = (difference - scale * (2 * signs.double() - 1)).norm()
    errors = []
    for pattern in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 6):
        best = (difference @ pattern).clamp(min=0) / 6
        errors += [
            float((difference - (best + step) * pattern).norm()) for step in (0, 1e-3, -1e-3)
        ]
    assert len(errors) == 3 * 64
    assert float(found) <= min(errors) + 1e-7
    left = 6 * ((difference**2).mean() - difference.abs().mean() ** 2)
    torch.testing.assert_close(found**2, left, rtol=1e-6, atol=0)


@given(
    kind=st.sampled_from(list(LAYERS)), base_type=dtypes, scale_type=dtypes, seed=st.integers(0, 99)
)
def test_sign_delta_values(kind, base_type, scale_type, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = LAYERS[kind]()
    shape = tuple(layer.weight.shape)
    rows, outputs = rows_of(layer, shape), outputs_of(layer, shape)
    weight = torch.randn(shape, generator=generator).to(base_type)
    signs = torch.rand(shape, generator=generator) > 0.5
    scales = torch.rand(rows.count, generator=generator).to(scale_type)
    expected = delta_oracle(weight, signs, scales, outputs)
    assert_same(sign_delta.sign_delta(weight, signs, scales, rows), expected)


@given(kind=st.sampled_from(list(LAYERS)), piece=st.integers(1, 50), in_place=st.booleans())
def test_pieces_give_the_same_bits(kind, piece, in_place):
    layer = LAYERS[kind]()
    weight = layer.weight.detach()
    rows = rows_of(layer, tuple(weight.shape))
    signs, scales = torch.rand(weight.shape) > 0.5, torch.rand(rows.count)
    expected = sign_delta.sign_delta(weight, signs, scales, rows)
    before = weight.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sign_delta, "_PIECE", piece)
        patch.setattr(sign_delta, "goes_by_pieces", lambda *_: True)
        stored = bits.pack(signs)
        actual = sign_delta.sign_delta_from_bits(weight, stored, scales, rows, in_place=in_place)
    assert_same(actual, expected)
    assert (actual.data_ptr() == weight.data_ptr()) == in_place
    assert torch.equal(weight, before) or in_place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_weights_go_by_pieces(dtype, monkeypatch):
    weight = torch.randn(1100, 1000).to(dtype)
    rows, signs, scales = Rows(1, 1, 1100, 1000), torch.rand(1100, 1000) > 0.5, torch.rand(1100)
    expected = sign_delta.sign_delta(weight, signs, scales, rows)
    monkeypatch.setattr(sign_delta, "sign_delta", None)  # the other way is not gone
    stored = bits.pack(signs)
    assert_same(
        sign_delta.sign_delta_from_bits(weight, stored, scales, rows, in_place=False), expected
    )


@pytest.mark.parametrize("kind", list(LAYERS))
def test_gradients_are_those_of_autograd(kind):
    layer = LAYERS[kind]()
    shape = tuple(layer.weight.shape)
    rows, outputs = rows_of(layer, shape), outputs_of(layer, shape)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    scales = torch.rand(rows.count, dtype=torch.float64, requires_grad=True)
    signs, upstream = torch.rand(shape) > 0.5, torch.randn(shape, dtype=torch.float64)
    made = sign_delta.sign_delta(weight, signs, scales, rows)
    actual = torch.autograd.grad((made * upstream).sum(), (weight, scales))
    spread = scales[torch.tensor(outputs)].view(shape)
    plain = weight + spread * (2 * signs.double() - 1)
    expected = torch.autograd.grad((plain * upstream).sum(), (weight, scales))
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------- whole models


@every_method
def test_effective_weights_and_other_tensors(method):
    base, finetuned, model = make(method)
    layers = models.mask_layers(model)
    assert set(layers) == set(models.NET_TARGETS)
    for name, layer in layers.items():
        weight, goal = base.state_dict()[name], finetuned.state_dict()[name]
        if method == "mask":
            expected = torch.where(mask_oracle(weight, goal), weight, torch.zeros(()))
        else:
            outputs = outputs_of(nn.Linear(1, 1), tuple(weight.shape))
            signs, scales = sign_oracle(weight, goal, outputs)
            held = layer.mask_of("default").row_scale.detach()
            torch.testing.assert_close(held.double(), scales, rtol=1e-5, atol=1e-8)
            expected = delta_oracle(weight, signs, held, outputs)
        models.assert_equal(layer() + 0.0, expected + 0.0, name)
    inner = model.base_model.model
    others = [n for n, v in finetuned.state_dict().items() if v.is_floating_point()]
    others = [name for name in others if name not in layers]
    assert len(others) == 14
    for name in others:
        path, _, tensor = name.rpartition(".")
        held = getattr(inner.get_submodule(path), tensor)
        models.assert_equal(held.detach(), finetuned.state_dict()[name], name)


def test_a_scaled_mask():
    base, finetuned, model = make("mask", scale="sqrt_density")
    for name, layer in models.mask_layers(model).items():
        weight = base.state_dict()[name]
        mask = mask_oracle(weight, finetuned.state_dict()[name])
        expected = weight * mask * (mask.numel() / mask.sum().float()).sqrt()
        models.assert_equal(layer() + 0.0, expected + 0.0, name)


@every_method
def test_neither_model_loses_its_values(method):
    base = models.net()
    finetuned = finetuned_of(base)
    snapshot, values = models.Snapshot(finetuned), copy.deepcopy(base.state_dict())
    rewritten = copy.deepcopy(base)
    model = from_finetuned(rewritten, finetuned, method)
    snapshot.assert_unchanged()
    models.assert_same_tensors({name: rewritten.state_dict()[name] for name in values}, values)
    with model.disable_adapter():
        models.assert_equal(models.logits(model), models.logits(base))
    models.assert_equal(models.logits(model.unload()), models.logits(base))


@every_method
def test_a_state_dict_does_as_well(method):
    _, finetuned, model = make(method)
    other = from_finetuned(models.net(), dict(finetuned.state_dict()), method)
    models.assert_equal(models.logits(other), models.logits(model))


@every_method
def test_an_unchanged_model_stays_what_it_is(method):
    base = models.net()
    model = from_finetuned(copy.deepcopy(base), copy.deepcopy(base), method)
    assert model.peft_config["default"].carried == []
    models.assert_equal(models.logits(model), models.logits(base))
    found = measure_errors(model, base)
    assert (found.total.error, found.total.relative, found.total.of_difference) == (0.0, 0.0, 0.0)


def test_only_what_differs_travels():
    base = models.net()
    finetuned = copy.deepcopy(base)
    with torch.no_grad():
        finetuned.bn2.bias.add_(1)
        finetuned.head.weight.mul_(0.5)
    model = from_finetuned(copy.deepcopy(base), finetuned, "sign_delta", rest="freeze")
    assert model.peft_config["default"].carried == ["bn2.bias"]
    held = {n for n in model.state_dict() if "pemn_tensors" in n}
    assert held == {"base_model.model.bn2.task_tensors.pemn_tensors.default.bias"}


@models.ignore_peft_on_transformers
def test_embeddings_that_differ_travel():
    """Nothing but carrying would bring them: embeddings are frozen unless everything is trained."""
    base = models.bert()
    finetuned = finetuned_of(base)
    model = from_finetuned(copy.deepcopy(base), finetuned, "sign_delta")
    found = measure_errors(model, finetuned)
    assert found.others > 20
    assert found.others_differing == ()
    name = "bert.embeddings.word_embeddings.weight"
    assert name in model.peft_config["default"].carried
    held = model.base_model.model.bert.embeddings.word_embeddings.weight
    models.assert_equal(held.detach(), finetuned.state_dict()[name])


@models.ignore_peft_on_transformers
@every_method
def test_heads_that_peft_saves_whole(method, tmp_path):
    base = models.bert()
    finetuned = finetuned_of(base)
    model = from_finetuned(copy.deepcopy(base), finetuned, method, task_type="SEQ_CLS")
    assert "classifier.weight" not in models.mask_layers(model)
    assert measure_errors(model, finetuned).others_differing == ()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    run = lambda m: m.eval()(models.tokens()).logits.detach()  # noqa: E731
    models.assert_equal(run(again), run(model))


def test_timm_classifiers_are_saved_whole():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = timm.create_model("resnet18", num_classes=5)
    finetuned = finetuned_of(base, size=0.001)
    model = from_finetuned(base, finetuned, "sign_delta")
    found = measure_errors(model, finetuned)
    assert "fc.weight" not in {row.name for row in found.weights}
    assert found.others_differing == ()
    assert 0.55 < found.total.of_difference < 0.65  # sqrt(1 - 2 / pi) of normal differences


def test_targets_through_the_usual_fields():
    base = models.net()
    finetuned = finetuned_of(base)
    model = from_finetuned(copy.deepcopy(base), finetuned, "mask", target_modules=["conv2"])
    assert set(models.mask_layers(model)) == {"conv2.weight"}
    assert measure_errors(model, finetuned).others_differing == ()
    assert "conv1.weight" in model.peft_config["default"].carried


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.proj = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.proj(self.embed(x)))


@pytest.mark.filterwarnings("ignore::pemn_surgery.errors.LowCoverageWarning")
@every_method
@pytest.mark.parametrize("tied", ["leave", "untie", "both"])
def test_tied_weights(method, tied):
    base = Tied()
    finetuned = finetuned_of(base)
    finetuned.head.weight = finetuned.embed.weight
    for state in (
        finetuned,
        {n: v for n, v in finetuned.state_dict().items() if n != "head.weight"},
    ):
        model = from_finetuned(copy.deepcopy(base), state, method, tied=tied)
        inner = model.base_model.model
        goal = finetuned.embed.weight.detach()
        signs, scales = nearest_signs(base.embed.weight, goal, Rows(1, 1, 6, 4))
        near = (
            base.embed.weight * nearest_mask(base.embed.weight, goal)
            if method == "mask"
            else delta_oracle(
                base.embed.weight.detach(), signs, scales, [i // 4 for i in range(24)]
            )
        )
        expected = {"leave": (goal, goal), "untie": (goal, near), "both": (near, near)}[tied]
        models.assert_equal(inner.embed.weight.detach() + 0.0, expected[0].detach() + 0.0)
        models.assert_equal(inner.head.weight.detach() + 0.0, expected[1].detach() + 0.0)


@pytest.mark.parametrize("base_type", [torch.bfloat16, torch.float16, torch.float64])
@every_method
def test_other_types(method, base_type, tmp_path):
    base = models.net().to(base_type)
    finetuned = finetuned_of(models.net())
    model = from_finetuned(copy.deepcopy(base), finetuned, method)
    found = measure_errors(model, finetuned)
    assert found.others_differing == ()
    assert found.total.of_difference < (1.0 if method == "mask" else 0.7)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    for name, layer in models.mask_layers(again).items():
        assert layer().dtype == base_type
        models.assert_equal(layer(), models.mask_layers(model)[name](), name)


# ------------------------------------------------------------------------------------ life cycle


@every_method
def test_saved_and_loaded_bit_for_bit(method, tmp_path):
    base, finetuned, model = make(method)
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    kinds = {"bits"} if method == "mask" else {"bits", "row_scale"}
    assert {key.rpartition(".")[2] for key in held if ".pemn_masks." in key} == kinds
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    models.assert_equal(models.logits(again), models.logits(model))
    models.assert_same_tensors(
        {n: v for n, v in again.state_dict().items() if "num_batches" not in n},
        {n: v for n, v in model.state_dict().items() if "num_batches" not in n},
    )
    again.save_pretrained(tmp_path / "again")
    models.assert_same_tensors(load_file(tmp_path / "again" / "adapter_model.safetensors"), held)
    assert measure_errors(again, finetuned) == measure_errors(model, finetuned)


def test_bytes_of_the_file_are_those_of_the_plan(tmp_path):
    base, _, model = make("sign_delta")
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    signs = [value.nbytes for key, value in held.items() if key.endswith(".bits")]
    scales = [value.nbytes for key, value in held.items() if key.endswith(".row_scale")]
    assert (len(signs), sum(scales)) == (4, 4 * (8 + 8 + 8 + 4))
    config = PemnConfig.from_pretrained(str(tmp_path))
    planned = plan(base, config)
    assert planned.mask_bytes == sum(signs) + sum(scales)
    assert planned.mask_bytes + planned.other_bytes == sum(value.nbytes for value in held.values())


def test_the_file_is_read_without_a_model(tmp_path):
    _, _, model = make("sign_delta")
    model.save_pretrained(tmp_path)
    file = read_adapter_file(tmp_path / "adapter_model.safetensors")
    assert {name: mask.row_scales for name, mask in file.masks.items()} == {
        name: shape[0] for name, shape in models.NET_TARGETS.items()
    }
    ones = {name: int(mask.sum()) for name, mask in models.masks(model).items()}
    assert file.ones == ones


@every_method
def test_merge_and_unload(method):
    base, _, model = make(method)
    expected = models.logits(model)
    model.merge_adapter()
    models.assert_equal(models.logits(model), expected)
    model.unmerge_adapter()
    models.assert_equal(models.logits(model), expected)
    merged = copy.deepcopy(model).merge_and_unload()
    assert [(n, type(m)) for n, m in merged.named_modules()] == [
        (n, type(m)) for n, m in base.named_modules()
    ]
    models.assert_equal(models.logits(merged), expected)


def two_adapters(tmp_path, first, second, **options):
    """A base with two tasks, and each one's fine-tuned model."""
    base, goals = models.net(), []
    for number, method in enumerate((first, second)):
        goals.append(finetuned_of(base, seed=number))
        made = from_finetuned(copy.deepcopy(base), goals[-1], method, **options)
        made.save_pretrained(tmp_path / f"task{number}")
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "task0", "task0")
    model.load_adapter(tmp_path / "task1", "task1")
    return base, model


@pytest.mark.parametrize("first", METHODS)
@pytest.mark.parametrize("second", METHODS)
def test_switching_and_deleting(first, second, tmp_path):
    base, model = two_adapters(tmp_path, first, second)
    alone = {
        name: models.logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name))
        for name in ("task0", "task1")
    }
    models.assert_differs(alone["task0"], alone["task1"])
    for name in ("task0", "task1", "task0"):
        model.set_adapter(name)
        models.assert_equal(models.logits(model), alone[name], name)
    model.set_adapter("task1")
    model.delete_adapter("task0")
    models.assert_equal(models.logits(model), alone["task1"])


def test_a_task_that_carries_less_reads_the_base(tmp_path):
    """Each task carries what differs in it; what it does not carry is the base's."""
    base = models.net()
    only_head = copy.deepcopy(base)
    with torch.no_grad():
        only_head.head.bias.add_(1)
    from_finetuned(copy.deepcopy(base), finetuned_of(base)).save_pretrained(tmp_path / "all")
    from_finetuned(copy.deepcopy(base), only_head).save_pretrained(tmp_path / "head")
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "all", "all")
    model.load_adapter(tmp_path / "head", "head")
    model.set_adapter("head")
    models.assert_equal(models.logits(model), models.logits(only_head))


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("first", METHODS)
@pytest.mark.parametrize("second", METHODS)
def test_active_together_masks_multiply_and_deltas_add(first, second, tmp_path):
    base, model = two_adapters(tmp_path, first, second)
    chosen = {name: models.masks(model, name) for name in ("task0", "task1")}
    scales = {
        (task, name): layer.mask_of(task).row_scale.detach()
        for name, layer in models.mask_layers(model).items()
        for task, method in (("task0", first), ("task1", second))
        if method == "sign_delta"
    }
    for order in (["task0", "task1"], ["task1", "task0"]):
        model.base_model.set_adapter(order)
        for name, layer in models.mask_layers(model).items():
            outputs = outputs_of(nn.Linear(1, 1), tuple(layer.shape))
            expected = base.state_dict()[name]
            multiplying = [task for task in order if (task, name) not in scales]
            for task in multiplying:
                expected = expected * chosen[task][name]
            for task in order:
                if task not in multiplying:
                    signs = chosen[task][name]
                    expected = delta_oracle(expected, signs, scales[task, name], outputs)
            models.assert_equal(layer().detach() + 0.0, expected + 0.0, name)
        made = {name: layer().detach() + 0.0 for name, layer in models.mask_layers(model).items()}
        for task in order:  # one after the other, and the sum is the same
            model.merge_adapter([task])
        for name, layer in models.mask_layers(model).items():
            torch.testing.assert_close(layer(), made[name], rtol=1e-6, atol=1e-7)
            if first != second:
                models.assert_equal(layer(), made[name], name)
        model.unmerge_adapter()


@every_method
def test_copies_and_pickles(method):
    _, _, model = make(method)
    expected = models.logits(model)
    twin = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if "row_scale" in name:
            parameter.data.zero_()
    models.assert_equal(models.logits(twin), expected)
    models.assert_equal(models.logits(pickle.loads(pickle.dumps(twin))), expected)


@every_method
@pytest.mark.parametrize("is_trainable", [False, True])
def test_compiled_as_one_graph(method, is_trainable):
    _, _, model = make(method, is_trainable=is_trainable)
    model.eval()
    x = models.images(3)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = compiled(x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    if is_trainable:
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 4
        wanted = torch.autograd.grad(expected.square().sum(), trained)
        found = torch.autograd.grad(actual.square().sum(), trained)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_half_precision_after_the_fact():
    _, _, model = make("sign_delta")
    layer = models.mask_layers(model)["conv2.weight"]
    layer()
    model.to(torch.bfloat16)
    mask = layer.mask_of("default")
    outputs = outputs_of(nn.Linear(1, 1), tuple(layer.shape))
    signs = models.masks(model)["conv2.weight"]
    expected = delta_oracle(layer.fill().detach(), signs, mask.row_scale.detach(), outputs)
    models.assert_equal(layer().detach(), expected)


def test_weights_that_are_not_kept():
    _, _, model = make("sign_delta")
    expected = models.logits(model)
    keep_weights(model, False)
    models.assert_equal(models.logits(model), expected)


@models.ignore_peft_on_transformers
def test_transformers_own_door(tmp_path):
    """It puts tensors in place without PEFT's hooks, and there is no local file to look at."""
    base = models.bert()
    model = from_finetuned(copy.deepcopy(base), finetuned_of(base), "sign_delta")
    model.save_pretrained(tmp_path)
    other = copy.deepcopy(base)
    other.load_adapter(str(tmp_path))
    with torch.no_grad():
        expected = model.eval()(models.tokens()).logits
        models.assert_equal(other.eval()(models.tokens()).logits, expected)


# ---------------------------------------------------------------------------- training on from it


def test_scales_are_trained_and_signs_stay():
    base, finetuned, model = make("sign_delta", is_trainable=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"base_model.model.{name.removesuffix('.weight')}.masked_weight.pemn_masks.default.row_scale"
        for name in models.NET_TARGETS
    }
    signs = models.masks(model)
    goal, x = models.logits(finetuned), models.images(99)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    errors = []
    for _ in range(15):
        model.eval()
        optimizer.zero_grad()
        loss = (model(x) - goal).square().mean()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < errors[0] / 2
    assert models.flips(signs, models.masks(model)) == 0
    models.assert_same_tensors(
        {n: layer.fill().detach() for n, layer in models.mask_layers(model).items()},
        {n: base.state_dict()[n] for n in models.NET_TARGETS},
    )


def test_one_effective_weight_serves_two_backward_passes():
    _, _, model = make("sign_delta", is_trainable=True)
    model.eval()
    first, second = model(models.images(1)), model(models.images(2))
    first.sum().backward()
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    second.sum().backward()
    twice = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(once) == len(twice) == 4
    assert all(not torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_scales_written_through_data_are_seen():
    _, _, model = make("sign_delta", is_trainable=True)
    before = models.logits(model)
    for name, parameter in model.named_parameters():
        if name.endswith("row_scale"):
            parameter.data.mul_(3)
    models.assert_differs(models.logits(model), before)


def test_masks_to_train_on_are_scores_that_choose_them():
    _, _, still = make("mask")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, _, model = make("mask", is_trainable=True)
    assert models.flips(models.masks(still), models.masks(model)) == 0
    models.assert_equal(models.logits(model), models.logits(still))
    before = models.masks(model)
    models.train(model, steps=3)
    assert models.flips(before, models.masks(model)) > 10


def test_loading_to_train_scales_on(tmp_path):
    base, _, model = make("sign_delta")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    models.assert_equal(models.logits(again), models.logits(model))
    trained = [name for name, p in again.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all(name.endswith("row_scale") for name in trained)


def test_rest_may_be_trained_too():
    base, _, model = make("sign_delta", is_trainable=True, rest="norms")
    trained = {
        name.rpartition("default.")[2] for name, p in model.named_parameters() if p.requires_grad
    }
    assert trained == {"row_scale", "weight", "bias"}
    assert measure_errors(model, finetuned_of(base)).others_differing == ()


# ----------------------------------------------------------------------------------- the report


@every_method
def test_report_is_what_the_weights_say(method):
    base, finetuned, model = make(method)
    found = measure_errors(model, finetuned)
    assert [row.name for row in found.weights] == list(models.NET_TARGETS)
    squares = [0.0, 0.0, 0.0]
    for row in found.weights:
        goal = finetuned.state_dict()[row.name].double()
        weight = models.mask_layers(model)[row.name]().double()
        parts = goal, goal - base.state_dict()[row.name].double(), goal - weight
        norms = [sum(v * v for v in part.flatten().tolist()) ** 0.5 for part in parts]
        assert [row.norm, row.difference, row.error] == pytest.approx(norms, rel=1e-9)
        assert row.relative == pytest.approx(norms[2] / norms[0], rel=1e-9)
        assert row.of_difference == pytest.approx(norms[2] / norms[1], rel=1e-9)
        assert row.of_difference < 1
        squares = [total + norm**2 for total, norm in zip(squares, norms, strict=True)]
    total = found.total
    assert [total.norm, total.difference, total.error] == pytest.approx([s**0.5 for s in squares])
    told = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert told["total"]["error"] == total.error
    assert told["weights"][0]["shape"] == [8, 3, 3, 3]
    text = str(found)
    models.says(text, "conv1.weight", "total", f"{total.of_difference:.2%}", "differ: none")


def test_report_names_what_else_differs():
    base, finetuned, model = make("mask")
    with torch.no_grad():
        finetuned.bn1.bias.add_(1)
    found = measure_errors(model, finetuned)
    assert found.others_differing == ("bn1.bias",)
    models.says(str(found), "differ: bn1.bias")
    with model.disable_adapter():
        bare = measure_errors(model, finetuned)
    assert bare.total.of_difference == 1.0
    assert len(bare.others_differing) == 14
    assert len(measure_errors(model, base).others_differing) == 14


def test_a_share_of_nothing():
    base = models.net()
    finetuned = copy.deepcopy(base)
    model = from_finetuned(copy.deepcopy(base), finetuned_of(base), "sign_delta")
    row = measure_errors(model, finetuned).weights[0]  # this one is the base: no difference
    assert row.of_difference == float("inf")
    assert row.as_dict()["of_difference"] is None


def test_report_on_another_model_is_refused():
    _, _, model = make("mask")
    with pytest.raises(FinetunedMismatchError) as error:
        measure_errors(model, models.net(channels=4))
    models.says(error, "'conv1.weight'", "(8, 3, 3, 3)", "(4, 3, 3, 3)")
    with pytest.raises(FinetunedMismatchError, match="has none"):
        measure_errors(model, {})


# --------------------------------------------------------------------------------------- errors


def without(model, name):
    return {key: value for key, value in model.state_dict().items() if key != name}


def replaced(model, name, value):
    return {**model.state_dict(), name: value}


NET = models.net()
BAD_STATES = {
    "missing": (without(NET, "bn1.bias"), ("lacks 1 of the base's 21", "'bn1.bias'")),
    "unknown": (
        replaced(NET, "extra.weight", torch.ones(2)),
        ("1 that the base has not", "'extra.weight'"),
    ),
    "shape": (
        replaced(NET, "head.weight", torch.ones(5, 8)),
        ("'head.weight'", "(5, 8)", "(4, 8)"),
    ),
    "kind": (replaced(NET, "bn1.bias", torch.ones(8).long()), ("'bn1.bias'", "torch.int64")),
    "not a tensor": (replaced(NET, "bn1.bias", "text"), ("'bn1.bias'", "no tensor")),
    "nan": (
        replaced(NET, "conv2.weight", torch.full((8, 8, 3, 3), float("nan"))),
        ("576 of the 576 values of the fine-tuned 'conv2.weight'", "NaN"),
    ),
}  # fmt: skip


@every_method
@pytest.mark.parametrize("what", list(BAD_STATES))
def test_refused_states(method, what):
    state, said = BAD_STATES[what]
    base = models.net()
    before = models.Snapshot(base)
    with pytest.raises(FinetunedMismatchError) as error:
        from_finetuned(base, state, method)
    models.says(error, *said, "Nothing was changed")
    before.assert_unchanged()


def test_a_base_that_is_not_finite_is_refused():
    base = models.net()
    with torch.no_grad():
        base.conv3.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(FinetunedMismatchError, match="1 of the 576 values of the base's"):
        from_finetuned(base, models.net())


def test_infinite_buffers_are_no_obstacle():
    base = models.net()
    base.register_buffer("causal", torch.tensor([0.0, float("-inf"), float("nan")]))
    model = from_finetuned(base, copy.deepcopy(base))
    assert set(models.mask_layers(model)) == set(models.NET_TARGETS)


def test_weights_that_only_the_base_ties_are_refused():
    base = Tied()
    state = {**base.state_dict(), "head.weight": torch.randn(6, 4)}
    with pytest.raises(FinetunedMismatchError, match=r"ties 'embed\.weight' and 'head\.weight'"):
        from_finetuned(base, state)


def test_meta_tensors_are_refused():
    with torch.device("meta"):
        empty = models.Net()
    for base, finetuned, whose in ((empty, models.net(), "base"), (models.net(), empty, "fine-")):
        with pytest.raises(MetaTensorError, match=f"of the {whose}"):
            from_finetuned(base, finetuned)


BAD_OPTIONS = [
    ({"method": "prune"}, ("method='prune'", "'mask' or 'sign_delta'")),
    ({"bank": "rp"}, ("bank='rp'", "follows from the method")),
    ({"method": "sign_delta", "scale": "sqrt_density"}, ("scale='sqrt_density'", "own scales")),
    ({"form": "product", "selector": "topk"}, ("form='product'", "selector='topk'")),
    ({"inference_mode": True}, ("inference_mode=True", "is_trainable")),
    ({"carried": []}, ("carried=[]", "follows")),
    ({"rest": "all"}, ("rest='all'", "'train', 'norms', 'stats', 'freeze'")),
    ({"sead": 3}, ("Unknown option sead",)),
]  # fmt: skip


@pytest.mark.parametrize(("options", "said"), BAD_OPTIONS, ids=[str(o) for o, _ in BAD_OPTIONS])
def test_refused_options(options, said):
    base = models.net()
    before = models.Snapshot(base)
    with pytest.raises(ConfigError) as error:
        from_finetuned(base, models.net(1), **options)
    models.says(error, *said)
    before.assert_unchanged()


FORM_OPTIONS = [
    ({"bank": "rp"}, ("form='sign_delta'", "bank='rp'")),
    ({"bank": "own", "bank_init": "kaiming_normal"}, ("bank_init='kaiming_normal'",)),
    (
        {"bank": "own", "selector": "topk", "scale": "sqrt_density"},
        ("scale='sqrt_density'", "its own scales"),
    ),
    ({"bank": "own", "score_init": 0.5}, ("from_finetuned(base, finetuned", "begin alike")),
]


@pytest.mark.parametrize(("options", "said"), FORM_OPTIONS, ids=[str(o) for o, _ in FORM_OPTIONS])
def test_sign_deltas_that_cannot_be_are_refused(options, said):
    model = models.net()
    before = models.Snapshot(model)
    with pytest.raises(ConfigError) as error:
        pemnify(model, form="sign_delta", **options)
    models.says(error, *said)
    before.assert_unchanged()


def test_unknown_forms_are_refused():
    with pytest.raises(
        ConfigError, match=r"form='sum'; it needs one of 'product', 'flip', 'binary', 'sign_delta'"
    ):
        PemnConfig(form="sum")


def test_models_that_cannot_be_rewritten_are_refused():
    _, _, made = make("mask")
    with pytest.raises(AlreadyPemnifiedError):
        from_finetuned(made, models.net())
    with pytest.raises(AlreadyPemnifiedError):
        from_finetuned(models.net(), made)
    with pytest.raises(UnsupportedModelError, match="Got int"):
        from_finetuned(models.net(), 3)
    with pytest.raises(UnsupportedModelError, match="DataParallel"):
        from_finetuned(models.net(), nn.DataParallel(models.net()))
    norms = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(NothingToMaskError):
        from_finetuned(norms, finetuned_of(norms))


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x @ self.weight


def test_graphs_that_read_their_weights_are_refused():
    """A graph does not say of a square weight which dimension the outputs are."""
    traced = torch.fx.symbolic_trace(nn.Sequential(Raw(), nn.Linear(4, 2)))
    before = copy.deepcopy(traced.state_dict())
    with pytest.raises(UnsupportedModelError) as error:
        from_finetuned(traced, finetuned_of(traced), "sign_delta")
    models.says(error, "reads 1 of the 2 weights", "0.weight", "Nothing was changed")
    models.assert_same_tensors(traced.state_dict(), before)
    model = from_finetuned(traced, finetuned_of(traced), "mask")
    assert set(models.mask_layers(model)) == {"0.weight", "1.weight"}


def damaged(tmp_path, change):
    base, _, model = make("sign_delta")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    held = load_file(path)
    change(held)
    save_file(held, path, metadata={"format": "pt"})
    models.forget_digest(tmp_path)
    return base


SCALE = "base_model.model.conv2.masked_weight.pemn_masks.row_scale"


def test_files_that_do_not_fit_are_refused(tmp_path):
    changes = {
        "lost": lambda held: held.pop(SCALE),
        "short": lambda held: held.update({SCALE: torch.ones(3)}),
        "stray": lambda held: held.update({SCALE.replace("conv2", "conv9"): torch.ones(3)}),
    }
    said = {"lost": "conv2.weight", "short": "3 row scales", "stray": "row_scale"}
    for name, change in changes.items():
        base = damaged(tmp_path / name, change)
        before = models.Snapshot(base)
        with pytest.raises(ArchitectureError) as error:
            PeftModel.from_pretrained(base, tmp_path / name)
        models.says(error, said[name])
        if name != "stray":
            before.assert_unchanged()


def test_loads_into_an_existing_adapter_are_checked(tmp_path):
    """`load_adapter` under a name that is there, and set_peft_model_state_dict, skip the file."""
    from peft import set_peft_model_state_dict

    _, _, model = make("sign_delta")
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    before = models.logits(model)
    for wrong in ({**held, SCALE: torch.ones(3)}, {k: v for k, v in held.items() if k != SCALE}):
        with pytest.raises(ArchitectureError, match=r"conv2\.weight"):
            set_peft_model_state_dict(model, wrong)
        models.assert_equal(models.logits(model), before)


def test_another_base_is_refused(tmp_path):
    for method in METHODS:
        _, _, model = make(method)
        model.save_pretrained(tmp_path / method)
        with pytest.raises(FingerprintError):
            PeftModel.from_pretrained(models.net(1), tmp_path / method)


def test_signs_that_never_came_are_an_error_when_used():
    config = PemnConfig(bank="own", form="sign_delta", score_init=0.5, inference_mode=True)
    with signs_follow():
        model = pemnify(models.net(), config)
    with pytest.raises(MaskNotLoadedError, match=r"conv1\.weight"):
        model(models.images())
