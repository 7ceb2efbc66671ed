"""Masks coded by density: an independent reader as the oracle, the entropy, hostile bytes."""

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

from pemn_surgery.coding import bits, codec, coder
from pemn_surgery.coding.header import HEADER_BYTES, assemble, inspect
from pemn_surgery.errors import MaskFormatError
from tests import oracles, reader
from tests.stored import (
    as_bytes,
    as_tensor,
    assert_every_flipped_bit_is_noticed,
    assert_refused,
    assert_refused_or_the_same,
    by_density,
    changed,
)

DENSITIES = (0.5, 0.53, 0.54, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.975, 0.99)
# What is taken at once, and one weight more or less on every side of it.
EDGES = [0, 1, 2, 7, 8, 9, 23, 24, 25, 255, 256, 65535, 65537, 2**18 - 1, 2**18, 2**21 - 1, 2**21]


def bernoulli(weights, density, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random(weights) < density)


def bits_of_entropy(mask):
    density = float(mask.double().mean())
    return -mask.numel() * sum(p * math.log2(p) for p in (density, 1 - density) if p > 0)


def check_round_trip(mask, base=bytes(12)):
    stored = bits.pack(mask, base)
    coded = codec.encode(stored)
    assert coded.numel() <= stored.numel()
    header = inspect(coded, "m")
    assert (header.weights, header.base) == (mask.numel(), base)
    assert (header.coding == "bits") == torch.equal(coded, stored)
    oracles.assert_same(codec.decode(coded, "m"), stored)
    oracles.assert_same(codec.decode(by_density(mask, base), "m"), stored)
    return coded


def test_the_reader_is_independent():
    path = Path(reader.__file__)
    text = path.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert found == {"functools", "json", "zlib", "numpy"}
    assert len(text.splitlines()) <= 80


SHAPES = st.lists(st.integers(0, 12), max_size=4).map(tuple)


@given(SHAPES, st.floats(0, 1), st.integers(0, 2**32 - 1), st.binary(min_size=12, max_size=12))
@example((), 1.0, 0, bytes(12))
@example((0, 3), 0.5, 0, bytes(12))
@settings(deadline=None)
def test_round_trip_of_every_shape(shape, density, seed, base):
    mask = bernoulli(math.prod(shape), density, seed).view(shape)
    coded = check_round_trip(mask, base)
    oracles.assert_same(bits.unpack(codec.decode(coded, "m"), shape), mask)
    for content in (coded, by_density(mask, base)):
        oracles.assert_same(torch.from_numpy(reader.mask(as_bytes(content))), mask.view(-1))


@pytest.mark.parametrize("weights", EDGES)
@pytest.mark.parametrize("density", [0, 0.02, 0.3, 0.6, 0.97, 1])
def test_round_trip_at_the_edges(weights, density):
    check_round_trip(bernoulli(weights, density))


@given(st.sampled_from([32768, 40000, 65000, 65472]), st.booleans(), st.integers(0, 2000),
       st.floats(0, 1))  # fmt: skip
@settings(deadline=None)
def test_every_density_holds_every_mask(density, turned, weights, share):
    """A mask of any other density only takes more room."""
    mask = bernoulli(weights, share)
    turned &= density > 32768
    writer = coder.Writer()
    writer.write(np.packbits((mask ^ turned).numpy(), bitorder="little"), weights, density)
    options, header = 65536 - density if turned else density, bits.verify(bits.pack(mask), "m")
    stored = codec._coded("entropy", options, header, b"", writer)
    oracles.assert_same(codec.decode(stored, "m"), bits.pack(mask))
    oracles.assert_same(torch.from_numpy(reader.mask(as_bytes(stored))), mask)


def test_a_stream_by_hand():
    """Two weights 1 and 0 of density 1/2: the last is coded first, from state 0."""
    half = 2**23
    state = 0 // half * 2**24 + 0 % half + 1  # the weight 0, behind the end, which has 1
    state = state // (half - 1) * 2**24 + state % (half - 1) + half + 1  # the weight 1
    writer = coder.Writer()
    writer.write(np.array([1], np.uint8), 2, 32768)
    assert writer.stream() == struct.pack("<I", state).rstrip(b"\0")


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("inverted", [False, True])
def test_within_a_thousandth_of_the_entropy(density, inverted):
    """From a million weights on, headers apart."""
    mask = bernoulli(1_000_000, density) ^ inverted
    stored = bits.pack(mask)
    coded = codec.encode(stored)
    assert 1 <= 8 * (coded.numel() - HEADER_BYTES) / bits_of_entropy(mask) <= 1.001
    assert torch.equal(codec.decode(coded, "m"), stored)


def test_near_one_half_bits_stay_bits():
    """They are read at once; a code would be shorter by less than a thousandth."""
    assert inspect(codec.encode(bits.pack(bernoulli(1_000_000, 0.51))), "m").coding == "bits"
    assert inspect(codec.encode(bits.pack(bernoulli(1_000_000, 0.54))), "m").coding == "entropy"


def test_the_rarest_zeros_are_held_too():
    for mask in (torch.ones(2**20, dtype=torch.bool), torch.zeros(2**20 + 5, dtype=torch.bool)):
        coded = check_round_trip(mask)
        assert mask.numel() / 8192 < coded.numel() - HEADER_BYTES < mask.numel() / 5000


CODED = as_bytes(by_density(bernoulli(3000, 0.9)))
DENSITY = struct.unpack_from("<H", CODED, 6)[0]


def count(weights):
    return changed(CODED, 8, struct.pack("<Q", weights))


def density(value):
    return changed(CODED, 6, struct.pack("<H", value))


NO_END = "ends before its weights|does not end with its weights|decodes to checksum"
HOSTILE = {
    "payload gone": (CODED[:32], "32 bytes, too few for 3000 weights .at most 0"),
    "payload cut": (CODED[:-1], NO_END),
    "payload cut by a word": (CODED[:-4], NO_END),
    "payload cut in front": (CODED[:32] + CODED[36:], NO_END),
    "payload too long": (CODED + b"\1", NO_END),
    "payload too long by a zero": (CODED + b"\0", "ends in a byte 0"),
    "fewer weights": (count(2900), NO_END + ".*2900 weights"),
    "more weights": (count(3100), NO_END + ".*3100 weights"),
    "one weight more": (count(3001), NO_END),
    "8 weights more": (count(3008), NO_END),
    "2^60 weights": (count(2**60), f"too few for {2**60} weights"),
    "2^64 - 1 weights": (changed(CODED, 8, b"\xff" * 8), f"too few for {2**64 - 1} weights"),
    "no weights": (count(0), NO_END),
    "density 0": (density(0), "has density 0, this release reads 64 to 65472"),
    "density 63": (density(63), "has density 63, .*upgrade"),
    "density 65473": (density(65473), "has density 65473"),
    "another density": (density(DENSITY - 1), NO_END),
    "base": (changed(CODED, 20, b"\1"), "decodes to checksum"),
    "coding 4": (changed(CODED, 5, b"\4"), "coding 4, this release reads 0 to 3"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused(name):
    assert_refused(*HOSTILE[name], 4e6)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused_without_the_library(name, monkeypatch):
    monkeypatch.setattr(coder, "library", lambda: None)
    assert_refused(*HOSTILE[name], 4e6)


def test_every_flipped_bit_is_noticed():
    assert_every_flipped_bit_is_noticed(CODED)


@given(st.lists(st.tuples(st.integers(5, 300), st.integers(0, 255)), max_size=4))
@settings(deadline=None, max_examples=300)
def test_altered_bytes_with_a_fitting_checksum(changes):
    assert_refused_or_the_same(CODED, changes)


@given(st.binary(max_size=300), st.integers(64, 65472))
@settings(deadline=None, max_examples=50)
def test_any_bytes_end_in_bounded_memory(payload, options):
    payload = np.frombuffer(payload, np.uint8)
    stored = assemble("entropy", options, 8192 * len(payload), bytes(12), payload)
    tracemalloc.start()
    try:
        codec.decode(stored, "m")
    except MaskFormatError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4e6


def test_coded_masks_are_not_used_as_they_are():
    """A loader that passes PEFT's hooks by: an error that says what to do, not another mask."""
    with pytest.raises(MaskFormatError, match='coding="bits"'):
        bits.verify(as_tensor(CODED), "layer1.weight")
