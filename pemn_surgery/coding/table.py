"""Tables of frequencies: how often a coder should expect each symbol, in whole numbers.

A *density* says how many of 65,536 weights are ones. Weights are coded so that ones are the more
likely: 32,768 or more. A *level* is a density as a byte: twelve to a doubling of the odds. Nothing
here is a float, so every machine finds the same.
"""

from functools import lru_cache

ALL = 1 << 16  # weights that a density counts in
HALF, MOST = ALL // 2, ALL - 64
TOTAL = 1 << 24  # of all frequencies in a table
LEVELS = 120  # from there on the density is `MOST`

_STEPS = 12


def density_of(level: int) -> int:
    """Return a level's density: (12 + level % 12) * 2 ** (level // 12) ones to 12 zeros."""
    ones = (_STEPS + level % _STEPS) << level // _STEPS
    return min(ALL * ones // (ones + _STEPS), MOST)


def nearest_density(ones: int, weights: int) -> int:
    """Return the density of a mask of which at least half are ones."""
    return min(max((ALL * ones + weights // 2) // max(weights, 1), HALF), MOST)


@lru_cache(maxsize=4 * LEVELS)
def frequencies(density: int, weights: int) -> tuple[int, ...]:
    """Return the table of so many independent weights taken at once.

    Symbol 0 is the end, which is never coded: a stream that has run out reads it. Symbol s + 1 is
    the weights that are the bits of s, the lowest first. Products are rounded down, but at least 1;
    ones alone, the last and most likely, get what is left of the total.

    Args:
        density: `HALF` to `MOST`.
        weights: 1 or 8.

    Returns:
        ``1 + 2 ** weights`` numbers, which sum to `TOTAL`.
    """
    of_ones = [
        max((density**ones * (ALL - density) ** (weights - ones) * TOTAL) >> 16 * weights, 1)
        for ones in range(weights)
    ]
    found = [1, *(of_ones[symbol.bit_count()] for symbol in range((1 << weights) - 1))]
    return (*found, TOTAL - sum(found))
