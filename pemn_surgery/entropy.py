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
from functools import lru_cache
from typing import Any

import numpy as np

from pemn_surgery.deflate import PrefixCode, concatenate, make_code
from pemn_surgery.symbols import (
    CodeError,
    Model,
    count_units,
    odds_of,
    packed_units,
    put_symbols,
    symbols_of,
)

Array = Any  # of numpy; its element type is in the docstrings

_CODED_AT_ONCE = 2**14  # arrays between steps stay in the processor's cache

_NEARLY_HALF = 0.54  # below it less than .1 % would be gained
# Up to which density each width is used: within .9 % of the entropy, and fast (docs/coding.md).
_WIDTH_UP_TO = ((0.655, 8), (0.685, 7), (0.78, 8), (0.92, 6), (1.0, 1))


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
    return concatenate(symbols_of(packed, weights, model), _code(model))


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
    code = _Code(coded, model)
    placed = put_symbols(code.symbols(), units[: count + 1], model)
    if placed < count or not code.ended or code.used < len(coded):
        message = f"has a payload that does not end with its {weights} weights"
        raise CodeError(message)
    return packed_units(units, weights, model)


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
    count = sum(count_units(part, model) for part in found)
    if count > -(-most // model.width) + 1:
        message = f"has a payload of {count * model.width} weights where at most {most} are"
        raise CodeError(message)
    units = np.full(-(-count // 8) * 8, model.full, np.uint8)
    put_symbols(found, units[:count], model)
    if model.width == 1:
        return units[:count], code.used
    weights = count * model.width
    packed = packed_units(units, weights, model)
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
