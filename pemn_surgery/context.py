"""Masks coded beside what a reader knows of each weight before its bit.

That is its place in a convolution's kernel; the bits of its neighbours there, once they are read;
and, if its score was drawn, numbers that a seed gives again: training moves scores a little, so a
mask differs from its initial mask where initial scores were near the cut, and more where frozen
numbers are large. The integers that both are made of (`rng`) tell where that is on every machine.
Numbers that no seed draws, those of a pretrained base, tell it to whoever has the base.

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

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pemn_surgery import entropy
from pemn_surgery.bucket_table import choose_table
from pemn_surgery.buckets import (
    LEVELS,
    BaseGuide,
    Guide,
    Table,
    arrange,
    in_own_order,
    model_of,
    parts_of,
    repeated,
    sizes_of,
)
from pemn_surgery.deflate import CodeError

Array = Any  # of numpy; its element type is in the docstrings

_MOST_WEIGHTS_IN_A_BYTE = 8 * 255  # a code has a bit at least, the longest stands for 255 weights


def most_weights(nbytes: int) -> int:
    """Return how many weights so many bytes of streams can hold."""
    return _MOST_WEIGHTS_IN_A_BYTE * nbytes


def encode(
    packed: Array,
    weights: int,
    guides: Sequence[Guide | BaseGuide] = (),
    kernel: Sequence[int] = (),
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
    sizes = [repeated(sizes_of(guide, weights), weights) for guide in guides]
    table = choose_table(flags, guides, sizes, kernel)
    known = arrange(table.places, table.row, [guide.log2 for guide in table.guides], flags, sizes)
    streams: dict[int, list[Array]] = {level: [] for level in _levels_of(table)}
    for part in parts_of(known, table):
        flags = (known.flags[part.place] ^ part.inverted)[part.order]
        ends = np.cumsum(part.counts)
        for level, stream in streams.items():
            stream.append(flags[ends[level] - part.counts[level] : ends[level]])
    return table, b"".join(_encode_streams(streams))


def decode(table: Table, streams: memoryview, weights: int) -> Array:
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
    sizes = (repeated(sizes_of(guide, weights), weights) for guide in table.guides)
    log2s = [guide.log2 for guide in table.guides]
    known = arrange(table.places, table.row, log2s, np.empty(weights, np.uint8), sizes)
    used = dict.fromkeys(found, 0)
    for part in parts_of(known, table):
        flags = np.empty(len(part.order), np.uint8)
        flags[part.order] = _taken(found, used, part.counts, weights)
        known.flags[part.place] = flags ^ part.inverted
    _check_rest(found, used, weights)
    return np.packbits(in_own_order(known.flags, known.stages), bitorder="little")


def _levels_of(table: Table) -> list[int]:
    """Return the levels that have a stream: all in the table, whether or not weights have them."""
    return np.unique(np.frombuffer(table.levels, np.uint8) % LEVELS).tolist()


def _encode_streams(streams: Mapping[int, Sequence[Array]]) -> Iterator[bytes]:
    """Yield the codes of all levels."""
    for level, pieces in streams.items():
        flags = np.concatenate([np.empty(0, np.uint8), *pieces])
        packed = np.packbits(flags, bitorder="little")
        yield entropy.encode(packed, len(flags), model_of(level))


def _decode_streams(streams: memoryview, levels: Sequence[int], weights: int) -> dict[int, Array]:
    """Return the flags of each level, uint8, with what fills up the codes behind them.

    Raises:
        CodeError: If the bytes are no codes, or of more weights.
    """
    found: dict[int, Array] = {}
    rest = streams
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
