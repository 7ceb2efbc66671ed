"""Tables of frequencies: by hand, and the same for ever."""

import hashlib
import math
import struct
from fractions import Fraction
from itertools import pairwise

import pytest

from pemn_surgery.coding import table
from tests import reader

DENSITIES = [32768, 32769, 40000, 49152, 60000, 65000, 65471, 65472]


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("weights", [1, 8])
def test_frequencies_are_products_rounded_down(density, weights):
    found = table.frequencies(density, weights)
    assert len(found) == 1 + 2**weights
    assert sum(found) == 2**24
    assert found[0] == 1
    share = Fraction(density, 2**16)
    for symbol, frequency in enumerate(found[1:-1]):
        ones = symbol.bit_count()
        expected = math.floor(2**24 * share**ones * (1 - share) ** (weights - ones))
        assert frequency == max(expected, 1)
    assert found[-1] >= max(found[1:]) - 1  # at density 1/2 the end takes 1 of it
    assert list(found) == reader.frequencies(density, weights)


def test_tables_never_change():
    """All that files may need, as one digest: another table reads no old file."""
    digest = hashlib.sha256()
    for density in range(table.HALF, table.MOST + 1, 11):
        for weights in (1, 8):
            found = table.frequencies.__wrapped__(density, weights)
            digest.update(struct.pack(f"<{len(found)}I", *found))
    levels = [table.density_of(level) for level in range(128)]
    digest.update(struct.pack("<128I", *levels))
    assert digest.hexdigest() == "6561ccf82b9614490add15f49dc8aadbba8e43519cff7a59953eb94e18d91c83"


def test_levels_by_hand():
    """Twelve to a doubling of the odds, up to the largest density."""
    assert [table.density_of(level) for level in (0, 12, 24)] == [
        2**15,
        2**16 * 2 // 3,
        2**16 * 4 // 5,
    ]
    found = [table.density_of(level) for level in range(table.LEVELS)]
    assert found == sorted(set(found))
    odds = [density / (2**16 - density) for density in found]
    steps = [after / before for before, after in pairwise(odds)]
    assert 1.04 < min(steps) < max(steps) < 1.086
    rest = [table.density_of(level) for level in range(table.LEVELS, 128)]
    assert rest == [table.MOST] * 8


@pytest.mark.parametrize(
    ("ones", "weights", "density"),
    [(0, 0, 2**15), (1, 1, 65472), (1, 2, 2**15), (2, 3, 43691), (999, 1000, 65470)],
)
def test_nearest_density(ones, weights, density):
    assert table.nearest_density(ones, weights) == density


def test_no_weight_is_cheaper_than_a_file_may_claim():
    """`header.inspect` refuses more than 8,192 weights a byte."""
    least = min(-math.log2(table.frequencies(table.MOST, w)[-1] / 2**24) / w for w in (1, 8))
    assert 8 / least < 8192 / 1.4
