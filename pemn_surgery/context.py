"""Masks coded beside the numbers that a seed gives again: initial scores, and frozen weights.

Training moves scores a little, so a mask differs from its initial mask where initial scores were
near the cut, and more where weights are large. The integers that scores and weights are made of
(`rng`) tell where that is on every machine, without them:

* Weights go to *buckets*, by the size of their initial score, by the size of their frozen number,
  and by their place in a kernel: where maps are small, few places ever see an input.
* The weights of a bucket have one *level*: how likely most of them are, and whether most are
  ones. A table has a byte for each bucket.
* The weights of a level are one stream, in their own order, coded by `entropy`.

All that only guesses: every mask can be coded, and one that it says nothing about is no shorter.
``docs/format.md`` describes the bytes, ``docs/coding.md`` has the sizes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from pemn_surgery import entropy, rng
from pemn_surgery.entropy import CodeError, Model

Array = Any  # of numpy; its element type is in the docstrings

MOST_LOG2 = 8

_LEVELS = 64
_INVERTED = 0x80
_MOST_WEIGHTS_IN_A_BYTE = 8 * 255  # a code has a bit at least, the longest stands for 255 weights
_AT_ONCE = 1 << 16  # arrays between steps stay in the processor's cache
_MOST_PLACES = 255
# What is tried when a mask is coded.
_STREAM_BITS = 19  # the end of a stream, and what fills up its last byte
_COARSER = (1, 2, 4, 16)  # a small mask gets fewer levels, as each costs a stream
_MOST_BUCKETS = 1 << 14
_FEWEST_WEIGHTS = 64  # in a bucket, which has a byte in the table


class Guide(NamedTuple):
    """Numbers of a seed, one for each weight.

    Attributes:
        key: Of their stream (`rng.key_of`).
        period: Weight i has number ``i % period``.
        log2: How many upper bits of a number's size are looked at, 0 to 8.
    """

    key: bytes
    period: int
    log2: int = MOST_LOG2


@dataclass(frozen=True)
class Table:
    """The buckets, and the level of each.

    Attributes:
        places: Number of places in a kernel, 1 to 255: weight i has place ``i % places``.
        guides: What else decides a weight's bucket.
        levels: A byte for each bucket: its level, and 128 more where most weights are zero. Buckets
            count in places, then in the sizes of one guide after the other, the last fastest.
    """

    places: int
    guides: tuple[Guide, ...]
    levels: bytes

    @property
    def buckets(self) -> int:
        """Number of buckets."""
        return self.places << sum(guide.log2 for guide in self.guides)


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


def encode(
    packed: Array, weights: int, guides: Sequence[Guide], places: int = 1
) -> tuple[Table, bytes]:
    """Code a mask.

    Args:
        packed: uint8 array of shape (ceil(weights / 8),): weight i is bit ``i % 8`` of byte
            ``i // 8``.
        weights: Number of weights.
        guides: What may guess the mask; as many bits of each as are found worth it, at most its
            ``log2``, decide the buckets.
        places: Number of places in a kernel; used if worth it too.

    Returns:
        Table, and the streams, one behind the other.
    """
    flags = np.unpackbits(packed, count=weights, bitorder="little")
    sizes = [sizes_of(guide, weights) for guide in guides]
    table = _choose_table(flags, guides, sizes, places)
    streams: list[list[Array]] = [[] for _ in range(_LEVELS)]
    for part in _parts(weights, table, sizes):
        pieces = np.split((flags[part.place] ^ part.inverted)[part.order], part.ends[:-1])
        for stream, piece in zip(streams, pieces, strict=True):
            stream.append(piece)
    return table, b"".join(_encode_streams(streams))


def decode(table: Table, streams: bytes, weights: int) -> Array:
    """Return the mask that `encode` was given.

    Memory stays below six bytes a weight; check ``weights`` against `most_weights` first.

    Args:
        table: The table.
        streams: The streams.
        weights: Number of weights.

    Returns:
        uint8 array of shape (ceil(weights / 8),).

    Raises:
        CodeError: If the bytes are no code of so many weights.
    """
    sizes = [sizes_of(guide, weights) for guide in table.guides]
    found = _decode_streams(streams, _weights_of_levels(weights, table, sizes))
    packed = np.empty(-(-weights // 8), np.uint8)
    begins = np.zeros(_LEVELS, np.int64)
    for part in _parts(weights, table, sizes):
        ends = begins + np.diff(part.ends, prepend=0)
        flags = np.empty(len(part.order), np.uint8)
        flags[part.order] = np.concatenate(
            [found[level][begins[level] : ends[level]] for level in range(_LEVELS)]
        )
        start = part.place.start // 8
        bits = np.packbits(flags ^ part.inverted, bitorder="little")
        packed[start : start + len(bits)] = bits
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


def sizes_of(guide: Guide, weights: int) -> Array:
    """Return the upper eight bits of the sizes of a guide's numbers, uint8; each number once.

    Numbers are symmetric in their integers w, with zero in the middle: the size is w - 2 ** 31, or
    2 ** 31 - 1 - w below the middle.
    """
    count = min(guide.period, weights) if guide.log2 else 0
    found = np.zeros(max(count, 1), np.uint8)
    place = 0
    for words in rng.pieces(guide.key, count):
        signed = (words ^ np.uint32(1 << 31)).view(np.int32)
        size = signed ^ (signed >> 31)  # ~signed below the middle
        found[place : place + len(words)] = size >> (31 - MOST_LOG2)
        place += len(words)
    return found


def _buckets(
    weights: int, places: int, sizes: Sequence[Array], log2s: Sequence[int]
) -> Iterator[tuple[slice, Array]]:
    """Yield each weight's bucket, int32, piece by piece.

    Args:
        weights: Number of weights.
        places: Number of places in a kernel.
        sizes: What `sizes_of` returned, for each guide.
        log2s: How many of their bits are looked at.
    """
    longest = min(weights, _AT_ONCE)
    of_places = _repeated(np.arange(places, dtype=np.int32), longest, weights)
    of_guides = [_repeated(one, longest, weights) for one in sizes]
    for start in range(0, weights, _AT_ONCE):
        count = min(_AT_ONCE, weights - start)
        found = of_places[start % places :][:count]
        for one, all_of_it, log2 in zip(sizes, of_guides, log2s, strict=True):
            upper = all_of_it[start % len(one) :][:count] >> (MOST_LOG2 - log2)
            found = (found << log2) | upper
        yield slice(start, start + count), found


def _repeated(values: Array, count: int, weights: int) -> Array:
    """Return values, repeated until ``count`` follow on each of them; not if each is used once."""
    return values if len(values) >= weights else np.tile(values, count // len(values) + 2)


def _parts(weights: int, table: Table, sizes: Sequence[Array]) -> Iterator[_Part]:
    levels = np.frombuffer(table.levels, np.uint8)
    log2s = [guide.log2 for guide in table.guides]
    for place, buckets in _buckets(weights, table.places, sizes, log2s):
        chosen = levels[buckets]
        own = chosen % _LEVELS
        order = np.argsort(own, kind="stable")
        ends = np.cumsum(np.bincount(own, minlength=_LEVELS))
        yield _Part(place, order, ends, chosen // _INVERTED)


def _weights_of_levels(weights: int, table: Table, sizes: Sequence[Array]) -> list[int]:
    levels = np.frombuffer(table.levels, np.uint8) % _LEVELS
    log2s = [guide.log2 for guide in table.guides]
    counts = np.zeros(_LEVELS, np.int64)
    for _, buckets in _buckets(weights, table.places, sizes, log2s):
        counts += np.bincount(levels[buckets], minlength=_LEVELS)
    return counts.tolist()


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


def _choose_table(
    flags: Array, guides: Sequence[Guide], sizes: Sequence[Array], places: int
) -> Table:
    """Return the table with which table and streams are shortest together."""
    choices = [
        (*_cheapest(counts.reshape(-1, 2), step), of_places, log2s)
        for of_places in sorted({1, places if places <= _MOST_PLACES else 1})
        for log2s, counts in _counts(flags, guides, sizes, of_places)
        for step in _COARSER
    ]
    _, levels, of_places, log2s = min(choices)
    chosen = zip(guides, log2s, strict=True)
    return Table(of_places, tuple(guide._replace(log2=log2) for guide, log2 in chosen), levels)


def _counts(
    flags: Array, guides: Sequence[Guide], sizes: Sequence[Array], places: int
) -> Iterator[tuple[tuple[int, ...], Array]]:
    """Yield all choices of bits of the guides, and the zeros and ones in each of their buckets."""
    finest = [guide.log2 for guide in guides]
    counts = np.zeros(2 * places << sum(finest), np.int64)
    for place, buckets in _buckets(len(flags), places, sizes, finest):
        counts += np.bincount(2 * buckets + flags[place], minlength=len(counts))
    most = min(len(flags) // _FEWEST_WEIGHTS, _MOST_BUCKETS)
    for log2s in product(*(range(log2 + 1) for log2 in finest)):
        if places << sum(log2s) <= max(most, 1):
            pairs = [
                (1 << kept, 1 << log2 - kept) for kept, log2 in zip(log2s, finest, strict=True)
            ]
            shape = [places, *(size for pair in pairs for size in pair), 2]
            yield log2s, counts.reshape(shape).sum(axis=tuple(range(2, len(shape) - 1, 2)))


def _cheapest(counts: Array, step: int) -> tuple[float, bytes]:
    """Return the best table of every ``step``-th level, after the bits that all takes with it.

    Args:
        counts: Zeros and ones in each bucket, shape (buckets, 2).
        step: Between the levels.
    """
    levels = np.arange(0, _LEVELS, step)
    odds = np.array([entropy.odds_of(model_of(level).odds) for level in levels.tolist()])
    few, many = counts.min(axis=1), counts.max(axis=1)
    between = np.sqrt(odds[1:] * odds[:-1])
    best = np.searchsorted(between, many / np.maximum(few, 1e-9))
    bits = many @ np.log2(1 + 1 / odds)[best] + few @ np.log2(1 + odds)[best]
    bits += 8 * len(best) + _STREAM_BITS * len(np.unique(best))
    table = levels[best] + _INVERTED * (counts[:, 0] > counts[:, 1])
    return float(bits), table.astype(np.uint8).tobytes()
