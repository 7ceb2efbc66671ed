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

from pemn_surgery import bits, codec, deflate, entropy, symbols
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
    0.78,
    0.8,
    0.85,
    0.9,
    0.92,
    0.93,
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


@given(st.sampled_from(symbols.WIDTHS), st.integers(0, 255), st.integers(0, 2000), st.floats(0, 1))
@settings(deadline=None)
def test_every_code_holds_every_mask(width, odds, weights, density):
    """The code is for a density; a mask of any other only takes more room."""
    model = symbols.Model(width, odds)
    mask = bernoulli(weights, density)
    packed = np.packbits(mask.numpy(), bitorder="little")
    coded = entropy.encode(packed, weights, model)
    np.testing.assert_array_equal(entropy.decode(coded, weights, model), packed)
    found, rest = reader.stream(coded + b"more", weights, width, odds)
    np.testing.assert_array_equal(found, mask.numpy())
    assert rest == b"more"


def test_runs_across_parts():
    """Ones for longer than what is taken at once, and a zero on each side of a part's end."""
    mask = torch.ones(2**18 + 5, dtype=torch.bool)
    for zero in (3, 2**16 - 1, 2**16, 2**16 + 1, 2**17 + 255, 2**17 + 511):
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


CODED = as_bytes(codec.encode(bits.pack(bernoulli(3000, 0.9))))


def count(weights):
    return changed(CODED, 8, struct.pack("<Q", weights))


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
        "does not end with its 3100 weights",
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
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused(name):
    assert_refused(*HOSTILE[name], 4e6)


def test_every_flipped_bit_is_noticed():
    assert_every_flipped_bit_is_noticed(CODED)


@given(st.lists(st.tuples(st.integers(5, len(CODED) - 1), st.integers(0, 255)), max_size=4))
@settings(deadline=None, max_examples=300)
def test_altered_bytes_with_a_fitting_checksum(changes):
    assert_refused_or_the_same(CODED, changes)


@given(st.binary(max_size=300), st.sampled_from(symbols.WIDTHS), st.integers(0, 255))
@settings(deadline=None, max_examples=50)
def test_any_bytes_end_in_bounded_memory(payload, width, odds):
    model = symbols.Model(width, odds)
    weights = model.most_weights(len(payload))
    tracemalloc.start()
    try:
        with pytest.raises(symbols.CodeError):
            entropy.decode(payload, weights, model)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4e6


def test_coded_masks_are_not_used_as_they_are():
    """A loader that passes PEFT's hooks by: an error that says what to do, not another mask."""
    with pytest.raises(MaskFormatError, match='coding="bits"'):
        bits.verify(as_tensor(CODED), "layer1.weight")
