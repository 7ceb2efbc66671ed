"""How many ones there are to a zero, as a byte, and probabilities in whole numbers."""

from collections.abc import Sequence

_ZEROS = 16  # to which a byte gives the number of ones


def odds_of(odds: int) -> float:
    """Return the ones to a zero that a byte stands for."""
    return _ones(odds) / _ZEROS


def nearest_odds(density: float) -> int:
    """Return the byte that is nearest to a density.

    Args:
        density: Share of ones, .5 to 1.
    """
    wanted = density / max(1 - density, 1e-9)
    return min(range(256), key=lambda odds: abs(odds_of(odds) / wanted - 1))


def share_of(weights: int, odds: int, ways: Sequence[int]) -> int:
    """Return how often independent weights are one of some masks, times 2 ** 32.

    In whole numbers, rounded down but at least 1, so that every machine finds the same.

    Args:
        weights: Number of weights.
        odds: Ones to a zero, as a byte.
        ways: How many of the masks have 0, 1, ... zeros.
    """
    ones = _ones(odds)
    share = sum(
        count * ones ** (weights - zeros) * _ZEROS**zeros
        for zeros, count in enumerate(ways)
        if count
    )
    return max((share << 32) // (ones + _ZEROS) ** weights, 1)


def _ones(odds: int) -> int:
    return (16 + odds % 16) << odds // 16
