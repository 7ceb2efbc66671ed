"""What stands behind the header of a coded mask: its code, what reads it, the streams.

``docs/format.md`` has the bytes: a mask coded by its density (`entropy`), or beside what is known
of its weights (`context`), the numbers of its base among that or not.
"""

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from pemn_surgery import buckets, context, entropy
from pemn_surgery.buckets import BaseGuide, Guide, Table
from pemn_surgery.deflate import CodeError
from pemn_surgery.numbers.rng import KEY_BYTES
from pemn_surgery.packed import cut_off
from pemn_surgery.symbols import Model
from pemn_surgery.words import WordModel

Array = Any  # of numpy; its element type is in the docstrings

CODE_OFFSET = 36  # behind the header, and the checksum of the mask as bits

_CODING_OFFSET, _FIRST, _SECOND = 5, 6, 7
_INVERTED = 0x80
_GUIDE = struct.Struct(f"<{KEY_BYTES}sQ")


class Coding(IntEnum):
    """How a stored mask holds its bits."""

    BITS = 0
    ENTROPY = 1
    CONTEXT = 2
    BASE = 3


class Code(NamedTuple):
    """A mask's code.

    Attributes:
        coding: Which.
        first: Byte 6 of the header.
        second: Byte 7 of the header.
        content: The bytes from `CODE_OFFSET` on.
    """

    coding: Coding
    first: int
    second: int
    content: bytes


def by_density(packed: Array, weights: int, ones: int) -> Code | None:
    """Code a mask by its density; None where that is near one half.

    Args:
        packed: The mask as bits, uint8 of shape (ceil(weights / 8),).
        weights: Number of weights.
        ones: Number of ones.
    """
    inverted = 2 * ones < weights
    models = entropy.choose_models(max(ones, weights - ones) / max(weights, 1), weights)
    flipped = _flipped(packed, weights, inverted)
    found = [(model, entropy.encode(flipped, weights, model)) for model in models]
    if not found:
        return None
    model, content = min(found, key=lambda code: len(code[1]))
    return Code(Coding.ENTROPY, model.width | inverted * _INVERTED, model.odds, content)


def by_context(
    packed: Array, weights: int, guides: Sequence[Guide | BaseGuide], kernel: Sequence[int]
) -> Code:
    """Code a mask beside what is known of its weights.

    Args:
        packed: The mask as bits, uint8 of shape (ceil(weights / 8),).
        weights: Number of weights.
        guides: At most two; a `BaseGuide` is the last.
        kernel: Shape of a convolution's kernel.
    """
    table, streams = context.encode(packed, weights, guides, kernel)
    drawn = [guide for guide in table.guides if isinstance(guide, Guide)]
    of_base = [g.log2 for g in table.guides if isinstance(g, BaseGuide) and g.log2]
    first, second = (*(guide.log2 for guide in drawn), 0, 0)[:2]
    log2s = first | (of_base[0] if of_base else second) << 4
    kept = [_GUIDE.pack(guide.key, guide.period) for guide in drawn if guide.log2]
    content = b"".join([bytes([table.row]), *kept, table.levels, streams])
    return Code(Coding.BASE if of_base else Coding.CONTEXT, log2s, table.places, content)


def most_weights(content: memoryview) -> int:
    """Return how many weights a coded mask can have: every code has at least one bit.

    Args:
        content: The stored mask, of any coding but bits.

    Raises:
        CodeError: If the bytes begin with no code.
    """
    if content[_CODING_OFFSET] == Coding.ENTROPY:
        return _model(content)[0].most_weights(len(content) - CODE_OFFSET)
    return context.most_weights(len(_table(content)[1]))


def decode(content: memoryview, weights: int, sizes: Array | None) -> Array:
    """Return a coded mask's packed bits; check ``weights`` against `most_weights` first.

    Args:
        content: The stored mask, of any coding but bits.
        weights: Number of weights.
        sizes: For BASE, `buckets.base_sizes` of the frozen numbers, uint8 of shape (weights,).

    Raises:
        CodeError: If the bytes are no code of so many weights.
    """
    if content[_CODING_OFFSET] != Coding.ENTROPY:
        table, streams = _table(content, sizes)
        return context.decode(table, streams, weights)
    model, inverted = _model(content)
    return _flipped(entropy.decode(content[CODE_OFFSET:], weights, model), weights, inverted)


def _model(content: memoryview) -> tuple[Model | WordModel, bool]:
    """Return which code a mask coded by its density has, and whether it is inverted."""
    if len(content) < CODE_OFFSET:
        message = f"has {len(content)} bytes, the header of a coded mask needs {CODE_OFFSET}"
        raise CodeError(message)
    width, odds = content[_FIRST], content[_SECOND]
    if width & ~_INVERTED not in entropy.WIDTHS:
        message = f"has code {width}, this release reads {entropy.WIDTHS}"
        raise CodeError(message, is_newer=True)
    return entropy.make_model(width & ~_INVERTED, odds), bool(width & _INVERTED)


def _table(content: memoryview, sizes: Array | None = None) -> tuple[Table, memoryview]:
    """Return table and streams of a mask coded by context; ``sizes`` are those of the base."""
    log2s, places = (content[_FIRST] & 15, content[_FIRST] >> 4), content[_SECOND]
    if max(log2s) > buckets.MOST_LOG2 or not places:
        needed = "0 to 8 bits of both and 1 to 255 places"
        problem = f"has {log2s[0]} and {log2s[1]} bits of its guides and {places} places"
        message = f"{problem}, this release reads {needed}"
        raise CodeError(message, is_newer=True)
    is_beside_base = content[_CODING_OFFSET] == Coding.BASE
    used = [log2 for log2 in (log2s[:1] if is_beside_base else log2s) if log2]
    begin = CODE_OFFSET + 1 + len(used) * _GUIDE.size
    row = _row(content, begin, places)
    read = _GUIDE.iter_unpack(content[CODE_OFFSET + 1 : begin])
    drawn = [Guide(key, period, log2) for (key, period), log2 in zip(read, used, strict=True)]
    if not all(guide.period for guide in drawn):
        message = "has a guide without numbers"
        raise CodeError(message, is_newer=True)
    guides = (*drawn, *[BaseGuide(sizes, log2s[1])] * is_beside_base)
    end = begin + Table(places, row, guides, b"").buckets
    if len(content) < end:
        message = f"has {len(content)} bytes, its header and table need {end}"
        raise CodeError(message)
    return Table(places, row, guides, bytes(content[begin:end])), content[end:]


def _row(content: memoryview, needed: int, places: int) -> int:
    """Return the width of a kernel whose neighbours are looked at, 0 if they are not."""
    if len(content) < needed:
        message = f"has {len(content)} bytes, its header needs {needed}"
        raise CodeError(message)
    row = content[CODE_OFFSET]
    if row > places:
        message = f"has kernels of {places} places in rows of {row}"
        raise CodeError(message, is_newer=True)
    return row


def _flipped(packed: Array, weights: int, inverted: bool) -> Array:
    """Return packed bits, each turned around if asked for; unused bits stay zero."""
    return cut_off(~packed, weights) if inverted else packed
