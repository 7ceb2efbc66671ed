"""Choosing the buckets with which a mask is shortest (`pemn_surgery.context`)."""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from pemn_surgery.buckets import (
    INVERTED,
    LEVELS,
    NEIGHBOURS,
    BaseGuide,
    Guide,
    Table,
    arrange,
    buckets_of,
    model_of,
)
from pemn_surgery.odds import odds_of

Array = Any  # of numpy; its element type is in the docstrings

_MOST_PLACES = 255
_STREAM_BITS = 19  # the end of a stream, and what fills up its last byte
_COARSER = (1, 2, 4, 16)  # a small mask gets fewer levels, as each costs a stream
_MOST_BUCKETS = 1 << 14
_FEWEST_WEIGHTS = 64  # in a bucket, which has a byte in the table


def choose_table(
    flags: Array,
    guides: Sequence[Guide | BaseGuide],
    sizes: Sequence[Array],
    kernel: Sequence[int],
) -> Table:
    """Return the table with which table and streams are shortest together."""
    choices = [
        (*_cheapest(counts.reshape(-1, 2), step), places, row, log2s)
        for places, row in _kernels(len(flags), kernel)
        for log2s, counts in _counts(flags, guides, sizes, places, row)
        for step in _COARSER
    ]
    _, levels, places, row, log2s = min(choices)
    chosen = zip(guides, log2s, strict=True)
    return Table(places, row, tuple(guide._replace(log2=log2) for guide, log2 in chosen), levels)


def _kernels(weights: int, kernel: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield what may be known of a kernel: numbers of places, and widths of rows or 0."""
    yield 1, 0
    places = math.prod(kernel)
    if 1 < places <= _MOST_PLACES and weights % places == 0:
        most = _most_buckets(weights)
        yield from [(places, 0)] * (places <= most)
        yield from [(places, kernel[-1])] * (NEIGHBOURS * places <= most)


def _most_buckets(weights: int) -> int:
    return max(min(weights // _FEWEST_WEIGHTS, _MOST_BUCKETS), 1)


def _counts(
    flags: Array, guides: Sequence[Guide | BaseGuide], sizes: Sequence[Array], places: int, row: int
) -> Iterator[tuple[tuple[int, ...], Array]]:
    """Yield all choices of bits of the guides, and the zeros and ones in each of their buckets."""
    of_kernel = places * (NEIGHBOURS if row else 1)
    most = (_most_buckets(len(flags)) // of_kernel).bit_length() - 1  # bits of all guides
    finest = [min(guide.log2, most) for guide in guides]
    counts = np.zeros(2 * of_kernel << sum(finest), np.int64)
    known = arrange(places, row, finest, flags, sizes)
    for place, buckets in buckets_of(known):
        counts += np.bincount(2 * buckets + known.flags[place], minlength=len(counts))
    shape = [of_kernel, *(1 << log2 for log2 in finest), 2]
    for log2s, coarser in _coarser(counts.reshape(shape), 1):
        if sum(log2s) <= most:
            yield log2s, coarser


def _coarser(counts: Array, axis: int) -> Iterator[tuple[tuple[int, ...], Array]]:
    """Yield log2 sizes and sums for all ways to join neighbours along this axis and those after.

    Args:
        counts: int64 array whose sizes are powers of two, but for the first and the last axis.
        axis: Where to begin.
    """
    if axis == counts.ndim - 1:
        yield (), counts
        return
    for others, found in _coarser(counts, axis + 1):
        yield (counts.shape[axis].bit_length() - 1, *others), found
    if counts.shape[axis] > 1:
        before, after = counts.shape[:axis], counts.shape[axis + 1 :]
        yield from _coarser(counts.reshape(*before, -1, 2, *after).sum(axis=axis + 1), axis)


def _cheapest(counts: Array, step: int) -> tuple[float, bytes]:
    """Return the best table of every ``step``-th level, after the bits that all takes with it.

    Args:
        counts: Zeros and ones in each bucket, shape (buckets, 2).
        step: Between the levels.
    """
    between, of_many, of_few = _costs(step)
    few, many = counts.min(axis=1), counts.max(axis=1)
    best = np.searchsorted(between, many / np.maximum(few, 1e-9))
    best[many == 0] = best.max()  # a bucket without weights must not cost a stream
    bits = many @ of_many[best] + few @ of_few[best]
    bits += 8 * len(best) + _STREAM_BITS * np.count_nonzero(np.bincount(best))
    table = step * best + INVERTED * (counts[:, 0] > counts[:, 1])
    return float(bits), table.astype(np.uint8).tobytes()


@lru_cache(maxsize=len(_COARSER))
def _costs(step: int) -> tuple[Array, Array, Array]:
    """Return the odds between every ``step``-th level, and at each the bits of both weights."""
    levels = range(0, LEVELS, step)
    odds = np.array([odds_of(model_of(level).odds) for level in levels])
    return np.sqrt(odds[1:] * odds[:-1]), np.log2(1 + 1 / odds), np.log2(1 + odds)
