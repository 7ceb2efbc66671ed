"""Which weights a support masks, against the rule written out in Python."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pemn_surgery.numbers.support import Support
from tests.oracles import integers

_LAYOUTS = st.tuples(*(st.integers(0, 5) for _ in range(4)))
_SHARES = st.floats(0.001, 0.999)

GOLDEN_PLACES = [3, 37, 39, 40, 49, 70, 72, 77]
GOLDEN_ROWS = [8, 9, 10, 11, 12, 13, 14, 15]


def count_of(things, share):
    return min(max(round(share * things), 1), things)


def first_of(keys, count):
    """The places of the smallest keys, one by one; of equal ones the first."""
    by_key = sorted(range(len(keys)), key=lambda place: (keys[place], place))
    return sorted(by_key[:count])


@settings(max_examples=60, deadline=None)
@given(_LAYOUTS, _SHARES, st.integers(-5, 2**70))
def test_drawn_places_are_those_of_the_smallest_numbers(layout, share, seed):
    weights = math.prod(layout)
    support = Support(share, "seed", seed)
    places = support.places("block.0.weight", layout, None)
    drawn = integers(seed, "support/block.0.weight", weights)
    assert places.dtype == np.int64
    assert places.tolist() == first_of(drawn, count_of(weights, share))
    assert len(places) == support.count(layout)


@settings(max_examples=60, deadline=None)
@given(_LAYOUTS, _SHARES, st.integers(0, 99))
def test_rows_are_whole_outputs(layout, share, seed):
    outer, summed, outputs, inner = layout
    support = Support(share, "rows", seed)
    places = set(support.places("w", layout, None).tolist())
    drawn = integers(seed, "support/w", outer * outputs)
    chosen = set(first_of(drawn, count_of(outer * outputs, share)))
    wanted = {
        ((g * summed + s) * outputs + o) * inner + i
        for g in range(outer)
        for s in range(summed)
        for o in range(outputs)
        for i in range(inner)
        if g * outputs + o in chosen
    }
    assert places == wanted
    assert len(places) == support.count(layout)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**16 - 1), max_size=60), _SHARES)
def test_largest_and_smallest_go_by_magnitude_and_then_by_place(words, share):
    layout = (1, 1, 1, len(words))
    held = np.array(words, np.uint16)
    magnitudes = [word & 0x7FFF for word in words]
    count = count_of(len(words), share)
    largest = Support(share, "largest", 0).places("w", layout, held)
    smallest = Support(share, "smallest", 0).places("w", layout, held)
    assert largest.tolist() == first_of([-one for one in magnitudes], count)
    assert smallest.tolist() == first_of(magnitudes, count)


def test_places_never_change():
    """Golden: files hold no places, so every version has to draw these."""
    places = Support(0.1, "seed", 0).places("layer1.0.conv1.weight", (1, 1, 8, 10), None)
    rows = Support(0.3, "rows", 7).places("fc.weight", (1, 1, 6, 4), None)
    assert places.tolist() == GOLDEN_PLACES
    assert rows.tolist() == GOLDEN_ROWS


@pytest.mark.parametrize(
    ("by", "reads"), [("seed", 0), ("rows", 0), ("largest", 1), ("smallest", 1)]
)
def test_what_reads_the_base(by, reads):
    assert Support(0.5, by, 0).reads_base == bool(reads)
