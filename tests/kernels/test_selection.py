"""Masks of the largest scores: bit-equal to a stable sort, whichever way they are found."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pemn_surgery.kernels import selection, twin
from tests import oracles
from tests.kernels.ways import WAYS, every_compiled, every_way, through

NARROW = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*NARROW, torch.float64]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)
TIED = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 3e-39, float("inf")])
ANY = st.floats(width=32, allow_nan=False)
SPREAD = {
    "normal": lambda g, n: g.standard_normal(n),
    "equal": lambda g, n: np.full(n, -0.25),
    "few": lambda g, n: g.integers(-3, 4, n) / 7,
    "heavy": lambda g, n: g.standard_cauchy(n) ** 3,
    "zeros": lambda g, n: g.standard_normal(n) * (g.random(n) < 0.02),
    "sorted": lambda g, n: np.sort(g.standard_normal(n)),
    "rows": lambda g, n: np.where(np.arange(n) % 8, 1.0, 100.0) * g.standard_normal(n),
}


CUTS = (selection._sorted_cut, selection._radix_cut)


def stable_sort(scores, dropped):
    """Drop by (bits without the sign, index)."""
    sizes = (
        twin.words_of(scores.contiguous())
        & np.array(-1).astype({2: np.uint16, 4: np.uint32, 8: np.uint64}[scores.element_size()])
        // 2
    )
    keep = np.ones(scores.numel(), np.bool_)
    keep[np.argsort(sizes, kind="stable")[:dropped]] = False
    return torch.from_numpy(keep).view(scores.shape)


@every_way
@pytest.mark.parametrize("elements", [TIED, ANY], ids=["ties", "any"])
def test_small(way, elements):
    @given(SHAPES.flatmap(lambda s: hnp.arrays(np.float32, s, elements=elements)), st.data())
    def check(values, data):
        scores = torch.from_numpy(values).to(data.draw(st.sampled_from(DTYPES)))
        dropped = data.draw(st.integers(0, scores.numel()))
        density = 1 - dropped / max(scores.numel(), 1)
        mask = selection.keep_largest(scores, dropped)
        oracles.assert_same(mask, stable_sort(scores, dropped))
        if int((1 - density) * scores.numel()) == dropped:
            oracles.assert_same(mask, oracles.topk(scores, density))

    with through(way):
        check()


@every_way
@pytest.mark.parametrize("spread", list(SPREAD))
@pytest.mark.parametrize("dtype", DTYPES)
def test_large(way, spread, dtype):
    """Sizes at which scores are sampled: the bracket holds the cut, overflows, or misses it."""
    generator = np.random.default_rng(0)
    with through(way):
        for weights in (1023, 1024, 4097, 70_001, 300_000):
            made = SPREAD[spread](generator, weights)
            with np.errstate(over="ignore"):
                scores = torch.from_numpy(made).to(dtype)
            for dropped in (1, weights // 40, weights // 2, weights - 7, weights):
                mask = selection.keep_largest(scores, dropped)
                oracles.assert_same(mask, stable_sort(scores, dropped))


@every_way
@settings(max_examples=25)
@given(st.integers(1, 40_000), st.integers(0, 2**32 - 1), st.floats(0, 1), st.sampled_from(NARROW))
def test_any_number_of_scores(way, weights, seed, share, dtype):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(weights, generator=generator).to(dtype)
    dropped = int(share * weights)
    with through(way):
        mask = selection.keep_largest(scores, dropped)
    oracles.assert_same(mask, stable_sort(scores, dropped))


@every_compiled
def test_a_sample_that_misleads(way):
    """The scores that are sampled tell nothing of the others: all of them are counted."""
    scores = torch.rand(70_000) + 1
    places = twin._sample(70_000)
    assert places.size == 1024
    scores[torch.from_numpy(places)] = 1e-3
    for used in (way, "python"):
        with through(used):
            for dropped in (512, 2000, 35_000):
                mask = selection.keep_largest(scores, dropped)
                oracles.assert_same(mask, stable_sort(scores, dropped))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("piece", [3, 1 << 16])
def test_counting(dtype, piece, monkeypatch):
    monkeypatch.setattr(twin, "_PIECE", piece)
    scores = torch.from_numpy(np.random.default_rng(2).integers(-9, 9, 301) / 7).to(dtype)
    words = twin.words_of(scores)
    for dropped in (1, 2, 100, 150, 300, 301):
        cut, wanted, equal = twin._count(words, dropped)
        place = words.size if wanted == equal else twin._find_equal(words, cut, wanted) + 1
        mask = torch.from_numpy(twin.mark(words, cut, place))
        oracles.assert_same(mask, stable_sort(scores, dropped))
        assert twin._search(words, dropped) == (cut, wanted, equal)


def test_a_place_that_is_not_there():
    with pytest.raises(LookupError, match="2 too few scores of size 5"):
        twin._find_equal(twin.words_of(torch.zeros(4)), 5, 2)


@every_way
def test_nan_is_larger_than_all(way):
    scores = torch.tensor([1.0, float("nan"), 2.0, float("inf"), -float("nan"), 0.5])
    with through(way):
        for dropped in range(7):
            mask = selection.keep_largest(scores, dropped)
            oracles.assert_same(mask, stable_sort(scores, dropped))
    for cut in CUTS:
        kept = selection.keep_by_torch(scores, 3, cut).tolist()
        assert kept == [False, True, False, True, True, False]


@every_compiled
@pytest.mark.parametrize("dtype", NARROW)
def test_threads_choose_the_same(way, dtype):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(1_200_007, generator=generator).to(dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with through(way):
            mask = selection.keep_largest(scores, 400_000)
    finally:
        torch.set_num_threads(threads)
    oracles.assert_same(mask, stable_sort(scores, 400_000))


def test_strided_scores_are_ordered_row_by_row():
    scores = torch.ones(6, 4).t()
    for way in WAYS:
        with through(way):
            expected = stable_sort(scores.contiguous(), 9)
            oracles.assert_same(selection.keep_largest(scores, 9), expected)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(hnp.arrays(np.float32, st.integers(1, 30), elements=TIED), st.data())
def test_by_torchs_own_operations(cut, dtype, values, data):
    """On other devices, and what torch transforms; on GPUs a sort gives way to ``topk``."""
    scores = torch.from_numpy(values).to(dtype)
    dropped = data.draw(st.integers(1, scores.numel()))
    expected = stable_sort(scores, dropped)
    oracles.assert_same(selection.keep_by_torch(scores, dropped, cut), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "is_transformed", lambda: True)
        oracles.assert_same(selection.keep_by_torch(scores, dropped, cut), expected)


@pytest.mark.parametrize("spread", list(SPREAD))
@pytest.mark.parametrize("density", [0.01, 0.5, 0.99])
def test_both_cuts_are_one(spread, density):
    values = SPREAD[spread](np.random.default_rng(0), 5000)
    sizes = torch.from_numpy(np.asarray(values, np.float32)).abs()
    dropped = int((1 - density) * 5000)
    assert torch.equal(*(cut(sizes, dropped) for cut in CUTS))


def test_the_operator_is_one():
    scores = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    torch.library.opcheck(selection._keep_largest, (scores, 11))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_whole(mode):
    torch.compiler.reset()
    compiled = torch.compile(
        lambda s: selection.keep_largest(s, 17), backend="aot_eager", fullgraph=True
    )
    scores = torch.randn(40, generator=torch.Generator().manual_seed(0))
    for sign in (1, -1):
        oracles.assert_same(compiled(sign * scores), stable_sort(scores, 17))


@every_way
def test_a_storage_that_was_read_may_be_resized(way):
    """FSDP frees gathered parameters so."""
    scores = torch.randn(1000)
    with through(way):
        assert selection.keep_largest(scores, 500).sum() == 500
    scores.untyped_storage().resize_(0)
    assert scores.untyped_storage().nbytes() == 0


def test_words_outlive_the_tensor():
    words = twin.words_of(torch.arange(5000.0))
    torch.zeros(5000)
    assert words.view(np.float32).tolist() == list(range(5000))
    assert twin.words_of(torch.empty(0)).tolist() == []
