"""Weights as one stream of bytes, by asymmetric numeral systems (Duda, arXiv:1311.2540).

The coder is constriction's `AnsCoder` where that is installed, else `PlainStack`, which makes the
same bytes. It is a stack: what was coded last is read first, so a `Writer` codes from the end.
Weights go in eight at a time, the few that are left one by one, by tables of ours (`table`).

A coder begins at state 0, and a reader that has read all weights is there again with no byte left.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import import_module
from itertools import accumulate
from typing import Any

import numpy as np

from pemn_surgery.coding.table import TOTAL, frequencies

Array = Any  # of numpy; its element type is in the docstrings

_AT_ONCE = 1 << 18  # symbols, which are 32 bits each between the steps
_WORD = 1 << 32


class CodeError(Exception):
    """A payload is no code of its weights; ``is_newer``: perhaps it is one of a later release."""

    def __init__(self, message: str, *, is_newer: bool = False) -> None:
        super().__init__(message)
        self.is_newer = is_newer


class Writer:
    """Takes weights, and returns the stream that a `Reader` gives them back from."""

    def __init__(self) -> None:
        self._pieces: list[tuple[Array, int, int]] = []

    def write(self, packed: Array, count: int, density: int) -> None:
        """Take further weights.

        Args:
            packed: The weights, uint8 of shape (ceil(count / 8),), the first lowest.
            count: Number of weights.
            density: As ones are expected, `table.HALF` to `table.MOST`.
        """
        rest = np.unpackbits(packed[count // 8 :], count=count % 8, bitorder="little")
        self._pieces += [(packed[: count // 8], density, 8), (rest, density, 1)]

    def stream(self) -> bytes:
        """Return the stream of all that was taken."""
        stack = _stack()
        for symbols, density, weights in reversed(self._pieces):
            model = _model(density, weights, library())
            for part in reversed([*_parts(len(symbols))]):
                stack.encode_reverse(symbols[part].astype(np.int32) + 1, model)
        return stack.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


class Reader:
    """Returns the weights of a stream, in the order in which a `Writer` took them."""

    def __init__(self, stream: bytes) -> None:
        """Raise a CodeError if a byte 0 ends the stream, which no writer leaves there."""
        if stream.endswith(b"\0"):
            message = "has a payload that ends in a byte 0"
            raise CodeError(message)
        self._stack = _stack(np.frombuffer(stream + bytes(-len(stream) % 4), "<u4"))

    def read(self, count: int, density: int) -> Array:
        """Return the next weights as they were written, packed; unused bits are zero.

        Raises:
            CodeError: If the stream ends before.
        """
        packed = np.zeros(-(-count // 8), np.uint8)
        for part in _parts(count // 8):
            packed[part] = self._symbols(part.stop - part.start, density, 8)
        if count % 8:
            rest = self._symbols(count % 8, density, 1)
            packed[-1:] = np.packbits(rest, bitorder="little")
        return packed

    def _symbols(self, count: int, density: int, weights: int) -> Array:
        symbols = self._stack.decode(_model(density, weights, library()), count)
        if not symbols.all():
            message = "has a payload that ends before its weights"
            raise CodeError(message)
        return (symbols - 1).astype(np.uint8)

    def end(self) -> None:
        """Check that all was read.

        Raises:
            CodeError: If it was not, or what was read was not what was written.
        """
        if not self._stack.is_empty():
            message = "has a payload that does not end with its weights"
            raise CodeError(message)


def _parts(count: int) -> Iterator[slice]:
    return (slice(at, min(at + _AT_ONCE, count)) for at in range(0, count, _AT_ONCE))


@lru_cache(maxsize=1)
def library() -> Any:
    """Return `constriction.stream`, or None where it is not installed (no wheel for a system)."""
    try:
        return import_module("constriction").stream  # compiled, and needed by files alone
    except ImportError:
        return None


def _stack(*words: Array) -> Any:
    """Return a coder, empty or with a stream, uint32, whose last word is not 0."""
    found = library()
    return (found.stack.AnsCoder if found else PlainStack)(*words)


@lru_cache(maxsize=512)
def _model(density: int, weights: int, stream: Any) -> Any:
    """Return constriction's model, or frequencies and how much lies below each.

    constriction gives each symbol 1, and shares out what is left in proportion to floats: of
    frequencies less 1, whose sum is what is left, the proportion is 1. So they are exactly these.
    """
    table = frequencies(density, weights)
    if stream is None:
        return table, [0, *accumulate(table[:-1])]
    return stream.model.Categorical(np.array(table, np.float64) - 1, perfect=False)


class PlainStack:
    """constriction's `AnsCoder` in Python, as far as it is used here, with its names."""

    def __init__(self, words: Array | None = None) -> None:
        self._words: list[int] = [] if words is None else words.tolist()
        self._state = 0
        self._fill()

    def _fill(self) -> None:
        while self._state < _WORD and self._words:
            self._state = self._state * _WORD + self._words.pop()

    def encode_reverse(self, symbols: Array, model: tuple[Sequence[int], Sequence[int]]) -> None:
        """Put symbols on the stack, the last first."""
        sizes, below = model
        for symbol in reversed(symbols.tolist()):
            size = sizes[symbol]
            if self._state // (_WORD * _WORD // TOTAL) >= size:
                self._words.append(self._state % _WORD)
                self._state //= _WORD
            self._state = self._state // size * TOTAL + self._state % size + below[symbol]

    def decode(self, model: tuple[Sequence[int], Sequence[int]], count: int) -> Array:
        """Take symbols off the stack, int32."""
        sizes, below = model
        found = np.empty(count, np.int32)
        for place in range(count):
            rest = self._state % TOTAL
            symbol = bisect_right(below, rest) - 1
            self._state = self._state // TOTAL * sizes[symbol] + rest - below[symbol]
            self._fill()
            found[place] = symbol
        return found

    def get_compressed(self) -> Array:
        """Return the stream, uint32; zeros may end it."""
        return np.array([*self._words, self._state % _WORD, self._state // _WORD], np.uint32)

    def is_empty(self) -> bool:
        """Tell whether the state is 0 and no word is left."""
        return not self._state and not self._words
