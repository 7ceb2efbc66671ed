"""What decides the bucket of a weight, and its level (`pemn_surgery.context`)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pemn_surgery.numbers import rng
from pemn_surgery.symbols import Model

Array = Any  # of numpy; its element type is in the docstrings

MOST_LOG2 = 8
LEVELS = 64
INVERTED = 0x80
NEIGHBOURS = 4  # what the left and the upper one can be together

_AT_ONCE = 1 << 16  # arrays between steps stay in the processor's cache


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


class BaseGuide(NamedTuple):
    """Sizes of a base's own numbers, which no seed gives: both sides must have the base.

    Attributes:
        sizes: What `base_sizes` returned; None where they are not needed yet.
        log2: How many upper bits of a size are looked at, 0 to 8.
    """

    sizes: Array | None
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
    guides: tuple[Guide | BaseGuide, ...]
    levels: bytes

    @property
    def buckets(self) -> int:
        """Number of buckets."""
        near = NEIGHBOURS if self.row else 1
        return self.places * near << sum(guide.log2 for guide in self.guides)


def model_of(level: int) -> Model:
    """Return the code of a level's weights: four levels to a doubling of the odds.

    Args:
        level: 0 (hardly more ones than zeros) to 63.
    """
    odds = 4 * level + 2
    return Model(8 if odds < 30 else 6 if odds < 62 else 1, odds)


def base_sizes(words: Array) -> Array:
    """Return the sizes of numbers by their order: how many 256ths of them are smaller.

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


def sizes_of(guide: Guide | BaseGuide, weights: int) -> Array:
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
    if isinstance(guide, BaseGuide):
        return guide.sizes if weights and guide.log2 else np.zeros(1, np.uint8)
    count = min(guide.period, weights) if guide.log2 else 0
    found = np.zeros(max(count, 1), np.uint8)
    place = 0
    for words in rng.pieces(guide.key, count):
        signed = (words ^ np.uint32(1 << 31)).view(np.int32)
        size = signed ^ (signed >> 31)  # ~signed below the middle
        found[place : place + len(words)] = size >> (31 - MOST_LOG2)
        place += len(words)
    return found


def repeated(values: Array, count: int) -> Array:
    """Return the first ``count`` of values that are repeated without end."""
    return np.tile(values, -(-count // len(values)))[:count]


@dataclass(frozen=True)
class Known:
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


def arrange(
    places: int, row: int, log2s: Sequence[int], flags: Array, sizes: Iterable[Array]
) -> Known:
    """Bring arrays into the order of stages."""
    stages = places if row else 1
    in_stages = [_in_stages(one, stages) for one in sizes]
    return Known(places, row, log2s, _in_stages(flags, stages), in_stages)


def _in_stages(values: Array, stages: int) -> Array:
    return values.reshape(-1, stages).T.reshape(-1)


def in_own_order(values: Array, stages: int) -> Array:
    """Undo `_in_stages`."""
    return values.reshape(stages, -1).T.reshape(-1)


def buckets_of(known: Known) -> Iterator[tuple[slice, Array]]:
    """Yield the bucket of each weight, int32, piece by piece; none reaches into two stages."""
    weights = len(known.flags)
    length = weights // known.stages
    of_places = np.arange(known.places, dtype=np.int32)
    of_places = repeated(of_places, min(length, _AT_ONCE) + known.places)
    for stage in range(known.stages):
        for start in range(0, length, _AT_ONCE):
            place = slice(stage * length + start, stage * length + min(start + _AT_ONCE, length))
            if known.row:
                found = NEIGHBOURS * stage + _neighbours(known, stage, place)
            else:
                found = of_places[start % known.places :][: place.stop - place.start]
            for sizes, log2 in zip(known.sizes, known.log2s, strict=True):
                found = (found << log2) | (sizes[place] >> (MOST_LOG2 - log2))
            yield place, found


def _neighbours(known: Known, stage: int, place: slice) -> Array:
    """Return twice the bit to the left and the bit above, int32; 0 where the kernel ends."""
    length = len(known.flags) // known.stages
    found = np.zeros(place.stop - place.start, np.int32)
    if stage % known.row:
        found += 2 * known.flags[place.start - length : place.stop - length]
    if stage >= known.row:
        above = known.row * length
        found += known.flags[place.start - above : place.stop - above]
    return found


class Part(NamedTuple):
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


def parts_of(known: Known, table: Table) -> Iterator[Part]:
    """Yield the weights by level, piece by piece; none reaches into two stages."""
    levels = np.frombuffer(table.levels, np.uint8)
    for place, buckets in buckets_of(known):
        chosen = levels[buckets]
        own = chosen % LEVELS
        order = np.argsort(own, kind="stable")
        counts = np.bincount(own, minlength=LEVELS)
        yield Part(place, order, counts, chosen // INVERTED)
