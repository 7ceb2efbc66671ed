"""Scores to mask: bit-equal to sorting by (|S|, index), with ties everywhere."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pemn_surgery.errors import NonFiniteScoresError
from pemn_surgery.masks import selector
from pemn_surgery.masks.selector import (
    Selector,
    check_finite,
    signed_topk_mask,
    threshold_mask,
    topk_mask,
)
from tests import oracles

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6)
DENSITIES = st.one_of(
    st.floats(0.1, 0.97), st.sampled_from([0.1, 0.5, 0.9, 0.97, 1.0, 1e-9, 1e-20, 1 / 3])
)
TIED = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0])
ANY = st.floats(-8, 8, width=32)


def tensors(elements):
    arrays = SHAPES.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=elements))
    return st.builds(
        lambda a, dtype: torch.from_numpy(a).to(dtype), arrays, st.sampled_from(DTYPES)
    )


@given(tensors(TIED), DENSITIES)
def test_topk_with_ties(scores, density):
    oracles.assert_same(topk_mask(scores, density), oracles.topk(scores, density))


@given(tensors(ANY), DENSITIES)
def test_topk_with_any_scores(scores, density):
    oracles.assert_same(topk_mask(scores, density), oracles.topk(scores, density))


@given(tensors(TIED), DENSITIES)
def test_topk_traced(scores, density):
    """The branch that torch.compile takes, run eagerly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        mask = topk_mask(scores, density)
    oracles.assert_same(mask, oracles.topk(scores, density))


@given(tensors(st.one_of(TIED, ANY)), DENSITIES)
def test_topk_with_signs(scores, density):
    flat = scores.flatten().tolist()
    by_value = sorted(range(len(flat)), key=lambda place: (flat[place], place))
    wanted = torch.ones(len(flat), dtype=torch.bool)
    wanted[by_value[: int((1 - density) * len(flat))]] = False
    oracles.assert_same(signed_topk_mask(scores, density), wanted.view(scores.shape))
    assert Selector("topk_signed", density, 0.0).rule(scores.numel()) is None


@given(tensors(TIED), DENSITIES)
def test_counts_are_exact(scores, density):
    ones = int(topk_mask(scores, density).sum())
    assert ones == scores.numel() - int((1 - density) * scores.numel())
    assert selector.dropped_count(scores.numel(), density) == scores.numel() - ones


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 0.75, 0.97])
def test_all_equal_scores_drop_the_first(dtype, density):
    mask = topk_mask(torch.full((10, 11), -2.0, dtype=dtype), density)
    dropped = int((1 - density) * 110)
    assert mask.reshape(-1).tolist() == [False] * dropped + [True] * (110 - dropped)


def test_equal_in_bfloat16_are_ties():
    """1 + 2^-10 rounds to 1 in bfloat16: the order is then that of the index."""
    scores = torch.tensor([1 + 2**-10, 1.0, 1 + 2**-9, 1.0])
    assert topk_mask(scores, 0.5).tolist() == [True, False, True, False]
    assert topk_mask(scores.bfloat16(), 0.5).tolist() == [False, False, True, True]


def test_large_tensor_against_a_stable_sort():
    scores = torch.from_numpy(np.random.default_rng(0).integers(-50, 50, 100_003) / 7).float()
    for density in (0.03, 0.5, 0.91):
        order = np.argsort(scores.abs().numpy(), kind="stable")
        expected = torch.ones(100_003, dtype=torch.bool)
        expected[torch.from_numpy(order[: int((1 - density) * 100_003)])] = False
        oracles.assert_same(topk_mask(scores, density), expected)


def test_strided_scores_are_ordered_row_by_row():
    scores = torch.ones(6, 4).t()
    assert not scores.is_contiguous()
    oracles.assert_same(topk_mask(scores, 0.5), oracles.topk(scores.contiguous(), 0.5))


def test_infinite_scores_are_the_largest():
    scores = torch.tensor([1.0, float("-inf"), 0.0, float("inf")])
    assert topk_mask(scores, 0.5).tolist() == [False, True, False, True]


def test_no_gradient_and_no_change():
    scores = torch.nn.Parameter(torch.tensor([3.0, -1.0, 2.0, 1.0]))
    before = scores.detach().clone()
    mask = topk_mask(scores, 0.5)
    assert not mask.requires_grad
    assert mask.tolist() == [True, False, True, False]
    assert not threshold_mask(scores, 0.0).requires_grad
    oracles.assert_same(scores.detach(), before)


@given(tensors(st.one_of(TIED, ANY)), st.sampled_from([0.0, 0.5, -1.0, 0.005, 3.0]))
def test_threshold(scores, mu):
    if scores.dtype == torch.float64:
        oracles.assert_same(threshold_mask(scores, mu), oracles.threshold(scores, mu))
    else:  # torch compares a narrow tensor with a number in the tensor's own type
        rounded = float(torch.tensor(mu, dtype=scores.dtype))
        oracles.assert_same(threshold_mask(scores, mu), oracles.threshold(scores, rounded))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_is_strict(dtype):
    scores = torch.tensor([0.5, 0.5078125, 0.4921875, -1.0, 1.0], dtype=dtype)
    assert threshold_mask(scores, 0.5).tolist() == [False, True, False, False, True]


@given(tensors(TIED), st.sampled_from([0.25, 0.5, 1.0]))
def test_selector_chooses_its_rule(scores, number):
    by_rank = Selector("topk", number, 99.0)
    by_size = Selector("threshold", 1e-9, number)
    oracles.assert_same(by_rank.mask(scores), oracles.topk(scores, number))
    oracles.assert_same(by_size.mask(scores), oracles.threshold(scores, number))
    assert by_rank.uses_magnitude is True
    assert by_size.uses_magnitude is False


@pytest.mark.parametrize("density", [0.1, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("shape", [(7, 5), (16,), (3, 2, 3, 3)])
def test_compiled_equals_eager(density, shape):
    torch.compiler.reset()
    compiled = torch.compile(lambda s: topk_mask(s, density), backend="eager", fullgraph=True)
    generator = np.random.default_rng(1)
    for _ in range(3):
        scores = torch.from_numpy(generator.integers(-2, 3, shape).astype(np.float32))
        oracles.assert_same(compiled(scores), oracles.topk(scores, density))


@given(tensors(ANY))
def test_finite_scores_pass(scores):
    assert check_finite(scores, "w") is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_scores_are_refused(bad, dtype):
    scores = torch.zeros(3, 4, dtype=dtype)
    scores[0, 1] = scores[2, 3] = bad
    with pytest.raises(NonFiniteScoresError) as caught:
        check_finite(scores, "layer1.0.conv1.weight")
    message = str(caught.value)
    assert "2 of the 12 scores of 'layer1.0.conv1.weight'" in message
    assert "learning rate" in message
