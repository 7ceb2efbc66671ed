"""Learned signs against the equations: W + s (2M - 1), with gradients for W, s and the scores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pemn_surgery.masks.rows import Rows
from pemn_surgery.masks.selector import Selector
from pemn_surgery.masks.sign_delta import SignDelta, unit_of
from tests.oracles import assert_same

_ROWS = st.sampled_from([Rows(1, 1, 4, 6), Rows(1, 5, 3, 1), Rows(2, 3, 2, 4), Rows(1, 1, 1, 7)])
_SELECTORS = st.sampled_from([Selector("topk", 0.5, 0.0), Selector("threshold", 0.5, 0.1)])


def numbers(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def output_of(place, rows):
    """The output that a place belongs to, by counting through the weight."""
    at = 0
    for group in range(rows.outer):
        for _ in range(rows.summed):
            for output in range(rows.outputs):
                for _ in range(rows.inner):
                    if at == place:
                        return group * rows.outputs + output
                    at += 1
    raise AssertionError(place)


def learned(rows, selector, seed, places=None):
    """A mask that learns signs, with its scales, of a weight of that many numbers."""
    weights = rows.outer * rows.summed * rows.outputs * rows.inner
    count = weights if places is None else len(places)
    where = None if places is None else torch.tensor(places, dtype=torch.int32)
    mask = SignDelta(
        "w", (weights,), selector, scaled=False, scores=numbers((count,), seed), places=where
    )
    mask.take_row_scale(numbers((rows.count,), seed + 1), rows, is_final=False)
    mask.learns, mask.unit = True, 0.25
    return mask


@settings(max_examples=60, deadline=None)
@given(_ROWS, _SELECTORS, st.integers(0, 99), st.booleans())
def test_values_and_gradients(rows, selector, seed, is_part):
    weights = rows.outer * rows.summed * rows.outputs * rows.inner
    places = list(range(seed % 3, weights, 3)) if is_part else None
    mask = learned(rows, selector, seed, places)
    weight, pull = numbers((weights,), seed + 2), numbers((weights,), seed + 3)
    wanted = weight.double()
    chosen = selector.mask(mask.scores)
    of_scores, of_scale = torch.zeros(len(chosen)), torch.zeros(rows.count, dtype=torch.float64)
    for at, place in enumerate(places or range(weights)):
        output = output_of(place, rows)
        scale = float(mask.row_scale.detach()[output]) * 0.25
        sign = 1 if chosen[at] else -1
        wanted[place] += sign * scale
        of_scale[output] += sign * 0.25 * float(pull[place])
        of_scores[at] = scale * float(pull[place])
    if selector.uses_magnitude:
        of_scores *= mask.scores.detach().sign()
    weight.requires_grad_()
    made = mask(weight)
    torch.testing.assert_close(made.detach(), wanted.float())
    found = torch.autograd.grad(made, (weight, mask.scores, mask.row_scale), pull)
    assert_same(found[0], pull)
    torch.testing.assert_close(found[1], of_scores)
    torch.testing.assert_close(found[2], of_scale.float())


@given(_ROWS)
def test_places_are_told_their_outputs(rows):
    places = torch.arange(rows.outer * rows.summed * rows.outputs * rows.inner)
    assert len(places) > 0
    assert rows.outputs_at(places).tolist() == [output_of(p, rows) for p in places.tolist()]


@pytest.mark.parametrize("is_part", [False, True])
def test_operations_in_the_open_give_the_same(is_part):
    rows, selector = Rows(1, 1, 4, 6), Selector("threshold", 0.5, 0.0)
    mask = learned(rows, selector, 5, range(0, 24, 2) if is_part else None)
    weight, pull = numbers((24,), 6), numbers((24,), 7)
    parameters = dict(mask.named_parameters())

    def loss(given):
        return (torch.func.functional_call(mask, given, (weight,)) * pull).sum()

    found = torch.func.grad(loss)(parameters)
    made = mask(weight)
    wanted = torch.autograd.grad(made, list(parameters.values()), pull)
    assert set(found) == {"scores", "row_scale"}
    for name, grad in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(found[name], grad)


@pytest.mark.parametrize(
    ("fan_in", "unit"), [(1, 1.0), (4, 0.5), (64, 0.125), (384, 2**-4), (576, 2**-5)]
)
def test_units_are_powers_of_two(fan_in, unit):
    assert unit_of(fan_in) == unit
    assert 2**-0.5 <= unit * fan_in**0.5 <= 2**0.5
