"""Coded masks: an independent reader as the oracle, sizes against the entropy, hostile bytes."""

import ast
import math
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pemn_surgery import bits, codec, codes, deflate, entropy, odds, words
from pemn_surgery.errors import MaskFormatError
from tests import oracles, reader
from tests.stored import (
    as_bytes,
    as_tensor,
    assert_every_flipped_bit_is_noticed,
    assert_refused,
    assert_refused_or_the_same,
    changed,
)

DENSITIES = (
    0.54,
    0.55,
    0.6,
    0.65,
    0.655,
    0.66,
    0.665,
    0.67,
    0.68,
    0.69,
    0.7,
    0.714,
    0.72,
    0.75,
    0.764,
    0.78,
    0.795,
    0.8,
    0.85,
    0.89,
    0.9,
    0.92,
    0.93,
    0.935,
    0.95,
    0.975,
    0.99,
)
# What is taken at once, and one weight more or less on every side of it.
EDGES = [0, 1, 2, 5, 6, 7, 8, 9, 23, 24, 25, 47, 48, 49, 255, 256, 65535, 65536, 65537, 2**19 + 1]


def bernoulli(weights, density, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random(weights) < density)


def bits_of_entropy(mask):
    density = float(mask.double().mean())
    return -mask.numel() * sum(p * math.log2(p) for p in (density, 1 - density) if p > 0)


def check_round_trip(mask, base=bytes(12)):
    stored = bits.pack(mask, base)
    coded = codec.encode(stored)
    assert coded.numel() <= stored.numel()
    header = bits.inspect(coded, "m")
    assert (header.weights, header.base) == (mask.numel(), base)
    assert (header.coding == "bits") == torch.equal(coded, stored)
    oracles.assert_same(codec.decode(coded, "m"), stored)
    return coded


def test_the_reader_is_independent():
    path = Path(reader.__file__)
    text = path.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert found == {"json", "zlib", "numpy"}
    assert len(text.splitlines()) < 80


SHAPES = st.lists(st.integers(0, 12), max_size=4).map(tuple)


@given(SHAPES, st.floats(0, 1), st.integers(0, 2**32 - 1), st.binary(min_size=12, max_size=12))
@example((), 1.0, 0, bytes(12))
@example((0, 3), 0.5, 0, bytes(12))
@settings(deadline=None)
def test_round_trip_of_every_shape(shape, density, seed, base):
    mask = bernoulli(math.prod(shape), density, seed).view(shape)
    coded = check_round_trip(mask, base)
    oracles.assert_same(bits.unpack(codec.decode(coded, "m"), shape), mask)
    oracles.assert_same(torch.from_numpy(reader.mask(as_bytes(coded))), mask.view(-1))


@pytest.mark.parametrize("weights", EDGES)
@pytest.mark.parametrize("density", [0, 0.02, 0.3, 0.6, 0.85, 0.97, 1])
def test_round_trip_at_the_edges(weights, density):
    check_round_trip(bernoulli(weights, density))


@given(st.sampled_from(entropy.WIDTHS), st.integers(0, 255), st.integers(0, 2000), st.floats(0, 1))
@settings(deadline=None)
def test_every_code_holds_every_mask(width, odds, weights, density):
    """The code is for a density; a mask of any other only takes more room."""
    model = entropy.make_model(width, odds)
    mask = bernoulli(weights, density)
    packed = np.packbits(mask.numpy(), bitorder="little")
    coded = entropy.encode(packed, weights, model)
    np.testing.assert_array_equal(entropy.decode(coded, weights, model), packed)
    behind = b"" if width == words.WIDTH else b"more"
    found, rest = reader.stream(coded + behind, width, odds)
    np.testing.assert_array_equal(list(found)[:weights], mask.numpy())
    assert rest == behind


@pytest.mark.parametrize("own", [0, 1, 2, 17, 136, 137, 200, 254, 255])
def test_words_with_any_number_of_symbols_of_their_own(own, monkeypatch):
    """A reader takes that number from the file: a later release may choose another."""
    monkeypatch.setattr(words, "_OWN_UP_TO", ((float("inf"), own),))
    model = entropy.make_model(16, 40)
    mask = np.arange(0, 65536, 13, dtype="<u2").view(np.uint8)  # words of all ranks
    coded = entropy.encode(mask, 8 * len(mask), model)
    assert coded[0] == own
    np.testing.assert_array_equal(entropy.decode(coded, 8 * len(mask), model), mask)
    found, rest = reader.stream(coded, 16, 40)
    np.testing.assert_array_equal(np.packbits(list(found), bitorder="little"), mask)
    assert rest == b""


def test_words_by_hand():
    """16 ones have rank 0; 14 and two zeros lowest rank 136, behind 1 + 16 + 119 others."""
    mask = torch.tensor([True] * 16 + [False] * 2 + [True] * 14)
    packed = np.packbits(mask.numpy(), bitorder="little")
    coded = entropy.encode(packed, 32, entropy.make_model(16, 0))
    assert coded[0] == 0
    assert coded[-2:] == bytes([0, 136])  # both in the first page; no page for words that are rare
    single = entropy.encode(packed, 32, entropy.make_model(16, 60))
    assert single[0] == 190  # every word of two zeros has its own symbol
    assert len(single) < len(coded)


@pytest.mark.parametrize(("odds_byte", "weights"), [(0, 0), (16, 1), (30, 2), (59, 3)])
def test_shares_by_hand(odds_byte, weights):
    ones = odds.odds_of(odds_byte)
    for zeros in range(weights + 1):
        ways = [0] * zeros + [math.comb(weights, zeros)]
        share = ways[-1] * ones ** (weights - zeros) / (1 + ones) ** weights
        assert odds.share_of(weights, odds_byte, ways) == int(share * 2**32)


def test_large_masks_are_coded_fast_and_small_ones_short():
    def widths(weights, density):
        return [model.width for model in entropy.choose_models(density, weights)]

    assert widths(10**6, 0.5) == widths(10, 0.53) == []
    assert widths(10**6, 0.54) == widths(10**6, 0.93) == [16]
    assert widths(10**6, 0.94) == widths(10, 0.94) == [1]
    assert widths(1000, 0.6) == widths(1000, 0.93) == [16, 8, 6]


def test_runs_across_parts():
    """Ones for longer than what is taken at once, and a zero on each side of a part's end."""
    mask = torch.ones(2**19 + 5, dtype=torch.bool)
    for zero in (3, 2**16 - 1, 2**16, 2**17 + 511, 2**18 - 1, 2**18, 2**18 + 255, 2**19 + 1):
        mask[zero] = False
        for chosen in (mask, ~mask):
            oracles.assert_same(
                torch.from_numpy(reader.mask(as_bytes(check_round_trip(chosen)))), chosen
            )


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("inverted", [False, True])
def test_within_one_percent_of_the_entropy(density, inverted):
    mask = bernoulli(4_000_000, density) ^ inverted
    stored = bits.pack(mask)
    coded = codec.encode(stored)
    assert 1 <= 8 * coded.numel() / bits_of_entropy(mask) <= 1.01
    assert bits.inspect(coded, "m").coding == "entropy"
    assert torch.equal(codec.decode(coded, "m"), stored)


@pytest.mark.parametrize("density", [0.47, 0.5, 0.53])
def test_near_one_half_bits_are_within_one_percent(density):
    mask = bernoulli(1_000_000, density)
    coded = codec.encode(bits.pack(mask))
    assert bits.inspect(coded, "m").coding == "bits"
    assert 8 * coded.numel() / bits_of_entropy(mask) <= 1.01


def test_what_no_code_makes_shorter_stays_bits():
    halves = torch.cat([torch.ones(48, dtype=torch.bool), bernoulli(40, 0.5)])
    assert torch.equal(codec.encode(bits.pack(halves)), bits.pack(halves))
    alternating = torch.arange(8000) % 3 != 0  # density 2/3, but no byte is likely in the model
    stored = bits.pack(alternating)
    assert codec.encode(stored).numel() <= stored.numel()


def test_code_lengths_are_the_best():
    """Against Huffman's algorithm, where that stays below the limit."""
    import heapq

    generator = np.random.default_rng(0)
    for _ in range(20):
        weights = generator.integers(50, 1000, generator.integers(2, 257)).tolist()
        lengths = deflate.code_lengths(weights)
        heap, best = sorted(weights), 0
        while len(heap) > 1:
            both = heapq.heappop(heap) + heapq.heappop(heap)
            heapq.heappush(heap, both)
            best += both
        assert sum(weight * length for weight, length in zip(weights, lengths, strict=True)) == best
        assert sum(2.0**-length for length in lengths) == 1


def test_code_lengths_at_the_limit():
    lengths = deflate.code_lengths([2**place for place in range(30)])
    assert max(lengths) == 15
    assert sum(2.0**-length for length in lengths) == 1


def coded_by(width, weights=3000, density=0.9):
    """The form of one width, also where another is shorter."""
    stored = bits.pack(bernoulli(weights, density))
    model = entropy.make_model(width, odds.nearest_odds(density))
    content = entropy.encode(stored.numpy()[bits.HEADER_BYTES :], weights, model)
    code = codes.Code(codes.Coding.ENTROPY, width, model.odds, content)
    return as_bytes(codec.sealed(code, bits.verify(stored, "m")))


CODED = coded_by(6)
WORDS = coded_by(16)  # 188 words; 190 ranks have their own symbol
RARE = coded_by(16, 30_000, 0.87)  # 190 symbols, 65 pages, and words of those that are left
OWN = bits.HEADER_BYTES + 4


def count(weights, coded=CODED):
    return changed(coded, 8, struct.pack("<Q", weights))


HOSTILE = {
    "header cut": (CODED[:35], "35 bytes, the header of a coded mask needs 36"),
    "payload gone": (CODED[:36], "too few for 3000 weights"),
    "payload cut": (CODED[:-1], "does not end with its 3000 weights"),
    "payload too long": (CODED + b"\0", "does not end with its 3000 weights"),
    "fewer weights": (
        count(2900),
        "more than 484 units of 6 weights",
    ),
    "more weights": (
        count(3100),
        "does not end with its 517 units of 6 weights",
    ),
    "2^60 weights": (count(2**60), f"too few for {2**60} weights"),
    "2^64 - 1 weights": (changed(CODED, 8, b"\xff" * 8), f"too few for {2**64 - 1} weights"),
    "no weights": (changed(CODED, 8, bytes(8)), "more than 0 units"),
    "one weight more": (
        count(3001),
        "has a payload|decodes to checksum",
    ),
    "width 0": (changed(CODED, 6, b"\0"), "code 0, this release reads"),
    "width 5": (changed(CODED, 6, b"\5"), "code 5, this release reads"),
    "width 8": (changed(CODED, 6, b"\x08"), "has a payload"),
    "inverted": (changed(CODED, 6, b"\x86"), "decodes to checksum"),
    "odds": (changed(CODED, 7, b"\0"), "has a payload|decodes to checksum"),
    "checksum of the bits": (changed(CODED, 32, b"\0\0\0\0"), "its payload says 00000000"),
    "base": (changed(CODED, 20, b"\1"), "decodes to checksum"),
    "coding 4": (changed(CODED, 5, b"\4"), "coding 4, this release reads 0 to 3"),
    "words, payload gone": (WORDS[:OWN], "too few for 3000 weights"),
    "words, nothing but their number": (count(0, WORDS)[:OWN], "has no payload"),
    "words, code cut": (WORDS[: OWN + 60], "does not end with its 188 words"),
    "words, bytes cut": (WORDS[:-1], "bytes behind its code, which needs"),
    "words, a byte more": (WORDS + b"\0", "bytes behind its code, which needs"),
    "words, fewer weights": (count(2900, WORDS), "more than 182 words of 16 weights"),
    "words, more weights": (count(3100, WORDS), "does not end with its 194 words"),
    "words, other place": (changed(WORDS, len(WORDS) - 1, b"\xff"), "decodes to checksum"),
    "words, other number of own symbols": (changed(WORDS, OWN, b"\0"), "has a payload|needs"),
    "words, a page that is not there": (
        changed(RARE, len(RARE) - 1, b"\xff"),
        "has a word of rank 82[0-9]{3}, where there are 65536",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused(name):
    assert_refused(*HOSTILE[name], 4e6)


@pytest.mark.parametrize("coded", [CODED, WORDS], ids=["runs", "words"])
def test_every_flipped_bit_is_noticed(coded):
    assert_every_flipped_bit_is_noticed(coded)


@pytest.mark.parametrize("coded", [CODED, WORDS, RARE], ids=["runs", "words", "rare"])
@given(st.lists(st.tuples(st.integers(5, 300), st.integers(0, 255)), max_size=4))
@settings(deadline=None, max_examples=300)
def test_altered_bytes_with_a_fitting_checksum(coded, changes):
    assert_refused_or_the_same(coded, changes)


@given(st.binary(max_size=300), st.sampled_from(entropy.WIDTHS), st.integers(0, 255))
@settings(deadline=None, max_examples=50)
def test_any_bytes_end_in_bounded_memory(payload, width, odds):
    model = entropy.make_model(width, odds)
    weights = model.most_weights(len(payload))
    tracemalloc.start()
    try:
        with pytest.raises(deflate.CodeError):
            entropy.decode(payload, weights, model)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4e6


def test_coded_masks_are_not_used_as_they_are():
    """A loader that passes PEFT's hooks by: an error that says what to do, not another mask."""
    with pytest.raises(MaskFormatError, match='coding="bits"'):
        bits.verify(as_tensor(CODED), "layer1.weight")
