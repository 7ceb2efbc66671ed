"""Masks coded near their entropy: runs of ones as symbols, Huffman codes, read back by zlib.

A weight of a mask of density p holds H = -p log2 p - (1 - p) log2 (1 - p) bits: 1 at .5, .08 at
.99. What comes near that (``docs/coding.md`` has the other ways that were measured):

* ``width`` weights (8, 7, 6 or 1) are a *unit*. A symbol is a run of full units (all ones) and the
  unit that ends it, or the longest run alone: at most 256 symbols. With ``width`` 8 it is a byte of
  the mask, with 1 a distance between zeros.
* Symbols get the best prefix code for independent weights of one density. It follows from
  ``width`` and the density, rounded to a byte, so that a file holds no table.
* Codes lie in bytes as in DEFLATE (`deflate`), which zlib decodes: it is fed the head of a stream
  that announces the code, then the bytes of the file.

``docs/format.md`` describes the bytes.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pemn_surgery.deflate import PrefixCode, concatenate, make_code

Array = Any  # of numpy; its element type is in the docstrings

WIDTHS = (1, 6, 7, 8)

# Arrays between steps stay in the processor's cache.
_CODED_AT_ONCE = 2**14
_ROWS_AT_ONCE = 2**13
_UNITS_AT_ONCE = 2**16

_NEARLY_HALF = 0.54  # below it less than .1 % would be gained
# Up to which density each width is used: within .9 % of the entropy, and fast (docs/coding.md).
_WIDTH_UP_TO = ((0.655, 8), (0.685, 7), (0.78, 8), (0.92, 6), (1.0, 1))


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
    """Coded bytes are not what `encode` returns."""


def choose_model(density: float) -> Model | None:
    """Return the model for a mask, None if one bit a weight is within 1 % of the entropy.

    Args:
        density: Share of ones, at least .5.
    """
    if density < _NEARLY_HALF:
        return None
    width = next(width for limit, width in _WIDTH_UP_TO if density <= limit)
    zeros = max(1 - density, 1e-9)
    return Model(
        width, min(range(256), key=lambda odds: abs(odds_of(odds) / (density / zeros) - 1))
    )


def encode(packed: Array, weights: int, model: Model) -> bytes:
    """Code a mask.

    Args:
        packed: uint8 array of shape (ceil(weights / 8),): weight i is bit ``i % 8`` of byte
            ``i // 8``.
        weights: Number of weights.
        model: The code.
    """
    return concatenate(_symbols(_units(packed, weights, model), model), _code(model))


def decode(coded: bytes, weights: int, model: Model) -> Array:
    """Return the mask that `encode` was given.

    Memory stays below a byte a weight; check ``weights`` against `Model.most_weights` first.

    Args:
        coded: What `encode` returned.
        weights: Number of weights.
        model: The code.

    Returns:
        uint8 array of shape (ceil(weights / 8),).

    Raises:
        CodeError: If the bytes are no code of so many weights.
    """
    count = -(-weights // model.width)
    # Room for what the last row of 8 lacks, and for the unit that may stand after the last.
    units = np.full(-(-count // 8) * 8 + 8, model.full, np.uint8)
    place, put = 0, _put if model.longest == 1 else _expand
    code = _Code(coded, model)
    for symbols in code.symbols():
        place = put(symbols, units[: count + 1], place, model)
    if place < count or not code.ended or code.used < len(coded):
        message = f"has a payload that does not end with its {weights} weights"
        raise CodeError(message)
    return _packed(units, weights, model)


def decode_first(coded: bytes | memoryview, most: int, model: Model) -> tuple[Array, int]:
    """Return all weights of a code whose number is not known, from bytes that may go on behind it.

    Memory stays below a byte for each of ``most``, and 16 bytes for each coded one.

    Args:
        coded: What `encode` returned, and anything.
        most: The most weights that are expected.
        model: The code.

    Returns:
        The weights and what fills up the code behind them (see `is_filling`), uint8 of shape
        (weights,), each 0 or 1; and how many bytes the code has.

    Raises:
        CodeError: If the bytes do not begin with a code, or one of more weights.
    """
    code = _Code(coded, model)
    found = list(code.symbols())
    if not code.ended:
        message = "has a payload that does not end"
        raise CodeError(message)
    unit_count, _ = _expansions(model)
    counts = (np.frombuffer(part.translate(unit_count), np.uint8).sum() for part in found)
    count = sum(int(one) for one in counts)
    if count > -(-most // model.width) + 1:
        message = f"has a payload of {count * model.width} weights where at most {most} are"
        raise CodeError(message)
    units = np.full(-(-count // 8) * 8, model.full, np.uint8)
    place, put = 0, _put if model.longest == 1 else _expand
    for symbols in found:
        place = put(symbols, units[:count], place, model)
    if model.width == 1:
        return units[:count], code.used
    weights = count * model.width
    packed = _packed(units, weights, model)
    return np.unpackbits(packed, count=weights, bitorder="little"), code.used


def is_filling(rest: Array, weights: int, model: Model) -> bool:
    """Tell whether a code goes on behind its weights as `encode` lets it.

    Args:
        rest: What `decode_first` returned behind the weights.
        weights: Number of weights.
        model: The code.
    """
    ones = -weights % model.width
    ending, unit = rest[:ones], rest[ones:]
    return len(ending) == ones and bool(ending.all()) and _is_no_unit(unit, model)


def _is_no_unit(unit: Array, model: Model) -> bool:
    """Tell whether there is none, or the unit 0 that ends a run."""
    return not len(unit) or (len(unit) == model.width and not unit.any())


class _Code:
    """A code that is being read.

    Attributes:
        used: How many bytes of it were read.
        ended: Whether its end was among them.
    """

    def __init__(self, coded: bytes | memoryview, model: Model) -> None:
        self.used = 0
        self.ended = False
        self._coded = coded
        self._head = _code(model).head

    def symbols(self) -> Iterator[bytes]:
        """Yield the symbols piece by piece.

        Raises:
            CodeError: If the bytes are no code.
        """
        inflater = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
        try:
            inflater.decompress(self._head)
            while self.used < len(self._coded) and not self.ended:
                part = self._coded[self.used : self.used + _CODED_AT_ONCE]
                symbols = inflater.decompress(part)
                self.used += len(part) - len(inflater.unused_data)
                self.ended = inflater.eof
                yield symbols
        except zlib.error as error:
            message = f"has a payload that is no code ({error})"
            raise CodeError(message) from error


def odds_of(odds: int) -> float:
    """Return the ones to a zero that a model's byte stands for."""
    return (16 + odds % 16) * 2 ** (odds // 16) / 16


# -- units and symbols -----------------------------------------------------------------------------


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


def _packed(units: Array, weights: int, model: Model) -> Array:
    """Undo `_units`; the number of units is a multiple of 8."""
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


# -- the code --------------------------------------------------------------------------------------


@lru_cache(maxsize=96)  # a mask coded by context may have 64 (some .6 MB each)
def _code(model: Model) -> PrefixCode:
    return make_code(symbol_weights(model))


def symbol_weights(model: Model) -> list[int]:
    """Return every symbol's probability times 2 ** 32, rounded down but at least 1.

    Whole numbers throughout, so that every machine gets the same code.

    Args:
        model: The model.
    """
    ones, zeros = (16 + model.odds % 16) << model.odds // 16, 16
    both = ones + zeros
    longest = model.longest * model.width  # weights in the longest symbol
    found = []
    for symbol in range(model.symbols):
        run, unit = divmod(symbol, model.full)
        length = min((run + 1) * model.width, longest)
        zeros_in = model.width - unit.bit_count() if run < model.longest else 0
        share = ones ** (length - zeros_in) * zeros**zeros_in
        found.append(max((share << 32) // both**length, 1))
    return found
