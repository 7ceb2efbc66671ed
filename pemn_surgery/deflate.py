"""Prefix codes that zlib reads: the code made from weights, the head that announces it, the bits.

RFC 1951 (DEFLATE), sections 3.2.2 and 3.2.7. Its decoder is in C and comes with Python; what is
written here has no matches, only the codes of symbols one after the other.
"""

import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Array = Any  # of numpy; its element type is in the docstrings
_END = 256  # DEFLATE's symbol for the end of a block

_LONGEST_CODE = 15  # DEFLATE's limit

_PAIRS_AT_ONCE = 2**14  # arrays between steps stay in the processor's cache


class CodeError(ValueError):
    """Coded bytes are not what an encoder returns.

    Attributes:
        is_newer: Whether a later release may have written them.
    """

    def __init__(self, problem: str, *, is_newer: bool = False) -> None:
        super().__init__(problem)
        self.is_newer = is_newer


@dataclass(frozen=True)
class PrefixCode:
    """A prefix code.

    Attributes:
        head: Start of a DEFLATE stream that announces the code, to the byte.
        bits: The code of every symbol, its first bit lowest, uint64 of shape (257,).
        lengths: Bits of every code, int64 of shape (257,).
    """

    head: bytes
    bits: Array
    lengths: Array

    @cached_property
    def pair_bits(self) -> Array:
        """Codes of two symbols, first + 256 * second, uint64 of shape (65536,)."""
        second = self.bits[:256, None] << self.lengths[:256].astype(np.uint64)
        return (self.bits[:256] | second).reshape(-1)

    @cached_property
    def pair_lengths(self) -> Array:
        """Bits of those, uint8 of shape (65536,)."""
        return (self.lengths[:256] + self.lengths[:256, None]).astype(np.uint8).reshape(-1)


def make_code(weights: list[int]) -> PrefixCode:
    """Return the best code for symbols 0, 1, ... and the end of a block.

    Args:
        weights: What each symbol's length counts, at most 256; the end's weight is 1.
    """
    used = [*range(len(weights)), _END]
    lengths = np.zeros(257, np.int64)
    lengths[used] = code_lengths([*weights, 1])
    return PrefixCode(_head(lengths.tolist()), _canonical(lengths), lengths)


def concatenate(symbols: Array, code: PrefixCode) -> bytes:
    """Return the codes of symbols and of the end, one after the other.

    Args:
        symbols: Uint8 of shape (n,), contiguous.
        code: Their code.
    """
    size = int(np.bincount(symbols, minlength=257) @ code.lengths + code.lengths[_END])
    words = np.zeros(size // 64 + 2, "<u8")
    place = 0
    pairs = symbols[: len(symbols) // 2 * 2].view("<u2")
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        part = pairs[start : start + _PAIRS_AT_ONCE]
        place = _append(words, place, code.pair_bits[part], code.pair_lengths[part])
    rest = [*symbols[2 * len(pairs) :].tolist(), _END]
    _append(words, place, code.bits[rest], code.lengths[rest])
    return words.tobytes()[: (size + 7) // 8]


class CodeReader:
    """The symbols of a code that `concatenate` wrote.

    Attributes:
        used: How many bytes of it were read.
        ended: Whether its end was among them.
    """

    def __init__(self, coded: bytes | memoryview, code: PrefixCode) -> None:
        self.used = 0
        self.ended = False
        self._coded = coded
        self._head = code.head

    def symbols(self, at_once: int) -> Iterator[bytes]:
        """Yield the symbols piece by piece.

        Args:
            at_once: Bytes that are read for a piece.

        Raises:
            CodeError: If the bytes are no code.
        """
        inflater = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
        try:
            inflater.decompress(self._head)
            while self.used < len(self._coded) and not self.ended:
                part = self._coded[self.used : self.used + at_once]
                symbols = inflater.decompress(part)
                self.used += len(part) - len(inflater.unused_data)
                self.ended = inflater.eof
                yield symbols
        except zlib.error as error:
            message = f"has a payload that is no code ({error})"
            raise CodeError(message) from error


def code_lengths(weights: list[int]) -> list[int]:
    """Return the lengths of the best prefix code with codes of at most 15 bits (package-merge).

    Args:
        weights: At least two; what each symbol's length counts.
    """
    coins = sorted(((weight, (place,)) for place, weight in enumerate(weights)), key=_weight)
    row = coins
    for _ in range(_LONGEST_CODE - 1):
        pairs = zip(row[::2], row[1::2], strict=False)
        packages = [(one[0] + two[0], one[1] + two[1]) for one, two in pairs]
        row = sorted(coins + packages, key=_weight)
    chosen = Counter(place for _, places in row[: 2 * len(coins) - 2] for place in places)
    return [chosen[place] for place in range(len(weights))]


def _weight(coin: tuple[int, tuple[int, ...]]) -> int:
    return coin[0]


def _canonical(lengths: Array) -> Array:
    """Return DEFLATE's codes for these lengths, uint64, the first bit lowest (RFC 1951, 3.2.2)."""
    bits = np.zeros(len(lengths), np.uint64)
    code, length = 0, 0
    for symbol in np.lexsort((np.arange(len(lengths)), lengths)):
        if lengths[symbol]:
            code <<= int(lengths[symbol]) - length
            length = int(lengths[symbol])
            bits[symbol] = int(f"{code:0{length}b}"[::-1], 2)
            code += 1
    return bits


def _head(lengths: list[int]) -> bytes:
    """Return 140 bytes: an empty block, and the start of the last (RFC 1951, 3.2.7).

    The empty block, and a second distance code, which is never used either, make it end with a
    byte. Every length takes 4 bits.
    """
    fields = [(2, 10), (5, 3), (0, 5), (1, 5), (15, 4), (0, 9), *[(4, 3)] * 16]
    fields += [(int(f"{length:04b}"[::-1], 2), 4) for length in [*lengths, 1, 1]]
    value, place = 0, 0
    for number, size in fields:
        value |= number << place
        place += size
    return value.to_bytes(place // 8, "little")


def _append(words: Array, place: int, bits: Array, lengths: Array) -> int:
    """Put numbers of at most 30 bits into words of 64 bits from bit ``place`` on.

    Returns:
        The bit after them.
    """
    if len(bits) % 2:
        bits, lengths = np.append(bits, np.uint64(0)), np.append(lengths, 0)
    bits = bits[::2] | bits[1::2] << lengths[::2].astype(np.uint64)
    lengths = (lengths[::2] + lengths[1::2]).astype(np.int64)
    ends = np.cumsum(lengths) + place
    starts = ends - lengths
    in_word, shifts = starts >> 6, (starts & 63).astype(np.uint64)
    first = np.flatnonzero(np.diff(in_word, prepend=-1))
    here = words[int(in_word[0]) : int(in_word[-1]) + 2]
    here[:-1] |= np.bitwise_or.reduceat(bits << shifts, first)
    last = np.append(first[1:] - 1, len(bits) - 1)
    # What the last number of a word has for the next; in two steps, as no shift by 64 is defined.
    here[1:] |= bits[last] >> 1 >> (63 - shifts[last])
    return int(ends[-1])
