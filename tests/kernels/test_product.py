"""A masked weight and its gradients in one pass: the numbers of the plain expressions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pemn_surgery import pemnify
from pemn_surgery.coding import bits
from pemn_surgery.kernels import product
from pemn_surgery.kernels.selection import Rule
from pemn_surgery.masks import product as masking
from pemn_surgery.masks.selector import Selector
from tests import oracles
from tests.adapters import models
from tests.kernels.ways import every_compiled, every_way, through

TYPES = [torch.float32, torch.bfloat16]
SIZES = st.one_of(st.integers(1, 70), st.integers(1, 5000), st.just(3 * 1024))
WHERE = {"topk": Selector("topk", 0.4, 0.0), "threshold": Selector("threshold", 0.4, 0.1)}


def words(tensor):
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def drawn(seed, count, dtype):
    """Normal numbers with ties and zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator)
    rounded = torch.rand(count, generator=generator) < 0.3
    return torch.where(rounded, (values * 2).round() / 2, values).to(dtype)


def plain(weight, scores, selector, scaled, dtype):
    """The masked weight as the papers' equations read, one operation after the other."""
    mask = selector.mask(scores)
    kept = weight * mask.to(weight.dtype)
    if scaled:
        kept = kept * (mask.numel() / mask.sum().clamp(min=1).float()).sqrt()
    return kept.to(dtype)


@every_compiled
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", list(WHERE))
def test_the_product(way, name, scaled):
    @given(SIZES, st.integers(0, 99), st.sampled_from(TYPES), st.sampled_from(TYPES), st.data())
    def check(count, seed, of_weight, of_scores, data):
        dtype = data.draw(st.sampled_from([of_weight, torch.bfloat16]), label="dtype")
        period = data.draw(st.integers(1, count), label="period")
        weight, scores = drawn(seed, period, of_weight), drawn(seed + 1, count, of_scores)
        selector = WHERE[name]
        with through(way):
            chosen = product.choose(weight, scores, selector.rule(count), dtype)
            assert chosen is not None
            oracles.assert_same(chosen.mask(), selector.mask(scores))
            ones = torch.tensor(chosen.count())
            assert ones == selector.mask(scores).sum()
            scale = float((count / ones.clamp(min=1).float()).sqrt()) if scaled else None
            made = chosen.product(dtype, scale)
        whole = masking.spread(weight, (count,))
        expected = plain(whole, scores, selector, scaled, dtype)
        oracles.assert_same(words(made), words(expected))

    check()


@every_way
@pytest.mark.parametrize("scaled", [False, True])
def test_the_product_of_bits(way, scaled):
    """Whatever the period, so that blocks begin within bytes; the twin serves every type."""

    @given(SIZES, st.integers(0, 99), st.sampled_from([*TYPES, torch.float16]), st.data())
    def check(count, seed, of_weight, data):
        dtype = data.draw(st.sampled_from([of_weight, torch.bfloat16]), label="dtype")
        period = data.draw(st.integers(1, count), label="period")
        weight = drawn(seed, period, of_weight)
        mask = drawn(seed + 1, count, torch.float32) > data.draw(st.floats(-2, 2), label="above")
        stored = bits.pack(mask)
        with through(way):
            made = masking.masked_by_bits(
                weight, stored, (count,), scaled=scaled, in_place=False, dtype=dtype
            )
            applied = product.choose_bits(weight, stored[bits.HEADER_BYTES :], (count,), dtype)
        assert (applied is None) == (way == "python" or torch.float16 == of_weight)
        if applied is not None:
            assert applied.count() == int(mask.sum())
            oracles.assert_same(applied.mask(), mask)
        whole = masking.spread(weight, (count,))
        kept = whole * mask.to(of_weight)
        if scaled:
            kept = kept * (count / mask.sum().clamp(min=1).float()).sqrt()
        oracles.assert_same(words(made), words(kept.to(dtype)))

    check()


@every_way
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", list(WHERE))
def test_the_gradients(way, name, scaled):
    @given(SIZES, st.integers(0, 99), st.sampled_from(TYPES), st.sampled_from(TYPES), st.data())
    def check(count, seed, of_weight, of_scores, data):
        dtype = data.draw(st.sampled_from([of_weight, torch.bfloat16]), label="dtype")
        period = data.draw(st.integers(1, count), label="period")
        weight = drawn(seed, period, of_weight)
        scores = drawn(seed + 1, count, of_scores).requires_grad_()
        grad, selector = drawn(seed + 2, count, dtype), WHERE[name]
        with through(way):
            made = masking.masked_straight_through(
                weight, scores, selector, scaled=scaled, dtype=dtype
            )
            (found,) = torch.autograd.grad(made, scores, grad)
        whole, values = masking.spread(weight, (count,)), scores.detach()
        expected = plain(whole, values, selector, scaled, dtype)
        oracles.assert_same(words(made.detach()), words(expected))
        through_mask = (grad * whole).to(of_scores)
        sign = values.sign() if name == "topk" else torch.ones_like(values)
        if not scaled:
            oracles.assert_same(words(found), words(through_mask * sign))
            return
        mask = selector.mask(values)
        scale = (count / mask.sum().clamp(min=1).double()).sqrt()
        pull = (through_mask.double() * mask).sum()
        slow = (through_mask.double() * scale - pull * scale**3 / (2 * count)) * sign
        if slow.abs().max() > 0:
            oracles.assert_near(found, slow, 1e-4 if of_scores == torch.float32 else 0.05)

    check()


@every_way
@pytest.mark.parametrize("scaled", [False, True])
def test_a_weight_that_is_trained_too(way, scaled):
    weight = drawn(1, 60, torch.float32).requires_grad_()
    scores = drawn(2, 60, torch.float32).requires_grad_()
    with through(way):
        made = masking.masked_straight_through(weight, scores, WHERE["topk"], scaled=scaled)
        scores.data.neg_()  # the mask of the backward pass is that of the forward
        found = torch.autograd.grad(made, weight, torch.ones(60))[0]
    expected = plain(torch.ones(60), scores.detach(), WHERE["topk"], scaled, torch.float32)
    oracles.assert_same(found, expected)


REFUSED = {
    "no scores": lambda: (torch.ones(0), torch.ones(0), torch.float32),
    "double": lambda: (torch.ones(4).double(), torch.ones(4), torch.float64),
    "half": lambda: (torch.ones(4).half(), torch.ones(4), torch.float16),
    "wider": lambda: (torch.ones(4).bfloat16(), torch.ones(4), torch.float32),
    "strided": lambda: (torch.ones(2, 3).t(), torch.ones(3, 2), torch.float32),
    "meta": lambda: (torch.ones(4, device="meta"), torch.ones(4), torch.float32),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_compiled_code_leaves_to_torch(case):
    weight, scores, dtype = REFUSED[case]()
    assert product.choose(weight, scores, Rule(1), dtype) is None


def test_scaled_gradients_of_narrow_scores_are_left_to_torch():
    tensors = torch.ones(4), torch.ones(4), torch.ones(4).bfloat16()
    assert product.pull(*tensors, scaled=True, in_place=False) is None


# ---- whole models --------------------------------------------------------------------------------


def steps(way, bank, autocast, **options):
    """Three steps of training: what the model said, and its scores."""
    torch.manual_seed(0)
    given = {"rp": {"ratio": 0.05}}.get(bank, {})
    model = pemnify(models.net(), bank=bank, **given, **options)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    said = []
    with through(way):
        for step in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = model(models.images(step))
            said.append(out.detach().clone())
            optimizer.zero_grad()
            out.float().square().sum().backward()
            optimizer.step()
    return said, [p.detach() for n, p in model.named_parameters() if n.endswith("scores")]


@every_compiled
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("selector", ["topk", "threshold"])
@pytest.mark.parametrize("bank", ["mp", "rp", "one_layer", "own"])
def test_models_train_the_same(way, bank, selector, autocast):
    fast, slow = (
        steps(w, bank, autocast, selector=selector, threshold=0.0) for w in (way, "python")
    )
    assert len(fast[1]) == 4
    for one, two in zip(fast[0] + fast[1], slow[0] + slow[1], strict=True):
        oracles.assert_same(one, two)


@every_way
def test_autocast_rounds_what_plain_layers_multiply_with(way):
    """Only there: elsewhere a reader gets the weight's own type."""
    model = pemnify(
        nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4)),
        bank="own",
        selector="topk",
    )
    layer = model.base_model.model[0]
    with through(way):
        exact = layer.weight.detach().clone()
        with torch.autocast("cpu", torch.bfloat16):
            oracles.assert_same(layer.weight.detach(), exact.bfloat16())
        assert layer.weight.dtype == torch.float32
        assert model.merge_and_unload()[0].weight.dtype == torch.float32


@every_compiled
def test_a_repeated_fill_is_never_made(way):
    """Nothing of the weight's size is there during a step but the product and the gradients."""
    model = pemnify(nn.Sequential(nn.Linear(64, 64)), bank="rp", ratio=0.01)
    child = models.mask_layers(model)["0.weight"]
    calls = []
    with through(way), pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking, "spread", lambda *args: calls.append(args))
        model(torch.randn(2, 64)).sum().backward()
    assert calls == []
    assert child.bank.values.numel() < 64
