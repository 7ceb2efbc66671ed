"""Masks coded near their entropy: symbols of several weights, Huffman codes, read back by zlib.

A weight of a mask of density p holds H = -p log2 p - (1 - p) log2 (1 - p) bits: 1 at .5, .08 at
.99. What comes near that (``docs/coding.md`` has the other ways that were measured):

* At middling densities a symbol is a class of words of 16 weights (`words`). At high ones it is the
  distance between zeros: a run of full units, and the unit that ends it, where a unit is a weight
  (`symbols`; units of 6 to 8 weights are for codes without extra bits).
* Symbols get the best prefix code for independent weights of one density. It follows from
  ``width`` and the density, rounded to a byte, so that a file holds no table.
* Codes lie in bytes as in DEFLATE (`deflate`), which zlib decodes: it is fed the head of a stream
  that announces the code, then the bytes of the file.

``docs/format.md`` describes the bytes.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from pemn_surgery import symbols, words
from pemn_surgery.deflate import CodeError, CodeReader, PrefixCode, concatenate, make_code
from pemn_surgery.odds import nearest_odds
from pemn_surgery.packed import cut_off, filled_up
from pemn_surgery.symbols import Model, count_units, packed_units, symbols_of, units_of
from pemn_surgery.words import WordModel

Array = Any  # of numpy; its element type is in the docstrings

WIDTHS = (*symbols.WIDTHS, words.WIDTH)

_READ_AT_ONCE = 2**15  # arrays between steps stay in the processor's cache

_NEARLY_HALF = 0.54  # below it less than .2 % would be gained
_WORDS_UP_TO = 0.931  # both codes are within .8 % of the entropy there (docs/coding.md)
_SMALL = 2**17  # fewer weights are quickly coded in several ways


def choose_models(density: float, weights: int) -> list[Model | WordModel]:
    """Return the models for a mask, of which the shortest code is to be taken.

    Args:
        density: Share of ones, at least .5.
        weights: Number of weights; where they are many, there is one model, which is fast.

    Returns:
        The models; none if one bit a weight is within 1 % of the entropy.
    """
    if density < _NEARLY_HALF:
        return []
    fast = words.WIDTH if density <= _WORDS_UP_TO else 1
    widths = (words.WIDTH, 8, 6) if weights < _SMALL and fast > 1 else (fast,)
    return [make_model(width, nearest_odds(density)) for width in widths]


def make_model(width: int, odds: int) -> Model | WordModel:
    """Return a model.

    Args:
        width: One of `WIDTHS`.
        odds: Ones to a zero, as a byte.
    """
    return WordModel(odds) if width == words.WIDTH else Model(width, odds)


def encode(packed: Array, weights: int, model: Model | WordModel) -> bytes:
    """Code a mask.

    Args:
        packed: uint8 array of shape (ceil(weights / 8),): weight i is bit ``i % 8`` of byte
            ``i // 8``.
        weights: Number of weights.
        model: The code.
    """
    if isinstance(model, WordModel):
        return words.encode(filled_up(packed, weights, words.WIDTH // 8).view("<u2"), model)
    return concatenate(symbols_of(packed, weights, model), _code(model))


def decode(coded: bytes | memoryview, weights: int, model: Model | WordModel) -> Array:
    """Return the mask that `encode` was given.

    Memory stays within 1.3 bytes a weight; check ``weights`` against ``model.most_weights`` first.

    Args:
        coded: What `encode` returned.
        weights: Number of weights.
        model: The code.

    Returns:
        uint8 array of shape (ceil(weights / 8),).

    Raises:
        CodeError: If the bytes are no code of so many weights.
    """
    if isinstance(model, WordModel):
        found = words.decode(coded, -(-weights // words.WIDTH), model)
        return cut_off(found.view(np.uint8), weights)
    code = CodeReader(coded, _code(model))
    units = units_of(code.symbols(_READ_AT_ONCE), -(-weights // model.width), model)
    packed = packed_units(units, weights, model)
    if not code.ended or code.used < len(coded):
        message = f"has a payload that does not end with its {weights} weights"
        raise CodeError(message)
    return packed


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
    code = CodeReader(coded, _code(model))
    found = list(code.symbols(_READ_AT_ONCE))
    if not code.ended:
        message = "has a payload that does not end"
        raise CodeError(message)
    count = sum(count_units(part, model) for part in found)
    if count > -(-most // model.width) + 1:
        message = f"has a payload of {count * model.width} weights where at most {most} are"
        raise CodeError(message)
    units = units_of(found, count, model)
    if model.width == 1:
        return np.concatenate(list(units)), code.used
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


# -- the code --------------------------------------------------------------------------------------


@lru_cache(maxsize=96)  # a mask coded by context may have 64 (some .6 MB each)
def _code(model: Model) -> PrefixCode:
    return make_code(model.shares())
