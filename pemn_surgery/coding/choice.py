"""Choosing the context with which a mask is shortest (`pemn_surgery.coding.context`)."""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, product
from typing import Any

import numpy as np

from pemn_surgery.coding.context import NEIGHBOURS, TURNED, Context, Guide, buckets_of
from pemn_surgery.coding.table import ALL, LEVELS, density_of

Array = Any  # of numpy; its element type is in the docstrings

_MOST_PLACES = 255
_MOST_BUCKETS = 1 << 14
_FEWEST_WEIGHTS = 64  # in a bucket, which has a byte
_OF_A_SEED = 24  # bytes


def choose(flags: Array, guides: Sequence[Guide], kernel: Sequence[int]) -> Context:
    """Return the context with which levels and stream are shortest; see `codec.encode`."""
    choices = [
        (*_levels(counts.reshape(-1, 2), _looking_at(guides, log2s)), places, row, log2s)
        for places, row in _kernels(len(flags), kernel)
        for log2s, counts in _counts(flags, Context(places, row), guides)
    ]
    _, levels, places, row, log2s = min(choices)
    return Context(places, row, _looking_at(guides, log2s), levels)


def _looking_at(guides: Sequence[Guide], log2s: Sequence[int]) -> tuple[Guide, ...]:
    return tuple(guide._replace(log2=log2) for guide, log2 in zip(guides, log2s, strict=True))


def _kernels(weights: int, kernel: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield what may be known of a kernel: numbers of places, and widths of rows or 0."""
    yield 1, 0
    places = math.prod(kernel)
    if 1 < places <= _MOST_PLACES and weights % places == 0:
        near = [0] * (places <= _most_buckets(weights))
        near += [kernel[-1]] * (NEIGHBOURS * places <= _most_buckets(weights))
        yield from ((places, row) for row in near)


def _most_buckets(weights: int) -> int:
    return max(min(weights // _FEWEST_WEIGHTS, _MOST_BUCKETS), 1)


def _counts(
    flags: Array, of_kernel: Context, guides: Sequence[Guide]
) -> Iterator[tuple[tuple[int, ...], Array]]:
    """Yield all choices of bits of the guides, and the zeros and ones in each of their buckets."""
    most = (_most_buckets(len(flags)) // of_kernel.buckets).bit_length() - 1  # bits of all guides
    finest = [min(guide.log2, most) for guide in guides]
    context = Context(of_kernel.places, of_kernel.row, _looking_at(guides, finest))
    counts = np.zeros(2 * context.buckets, np.int64)
    for place, buckets in buckets_of(flags, context):
        counts += np.bincount(2 * buckets + flags[place], minlength=len(counts))
    for log2s in product(*(range(log2 + 1) for log2 in finest)):
        pairs = zip(log2s, finest, strict=True)
        parts = chain(*((1 << log2, 1 << all_bits - log2) for log2, all_bits in pairs))
        apart = counts.reshape(of_kernel.buckets, *parts, 2)
        if sum(log2s) <= most:
            yield log2s, apart.sum(axis=tuple(range(2, apart.ndim - 1, 2)))


def _levels(counts: Array, guides: Sequence[Guide]) -> tuple[float, bytes]:
    """Return a mask's bits with the best levels, and those, by counts of shape (buckets, 2)."""
    between, of_many, of_few = _costs()
    few, many = counts.min(axis=1), counts.max(axis=1)
    best = np.searchsorted(between, many / np.maximum(few, 1e-9))
    heads = sum(guide.log2 > 0 and guide.seed is not None for guide in guides)
    bits = many @ of_many[best] + few @ of_few[best] + 8 * (len(best) + _OF_A_SEED * heads)
    levels = best + TURNED * (counts[:, 0] > counts[:, 1])
    return float(bits), levels.astype(np.uint8).tobytes()


@lru_cache(maxsize=1)
def _costs() -> tuple[Array, Array, Array]:
    """Return the odds between levels, and at each the bits of a likely and an unlikely weight."""
    likely = np.array([density_of(level) for level in range(LEVELS)]) / ALL
    odds = likely / (1 - likely)
    return np.sqrt(odds[1:] * odds[:-1]), -np.log2(likely), -np.log2(1 - likely)
