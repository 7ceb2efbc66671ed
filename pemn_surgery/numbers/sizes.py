"""How large numbers are, in 256ths: initial scores and frozen numbers, which may guess a mask."""

from typing import Any

import numpy as np

from pemn_surgery.numbers import rng

Array = Any  # of numpy; its element type is in the docstrings

LOG2 = 8  # bits of a size


def drawn_sizes(key: bytes, period: int, weights: int) -> Array:
    """Return the sizes of a seed's numbers, by the 32-bit integers w that they are made of.

    Numbers are symmetric in w, with zero in the middle: the size is the upper bits of w - 2 ** 31,
    or of 2 ** 31 - 1 - w below the middle.

    Args:
        key: Of their stream (`rng.key_of`).
        period: Weight i has number ``i % period``.
        weights: Number of weights.

    Returns:
        uint8 array of shape (weights,).
    """
    sizes = np.zeros(min(period, weights), np.uint8)
    place = 0
    for words in rng.pieces(key, len(sizes)):
        signed = (words ^ np.uint32(1 << 31)).view(np.int32)
        size = signed ^ (signed >> 31)  # ~signed below the middle
        sizes[place : place + len(words)] = size >> (31 - LOG2)
        place += len(words)
    return np.tile(sizes, -(-weights // max(len(sizes), 1)))[:weights]


def base_sizes(words: Array) -> Array:
    """Return the sizes of a base's own numbers by their order: how many 256ths are smaller.

    Args:
        words: The numbers as bfloat16, uint16 of shape (weights,). A base held in float32 or in
            bfloat16 gives the same.

    Returns:
        uint8 array of shape (weights,).
    """
    magnitudes = words & 0x7FFF
    counts = np.bincount(magnitudes, minlength=1 << 15)
    smaller = np.cumsum(counts) - counts
    return (256 * smaller // max(len(words), 1)).astype(np.uint8)[magnitudes]
