"""Masks coded beside what a reader knows of each weight before its bit.

That is its place in a convolution's kernel; the bits of its neighbours there, once they are read;
and *guides*. Training moves scores a little, so a mask differs from its initial mask where initial
scores were near the cut, and more where frozen numbers are large: a seed gives both again. On a
pretrained base large weights are dropped, which its numbers tell to whoever has the base.

* Weights of which the same is known are a *bucket*. It has a *level*, how likely most of them are
  (`table`), and they are turned around where most are zeros.
* With neighbours weights are taken in *stages*: all of the first place, then all of the second.
* A stage is taken in *blocks*, those level by level, so that the coder has few and long steps.

That only guesses: every mask can be coded, and one that it says nothing about is no shorter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pemn_surgery.coding.coder import CodeError, Reader, Writer
from pemn_surgery.coding.table import density_of
from pemn_surgery.numbers.sizes import LOG2

Array = Any  # of numpy; its element type is in the docstrings

TURNED = 0x80
NEIGHBOURS = 4  # what the left and the upper one can be together

_BLOCK = 1 << 18


class Guide(NamedTuple):
    """One number for each weight, which may guess the mask.

    Attributes:
        sizes: How large it is (`pemn_surgery.numbers.sizes`), uint8 of shape (weights,).
        log2: How many upper bits of a size are looked at, 0 to 8.
        seed: Key and period of the numbers; None of a base's own.
    """

    sizes: Array
    log2: int = LOG2
    seed: tuple[bytes, int] | None = None


@dataclass(frozen=True)
class Context:
    """What decides the bucket of a weight, and the level of each bucket.

    Attributes:
        places: Number of places in a kernel, 1 to 255: weight i has place ``i % places``.
        row: Width of the kernel, 1 to ``places``, if neighbours decide too; 0 if not.
        guides: What else decides.
        levels: A byte for each bucket: its level, and 128 more where most weights are zero. Buckets
            count in places, then in neighbours (2 for the left, 1 for the upper), then in the sizes
            of one guide after the other, the last fastest.
    """

    places: int
    row: int
    guides: tuple[Guide, ...] = ()
    levels: bytes = b""

    @property
    def buckets(self) -> int:
        """Number of buckets."""
        near = NEIGHBOURS if self.row else 1
        return self.places * near << sum(guide.log2 for guide in self.guides)


def encode(flags: Array, context: Context, writer: Writer) -> None:
    """Write a mask, uint8 of shape (weights,)."""
    for place, order, counts, turned in _blocks(flags, context):
        chosen = (flags[place] ^ turned)[order]
        start = 0
        for level, count in counts:
            packed = np.packbits(chosen[start : start + count], bitorder="little")
            writer.write(packed, count, density_of(level))
            start += count


def decode(reader: Reader, context: Context, weights: int) -> Array:
    """Read the mask that `encode` was given.

    Raises:
        CodeError: If the stream ends before, or there are no whole kernels of weights.
    """
    if context.row and weights % context.places:
        message = f"has {weights} weights, not whole kernels of {context.places} places"
        raise CodeError(message)
    flags = np.zeros(weights, np.uint8)
    for place, order, counts, turned in _blocks(flags, context):
        pieces = [
            np.unpackbits(reader.read(count, density_of(level)), count=count, bitorder="little")
            for level, count in counts
        ]
        turned[order] ^= np.concatenate(pieces)
        flags[place] = turned
    return flags


def buckets_of(flags: Array, context: Context) -> Iterator[tuple[slice, Array]]:
    """Yield where a block of weights lies and the bucket of each, int32, stage by stage.

    Flags, uint8 of shape (weights,), may be unknown until their stage has been yielded.
    """
    stages = context.places if context.row else 1
    for stage in range(stages):
        for start in range(stage, len(flags), stages * _BLOCK):
            place = slice(start, min(start + stages * _BLOCK, len(flags)), stages)
            if context.row:
                found = NEIGHBOURS * stage + _neighbours(flags, context.row, stage, place)
            else:
                found = np.arange(start, place.stop, dtype=np.int32) % context.places
            for guide in context.guides:
                found = (found << guide.log2) | (guide.sizes[place] >> (LOG2 - guide.log2))
            yield place, found


def _neighbours(flags: Array, row: int, stage: int, place: slice) -> Array:
    """Return twice the bit to the left and the bit above, int32; 0 where the kernel ends."""
    found = np.zeros(len(flags[place]), np.int32)
    for weight, step, is_inside in ((2, 1, stage % row > 0), (1, row, stage >= row)):
        if is_inside:
            found += weight * flags[place.start - step : place.stop - step : place.step]
    return found


def _blocks(
    flags: Array, context: Context
) -> Iterator[tuple[slice, Array, list[tuple[int, int]], Array]]:
    """Yield where each block lies, its places by level, the levels' sizes, and what is turned."""
    levels = np.frombuffer(context.levels, np.uint8)
    for place, buckets in buckets_of(flags, context):
        chosen = levels[buckets]
        own, turned = chosen & (TURNED - 1), chosen // TURNED
        there = [(one, count) for one, count in enumerate(np.bincount(own).tolist()) if count]
        yield place, np.argsort(own, kind="stable"), there, turned
