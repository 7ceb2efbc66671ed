"""Masks coded beside the numbers of their base: sizes by hand, both readers, other bases."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pemn_surgery.coding import bits, codec
from pemn_surgery.coding.context import Guide
from pemn_surgery.coding.header import inspect
from pemn_surgery.errors import MaskFormatError
from pemn_surgery.numbers import rng
from pemn_surgery.numbers.sizes import base_sizes
from tests import oracles, reader
from tests.stored import (
    as_bytes,
    as_tensor,
    assert_every_flipped_bit_is_noticed,
    assert_refused,
    assert_refused_or_the_same,
    changed,
    drawn,
    forced,
    resealed,
)

KERNELS = [(), (2,), (3, 3)]


def words_of(weight):
    return weight.to(torch.bfloat16).flatten().view(torch.int16).numpy().view(np.uint16)


def guide_of(weight, log2=5):
    return Guide(base_sizes(words_of(weight)), log2)


def weight_of(count, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def mask_beside(weight, sharpness=3.0, seed=0):
    """A mask whose zeros are mostly large weights, as those of pretrained models are."""
    noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(100 + seed))
    return noise > 1 - 1 / (1 + (weight.abs() / 1.5) ** sharpness)


def as_base_coded(mask, guides, kernel=()):
    """Coded beside the base whatever is shorter: the table is the encoder's own choice."""
    coded = forced(mask, guides, kernel)
    assert inspect(coded, "m").coding == "base"
    return coded


@given(st.lists(st.floats(width=32), max_size=40))
@example([])
@example([0.0, -0.0, 1.0, -1.0, float("inf"), float("nan")])
def test_sizes_are_256ths_that_are_smaller(values):
    weight = torch.tensor(values, dtype=torch.float32)
    magnitudes = [word & 0x7FFF for word in words_of(weight).tolist()]
    expected = [
        256 * sum(other < one for other in magnitudes) // len(magnitudes) for one in magnitudes
    ]
    found = base_sizes(words_of(weight))
    assert found.dtype == np.uint8
    assert found.tolist() == expected


def test_a_base_in_float32_and_in_bfloat16_has_the_same_sizes():
    weight = weight_of(5000)
    np.testing.assert_array_equal(guide_of(weight).sizes, guide_of(weight.to(torch.bfloat16)).sizes)
    order = weight.to(torch.bfloat16).float().abs().argsort(stable=True)
    assert (np.diff(guide_of(weight).sizes[order].astype(int)) >= 0).all()


@given(
    st.integers(0, 200).map(lambda count: 18 * count),
    st.sampled_from(KERNELS),
    st.floats(0.5, 20),
    st.booleans(),
    st.integers(0, 2**31 - 1),
)
@settings(deadline=None, max_examples=40)
def test_every_mask_comes_back(weights, kernel, sharpness, is_drawn, seed):
    weight = weight_of(weights, seed)
    mask, guide = mask_beside(weight, sharpness, seed), guide_of(weight)
    of_seed = [drawn(rng.key_of(seed, "scores"), max(weights, 1), weights)] if is_drawn else []
    coded = forced(mask, [*of_seed, guide], kernel)
    found = codec.decode(coded, "m", lambda: guide.sizes)
    oracles.assert_same(found, bits.pack(mask))
    words = words_of(weight).astype(int)
    oracles.assert_same(torch.from_numpy(reader.mask(as_bytes(coded), words)), mask)


def test_it_is_near_the_entropy_beside_the_sizes():
    weight = weight_of(1_000_000)
    mask, guide = mask_beside(weight), guide_of(weight)
    stored = bits.pack(mask)
    coded = codec.encode(stored, [guide])
    assert inspect(coded, "m").coding == "base"
    ones = np.bincount(guide.sizes >> 3, weights=mask.numpy())
    all_of_size = np.bincount(guide.sizes >> 3)
    share = np.clip(ones / all_of_size, 1e-12, 1 - 1e-12)
    held = -(all_of_size * (share * np.log2(share) + (1 - share) * np.log2(1 - share))).sum()
    assert held < 0.8 * 1_000_000 * entropy_of(float(mask.double().mean()))
    assert 0.999 * held <= 8 * coded.numel() <= 1.003 * held


def entropy_of(density):
    return -sum(p * np.log2(p) for p in (density, 1 - density) if p > 0)


@given(st.integers(0, 4000), st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=25)
def test_it_is_never_longer_than_by_context(weights, seed):
    weight = weight_of(weights, seed)
    stored = bits.pack(mask_beside(weight, seed=seed))
    guide = guide_of(weight)
    coded = codec.encode(stored, [guide])
    assert coded.numel() <= codec.encode(stored, []).numel()
    assert torch.equal(codec.decode(coded, "m", lambda: guide.sizes), stored)


def test_a_mask_that_sizes_say_nothing_of_needs_no_base():
    weight = weight_of(20_000)
    stored = bits.pack(mask_beside(weight_of(20_000, 1), seed=2))
    coded = codec.encode(stored, [guide_of(weight)])
    assert inspect(coded, "m").coding == "entropy"
    assert torch.equal(codec.decode(coded, "m"), stored)


WEIGHT = weight_of(3000, 5)
MASK = mask_beside(WEIGHT)
GUIDE = guide_of(WEIGHT)
PLAIN = as_bytes(as_base_coded(MASK, [GUIDE]))
DRAWN = drawn(rng.key_of(0, "scores"), 3000, 3000)
BOTH_MASK = torch.from_numpy(DRAWN.sizes >= 128) ^ ~MASK
BOTH = as_bytes(as_base_coded(BOTH_MASK, [DRAWN, GUIDE], (3, 3)))


def sizes():
    return GUIDE.sizes


def test_what_is_damaged_below():
    assert PLAIN[5] == BOTH[5] == 3
    assert PLAIN[6] & 15 == 0 < PLAIN[6] >> 4  # the base alone, and no guide in the file
    assert BOTH[6] & 15 > 0
    assert BOTH[6] >> 4 > 0
    assert len(PLAIN) < 33 + 2 ** (PLAIN[6] >> 4) + 250


@pytest.mark.parametrize(
    ("given_sizes", "said"),
    [
        (lambda: None, r"beside the 3000 frozen numbers .* they are not at hand"),
        (lambda: GUIDE.sizes[:-1], "but there are 2999"),
        (lambda: guide_of(weight_of(3000, 6)).sizes, "coded beside other numbers than the base's"),
    ],
)
def test_without_the_base_it_is_refused(given_sizes, said):
    assert_refused(PLAIN, said, 6e6, given_sizes)


def test_who_does_not_know_of_bases_gets_the_same_refusal():
    assert_refused(PLAIN, "they are not at hand", 6e6)


def count(weights):
    return changed(PLAIN, 8, struct.pack("<Q", weights))


NO_END = "ends before|does not end with|decodes to checksum"
HOSTILE = {
    "header gone": (PLAIN[:32], "32 bytes, too few for 3000 weights"),
    "guide cut": (BOTH[:50], "has 50 bytes, its header needs 57"),
    "levels cut": (PLAIN[:33], "33 bytes, its header and levels need"),
    "payload cut": (PLAIN[:-1], NO_END),
    "payload too long": (PLAIN + b"\1", NO_END),
    "payload too long by a zero": (PLAIN + b"\0", "ends in a byte 0"),
    "fewer weights": (count(2900), "but there are 3000"),
    "2^64 - 1 weights": (count(2**64 - 1), f"too few for {2**64 - 1} weights"),
    "9 bits of the base": (changed(PLAIN, 6, b"\x90"), "has 0 and 9 bits of its guides"),
    "no bits of the base": (changed(PLAIN, 6, b"\0"), NO_END),
    "another coding": (changed(PLAIN, 5, b"\2"), f"{NO_END}|need|guides of no numbers|rows"),
    "other rows": (changed(PLAIN, 32, b"\1"), f"{NO_END}|need"),
    "base": (changed(PLAIN, 20, b"\1"), "decodes to checksum"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused(name):
    assert_refused(*HOSTILE[name], 6e6, sizes)


@pytest.mark.parametrize("coded", [PLAIN, BOTH])
def test_every_flipped_bit_is_noticed(coded):
    assert_every_flipped_bit_is_noticed(coded, sizes)


@given(
    st.sampled_from([PLAIN, BOTH]),
    st.lists(st.tuples(st.integers(5, 300), st.integers(0, 255)), max_size=4),
)
@settings(deadline=None, max_examples=300)
def test_altered_bytes_with_a_fitting_checksum(content, changes):
    assert_refused_or_the_same(content, changes, sizes)


def test_it_is_not_used_as_it_is():
    with pytest.raises(MaskFormatError, match=r"coding='base'.*coding=\"bits\""):
        bits.verify(as_tensor(resealed(PLAIN)), "layer1.weight")
