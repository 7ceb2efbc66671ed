"""A mask as symbols: units of weights, and runs of full ones (`pemn_surgery.entropy`)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

Array = Any  # of numpy; its element type is in the docstrings

WIDTHS = (1, 6, 7, 8)

# Arrays between steps stay in the processor's cache.
_ROWS_AT_ONCE = 2**13
_UNITS_AT_ONCE = 2**16


@dataclass(frozen=True)
class Model:
    """What decides the code of a mask.

    Attributes:
        width: Weights in a unit.
        odds: Ones to a zero, as a byte: (16 + odds % 16) * 2 ** (odds // 16) / 16.
    """

    width: int
    odds: int

    @property
    def full(self) -> int:
        """The unit of ones alone, and the number of other units."""
        return 2**self.width - 1

    @property
    def longest(self) -> int:
        """The most full units in a symbol."""
        return 255 // self.full

    @property
    def symbols(self) -> int:
        """Number of symbols; the last is the longest run, any other s a run of s // full units."""
        return self.longest * self.full + 1

    def most_weights(self, nbytes: int) -> int:
        """Return how many weights so many coded bytes can hold: a code has at least one bit."""
        return 8 * nbytes * self.longest * self.width


class CodeError(ValueError):
    """Coded bytes are not what an encoder returns.

    Attributes:
        is_newer: Whether a later release may have written them.
    """

    def __init__(self, problem: str, *, is_newer: bool = False) -> None:
        super().__init__(problem)
        self.is_newer = is_newer


def odds_of(odds: int) -> float:
    """Return the ones to a zero that a model's byte stands for."""
    return (16 + odds % 16) * 2 ** (odds // 16) / 16


def symbols_of(packed: Array, weights: int, model: Model) -> Array:
    """Return a mask's symbols.

    Args:
        packed: uint8 array of shape (ceil(weights / 8),): weight i is bit ``i % 8`` of byte
            ``i // 8``.
        weights: Number of weights.
        model: What a symbol is.

    Returns:
        uint8 array; where the last unit is full, a unit 0 follows it.
    """
    return _symbols(_units(packed, weights, model), model)


def put_symbols(parts: Iterable[bytes], units: Array, model: Model) -> int:
    """Write the units of symbols one behind the other.

    Args:
        parts: Symbols, piece by piece.
        units: Where to, uint8.
        model: What a symbol is.

    Returns:
        The number of units.

    Raises:
        CodeError: If there are more units than places.
    """
    place, put = 0, _put if model.longest == 1 else _expand
    for symbols in parts:
        place = put(symbols, units, place, model)
    return place


def count_units(symbols: bytes, model: Model) -> int:
    """Return the number of units of symbols."""
    unit_count, _ = _expansions(model)
    return int(np.frombuffer(symbols.translate(unit_count), np.uint8).sum())


def _units(packed: Array, weights: int, model: Model) -> Array:
    """Return a mask's units, uint8; ones fill up the last."""
    count = -(-weights // model.width)
    groups = -(-count // 8)  # of 8 units, that is ``width`` bytes
    filled = np.full(groups * model.width, 255, np.uint8)
    filled[: len(packed)] = packed
    if weights % 8:
        filled[len(packed) - 1] |= 255 << weights % 8 & 255
    if model.width == 8:
        return filled[:count]
    if model.width == 1:
        return np.unpackbits(filled, count=count, bitorder="little")
    units = np.empty((groups, 8), np.uint8)
    for part in _parts(groups):
        units[part] = _split(filled.reshape(groups, model.width)[part], model.width)
    return units.reshape(-1)[:count]


def _split(rows: Array, width: int) -> Array:
    """Return the 8 units of each row of ``width`` bytes, by halving: 64 to 32 to 16 to 8 bits."""
    words = np.zeros((len(rows), 8), np.uint8)
    words[:, :width] = rows
    for size in (4, 2, 1):
        whole = words.view(f"<u{2 * size}")
        low = 2 ** (size * width) - 1
        words = (whole & low) | (whole >> size * width & low) << 8 * size
    return words.view(np.uint8)


def packed_units(units: Array, weights: int, model: Model) -> Array:
    """Return the mask that has these units.

    Args:
        units: uint8 array; their number is a multiple of 8.
        weights: Number of weights.
        model: What a unit is.

    Returns:
        uint8 array of shape (ceil(weights / 8),).
    """
    if model.width == 8:
        filled = units
    elif model.width == 1:
        filled = np.packbits(units, bitorder="little")
    else:
        rows = units.reshape(-1, 8)
        filled = np.empty((len(rows), model.width), np.uint8)
        for part in _parts(len(rows)):
            filled[part] = _joined(rows[part], model.width)
    packed = filled.reshape(-1)[: -(-weights // 8)]
    if weights % 8:
        packed[-1] &= 2 ** (weights % 8) - 1
    return packed


def _joined(rows: Array, width: int) -> Array:
    """Undo `_split`: the upper half of each word moves down, beside the lower."""
    words = rows
    for size in (1, 2, 4):
        whole = words.view(f"<u{2 * size}")
        words = whole - (whole >> 8 * size) * (2 ** (8 * size) - 2 ** (size * width))
    return words.view(np.uint8)[:, :width]


def _parts(rows: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS_AT_ONCE) for start in range(0, rows, _ROWS_AT_ONCE))


def _symbols(units: Array, model: Model) -> Array:
    """Return the symbols of units, uint8; where the last unit is full, a unit 0 is put after it."""
    if model.longest == 1:
        return units
    found, run = [], 0  # the run of full units before the part
    for start in range(0, len(units), _UNITS_AT_ONCE):
        part = units[start : start + _UNITS_AT_ONCE]
        ends = np.flatnonzero(part != model.full)
        runs = ends.copy()
        runs[1:] -= ends[:-1] + 1
        runs[:1] += run
        found.append(_symbols_of_runs(runs, part[ends], model))
        run = len(part) - 1 - int(ends[-1]) if len(ends) else run + len(part)
    if run:
        found.append(_symbols_of_runs(np.array([run]), np.zeros(1, np.uint8), model))
    return np.concatenate(found or [units])


def _symbols_of_runs(runs: Array, last: Array, model: Model) -> Array:
    """Return symbols, uint8, of runs of full units (int64), each with the unit after it (uint8)."""
    runs = runs.astype(np.uint64)  # a division by a constant is fast without signs
    longest = runs // model.longest
    rest = (runs - longest * model.longest).astype(np.uint8)
    ending = rest * np.uint8(model.full) + last
    if not longest.any():
        return ending
    places = np.cumsum((longest + 1).astype(np.int64)) - 1
    symbols = np.full(places[-1] + 1, model.symbols - 1, np.uint8)
    symbols[places] = ending
    return symbols


def _expand(symbols: bytes, units: Array, place: int, model: Model) -> int:
    """Write the units of symbols to ``units`` from ``place`` on, and return the place after them.

    Raises:
        CodeError: If there are more units than places.
    """
    unit_count, last_unit = _expansions(model)
    last = np.frombuffer(symbols.translate(last_unit), np.uint8)
    ends = _running_sum(symbols.translate(unit_count), model.longest)
    total = int(ends[-1]) if len(ends) else 0
    if total > len(units) - place:
        message = f"has a payload of more than {len(units) - 1} units of {model.width} weights"
        raise CodeError(message)
    ends += place - 1
    units[ends] = last
    return place + total


def _put(symbols: bytes, units: Array, place: int, model: Model) -> int:
    """Do what `_expand` does where every symbol is one unit."""
    if len(symbols) > len(units) - place:
        message = f"has a payload of more than {len(units) - 1} units of {model.width} weights"
        raise CodeError(message)
    units[place : place + len(symbols)] = np.frombuffer(symbols, np.uint8)
    return place + len(symbols)


def _running_sum(counts: bytes, largest: int) -> Array:
    """Return the sums of the first 1, 2, ... of these bytes, int64.

    Args:
        counts: Numbers.
        largest: The largest that may be among them.
    """
    if 8 * largest > 255:
        return np.cumsum(np.frombuffer(counts, np.uint8).astype(np.int64))
    # One multiplication makes the sums within 8 bytes, which is several times as fast.
    eights = np.frombuffer(counts.ljust(-(-len(counts) // 8) * 8, b"\0"), "<u8")
    within = (eights * np.uint64(0x0101010101010101)).view(np.uint8).reshape(-1, 8)
    eighth = within[:, 7].astype(np.int64)
    sums = np.repeat(np.cumsum(eighth) - eighth, 8)
    sums += within.reshape(-1)
    return sums[: len(counts)]


@lru_cache(maxsize=96)
def _expansions(model: Model) -> tuple[bytes, bytes]:
    """Return each symbol's number of units, and its last unit."""
    pairs = [divmod(symbol, model.full) for symbol in range(model.symbols - 1)]
    counts = [run + 1 for run, _ in pairs] + [model.longest]
    units = [unit for _, unit in pairs] + [model.full]
    return bytes(counts).ljust(256, b"\1"), bytes(units).ljust(256, b"\0")
