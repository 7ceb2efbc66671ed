"""What the compiled kernels choose, in numpy: the same cut, a piece at a time.

The magnitudes of floats order like their bits without the sign, so sizes here are integers.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

Array = Any  # of numpy; its element type is in the docstrings

# Scores looked at together: their temporaries stay in the cache.
_PIECE = 1 << 16

# Bits that one pass counts by where sampling did not help.
_DIGIT = 16


class _Words:
    """The memory of a tensor, which stays alive, as numpy asks for it.

    ``Tensor.numpy()`` would forbid for good that the tensor's storage be resized, as FSDP does to
    gather parameters and to free them.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.__array_interface__ = {
            "version": 3,
            "shape": (tensor.numel(),),
            "typestr": np.dtype(f"u{tensor.element_size()}").str,
            "data": (tensor.data_ptr(), False),
        }


def words_of(scores: Tensor) -> Array:
    """Return the bits of scores as unsigned integers, which are not copied.

    Args:
        scores: Contiguous float tensor in the CPU's memory, of two, four or eight bytes a number.
    """
    return np.asarray(_Words(scores))


def choose(words: Array, dropped: int) -> tuple[int, int]:
    """Choose which scores are dropped: the smallest by (size, index).

    Args:
        words: What `words_of` returns, of at least one score.
        dropped: How many, from 1 to all.

    Returns:
        The size of the last one dropped, and the index before which scores of that size go.
    """
    cut, wanted, equal = _search(words, dropped) or _count(words, dropped)
    return cut, words.size if wanted == equal else _find_equal(words, cut, wanted) + 1


def mark(words: Array, cut: int, place: int) -> Array:
    """Return the bool mask of a choice.

    Args:
        words: What `words_of` returns.
        cut: Size of the last one dropped.
        place: Index before which scores of that size are dropped.
    """
    keep = np.empty(words.size, np.bool_)
    for piece, sizes in _pieces(words):
        kept = keep[piece]
        np.greater_equal(sizes, cut, out=kept)
        strict = max(place - piece.start, 0)
        np.greater(sizes[:strict], cut, out=kept[:strict])
    return keep


def _pieces(words: Array) -> Iterator[tuple[slice, Array]]:
    """Yield where pieces lie, and their sizes, which the next piece overwrites."""
    room = np.empty(min(_PIECE, words.size), words.dtype)
    for start in range(0, words.size, _PIECE):
        piece = slice(start, min(start + _PIECE, words.size))
        yield piece, np.bitwise_and(words[piece], _top(words), out=room[: piece.stop - start])


def _top(words: Array) -> Any:
    """Return the largest size, of the words' type: all bits but the sign."""
    return words.dtype.type(np.iinfo(words.dtype).max >> 1)


def _search(words: Array, dropped: int) -> tuple[int, int, int] | None:
    """Order the few scores within a bracket; None where the wanted one is not among them."""
    low, high = _bracket(words, dropped)
    below, within = 0, []
    for _, sizes in _pieces(words):
        inside = sizes >= low
        below += sizes.size - int(np.count_nonzero(inside))
        inside &= sizes <= high
        within.append(sizes.compress(inside))
    found = np.concatenate(within)
    if not below < dropped <= below + found.size:
        return None
    found.partition(dropped - below - 1)
    cut = found[dropped - below - 1]
    smaller = below + int(np.count_nonzero(found < cut))
    return int(cut), dropped - smaller, int(np.count_nonzero(found == cut))


def _bracket(words: Array, dropped: int) -> tuple[Any, Any]:
    """Return sizes a little below and above the wanted one, by a sample."""
    places = _sample(words.size)
    if not places.size:
        return words.dtype.type(0), _top(words)
    sample = words[places] & _top(words)
    middle, slack = dropped * sample.size // words.size, math.isqrt(sample.size) * 7 // 4
    first, last = max(middle - slack, 0), min(middle + slack, sample.size - 1)
    sample.partition((first, last))
    low = sample[first] if middle > slack else words.dtype.type(0)
    return low, sample[last] if middle + slack < sample.size else _top(words)


@functools.lru_cache(maxsize=64)
def _sample(weights: int) -> Array:
    """Return the places of 4^k scores to look at, or of none where there are few.

    The distances between them are uneven, so that the rows of a weight mislead none.
    """
    sides = (1 << k for k in range(7, 3, -1))
    side = next((s for s in sides if s**6 <= weights**2 and 4 * s * s <= weights), 0)
    order = np.arange(side * side, dtype=np.int64)
    stride = weights // max(order.size, 1)
    return order * stride + (order * 2654435761 % 2**32 // 256) % max(stride, 1)


def _count(words: Array, dropped: int) -> tuple[int, int, int]:
    """Find the wanted size digit by digit, from the highest: nothing is stored but counts."""
    cut, wanted, equal = 0, dropped, 0
    for shift in range(8 * words.itemsize - _DIGIT, -1, -_DIGIT):
        counts = np.zeros(1 << _DIGIT, np.int64)
        for _, sizes in _pieces(words):
            digits = sizes >> shift
            alike = digits[digits >> _DIGIT == cut] if cut else digits[digits < 1 << _DIGIT]
            counts += np.bincount(
                (alike & ((1 << _DIGIT) - 1)).astype(np.int64), minlength=counts.size
            )
        totals = counts.cumsum()
        digit = int(np.searchsorted(totals, wanted))
        equal = int(counts[digit])
        wanted -= int(totals[digit]) - equal
        cut = (cut << _DIGIT) + digit
    return cut, wanted, equal


def _find_equal(words: Array, cut: int, wanted: int) -> int:
    """Return the index of the ``wanted``-th score of a size, counted from 1."""
    for piece, sizes in _pieces(words):
        same = np.flatnonzero(sizes == cut)
        if same.size >= wanted:
            return piece.start + int(same[wanted - 1])
        wanted -= same.size
    message = f"There are {wanted} too few scores of size {cut}."
    raise LookupError(message)
