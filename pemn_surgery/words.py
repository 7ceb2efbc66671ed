"""Masks of middling density, 16 weights at a time: a prefix code, and bytes behind it.

A *word* is 16 weights; its *rank* is its place among all words, those of few zeros first. Where
weights are independent, words of near ranks are about as likely. So not each word has a symbol: the
first ``own`` ranks have their own, the other symbols stand for a *page* of 256 ranks, and a byte
behind the code is the place in the page. The last symbol is for all pages that are left, whose
words are *rare*: one byte more, counted from the end, is the page.

That takes hardly more bits than the best prefix code of 65,536 symbols, and few steps: zlib reads
the symbols, and one table has the word of every symbol and byte.

``docs/format.md`` describes the bytes, ``docs/coding.md`` has sizes and speeds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pemn_surgery.deflate import CodeError, CodeReader, PrefixCode, concatenate, make_code
from pemn_surgery.odds import odds_of, share_of

Array = Any  # of numpy; its element type is in the docstrings

WIDTH = 16

_ALL = 2**WIDTH
_PAGE = 256
_RARE = 255  # the last symbol

# Up to which odds how many words have their own symbol: within .9 % of the entropy, and with few
# codes of over 9 bits, which zlib reads more slowly.
_OWN_UP_TO = ((2.5, 0), (3.25, 20), (3.9, 145), (float("inf"), 190))

_READ_AT_ONCE = 2**18  # few pieces; a byte has eight symbols at most
_WORDS_AT_ONCE = 2**15  # arrays between steps stay in the processor's cache


@dataclass(frozen=True)
class WordModel:
    """What decides the code of a mask, but for the number of words that have their own symbol.

    Attributes:
        odds: Ones to a zero, as a byte (`odds.odds_of`).
    """

    odds: int

    @property
    def width(self) -> int:
        """Weights in a word."""
        return WIDTH

    def most_weights(self, nbytes: int) -> int:
        """Return how many weights so many coded bytes can hold: a word has at least one bit."""
        return 8 * nbytes * WIDTH


def encode(words: Array, model: WordModel) -> bytes:
    """Code words.

    Args:
        words: uint16 array of shape (n,), the first weight lowest.
        model: The code.
    """
    own = next(own for limit, own in _OWN_UP_TO if odds_of(model.odds) <= limit)
    tables = _tables(own)
    symbols = tables.symbol[words]
    places = tables.place[words[np.flatnonzero(symbols >= own)] if own else words]
    pages = tables.page[words[np.flatnonzero(symbols == _RARE)]][::-1]
    code = concatenate(symbols, _code(model.odds, own))
    return b"".join([bytes([own]), code, places.tobytes(), pages.tobytes()])


def decode(coded: bytes | memoryview, count: int, model: WordModel) -> Array:
    """Return the words that `encode` was given.

    Args:
        coded: What `encode` returned.
        count: Number of words.
        model: The code.

    Returns:
        uint16 array of shape (count,).

    Raises:
        CodeError: If the bytes are no code of so many words.
    """
    if not len(coded):
        message = "has no payload"
        raise CodeError(message)
    own = coded[0]
    reader = CodeReader(coded[1:], _code(model.odds, own))
    symbols = np.frombuffer(b"".join(_at_most(count, reader.symbols(_READ_AT_ONCE))), np.uint8)
    if len(symbols) < count or not reader.ended:
        message = f"has a payload that does not end with its {count} words of {WIDTH} weights"
        raise CodeError(message)
    return _decoded(symbols, np.frombuffer(coded[1 + reader.used :], np.uint8), own)


def _at_most(count: int, parts: Iterator[bytes]) -> Iterator[bytes]:
    """Yield parts as long as they have no more than so many symbols together."""
    left = count
    for part in parts:
        left -= len(part)
        if left < 0:
            message = f"has a payload of more than {count} words of {WIDTH} weights"
            raise CodeError(message)
        yield part


def _decoded(symbols: Array, behind: Array, own: int) -> Array:
    """Return the words of symbols and the bytes behind them, uint16.

    Raises:
        CodeError: If there are more bytes or fewer, or a page that is none.
    """
    rare = np.flatnonzero(symbols == _RARE)
    paged = int(np.count_nonzero(symbols >= own))
    if paged + len(rare) != len(behind):
        message = f"has {len(behind)} bytes behind its code, which needs {paged + len(rare)}"
        raise CodeError(message)
    words, table = np.empty(len(symbols), "<u2"), _tables(own).word
    used = 0
    for start in range(0, len(symbols), _WORDS_AT_ONCE):
        part = symbols[start : start + _WORDS_AT_ONCE]
        entries = part.astype("<u2") << np.uint16(8)
        places = entries.view(np.uint8)[::2]
        if own:
            have_place = np.flatnonzero(part >= own)
            places[have_place] = behind[used : used + len(have_place)]
            used += len(have_place)
        else:
            places[:] = behind[start : start + len(part)]
        words[start : start + len(part)] = table.take(entries.astype(np.int64), mode="clip")
    words[rare] = _rare_words(words[rare], behind[paged:][::-1], own)
    return words


def _rare_words(places: Array, pages: Array, own: int) -> Array:
    """Return the words of these places in these of the pages that are left."""
    ranks = _first_left(own) + pages.astype(np.int64) * _PAGE + places.astype(np.int64)
    if len(ranks) and ranks.max() >= _ALL:
        message = f"has a word of rank {ranks.max()}, where there are {_ALL}"
        raise CodeError(message)
    return _in_order()[ranks]


# -- the code --------------------------------------------------------------------------------------


class _Tables(NamedTuple):
    """Words and what they are coded as.

    Attributes:
        symbol: Symbol of every word, uint8 of shape (65536,).
        place: Place of every word in its page, uint8 of shape (65536,).
        page: Page of every word among those that are left, uint8 of shape (65536,).
        word: Word of a symbol and a place in its page, 0 if it is in none; where the page is left,
            the place. uint16 of shape (256 * 256,).
    """

    symbol: Array
    place: Array
    page: Array
    word: Array


@lru_cache(maxsize=8)
def _tables(own: int) -> _Tables:
    words, left = _in_order(), _first_left(own)
    rank = np.arange(_ALL, dtype=np.int32)
    symbol = np.where(rank < own, rank, np.minimum(own + (rank - own) // _PAGE, _RARE))
    place = np.where(rank < own, 0, (rank - own) % _PAGE)
    page = np.maximum((rank - left) // _PAGE, 0)
    of_word = np.empty((3, _ALL), np.uint8)
    for values, found in zip(of_word, (symbol, place, page), strict=True):
        values[words] = found
    word = np.zeros((256, _PAGE), "<u2")
    word[symbol[:left], place[:left]] = words[:left]
    word[_RARE] = np.arange(_PAGE)
    return _Tables(of_word[0], of_word[1], of_word[2], word.reshape(-1))


@lru_cache(maxsize=64)
def _code(odds: int, own: int) -> PrefixCode:
    """Return the best code for words of independent weights."""
    ends = [*range(1, own + 1), *range(own + _PAGE, _first_left(own) + _PAGE, _PAGE)]
    zeros = np.split(_zeros()[_in_order()], ends)  # of the words of each symbol
    return make_code([share_of(WIDTH, odds, np.bincount(of).tolist()) for of in zeros])


def _first_left(own: int) -> int:
    """Return the first rank of the pages that have no symbol of their own."""
    return own + (_RARE - own) * _PAGE


@lru_cache(maxsize=1)
def _in_order() -> Array:
    """Return the word of every rank, uint16 of shape (65536,)."""
    return np.argsort(_zeros(), kind="stable").astype("<u2")


def _zeros() -> Array:
    """Return how many zeros every word has, uint8 of shape (65536,)."""
    words = np.arange(_ALL, dtype="<u2").view(np.uint8).reshape(_ALL, 2)
    return WIDTH - np.unpackbits(words, axis=1).sum(axis=1, dtype=np.uint8)
