"""A mask as symbols: units of weights, and runs of full ones (`pemn_surgery.entropy`)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from pemn_surgery.deflate import CodeError
from pemn_surgery.odds import share_of
from pemn_surgery.packed import cut_off, filled_up

Array = Any  # of numpy; its element type is in the docstrings

WIDTHS = (1, 6, 7, 8)

# Arrays between steps stay in the processor's cache.
_ROWS_AT_ONCE = 2**13
_UNITS_AT_ONCE = 2**16
_WEIGHTS_AT_ONCE = 2**18  # a multiple of 8


@dataclass(frozen=True)
class Model:
    """What decides the code of a mask.

    Attributes:
        width: Weights in a unit.
        odds: Ones to a zero, as a byte (`odds.odds_of`).
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

    def shares(self) -> list[int]:
        """Return how often each symbol is expected, times 2 ** 32."""
        found = []
        for symbol in range(self.symbols):
            run, unit = divmod(symbol, self.full)
            zeros = self.width - unit.bit_count() if run < self.longest else 0
            weights = min(run + 1, self.longest) * self.width
            found.append(share_of(weights, self.odds, [0] * zeros + [1]))
        return found


class _Part(NamedTuple):
    """Part of a mask's units.

    Attributes:
        size: Number of units.
        ends: Which of them are not full, uint32.
        last: Those units, uint8.
    """

    size: int
    ends: Array
    last: Array


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
    if model.width == 1:
        return _symbols(_zeros(packed, weights), model)
    units = _units(packed, weights, model)
    return units if model.longest == 1 else _symbols(_ends(units, model), model)


def units_of(parts: Iterable[bytes], count: int, model: Model) -> Iterator[Array]:
    """Yield the units of symbols, piece by piece: multiples of 8, but for the last.

    Args:
        parts: Symbols, piece by piece.
        count: The number of units; there may be one more.
        model: What a symbol is.

    Raises:
        CodeError: If there are more units or fewer.
    """
    left, before = count + 1, np.empty(0, np.uint8)
    for symbols in parts:
        units = _expanded(symbols, before, left, model)
        left -= len(units) - len(before)
        whole = len(units) // 8 * 8
        before = units[whole:]
        yield units[:whole]
    yield before
    if left > 1:
        message = f"has a payload that does not end with its {count} units of {model.width} weights"
        raise CodeError(message)


def count_units(symbols: bytes, model: Model) -> int:
    """Return the number of units of symbols."""
    unit_count, _ = _expansions(model)
    return int(np.frombuffer(symbols.translate(unit_count), np.uint8).sum())


def _units(packed: Array, weights: int, model: Model) -> Array:
    """Return a mask's units of several weights, uint8; ones fill up the last."""
    count = -(-weights // model.width)
    rows = filled_up(packed, weights, model.width).reshape(-1, model.width)  # of 8 units each
    if model.width == 8:
        return rows.reshape(-1)[:count]
    units = np.empty((len(rows), 8), np.uint8)
    for part in _parts(len(rows)):
        units[part] = _split(rows[part], model.width)
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


def packed_units(parts: Iterable[Array], weights: int, model: Model) -> Array:
    """Return the mask that has these units.

    Args:
        parts: What `units_of` yields.
        weights: Number of weights.
        model: What a unit is.

    Returns:
        uint8 array of shape (ceil(weights / 8),).
    """
    return cut_off(np.concatenate([_packed(part, model) for part in parts]), weights)


def _packed(units: Array, model: Model) -> Array:
    """Return the weights of units as bits; what fills up the last 8 units is any."""
    if model.width == 8:
        return units
    if model.width == 1:
        return np.packbits(units, bitorder="little")
    units = np.append(units, np.zeros(-len(units) % 8, np.uint8)) if len(units) % 8 else units
    rows = units.reshape(-1, 8)
    packed = np.empty((len(rows), model.width), np.uint8)
    for part in _parts(len(rows)):
        packed[part] = _joined(rows[part], model.width)
    return packed.reshape(-1)


def _joined(rows: Array, width: int) -> Array:
    """Undo `_split`: the upper half of each word moves down, beside the lower."""
    words = rows
    for size in (1, 2, 4):
        whole = words.view(f"<u{2 * size}")
        words = whole - (whole >> 8 * size) * (2 ** (8 * size) - 2 ** (size * width))
    return words.view(np.uint8)[:, :width]


def _parts(rows: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS_AT_ONCE) for start in range(0, rows, _ROWS_AT_ONCE))


def _ends(units: Array, model: Model) -> Iterator[_Part]:
    """Yield where runs of full units end, part by part."""
    for start in range(0, len(units), _UNITS_AT_ONCE):
        part = units[start : start + _UNITS_AT_ONCE]
        places = np.flatnonzero(part != model.full)
        yield _Part(len(part), places.astype(np.uint32), part[places])


def _zeros(packed: Array, weights: int) -> Iterator[_Part]:
    """Yield what `_ends` does where units are weights; bytes of ones alone are passed by."""
    for start in range(0, weights, _WEIGHTS_AT_ONCE):
        size = min(weights - start, _WEIGHTS_AT_ONCE)
        part = ~packed[start // 8 : (start + size + 7) // 8]
        there = np.flatnonzero(part != 0)
        flags = np.unpackbits(part[there], bitorder="little").view(np.bool_)
        inside = np.flatnonzero(flags)
        places = there[inside >> 3] << 3 | inside & 7
        places = places[: np.searchsorted(places, size)]  # without the last byte's unused bits
        yield _Part(size, places.astype(np.uint32), np.zeros(len(places), np.uint8))


def _symbols(parts: Iterable[_Part], model: Model) -> Array:
    """Return symbols, uint8; where the last unit is full, a unit 0 is put after it."""
    found, run = [np.empty(0, np.uint8)], 0  # the run of full units before the part
    for part in parts:
        if not len(part.ends):
            run += part.size
            continue
        runs = np.diff(part.ends, prepend=part.ends[:1]) - np.uint32(1)
        longest, runs[0] = divmod(run + int(part.ends[0]), model.longest)
        found += [_longest(longest, model), _symbols_of_runs(runs, part.last, model)]
        run = part.size - 1 - int(part.ends[-1])
    longest, rest = divmod(run, model.longest)
    if run:
        found += [_longest(longest, model), np.array([rest * model.full], np.uint8)]
    return np.concatenate(found)


def _longest(count: int, model: Model) -> Array:
    return np.full(count, model.symbols - 1, np.uint8)


def _symbols_of_runs(runs: Array, last: Array, model: Model) -> Array:
    """Return symbols, uint8, of runs of full units, uint32, each with the unit after it, uint8."""
    longest = runs // np.uint32(model.longest)
    rest = (runs - longest * np.uint32(model.longest)).astype(np.uint8)
    ending = rest * np.uint8(model.full) + last
    if not longest.any():
        return ending
    places = np.cumsum((longest + np.uint32(1)).astype(np.int64)) - 1
    symbols = _longest(int(places[-1]) + 1, model)
    symbols[places] = ending
    return symbols


def _expanded(symbols: bytes, before: Array, most: int, model: Model) -> Array:
    """Return units, and behind them those of symbols, uint8.

    Raises:
        CodeError: If there are more than ``most``.
    """
    unit_count, last_unit = _expansions(model)
    ends = _running_sum(symbols.translate(unit_count))
    total = int(ends[-1]) if len(ends) else 0
    if total > most:
        message = f"has a payload of more than {most - 1} units of {model.width} weights"
        raise CodeError(message)
    units = np.full(len(before) + total, model.full, np.uint8)
    units[: len(before)] = before
    ends += len(before) - 1
    units[ends] = np.frombuffer(symbols.translate(last_unit), np.uint8)
    return units


def _running_sum(counts: bytes) -> Array:
    """Return the sums of the first 1, 2, ... of these bytes, int64; torch is faster than numpy."""
    numbers = np.frombuffer(counts, np.uint8).astype(np.int64)
    return torch.from_numpy(numbers).cumsum_(0).numpy()


@lru_cache(maxsize=96)
def _expansions(model: Model) -> tuple[bytes, bytes]:
    """Return each symbol's number of units, and its last unit."""
    pairs = [divmod(symbol, model.full) for symbol in range(model.symbols - 1)]
    counts = [run + 1 for run, _ in pairs] + [model.longest]
    units = [unit for _, unit in pairs] + [model.full]
    return bytes(counts).ljust(256, b"\1"), bytes(units).ljust(256, b"\0")
