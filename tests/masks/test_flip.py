"""Flips, and masks on a share of a weight, against the equations."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pemn_surgery.coding import bits
from pemn_surgery.masks.adapter_mask import AdapterMask
from pemn_surgery.masks.flip import FlipMask, flipped
from pemn_surgery.masks.selector import Selector
from pemn_surgery.masks.straight_through import straight_through
from tests.oracles import assert_near, assert_same

_SHAPES = st.sampled_from([(), (0,), (1,), (7,), (3, 5), (4, 2, 3, 3), (2, 0, 3)])
_DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
_SELECTORS = st.sampled_from(
    [Selector("topk", 0.5, 0.0), Selector("topk", 0.9, 0.0), Selector("threshold", 0.5, 0.1)]
)


def numbers(shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def flip_one_by_one(weight, mask):
    pairs = zip(weight.flatten().tolist(), mask.flatten().tolist(), strict=True)
    values = [value if kept else -value for value, kept in pairs]
    return torch.tensor(values, dtype=torch.float64).to(weight.dtype).view(weight.shape)


@settings(max_examples=60, deadline=None)
@given(_SHAPES, _DTYPES, _SELECTORS, st.integers(0, 99))
def test_values_and_gradients(shape, dtype, selector, seed):
    weight = numbers(shape, seed, dtype).requires_grad_()
    scores = numbers(shape, seed + 1).requires_grad_()
    pull = numbers(shape, seed + 2, dtype)
    made = straight_through(weight, scores, selector, flipped)
    mask = selector.mask(scores)
    assert_same(made.detach(), flip_one_by_one(weight.detach(), mask))
    of_weight, of_scores = torch.autograd.grad(made, (weight, scores), pull)
    signs = torch.where(mask, 1.0, -1.0).to(dtype)
    assert_same(of_weight, pull * signs)
    wanted = (pull * weight.detach()).float()
    if selector.uses_magnitude:
        wanted = wanted * scores.detach().sign()
    assert_same(of_scores, wanted)


def test_gradients_can_be_differentiated_again():
    weight, scores = numbers((4, 5), 0, torch.float64), numbers((4, 5), 1, torch.float64)
    weight.requires_grad_()
    scores.requires_grad_()
    selector = Selector("threshold", 0.5, 0.0)
    made = straight_through(weight, scores, selector, flipped)
    (of_scores,) = torch.autograd.grad((made**2).sum() / 2, scores, create_graph=True)
    signs = torch.where(scores > 0, 1.0, -1.0)
    assert_near(of_scores, weight**2 * signs, 1e-12)  # dL/dS = W_eff W = W^2 M'
    (again,) = torch.autograd.grad(of_scores.sum(), weight)
    assert_near(again, 2 * weight * signs, 1e-12)


def test_flips_twice_are_none_bit_for_bit():
    weight = torch.cat([numbers((50,), 3), torch.tensor([0.0, -0.0, float("inf"), 1e-45])])
    mask = numbers(weight.shape, 4) > 0
    again = flipped(flipped(weight, mask), mask)
    assert_same(again.view(torch.int32), weight.view(torch.int32))


def mask_on(kind, shape, places, selector, seed, *, stored):
    scores = numbers((len(places),), seed)
    held = {"stored": bits.pack(selector.mask(scores))} if stored else {"scores": scores}
    there = torch.tensor(places, dtype=torch.int32)
    return kind("w", shape, selector, scaled=False, places=there, **held), selector.mask(scores)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_support_changes_its_places_alone(data):
    shape = data.draw(st.sampled_from([(1,), (7,), (3, 5), (4, 2, 3)]))
    dtype, selector = data.draw(_DTYPES), data.draw(_SELECTORS)
    weights = int(torch.Size(shape).numel())
    places = sorted(data.draw(st.sets(st.integers(0, weights - 1), min_size=1)))
    kind, stored = data.draw(st.sampled_from([AdapterMask, FlipMask])), data.draw(st.booleans())
    one, mask = mask_on(kind, shape, places, selector, 5, stored=stored)
    weight = numbers(shape, 6, dtype)
    before = weight.clone()
    made = one(weight, is_scratch=False)
    wanted = weight.flatten().clone()
    for place, kept in zip(places, mask.tolist(), strict=True):
        gone = -wanted[place] if kind is FlipMask else wanted[place] * 0
        wanted[place] = wanted[place] if kept else gone
    assert_same(made.detach(), wanted.view(shape))
    assert_same(weight, before)


@pytest.mark.parametrize("kind", [AdapterMask, FlipMask])
def test_scores_of_a_support_get_the_gradients_of_its_places(kind):
    places, selector = [1, 4, 5, 11], Selector("threshold", 0.5, 0.0)
    one, _ = mask_on(kind, (3, 4), places, selector, 0, stored=False)
    weight, pull = numbers((3, 4), 1).requires_grad_(), numbers((3, 4), 2)
    one(weight).backward(pull)
    assert_same(one.scores.grad, (pull * weight.detach()).flatten()[places])
    ones = torch.ones(12)
    ones[places] = selector.mask(one.scores).float() * (2.0 if kind is FlipMask else 1.0)
    ones[places] -= 1.0 if kind is FlipMask else 0.0
    assert_same(weight.grad, pull * ones.view(3, 4))


def test_a_support_is_no_part_of_the_state_and_keeps_its_type():
    one, _ = mask_on(FlipMask, (3, 4), [0, 7], Selector("threshold", 0.5, 0.0), 0, stored=False)
    holder = nn.ModuleDict({"one": one}).half()
    assert set(holder.state_dict()) == {"one.scores"}
    assert copy.deepcopy(one).places.tolist() == [0, 7]
    assert one.places.dtype == torch.int32
