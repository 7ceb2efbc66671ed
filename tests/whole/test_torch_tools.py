"""torch's own tools on a pemnified model: copies, casts, state dicts, compile, export, pickle."""

import copy
import io

import pytest
import timm
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.func import functional_call

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.coding import bits
from pemn_surgery.coding.header import HEADER_BYTES
from pemn_surgery.masks.kept import one_forward
from tests import oracles
from tests.adapters import models
from tests.adapters.models import BANKS, SHARED

every_bank = pytest.mark.parametrize("bank", list(BANKS))
ignore_jit = pytest.mark.filterwarnings(  # it takes numbers of weights for constants, as they are
    "ignore:`torch.jit:FutureWarning", "ignore:Converting a tensor to a Python integer"
)
shared_banks = pytest.mark.parametrize("bank", SHARED)


def trained(bank, **changes):
    return models.train(pemnify(models.net(), **{**BANKS[bank], **changes}))


def bank_storages(model):
    layers = models.mask_layers(model).values()
    assert len(layers) == 4
    assert all(layer.bank is not None for layer in layers)
    return {layer.bank.values.untyped_storage().data_ptr() for layer in layers}


def bank_of(model):
    return next(iter(models.mask_layers(model).values())).bank


@shared_banks
def test_bank_is_one_storage(bank):
    model = trained(bank)
    count = bank_of(model).layout.floats
    for change, size in [
        (lambda m: m, 4), (lambda m: m.to(torch.float64), 8), (lambda m: m.half(), 2),
        (copy.deepcopy, 2), (lambda m: m.to(torch.bfloat16), 2), (lambda m: m.float(), 4),
        (lambda m: m.to("cpu"), 4), (lambda m: m.share_memory(), 4),
    ]:  # fmt: skip
        model = change(model)
        assert len(bank_storages(model)) == 1
        assert len({id(layer.bank) for layer in models.mask_layers(model).values()}) == 1
        assert bank_of(model).values.untyped_storage().nbytes() == count * size
        assert not any("bank" in key for key in model.state_dict())
    expected = trained(bank)
    assert count == bank_of(expected).values.numel()


@shared_banks
def test_fills_are_views_unless_tiled(bank):
    model = trained(bank)
    storage = bank_of(model).values.untyped_storage().data_ptr()
    shared = {
        name for name, layer in models.mask_layers(model).items()
        if layer.fill().untyped_storage().data_ptr() == storage
    }  # fmt: skip
    assert shared == (set() if bank in ("rp", "rp_aligned") else set(models.NET_TARGETS))


@every_bank
def test_deepcopy_is_independent(bank):
    model = trained(bank)
    expected, tensors = models.logits(model), dict(model.state_dict())
    other = copy.deepcopy(model)
    models.assert_same_tensors(other.state_dict(), tensors)
    models.assert_equal(models.logits(other), expected)
    pointers = {value.data_ptr() for value in tensors.values() if value.numel()}
    assert not pointers & {v.data_ptr() for v in other.state_dict().values() if v.numel()}
    models.train(other, 3, steps=3)
    models.assert_differs(models.logits(other), expected)
    models.assert_equal(models.logits(model), expected)
    assert type(other.base_model.model.conv1) is type(model.base_model.model.conv1)
    if bank in SHARED:
        assert not bank_storages(model) & bank_storages(other)


@every_bank
def test_pickle(bank):
    model = trained(bank)
    expected = models.logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    models.assert_equal(models.logits(other), expected)
    models.assert_same_tensors(other.state_dict(), model.state_dict())
    models.assert_equal(models.logits(other.merge_and_unload()), expected)


@every_bank
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_cast_keeps_masks_and_casts_weights(bank, dtype):
    model = trained(bank)
    chosen = models.masks(model)
    weights = {
        name: layer.fill().detach().clone() for name, layer in models.mask_layers(model).items()
    }
    model.to(dtype)
    for name, layer in models.mask_layers(model).items():
        assert layer.read().dtype == dtype
        models.assert_equal(layer.fill().detach(), weights[name].to(dtype), name)
    output = models.logits(model, models.images(5).to(dtype))
    assert output.dtype == dtype
    if dtype == torch.float64:  # narrower scores may tie; wider ones choose the same
        models.assert_same_tensors(models.masks(model), chosen)


@every_bank
def test_cast_of_bits_keeps_them(bank, tmp_path):
    from peft import PeftModel

    trained(bank).save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(models.net(), str(tmp_path))
    chosen = models.masks(model)
    for dtype in (torch.float16, torch.float64):
        model.to(dtype)
        stores = [layer.mask_of("default").store for layer in models.mask_layers(model).values()]
        assert {store.dtype for store in stores} == {torch.uint8}
        models.assert_same_tensors(models.masks(model), chosen)


@every_bank
def test_half_and_back_gives_the_rounded_model(bank):
    model = trained(bank, selector="threshold", scale=None)  # a scale rounds once more
    plain = copy.deepcopy(model).merge_and_unload().half().float()
    model.half().float()
    models.assert_equal(models.logits(model), models.logits(plain))


@every_bank
def test_state_dict_round_trip(bank):
    model = trained(bank)
    saved = copy.deepcopy(model.state_dict())
    expected = models.logits(model)
    models.train(model, 4, steps=4)
    models.assert_differs(models.logits(model), expected)
    result = model.load_state_dict(saved)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    models.assert_equal(models.logits(model), expected)
    other = pemnify(models.net(6), **BANKS[bank])
    other.load_state_dict(saved)
    models.assert_same_tensors(other.state_dict(), saved)
    models.assert_equal(models.logits(other), expected)


@every_bank
def test_base_keys_are_kept(bank):
    wanted = set(models.net().state_dict())
    model = pemnify(models.net(), **BANKS[bank]).base_model.model
    added = {key for key in model.state_dict() if "masked_" in key or "task_tensors" in key}
    assert added
    gone = set() if bank not in SHARED else set(models.NET_TARGETS)
    assert set(model.state_dict()) - added == wanted - gone


@pytest.mark.slow
@pytest.mark.parametrize("bank", ["rp", "own_generated"])  # tiled; scaled on own weights
def test_compile_fullgraph(bank):
    torch._dynamo.reset()
    model = trained(bank)
    model.eval()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="eager")
    x = models.images(3)
    with torch.no_grad():
        models.assert_equal(compiled(x), model(x))
    names = [name for name, p in model.named_parameters() if p.requires_grad and "scores" in name]
    assert len(names) == 4
    found = []
    for run in (compiled, model):
        model.zero_grad()
        run(x).square().sum().backward()
        found.append({name: model.get_parameter(name).grad.clone() for name in names})
    for name in names:
        torch.testing.assert_close(*(grads[name] for grads in found), rtol=1e-5, atol=1e-6)
        assert found[0][name].abs().max() > 0


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    base = nn.Sequential(nn.Linear(5, 6))
    model = pemnify(base, bank="mp", scale="sqrt_density").eval()
    x = torch.randn(4, 5)
    with torch.no_grad():
        actual = torch.compile(model.base_model.model, fullgraph=True)(x)
        torch.testing.assert_close(actual, model(x), rtol=1e-5, atol=1e-6)


def bits_in_place_of_scores(model):
    for layer in models.mask_layers(model).values():
        mask = layer.mask_of("default")
        mask.bits, mask.scores = bits.pack(mask.mask()), None
    return model


@ignore_jit
@pytest.mark.parametrize("grad_mode", [True, False])
@every_bank
def test_jit_trace_follows_the_scores(bank, grad_mode):
    """A kept weight would be a constant of the trace; what is traced is how a weight is made."""
    model = trained(bank).base_model.model.eval()
    x = models.images(3)
    models.logits(model, x)
    model(x)  # weights are kept now
    with torch.set_grad_enabled(grad_mode):
        traced = torch.jit.trace(model, x)
    before = traced(x)
    oracles.assert_near(before, model(x), 1e-6)
    with torch.no_grad():
        for layer in models.mask_layers(model).values():
            scores = layer.mask_of("default").scores
            scores.copy_(scores.flip(0) * 0.5)
    oracles.assert_near(traced(x), model(x), 1e-6)
    models.assert_differs(traced(x), before)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    grads = []
    for run in (traced, model):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append({n: model.get_parameter(n).grad.clone() for n in names})
    for name in names:
        oracles.assert_near(grads[0][name], grads[1][name], 1e-4)


@ignore_jit
@pytest.mark.parametrize("grad_mode", [True, False])
@every_bank
def test_jit_trace_follows_the_bits(bank, grad_mode):
    model = bits_in_place_of_scores(trained(bank)).base_model.model.eval()
    x = models.images(3)
    model(x)
    with torch.set_grad_enabled(grad_mode):
        traced = torch.jit.trace(model, x)
    before = traced(x)
    oracles.assert_near(before, model(x), 1e-6)
    stored = io.BytesIO()
    torch.jit.save(traced, stored)
    with torch.no_grad():
        for layer in models.mask_layers(model).values():
            mask = layer.mask_of("default")
            mask.bits.copy_(bits.pack(~mask.mask()))
    oracles.assert_near(traced(x), model(x), 1e-6)
    models.assert_differs(traced(x), before)
    stored.seek(0)
    oracles.assert_near(torch.jit.load(stored)(x), before, 1e-6)


@ignore_jit
def test_jit_trace_breaks_ties_of_later_scores():
    """No tie when it was traced, ties afterwards: still the exact number of ones."""
    model = trained("own").base_model.model.eval()
    traced = torch.jit.trace(model, models.images(3))
    with torch.no_grad():
        for layer in models.mask_layers(model).values():
            layer.mask_of("default").scores.fill_(1.0)
    oracles.assert_near(traced(models.images(3)), models.logits(model, models.images(3)), 1e-6)


@pytest.mark.parametrize("kind", ["scores", "bits"])
@every_bank
def test_export_of_the_unmerged_model_follows_its_masks(bank, kind):
    model = trained(bank)
    model = bits_in_place_of_scores(model) if kind == "bits" else model
    model, x = model.base_model.model.eval(), models.images(3)
    expected = models.logits(model, x)
    program = torch.export.export(model, (x,), strict=False).module()
    oracles.assert_near(program(x), expected, 1e-6)
    state = dict(program.state_dict())
    held = [name for name in state if name.endswith(f".{kind}")]
    assert len(held) == 4
    with torch.no_grad():
        for name in held:
            if kind == "scores":
                state[name].copy_(state[name].flip(0) * 0.5)
            else:
                state[name][HEADER_BYTES:].bitwise_not_()
        models.assert_differs(program(x), expected)


def test_recording_takes_nothing_kept():
    """make_fx sees operations alone: a kept weight would be a constant of its graph."""
    from torch.fx.experimental.proxy_tensor import make_fx

    model = trained("own_generated").base_model.model.eval()
    x = models.images(3)
    params = dict(model.named_parameters())
    model(x)
    graph = make_fx(lambda params, x: functional_call(model, params, (x,)))(params, x)
    other = {n: p.flip(0) if n.endswith("scores") else p for n, p in params.items()}
    expected = functional_call(model, other, (x,))
    models.assert_differs(expected, model(x))
    oracles.assert_near(graph(other, x), expected, 1e-6)


def test_fake_tensors_leave_no_weight_behind():
    model = trained("rp").base_model.model.eval()
    x = models.images(3)
    expected = models.logits(model, x)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert isinstance(model(torch.empty(x.shape)), FakeTensor)
    models.assert_equal(models.logits(model, x), expected)


@every_bank
def test_export_of_the_merged_model(bank):
    merged = trained(bank).merge_and_unload().eval()
    x = models.images(3)
    program = torch.export.export(merged, (x,))
    assert set(program.state_dict) == set(merged.state_dict())
    models.assert_equal(program.module()(x), models.logits(merged, x))


def test_functional_uses_of_the_weight():
    """timm's weight-standardised convolutions and attention read ``self.weight`` themselves."""
    for name, options in [("test_nfnet", {}), ("test_vit", {"img_size": 32})]:
        base = timm.create_model(name, num_classes=4, **options)
        with torch.no_grad():
            for key, value in base.named_parameters():  # zero gains would hide whole branches
                value.fill_(0.5) if "gain" in key else None
        model = pemnify(base, bank="rp").eval()
        x = models.images(2, count=2, size=32)
        expected = models.logits(model, x)
        with model.disable_adapter():
            models.assert_differs(models.logits(model, x), expected)
        layers = models.mask_layers(model)
        assert len(layers) > 4
        for target, layer in layers.items():  # every mask must matter to the output
            scores = layer.mask_of("default").scores
            kept = scores.detach().clone()
            with torch.no_grad():
                scores.neg_().reciprocal_()  # the smallest become the largest
            assert not torch.equal(models.logits(model, x), expected), target
            with torch.no_grad():
                scores.copy_(kept)
        models.assert_equal(models.logits(model, x), expected)


def test_kept_weight_follows_every_change():
    """The effective weight is kept between reads; no change of its sources may be missed."""
    model = trained("own")
    layer = models.mask_layers(model)["conv2.weight"]
    scores = layer.mask_of("default").scores
    conv = model.base_model.model.conv2
    changes = [
        lambda: scores.data.mul_(torch.linspace(0.1, 3, scores.numel()).view_as(scores)),
        lambda: scores.data.copy_(scores.flip(0)),
        lambda: layer.own_weight().data.add_(1.0),
        lambda: model.load_state_dict(
            pemnify(models.net(4), bank="own", selector="topk").state_dict()
        ),
    ]
    for place, change in enumerate(changes):
        with torch.no_grad():
            change()
            mask = models.masks(model)["conv2.weight"]
            expected = torch.where(mask, layer.own_weight(), torch.zeros(())) + 0.0
            models.assert_equal(conv.weight + 0.0, expected, f"change {place}")


def test_weight_is_computed_once_per_step():
    model = trained("rp")
    with one_forward():
        first = model.base_model.model.conv1.weight
        assert model.base_model.model.conv1.weight is first
        assert isinstance(model.base_model.model.conv1, nn.Conv2d)
        model.add_adapter("b", PemnConfig(**BANKS["rp"]))
        model.set_adapter("b")
        assert model.base_model.model.conv1.weight is not first
