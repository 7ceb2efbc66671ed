"""Masks as packed bits: weight i is bit ``i % 8`` of byte ``i // 8``."""

from typing import Any

import numpy as np

Array = Any  # of numpy; its element type is in the docstrings


def filled_up(packed: Array, weights: int, nbytes: int) -> Array:
    """Return a mask with ones behind its weights, up to a whole number of groups.

    Args:
        packed: uint8 array of shape (ceil(weights / 8),).
        weights: Number of weights.
        nbytes: Bytes of a group.

    Returns:
        uint8 array; ``packed`` itself where nothing is to be filled up.
    """
    groups = -(-weights // (8 * nbytes))
    if weights == 8 * nbytes * groups:
        return packed
    filled = np.full(groups * nbytes, 255, np.uint8)
    filled[: len(packed)] = packed
    if weights % 8:
        filled[len(packed) - 1] |= 255 << weights % 8 & 255
    return filled


def cut_off(packed: Array, weights: int) -> Array:
    """Return a mask without what lies behind its weights; unused bits become zero in place.

    Args:
        packed: uint8 array of ceil(weights / 8) bytes or more.
        weights: Number of weights.

    Returns:
        uint8 array of shape (ceil(weights / 8),).
    """
    packed = packed[: -(-weights // 8)]
    if weights % 8:
        packed[-1] &= 2 ** (weights % 8) - 1
    return packed
