"""The effective weight: values and gradients against autograd on float masks; when it is kept."""

import copy
import pickle

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.coding import bits
from pemn_surgery.errors import MaskNotLoadedError
from pemn_surgery.masks.adapter_mask import AdapterMask
from pemn_surgery.masks.kept import one_forward
from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.masks.product import masked
from pemn_surgery.masks.selector import Selector
from pemn_surgery.surgery import operate
from tests import oracles

TOPK = Selector("topk", 0.5, 0.0)
THRESHOLD = Selector("threshold", 0.5, 0.25)
SELECTORS = {"topk": TOPK, "threshold": THRESHOLD}
SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5)


def choose(selector, scores):
    if selector.name == "topk":
        return oracles.topk(scores, selector.density)
    return oracles.threshold(scores, selector.threshold)


def layer_with(weight, *masks):
    """A Linear-like owner of ``weight`` under masks named a0, a1, ..."""
    owner = nn.Linear(1, 1, bias=False)
    owner.weight = nn.Parameter(weight, requires_grad=False)
    child = MaskedWeight(owner, "net.fc.weight", "weight", tuple(weight.shape), 1, None)
    for place, mask in enumerate(masks):
        child.pemn_masks[f"a{place}"] = mask
    operate.mask_parameter(child)
    return owner


def trained(scores, selector=TOPK, scaled=False):
    shape = tuple(scores.shape)
    return AdapterMask("net.fc.weight", shape, selector, scaled=scaled, scores=scores)


def stored(mask, selector=TOPK, scaled=False):
    shape = tuple(mask.shape)
    return AdapterMask("w", shape, selector, scaled=scaled, stored=bits.pack(mask))


def random(shape, seed, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


# ---- values -----------------------------------------------------------------------------------


@given(SHAPES, st.integers(0, 99), st.sampled_from(["topk", "threshold"]), st.booleans())
def test_effective_weight(shape, seed, name, scaled):
    """W M, or W M / sqrt(mean(M)), element by element."""
    weight, scores = random(shape, seed), random(shape, seed + 1)
    layer = layer_with(weight, trained(scores.clone(), SELECTORS[name], scaled))
    mask = choose(SELECTORS[name], scores)
    flags = mask.reshape(-1).tolist()
    density = max(sum(flags), 1) / len(flags)
    factor = density**-0.5 if scaled else 1.0
    pairs = zip(weight.reshape(-1).tolist(), flags, strict=True)
    expected = torch.tensor([w * factor if m else 0.0 for w, m in pairs]).view(shape)
    oracles.assert_near(layer.weight, expected, 3e-7)
    if not scaled:
        oracles.assert_same(layer.weight.detach(), expected)
    assert (layer.weight.detach() != 0).sum() == sum(flags)


def test_a_mask_without_ones_is_zero_not_nan():
    weight = masked(torch.ones(3, 4), torch.zeros(3, 4, dtype=torch.bool), scaled=True)
    assert weight.tolist() == [[0.0] * 4] * 3
    scores = torch.full((3, 4), -1.0)
    layer = layer_with(torch.ones(3, 4), trained(scores, THRESHOLD, scaled=True))
    layer.weight.sum().backward()
    assert layer.masked_weight.pemn_masks["a0"].scores.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_weight_keeps_its_dtype(dtype, scaled):
    weight, scores = random((6, 5), 0, dtype), random((6, 5), 1)
    layer = layer_with(weight, trained(scores, TOPK, scaled))
    mask = oracles.topk(scores, 0.5)
    factor = (float(mask.sum()) / 30) ** -0.5 if scaled else 1.0
    assert layer.weight.dtype == dtype
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-7}[dtype]
    oracles.assert_near(layer.weight, weight.double() * mask * factor, tolerance)


@given(SHAPES, st.integers(0, 99), st.booleans())
def test_bits_serve_like_scores(shape, seed, scaled):
    weight, scores = random(shape, seed), random(shape, seed + 1)
    by_scores = layer_with(weight, trained(scores, TOPK, scaled))
    by_bits = layer_with(weight, stored(oracles.topk(scores, 0.5), TOPK, scaled))
    oracles.assert_same(by_bits.weight, by_scores.weight.detach())
    assert not by_bits.weight.requires_grad


# ---- gradients --------------------------------------------------------------------------------


@given(
    SHAPES,
    st.integers(0, 99),
    st.sampled_from(["topk", "threshold"]),
    st.booleans(),
    st.integers(1, 3),
)
def test_straight_through_gradients(shape, seed, name, scaled, adapters):
    """One, two or three active adapters: AND of the masks, every score with its own gradient."""
    selector = SELECTORS[name]
    weight, upstream = random(shape, seed, torch.float64), random(shape, seed + 9, torch.float64)
    scores = [random(shape, seed + 1 + place, torch.float64) for place in range(adapters)]
    masks = [choose(selector, score) for score in scores]
    if scaled and not all(mask.any() for mask in masks):
        return  # the paper's factor is not defined
    layer = layer_with(weight, *[trained(s.clone(), selector, scaled) for s in scores])
    expected, grads = oracles.ste_grads(
        weight, scores, masks, upstream, selector.uses_magnitude, scaled
    )
    effective = layer.weight
    (effective * upstream).sum().backward()
    oracles.assert_near(effective, expected, 1e-6)  # the factor itself is a float32
    held = [layer.masked_weight.pemn_masks[f"a{place}"].scores for place in range(adapters)]
    assert len(held) == adapters
    for parameter, grad in zip(held, grads, strict=True):
        oracles.assert_near(parameter.grad, grad, 1e-6)
    if not scaled:
        every = torch.stack(masks).all(0)
        oracles.assert_same(effective.detach() != 0, every)


def test_topk_gradient_by_hand():
    """g W sign(S), for kept and dropped weights alike (METHODS section 1)."""
    weight = torch.tensor([2.0, -3.0, 5.0, 7.0])
    layer = layer_with(weight, trained(torch.tensor([-1.0, 0.25, 0.5, -0.125])))
    layer.weight.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    grad = layer.masked_weight.pemn_masks["a0"].scores.grad
    assert layer.weight.tolist() == [2.0, 0.0, 5.0, 0.0]
    assert grad.tolist() == [-2.0, -30.0, 500.0, -7000.0]


def test_threshold_gradient_by_hand():
    weight = torch.tensor([2.0, -3.0])
    layer = layer_with(weight, trained(torch.tensor([-1.0, 0.5]), THRESHOLD))
    layer.weight.backward(torch.tensor([1.0, 10.0]))
    assert layer.masked_weight.pemn_masks["a0"].scores.grad.tolist() == [2.0, -30.0]


def test_scaled_gradient_by_hand():
    """M = 1,0,0,0: c = 2, dc/dM = -c^3 / (2 n) = -1; dL/dM = g W c - sum(g W M)."""
    weight = torch.tensor([3.0, 1.0, 1.0, -1.0])
    layer = layer_with(weight, trained(torch.tensor([1.0, 0, 0, 0]), THRESHOLD, scaled=True))
    assert layer.weight.tolist() == [6.0, 0.0, 0.0, 0.0]
    layer.weight.backward(torch.ones(4))
    assert layer.masked_weight.pemn_masks["a0"].scores.grad.tolist() == [3.0, -1.0, -1.0, -5.0]


@pytest.mark.parametrize("scaled", [False, True])
def test_narrow_weights_with_wide_scores(scaled):
    weight, scores = random((8, 9), 0, torch.bfloat16), random((8, 9), 1)
    upstream = random((8, 9), 2, torch.bfloat16)
    layer = layer_with(weight, trained(scores.clone(), TOPK, scaled))
    (layer.weight * upstream).sum().backward()
    masks = [oracles.topk(scores, 0.5)]
    _, grads = oracles.ste_grads(weight, [scores], masks, upstream, True, scaled)
    grad = layer.masked_weight.pemn_masks["a0"].scores.grad
    assert grad.dtype == torch.float32
    oracles.assert_near(grad, grads[0], 2**-7)


def test_gradients_reach_a_weight_that_wants_them():
    weight = torch.tensor([2.0, -3.0, 5.0, 7.0], requires_grad=True)
    mask = trained(torch.tensor([1.0, -0.5, 0.25, 2.0]), TOPK)
    mask(weight).backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert weight.grad.tolist() == [1.0, 0.0, 0.0, 1000.0]


def test_one_weight_serves_several_backward_passes():
    weight, scores = random((4, 4), 0), random((4, 4), 1)
    layer = layer_with(weight, trained(scores.clone()))
    effective = layer.weight
    (effective * 2).sum().backward()
    (effective * 3).sum().backward()
    expected = 5 * weight * scores.sign()
    oracles.assert_near(layer.masked_weight.pemn_masks["a0"].scores.grad, expected, 1e-6)


def test_float_products_equal_a_dense_layer():
    weight, scores, x = random((5, 7), 0), random((5, 7), 1), random((3, 7), 2)
    layer = layer_with(weight, trained(scores))
    expected = nn.functional.linear(x, weight * oracles.topk(scores, 0.5))
    oracles.assert_same(layer(x).detach(), expected)


# ---- keeping ----------------------------------------------------------------------------------


def test_two_reads_are_one_tensor():
    """Within a forward; of bits on frozen numbers in eval mode always."""
    layer = layer_with(random((4, 4), 0), trained(random((4, 4), 1)))
    assert layer.weight is not layer.weight
    with one_forward():
        assert layer.weight is layer.weight
    layer = layer_with(random((4, 4), 0), stored(torch.ones(4, 4, dtype=torch.bool)))
    assert layer.weight is not layer.weight
    layer.eval()
    assert layer.weight is layer.weight
    with torch.no_grad():
        assert layer.weight is layer.weight


def test_the_mask_is_chosen_once_for_many_reads(monkeypatch):
    calls = []
    original = Selector.rule
    monkeypatch.setattr(Selector, "rule", lambda s, count: calls.append(1) or original(s, count))
    layer = layer_with(random((4, 4), 0), trained(random((4, 4), 1)))
    with one_forward():
        for _ in range(12):
            layer(torch.ones(2, 4))
    assert len(calls) == 1


def expected_now(layer, weight=None):
    scores = layer.masked_weight.pemn_masks["a0"].scores
    own = layer._parameters["weight"] if weight is None else weight
    return own.detach() * oracles.topk(scores, 0.5)


def test_remade_after_an_optimizer_step():
    layer = layer_with(random((6, 6), 0), trained(random((6, 6), 1)))
    optimizer = torch.optim.SGD([layer.masked_weight.pemn_masks["a0"].scores], lr=1.0)
    before = layer.weight.detach().clone()
    for seed in range(3):
        optimizer.zero_grad()
        (layer.weight * random((6, 6), seed + 5)).sum().backward()
        optimizer.step()
        oracles.assert_same(layer.weight.detach(), expected_now(layer))
        with torch.no_grad():
            oracles.assert_same(layer.weight, expected_now(layer))
    assert not torch.equal(layer.weight.detach(), before)


def test_remade_after_an_optimizer_that_writes_through_data():
    layer = layer_with(random((6, 6), 0), trained(random((6, 6), 1)))
    scores = layer.masked_weight.pemn_masks["a0"].scores
    before = layer.weight.detach().clone()
    for seed in range(3):
        scores.grad = None
        (layer.weight * random((6, 6), seed + 5)).sum().backward()
        version = scores._version
        scores.data.add_(scores.grad, alpha=-1.0)
        assert scores._version == version  # nothing but the rule of keeping shows the change
        oracles.assert_same(layer.weight.detach(), expected_now(layer))
    assert not torch.equal(layer.weight.detach(), before)


def test_without_gradients_trained_scores_are_always_read_anew():
    layer = layer_with(random((6, 6), 0), trained(random((6, 6), 1)))
    scores = layer.masked_weight.pemn_masks["a0"].scores
    with torch.no_grad():
        before = layer.weight
        scores.data.copy_(random((6, 6), 2))
        oracles.assert_same(layer.weight, expected_now(layer))
        assert not torch.equal(layer.weight, before)


def test_not_kept_across_backward():
    layer = layer_with(random((4, 4), 0), trained(random((4, 4), 1)))
    first = layer.weight
    first.sum().backward()
    second = layer.weight
    assert second is not first
    oracles.assert_same(second.detach(), first.detach())
    second.sum().backward()  # its graph is a new one
    doubled = 2 * layer._parameters["weight"] * layer.masked_weight.pemn_masks["a0"].scores.sign()
    oracles.assert_near(layer.masked_weight.pemn_masks["a0"].scores.grad, doubled.detach(), 1e-6)


def test_gradient_modes_do_not_mix():
    layer = layer_with(random((4, 4), 0), trained(random((4, 4), 1)))
    with torch.no_grad():
        assert not layer.weight.requires_grad
    assert layer.weight.requires_grad
    with torch.no_grad():
        assert not layer.weight.requires_grad
    with torch.inference_mode():
        assert layer.weight.is_inference()
    assert layer.weight.requires_grad
    assert not layer.weight.is_inference()


def test_remade_after_the_base_changes():
    layer = layer_with(random((4, 4), 0), stored(oracles.topk(random((4, 4), 1), 0.5)))
    before = layer.weight
    layer._parameters["weight"].mul_(3)
    oracles.assert_same(layer.weight, before * 3)


def test_remade_after_load_state_dict():
    scores = [random((4, 4), seed) for seed in (1, 2)]
    layer = layer_with(random((4, 4), 0), trained(scores[0].clone()))
    old = layer.weight
    layer.load_state_dict({**layer.state_dict(), "masked_weight.pemn_masks.a0.scores": scores[1]})
    oracles.assert_same(layer.weight.detach(), expected_now(layer))
    assert not torch.equal(layer.weight, old)
    other = layer_with(random((4, 4), 0), stored(oracles.topk(scores[0], 0.5)))
    old = other.weight
    new_bits = bits.pack(oracles.topk(scores[1], 0.5))
    other.load_state_dict({**other.state_dict(), "masked_weight.pemn_masks.a0.bits": new_bits})
    oracles.assert_same(other.weight, layer.weight.detach())
    assert not torch.equal(other.weight, old)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_remade_after_to(dtype):
    scores = random((4, 4), 1)
    layer = layer_with(random((4, 4), 0), trained(scores.clone()))
    before = layer.weight.detach()
    layer.to(dtype)
    expected = before.to(dtype)
    assert torch.equal(oracles.topk(scores, 0.5), oracles.topk(scores.to(dtype), 0.5))
    oracles.assert_same(layer.weight.detach(), expected)


def test_remade_after_half_and_float():
    """The second cast may land on the memory that the first one freed."""
    trials, stale = 0, 0
    for _ in range(30):
        for size in (16, 64, 128):
            layer = layer_with(random((size, size), 0), stored(torch.ones(size, size) > 0))
            _ = layer.weight
            layer.half().float()
            trials += 1
            stale += not torch.equal(layer.weight, layer._parameters["weight"])
    assert trials == 90
    assert stale == 0


def test_copies_do_not_share_the_kept_weight():
    layer = layer_with(random((4, 4), 0), trained(random((4, 4), 1)))
    kept = layer.weight
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.weight is not kept
        oracles.assert_same(other.weight.detach(), kept.detach())
        with torch.no_grad():
            other.masked_weight.pemn_masks["a0"].scores.copy_(random((4, 4), 7))
        oracles.assert_same(other.weight.detach(), expected_now(other))
        assert other.masked_weight.owner is other
        oracles.assert_same(layer.weight.detach(), kept.detach())


def test_remade_after_set_adapter():
    torch.manual_seed(0)
    options = {"bank": "own", "bank_init": "kaiming_normal", "rest": "stats"}
    model = pemnify(nn.Sequential(nn.Linear(6, 5)), PemnConfig(**options), adapter_name="one")
    model.add_adapter("two", PemnConfig(**options))
    layer = model.base_model.model[0]
    child = layer.masked_weight
    with torch.no_grad():
        child.pemn_masks["two"].scores.copy_(random((5, 6), 3))
    fill = child.fill().detach()
    expected = {
        name: fill * oracles.topk(child.pemn_masks[name].scores, 0.5) for name in ("one", "two")
    }
    assert not torch.equal(expected["one"], expected["two"])
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        oracles.assert_same(layer.weight.detach(), expected[name])
        oracles.assert_same(layer.weight.detach(), expected[name])
    model.base_model.set_adapter(["one", "two"])
    both = torch.where(expected["one"] != 0, expected["two"], torch.zeros(()))
    oracles.assert_same(layer.weight.detach(), both)
    with model.disable_adapter():
        oracles.assert_same(layer.weight.detach(), fill)
    oracles.assert_same(layer.weight.detach(), both)


# ---- merging, errors --------------------------------------------------------------------------


def test_merged_names_leave_no_negative_zero():
    layer = layer_with(torch.tensor([-2.0, -3.0, 4.0]), stored(torch.tensor([True, False, False])))
    merged = layer.masked_weight.merge_names(["a0"])
    assert [str(value) for value in merged.tolist()] == ["-2.0", "0.0", "0.0"]
    assert not merged.requires_grad


def test_merging_composes_in_order():
    weight, scores = random((4, 4), 0), [random((4, 4), seed) for seed in (1, 2)]
    layer = layer_with(weight, *[trained(score) for score in scores])
    merged = layer.masked_weight.merge_names(["a0"])
    oracles.assert_same(merged, weight * oracles.topk(scores[0], 0.5) + 0.0)
    layer.masked_weight.hold_merged(merged)
    oracles.assert_same(layer.weight, merged)
    both = merged * oracles.topk(scores[1], 0.5) + 0.0
    oracles.assert_same(layer.masked_weight.merge_names(["a0", "a1"]), both)


def test_a_mask_that_was_never_loaded():
    mask = AdapterMask("encoder.fc.weight", (3, 4), TOPK, scaled=False, stored=bits.empty(12))
    with pytest.raises(MaskNotLoadedError, match=r"'encoder\.fc\.weight' was never loaded"):
        mask.mask()
    with pytest.raises(MaskNotLoadedError, match=r"PeftModel\.from_pretrained"):
        mask(torch.ones(3, 4))
    layer = layer_with(torch.ones(3, 4), mask)
    with pytest.raises(MaskNotLoadedError, match=r"encoder\.fc\.weight"):
        layer(torch.ones(2, 4))


def test_a_layer_without_its_weight_says_so():
    layer = layer_with(torch.ones(3, 4), trained(torch.ones(3, 4)))
    layer._parameters["weight"] = None
    assert layer.weight is None  # as in a plain layer
    del layer._parameters["weight"]
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'weight'"):
        layer.masked_weight.fill()


def test_representations():
    layer = layer_with(torch.ones(3, 4), trained(torch.ones(3, 4)))
    assert repr(layer.masked_weight.pemn_masks["a0"]) == "AdapterMask(topk, scores, shape=(3, 4))"
    assert "net.fc.weight, shape=(3, 4)" in repr(layer.masked_weight)
    assert "bits" in repr(stored(torch.ones(2, 2) > 0))
