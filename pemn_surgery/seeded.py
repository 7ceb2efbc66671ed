"""Masks coded beside the scores that they were trained from, which a seed gives again.

Training moves scores a little, so a mask differs from its initial mask where initial scores were
near the cut. The integers that the initial scores are made of (`rng`) tell where that is on every
machine, without the scores:

* Weights go to 2 ** b *buckets* by the size of their initial score.
* The weights of a bucket have one *level*: how likely most of them are, and whether most are
  ones. A table has a byte for each bucket.
* The weights of a level are one stream, in their own order, coded by `entropy`.

The scores only guess: every mask can be coded, and one that they say nothing about is no shorter.
``docs/format.md`` describes the bytes, ``docs/coding.md`` has the sizes.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pemn_surgery import entropy, rng
from pemn_surgery.entropy import CodeError, Model

Array = Any  # of numpy; its element type is in the docstrings

MOST_BUCKETS_LOG2 = 8

_BUCKETS = 1 << MOST_BUCKETS_LOG2
_LEVELS = 64
_INVERTED = 0x80
_MOST_WEIGHTS_IN_A_BYTE = 8 * 255  # a code has a bit at least, the longest stands for 255 weights
_AT_ONCE = 1 << 16  # arrays between steps stay in the processor's cache
_STREAM_BITS = 19  # the end of a stream, and what fills up its last byte
_COARSER = (1, 2, 4, 8, 64)  # a small mask gets fewer levels, as each costs a stream


def most_weights(nbytes: int) -> int:
    """Return how many weights so many bytes of streams can hold."""
    return _MOST_WEIGHTS_IN_A_BYTE * nbytes


def model_of(level: int) -> Model:
    """Return the code of a level's weights: four levels to a doubling of the odds.

    Args:
        level: 0 (hardly more ones than zeros) to 63.
    """
    odds = 4 * level + 2
    return Model(8 if odds < 30 else 6 if odds < 62 else 1, odds)


def encode(packed: Array, weights: int, key: bytes) -> tuple[bytes, bytes]:
    """Code a mask.

    Args:
        packed: uint8 array of shape (ceil(weights / 8),): weight i is bit ``i % 8`` of byte
            ``i // 8``.
        weights: Number of weights.
        key: Of the initial scores' stream (`rng.key_of`).

    Returns:
        Table of 1, 2, 4 ... 256 bytes, and the streams, one behind the other.
    """
    buckets = _buckets(key, weights)
    flags = np.unpackbits(packed, count=weights, bitorder="little")
    table = _choose_table(_count(buckets, flags))
    streams: list[list[Array]] = [[] for _ in range(_LEVELS)]
    for part in _parts(buckets, table):
        pieces = np.split((flags[part.place] ^ part.inverted)[part.order], part.ends[:-1])
        for stream, piece in zip(streams, pieces, strict=True):
            stream.append(piece)
    return table, b"".join(_encode_streams(streams))


def decode(table: bytes, streams: bytes, weights: int, key: bytes) -> Array:
    """Return the mask that `encode` was given.

    Memory stays below four bytes a weight; check ``weights`` against `most_weights` first.

    Args:
        table: 1, 2, 4 ... 256 bytes.
        streams: The streams.
        weights: Number of weights.
        key: Of the initial scores' stream.

    Returns:
        uint8 array of shape (ceil(weights / 8),).

    Raises:
        CodeError: If the bytes are no code of so many weights.
    """
    buckets = _buckets(key, weights)
    found = _decode_streams(streams, _weights_of_levels(buckets, table))
    packed = np.empty(-(-weights // 8), np.uint8)
    begins = np.zeros(_LEVELS, np.int64)
    for part in _parts(buckets, table):
        counts = np.diff(part.ends, prepend=0)
        ends = begins + counts
        flags = np.empty(len(part.order), np.uint8)
        flags[part.order] = np.concatenate(
            [found[level][begins[level] : ends[level]] for level in np.flatnonzero(counts)]
        )
        flags ^= part.inverted
        start = part.place.start // 8
        packed[start : start + -(-len(flags) // 8)] = np.packbits(flags, bitorder="little")
        begins = ends
    return packed


# -- buckets and levels ----------------------------------------------------------------------------


class _Part(NamedTuple):
    """Weights that are taken at once.

    Attributes:
        place: Where they lie.
        order: Their places in it by level, int64; within a level in their own order.
        ends: Where in ``order`` each level ends, int64 of shape (64,).
        inverted: Whether most weights of their buckets are zero, uint8.
    """

    place: slice
    order: Array
    ends: Array
    inverted: Array


def _buckets(key: bytes, weights: int) -> Array:
    """Return the finest bucket of each weight, uint8: the size of its initial score.

    Scores are uniform in their integers w, with zero in the middle: the size is w - 2 ** 31, or
    2 ** 31 - 1 - w below the middle. A bucket is the upper bits of that.
    """
    found = np.empty(weights, np.uint8)
    place = 0
    for words in rng.pieces(key, weights):
        signed = (words ^ np.uint32(1 << 31)).view(np.int32)
        size = signed ^ (signed >> 31)  # ~signed below the middle
        found[place : place + len(words)] = size >> (31 - MOST_BUCKETS_LOG2)
        place += len(words)
    return found


def _parts(buckets: Array, table: bytes) -> Iterator[_Part]:
    levels, inverted = _lookups(table)
    for start in range(0, len(buckets), _AT_ONCE):
        place = slice(start, min(start + _AT_ONCE, len(buckets)))
        which = buckets[place].tobytes()
        own = np.frombuffer(which.translate(levels), np.uint8)
        order = np.argsort(own, kind="stable")
        ends = np.cumsum(np.bincount(own, minlength=_LEVELS))
        yield _Part(place, order, ends, np.frombuffer(which.translate(inverted), np.uint8))


def _lookups(table: bytes) -> tuple[bytes, bytes]:
    """Return, for each of the finest buckets, the level, and whether most weights are zero."""
    fine = np.repeat(np.frombuffer(table, np.uint8), _BUCKETS // len(table))
    return (fine % _LEVELS).tobytes(), (fine // _INVERTED).tobytes()


def _weights_of_levels(buckets: Array, table: bytes) -> list[int]:
    levels, _ = _lookups(table)
    counts = np.zeros(_LEVELS, np.int64)
    np.add.at(counts, np.frombuffer(levels, np.uint8), _histogram(buckets, _BUCKETS))
    return counts.tolist()


def _histogram(values: Array, length: int) -> Array:
    """Return how often 0, 1, ... ``length`` - 1 occur, int64; bincount alone takes much memory."""
    starts = range(0, len(values), _AT_ONCE)
    counts = (np.bincount(values[at : at + _AT_ONCE], minlength=length) for at in starts)
    return sum(counts, start=np.zeros(length, np.int64))


# -- streams ---------------------------------------------------------------------------------------


def _encode_streams(streams: Sequence[Sequence[Array]]) -> Iterator[bytes]:
    """Yield the codes of all levels that have weights."""
    for level, pieces in enumerate(streams):
        flags = np.concatenate([np.empty(0, np.uint8), *pieces])
        if len(flags):
            packed = np.packbits(flags, bitorder="little")
            yield entropy.encode(packed, len(flags), model_of(level))


def _decode_streams(streams: bytes, weights: Sequence[int]) -> list[Array]:
    """Return the flags of each level, uint8.

    Raises:
        CodeError: If the bytes are no codes of so many weights.
    """
    found, rest = [], memoryview(streams)
    for level, count in enumerate(weights):
        packed, used = np.empty(0, np.uint8), 0
        if count:
            packed, used = entropy.decode_first(rest, count, model_of(level))
        found.append(np.unpackbits(packed, count=count, bitorder="little"))
        rest = rest[used:]
    if rest:
        message = f"has {len(rest)} bytes behind the codes of its {sum(weights)} weights"
        raise CodeError(message)
    return found


# -- choosing the table ----------------------------------------------------------------------------


def _count(buckets: Array, flags: Array) -> Array:
    """Return the number of zeros and of ones in each of the finest buckets, shape (256, 2)."""
    both = _histogram(buckets, _BUCKETS)
    ones = _histogram(buckets[flags.view(np.bool_)], _BUCKETS)
    return np.stack([both - ones, ones], axis=1)


def _choose_table(counts: Array) -> bytes:
    """Return the table with which table and streams are shortest together."""
    costs = counts @ _bits_of_bytes()
    choices = []
    while len(costs):
        choices += [_cheapest(costs, step) for step in _COARSER]
        costs = costs[::2] + costs[1::2] if len(costs) > 1 else costs[:0]
    return min(choices)[1]


def _bits_of_bytes() -> Array:
    """Return what a zero and a one take by the byte in the table, float64 of shape (2, 128).

    The first 64 are the levels, the others the levels inverted.
    """
    odds = np.array([entropy.odds_of(model_of(level).odds) for level in range(_LEVELS)])
    zero, one = np.log2(1 + odds), np.log2(1 + 1 / odds)
    return np.stack([np.append(zero, one), np.append(one, zero)])


def _cheapest(costs: Array, step: int) -> tuple[float, bytes]:
    """Return the bits that all takes with the best of every ``step``-th level, and the table."""
    kept = costs[:, ::step]
    best = kept.argmin(axis=1) * step
    levels = best % _LEVELS
    total = kept.min(axis=1).sum() + 8 * len(best) + _STREAM_BITS * len(np.unique(levels))
    return float(total), (levels + _INVERTED * (best // _LEVELS)).astype(np.uint8).tobytes()
