"""Masks coded beside what a reader knows of each weight before its bit.

That is its place in a convolution's kernel; the bits of its neighbours there, once they are read;
and, if its score was drawn, numbers that a seed gives again: training moves scores a little, so a
mask differs from its initial mask where initial scores were near the cut, and more where frozen
numbers are large. The integers that both are made of (`rng`) tell where that is on every machine.

* Weights go to *buckets*, by their place, by the bits of their left and upper neighbour, by the
  size of their initial score, and by the size of their frozen number; each where it pays.
* The weights of a bucket have one *level*: how likely most of them are, and whether most are
  ones. A table has a byte for each bucket.
* The weights of a level are one stream, coded by `entropy`.
* With neighbours weights are taken in *stages*: all of the first place, then all of the second.
  A stage is read at once, as it needs only stages before.

All that only guesses: every mask can be coded, and one that it says nothing about is no shorter.
``docs/format.md`` describes the bytes, ``docs/coding.md`` has the sizes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pemn_surgery import entropy, rng
from pemn_surgery.entropy import CodeError, Model

Array = Any  # of numpy; its element type is in the docstrings

MOST_LOG2 = 8

_LEVELS = 64
_INVERTED = 0x80
_NEIGHBOURS = 4  # what the left and the upper one can be together
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
        row: Width of the kernel, 1 to ``places``, if neighbours decide a weight's bucket; 0 if not.
        guides: What else decides it.
        levels: A byte for each bucket: its level, and 128 more where most weights are zero. Buckets
            count in places, then in neighbours (2 for the left, 1 for the upper), then in the sizes
            of one guide after the other, the last fastest.
    """

    places: int
    row: int
    guides: tuple[Guide, ...]
    levels: bytes

    @property
    def buckets(self) -> int:
        """Number of buckets."""
        near = _NEIGHBOURS if self.row else 1
        return self.places * near << sum(guide.log2 for guide in self.guides)


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
    packed: Array, weights: int, guides: Sequence[Guide] = (), kernel: Sequence[int] = ()
) -> tuple[Table, bytes]:
    """Code a mask.

    Args:
        packed: uint8 array of shape (ceil(weights / 8),): weight i is bit ``i % 8`` of byte
            ``i // 8``.
        weights: Number of weights.
        guides: What may guess the mask; as many bits of each as are found worth it, at most its
            ``log2``, decide the buckets.
        kernel: Shape of a kernel, the weight's last dimensions; places and neighbours in it are
            used if worth it too.

    Returns:
        Table, and the streams, one behind the other.
    """
    flags = np.unpackbits(packed, count=weights, bitorder="little")
    sizes = [_repeated(sizes_of(guide, weights), weights) for guide in guides]
    table = _choose_table(flags, guides, sizes, kernel)
    known = _known(table.places, table.row, [guide.log2 for guide in table.guides], flags, sizes)
    streams: dict[int, list[Array]] = {level: [] for level in _levels_of(table)}
    for part in _parts(known, table):
        flags = (known.flags[part.place] ^ part.inverted)[part.order]
        ends = np.cumsum(part.counts)
        for level, stream in streams.items():
            stream.append(flags[ends[level] - part.counts[level] : ends[level]])
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
    if table.row and weights % table.places:
        message = f"has {weights} weights, not whole kernels of {table.places} places"
        raise CodeError(message)
    found = _decode_streams(streams, _levels_of(table), weights)
    sizes = (_repeated(sizes_of(guide, weights), weights) for guide in table.guides)
    log2s = [guide.log2 for guide in table.guides]
    known = _known(table.places, table.row, log2s, np.empty(weights, np.uint8), sizes)
    used = dict.fromkeys(found, 0)
    for part in _parts(known, table):
        flags = np.empty(len(part.order), np.uint8)
        flags[part.order] = _taken(found, used, part.counts, weights)
        known.flags[part.place] = flags ^ part.inverted
    _check_rest(found, used, weights)
    return np.packbits(_in_own_order(known.flags, known.stages), bitorder="little")


# -- buckets and levels ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Known:
    """What decides buckets; all arrays have an element for each weight, in the order of stages.

    Attributes:
        places: Number of places in a kernel.
        row: Width of the kernel; 0 without neighbours.
        log2s: How many bits of the guides' sizes are looked at.
        flags: The mask, uint8; a part may be unknown until its stage.
        sizes: What `sizes_of` returned for each guide, uint8.
    """

    places: int
    row: int
    log2s: Sequence[int]
    flags: Array
    sizes: Sequence[Array]

    @property
    def stages(self) -> int:
        """Number of stages: one for each place, as neighbours must be known before."""
        return self.places if self.row else 1


def _known(
    places: int, row: int, log2s: Sequence[int], flags: Array, sizes: Iterable[Array]
) -> _Known:
    """Bring arrays into the order of stages."""
    stages = places if row else 1
    in_stages = [_in_stages(one, stages) for one in sizes]
    return _Known(places, row, log2s, _in_stages(flags, stages), in_stages)


def _in_stages(values: Array, stages: int) -> Array:
    return values.reshape(-1, stages).T.reshape(-1)


def _in_own_order(values: Array, stages: int) -> Array:
    """Undo `_in_stages`."""
    return values.reshape(stages, -1).T.reshape(-1)


class _Part(NamedTuple):
    """Weights that are taken at once.

    Attributes:
        place: Where they lie.
        order: Their places in it by level, int64; within a level in their own order.
        counts: How many each level has, int64 of shape (64,).
        inverted: Whether most weights of their buckets are zero, uint8.
    """

    place: slice
    order: Array
    counts: Array
    inverted: Array


def sizes_of(guide: Guide, weights: int) -> Array:
    """Return the upper eight bits of the sizes of a guide's numbers, each number once.

    Numbers are symmetric in their integers w, with zero in the middle: the size is w - 2 ** 31, or
    2 ** 31 - 1 - w below the middle.

    Args:
        guide: The guide.
        weights: Number of weights.

    Returns:
        uint8 array of shape (min(period, weights),), but of one zero if there are no weights or
        no bits are looked at.
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


def _repeated(values: Array, count: int) -> Array:
    """Return the first ``count`` of values that are repeated without end."""
    return np.tile(values, -(-count // len(values)))[:count]


def _buckets(known: _Known) -> Iterator[tuple[slice, Array]]:
    """Yield the bucket of each weight, int32, piece by piece; none reaches into two stages."""
    weights = len(known.flags)
    length = weights // known.stages
    of_places = np.arange(known.places, dtype=np.int32)
    of_places = _repeated(of_places, min(length, _AT_ONCE) + known.places)
    for stage in range(known.stages):
        for start in range(0, length, _AT_ONCE):
            place = slice(stage * length + start, stage * length + min(start + _AT_ONCE, length))
            if known.row:
                found = _NEIGHBOURS * stage + _neighbours(known, stage, place)
            else:
                found = of_places[start % known.places :][: place.stop - place.start]
            for sizes, log2 in zip(known.sizes, known.log2s, strict=True):
                found = (found << log2) | (sizes[place] >> (MOST_LOG2 - log2))
            yield place, found


def _neighbours(known: _Known, stage: int, place: slice) -> Array:
    """Return twice the bit to the left and the bit above, int32; 0 where the kernel ends."""
    length = len(known.flags) // known.stages
    found = np.zeros(place.stop - place.start, np.int32)
    if stage % known.row:
        found += 2 * known.flags[place.start - length : place.stop - length]
    if stage >= known.row:
        above = known.row * length
        found += known.flags[place.start - above : place.stop - above]
    return found


def _parts(known: _Known, table: Table) -> Iterator[_Part]:
    levels = np.frombuffer(table.levels, np.uint8)
    for place, buckets in _buckets(known):
        chosen = levels[buckets]
        own = chosen % _LEVELS
        order = np.argsort(own, kind="stable")
        counts = np.bincount(own, minlength=_LEVELS)
        yield _Part(place, order, counts, chosen // _INVERTED)


# -- streams ---------------------------------------------------------------------------------------


def _levels_of(table: Table) -> list[int]:
    """Return the levels that have a stream: all in the table, whether or not weights have them."""
    return np.unique(np.frombuffer(table.levels, np.uint8) % _LEVELS).tolist()


def _encode_streams(streams: Mapping[int, Sequence[Array]]) -> Iterator[bytes]:
    """Yield the codes of all levels."""
    for level, pieces in streams.items():
        flags = np.concatenate([np.empty(0, np.uint8), *pieces])
        packed = np.packbits(flags, bitorder="little")
        yield entropy.encode(packed, len(flags), model_of(level))


def _decode_streams(streams: bytes, levels: Sequence[int], weights: int) -> dict[int, Array]:
    """Return the flags of each level, uint8, with what fills up the codes behind them.

    Raises:
        CodeError: If the bytes are no codes, or of more weights.
    """
    found: dict[int, Array] = {}
    rest = memoryview(streams)
    for level in levels:
        model = model_of(level)
        found[level], used = entropy.decode_first(rest, weights, model)
        weights -= max(len(found[level]) - 2 * model.width, 0)
        rest = rest[used:]
    if rest:
        message = f"has {len(rest)} bytes behind the codes of its weights"
        raise CodeError(message)
    return found


def _taken(found: Mapping[int, Array], used: dict[int, int], counts: Array, weights: int) -> Array:
    """Return the next flags of all levels, one level after the other, and count them as used.

    Raises:
        CodeError: If there are fewer.
    """
    pieces = []
    for level, flags in found.items():
        start, used[level] = used[level], used[level] + int(counts[level])
        pieces.append(flags[start : used[level]])
        if used[level] > len(flags):
            message = f"has a payload of too few bits for its {weights} weights"
            raise CodeError(message)
    return np.concatenate(pieces)


def _check_rest(found: Mapping[int, Array], used: Mapping[int, int], weights: int) -> None:
    """Refuse streams that hold more than the weights of their level."""
    for level, flags in found.items():
        if not entropy.is_filling(flags[used[level] :], used[level], model_of(level)):
            message = f"has a payload of more than its {weights} weights"
            raise CodeError(message)


# -- choosing the table ----------------------------------------------------------------------------


def _choose_table(
    flags: Array, guides: Sequence[Guide], sizes: Sequence[Array], kernel: Sequence[int]
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
        yield from [(places, kernel[-1])] * (_NEIGHBOURS * places <= most)


def _most_buckets(weights: int) -> int:
    return max(min(weights // _FEWEST_WEIGHTS, _MOST_BUCKETS), 1)


def _counts(
    flags: Array, guides: Sequence[Guide], sizes: Sequence[Array], places: int, row: int
) -> Iterator[tuple[tuple[int, ...], Array]]:
    """Yield all choices of bits of the guides, and the zeros and ones in each of their buckets."""
    of_kernel = places * (_NEIGHBOURS if row else 1)
    most = (_most_buckets(len(flags)) // of_kernel).bit_length() - 1  # bits of all guides
    finest = [min(guide.log2, most) for guide in guides]
    counts = np.zeros(2 * of_kernel << sum(finest), np.int64)
    known = _known(places, row, finest, flags, sizes)
    for place, buckets in _buckets(known):
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
    table = step * best + _INVERTED * (counts[:, 0] > counts[:, 1])
    return float(bits), table.astype(np.uint8).tobytes()


@lru_cache(maxsize=len(_COARSER))
def _costs(step: int) -> tuple[Array, Array, Array]:
    """Return the odds between every ``step``-th level, and at each the bits of both weights."""
    levels = range(0, _LEVELS, step)
    odds = np.array([entropy.odds_of(model_of(level).odds) for level in levels])
    return np.sqrt(odds[1:] * odds[:-1]), np.log2(1 + 1 / odds), np.log2(1 + odds)
