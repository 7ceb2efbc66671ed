"""Masks coded by context: buckets by hand, known entropies, an independent reader, hostility."""

import hashlib
import math
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pemn_surgery import bits, context, rng
from pemn_surgery.adapters import PemnConfig
from pemn_surgery.adapters.layer import initial_scores
from pemn_surgery.errors import MaskFormatError
from tests import oracles, reader

EDGES = [0, 1, 2, 7, 8, 9, 63, 64, 65, 1001, 2**16 - 1, 2**16, 2**16 + 1, 2**17 + 9]


def key(name, seed=0):
    return rng.key_of(seed, name)


def sizes_by_hand(seed, name, count, log2):
    """The upper bits of |w - 2^31|, below the middle one less."""
    words = oracles.integers(seed, name, count)
    sizes = [word - 2**31 if word >= 2**31 else 2**31 - 1 - word for word in words]
    return [size >> 31 - log2 for size in sizes]


def guided_mask(weights, spread, seed=0, guides=None):
    """A mask whose ones follow the first guide, the less sharply the larger ``spread``.

    Returns:
        The mask, and the bits that it holds beside its guides.
    """
    (guide, *others) = guides or [context.Guide(key("scores", seed), max(weights, 1))]
    size = context.sizes_of(guide, weights)[:weights].astype(float)
    for other in others:
        spread = spread * (0.2 + np.resize(context.sizes_of(other, weights), weights) / 256)
    share = 1 / (1 + np.exp(np.clip((127.5 - size) / spread, -30, 30)))
    held = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)).sum()
    return torch.from_numpy(np.random.default_rng(seed).random(weights) < share), float(held)


def guides_of(weights, period=None, seed=0):
    scores = context.Guide(key("scores", seed), max(weights, 1))
    return [scores] if period is None else [scores, context.Guide(key("bank", seed), period, 3)]


def forced(mask, guides, places=1, base=bytes(12)):
    """The form coded by context, also where another is shorter."""
    stored = bits.pack(mask, base)
    header = bits.verify(stored, "m")
    return bits._with_contexts(header, stored.numpy()[bits.HEADER_BYTES :], guides, places)


def as_bytes(stored):
    return stored.numpy().tobytes()


def as_tensor(content):
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def resealed(content):
    return content[:16] + struct.pack("<I", oracles.checksum(content)) + content[20:]


def check_round_trip(mask, guides, places=1, base=bytes(12)):
    coded = forced(mask, guides, places, base)
    assert bits.inspect(coded, "m") == bits.StoredMask(
        mask.numel(), struct.unpack_from("<I", as_bytes(coded), 16)[0], base, "context"
    )
    oracles.assert_same(bits.decoded(coded, "m"), bits.pack(mask, base))
    oracles.assert_same(torch.from_numpy(reader.mask(as_bytes(coded))), mask.view(-1))
    return coded


@given(st.integers(0, 2**40), st.integers(0, 70), st.integers(0, 8))
def test_sizes_are_the_upper_bits_of_the_seeds_integers(seed, weights, log2):
    found = context.sizes_of(context.Guide(key("s", seed), max(weights, 1)), weights)[:weights]
    assert (found >> 8 - log2).tolist() == sizes_by_hand(seed, "s", weights, log2)


@pytest.mark.parametrize("fan_in", [1, 27, 144, 4608])
def test_sizes_are_in_the_order_of_the_initial_scores(fan_in):
    """Whatever rounding does to the floats."""
    config = PemnConfig(seed=5)
    scores = initial_scores(config, "layer.weight", (100_000,), fan_in).abs().numpy()
    sizes = context.sizes_of(context.Guide(key("scores/layer.weight", 5), 100_000), 100_000)
    order = np.argsort(scores, kind="stable")
    apart = np.diff(scores[order]) > 0
    assert apart.sum() > 90_000
    assert (np.diff(sizes[order].astype(int))[apart] >= 0).all()


@pytest.mark.parametrize("places", [1, 9])
@pytest.mark.parametrize("period", [7, 40])
def test_buckets_are_counted_by_hand(places, period):
    weights = 100
    guides = [context.Guide(key("a"), weights, 3), context.Guide(key("b"), period, 2)]
    sizes = [context.sizes_of(guide, weights) for guide in guides]
    first, second = sizes_by_hand(0, "a", weights, 3), sizes_by_hand(0, "b", period, 2)
    expected = [i % places * 32 + first[i] * 4 + second[i % period] for i in range(weights)]
    found = [one for _, part in context._buckets(weights, places, sizes, [3, 2]) for one in part]
    assert found == expected


@given(
    st.integers(0, 400),
    st.floats(0.01, 1e6),
    st.integers(0, 2**32 - 1),
    st.integers(1, 30),
    st.one_of(st.none(), st.integers(1, 500)),
    st.binary(min_size=12, max_size=12),
)
@example(0, 1.0, 0, 1, None, bytes(12))
@example(1, 1.0, 0, 255, 1, bytes(12))
@settings(deadline=None, max_examples=50)
def test_round_trip(weights, spread, seed, places, period, base):
    mask, _ = guided_mask(weights, spread, seed)
    check_round_trip(mask, guides_of(weights, period, seed), places, base)


@pytest.mark.parametrize("weights", EDGES)
@pytest.mark.parametrize("spread", [0.1, 30])
def test_round_trip_at_the_edges(weights, spread):
    mask, _ = guided_mask(weights, spread)
    check_round_trip(mask, guides_of(weights, 700), places=9)


@pytest.mark.parametrize("density", [0, 0.02, 0.5, 0.98, 1])
def test_masks_that_the_guides_say_nothing_about(density):
    mask = torch.from_numpy(np.random.default_rng(3).random(20_000) < density)
    check_round_trip(mask, guides_of(20_000, 999))
    stored = bits.pack(mask)
    assert bits.coded(stored, guides_of(20_000, 999)).numel() == bits.coded(stored).numel()


@given(st.binary(min_size=18, max_size=18), st.integers(0, 600), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_every_table_holds_every_mask(levels, weights, seed):
    """A table only says how long a mask becomes; bit 6 of its bytes says nothing."""
    guides = (context.Guide(key("a"), 600, 1),)
    table = context.Table(9, guides, levels)
    flags = np.random.default_rng(seed).integers(0, 2, weights, np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context, "_choose_table", lambda *_: table)
        packed = np.packbits(flags, bitorder="little")
        _, streams = context.encode(packed, weights, guides, 9)
    np.testing.assert_array_equal(context.decode(table, streams, weights), packed)


@pytest.mark.parametrize("spread", [10, 40, 150])
@pytest.mark.parametrize("period", [None, 30_000])
def test_size_is_the_conditional_entropy(spread, period):
    """Within 1 %, and a bit for 255 weights that are certain; coarse sizes of weights cost more."""
    weights = 2_000_000
    guides = guides_of(weights, period)
    mask, held = guided_mask(weights, spread, guides=guides)
    stored = bits.pack(mask)
    coded = bits.coded(stored, guides)
    assert bits.inspect(coded, "m").coding == "context"
    assert torch.equal(bits.decoded(coded, "m"), stored)
    most = (1.01 if period is None else 1.02) * held + weights / 255
    assert 0.999 * held <= 8 * coded.numel() <= most
    assert 8 * coded.numel() < weights * entropy_of(float(mask.double().mean()))


def entropy_of(density):
    return -sum(p * math.log2(p) for p in (density, 1 - density) if p > 0)


def test_size_where_places_decide():
    """One place in nine is random, the others follow their initial scores to the bit."""
    weights = 900_000
    guides = guides_of(weights)
    mask = torch.from_numpy(context.sizes_of(guides[0], weights) >= 128)
    random = torch.from_numpy(np.random.default_rng(0).random(weights) < 0.5)
    mask = torch.where(torch.arange(weights) % 9 == 4, random, mask)
    coded = bits.coded(bits.pack(mask), guides, places=9)
    assert weights / 9 <= 8 * coded.numel() <= 1.01 * weights / 9 + weights / 255
    assert 8 * bits.coded(bits.pack(mask), guides).numel() > 2 * weights / 9


@given(st.integers(1, 3000), st.floats(0.1, 1000), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_never_longer_than_without_guides(weights, spread, seed):
    mask, _ = guided_mask(weights, spread, seed)
    stored = bits.pack(mask)
    coded = bits.coded(stored, guides_of(weights, 100, seed), 3)
    assert coded.numel() <= bits.coded(stored).numel() <= stored.numel()
    assert torch.equal(bits.decoded(coded, "m"), stored)


GOLDEN = bytes.fromhex(
    "50454d4e0102120390010000000000009d5a0040000102030405060708090a0b7eaa5b5ada3d76644446700bc77c"
    "2acdff3ef84e9001000000000000b5a801b79087a33869159b432a79fc9d070000000000000083888d9203080d12"
    "83888d9203080d1283888d9203080d12f42661324a63f1c224fef00058a056eb46a73ad0ff0f676b98f2ff1f57a2"
    "fba6e66b9bd50ebfe27ae02b5f5ef70bb7ff3f1e01ff7f"
)


def test_stored_bytes_keep_their_meaning():
    """400 weights, 3 places, 2 and 1 bits of two guides; both readers."""
    assert GOLDEN[6:8] == b"\x12\3"
    mask = bits.unpack(bits.decoded(as_tensor(GOLDEN), "m"), (400,))
    digest = "0bee4ad3e830e8edd387ef0255097d993d820bdae51fb356408942a5ccacd7f4"
    assert hashlib.sha256(bytes(mask.tolist())).hexdigest() == digest
    assert mask.tolist() == reader.mask(GOLDEN).tolist()


GUIDES = [context.Guide(key("scores"), 3000), context.Guide(key("bank"), 50, 3)]
MASK, _ = guided_mask(3000, 5, guides=GUIDES[:1])
CODED = as_bytes(forced(MASK, GUIDES, places=2))
LOG2, PLACES = CODED[6], CODED[7]
TABLE = 36 + 24  # the first byte of the table


def changed(place, value):
    return CODED[:place] + value + CODED[place + len(value) :]


def test_what_is_damaged_below_has_one_guide_and_a_table():
    assert (LOG2 >> 4, PLACES) == (0, 1)
    assert 1 <= LOG2 <= 5
    assert len(CODED) < 300


HOSTILE = {
    "header cut": (CODED[:40], f"has 40 bytes, its header and table need {TABLE + 2**LOG2}"),
    "table cut": (CODED[:TABLE], f"60 bytes, its header and table need {TABLE + 2**LOG2}"),
    "payload gone": (CODED[: TABLE + 2**LOG2], "too few for 3000 weights"),
    "payload cut": (CODED[:-1], "does not end with its"),
    "payload too long": (CODED + b"\0", "1 bytes behind the codes of its 3000 weights"),
    "fewer weights": (changed(8, struct.pack("<Q", 2900)), "has a payload|behind the codes"),
    "more weights": (changed(8, struct.pack("<Q", 3100)), "has a payload"),
    "2^64 - 1 weights": (changed(8, b"\xff" * 8), f"too few for {2**64 - 1} weights"),
    "no weights": (changed(8, bytes(8)), "behind the codes of its 0 weights"),
    "9 bits": (changed(6, b"\x09"), "has 9 and 0 bits of its guides and 1 places"),
    "15 bits of both": (changed(6, b"\xff"), "has 15 and 15 bits"),
    "a second guide": (changed(6, bytes([LOG2 | 16])), "has a payload|behind|decodes|need"),
    "no place": (changed(7, b"\0"), "and 0 places, this release reads"),
    "two places": (changed(7, b"\2"), "has a payload|behind|decodes|too few"),
    "255 places": (changed(7, b"\xff"), "its header and table need"),
    "no numbers": (changed(52, bytes(8)), "a guide without numbers"),
    "short period": (changed(52, struct.pack("<Q", 5)), "has a payload|behind|decodes"),
    "key": (changed(36, b"\0\0"), "has a payload|behind|decodes"),
    "level": (changed(TABLE, b"\x3f"), "has a payload|behind|decodes"),
    "checksum of the bits": (changed(32, b"\0\0\0\0"), "its payload says 00000000"),
    "base": (changed(20, b"\1"), "decodes to checksum"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused(name):
    """Also where the checksum was made to fit."""
    content, said = HOSTILE[name]
    tracemalloc.start()
    with pytest.raises(MaskFormatError, match=said) as caught:
        bits.decoded(as_tensor(resealed(content)), "layer1.weight")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "'layer1.weight'" in str(caught.value)
    assert "Nothing was loaded" in str(caught.value)
    assert peak < 6e6


def test_a_long_period_draws_no_more_numbers_than_weights():
    content = resealed(changed(52, struct.pack("<Q", 2**63)))
    oracles.assert_same(bits.decoded(as_tensor(content), "m"), bits.pack(MASK))


def test_every_flipped_bit_is_noticed():
    for place in range(8 * len(CODED)):
        content = bytearray(CODED)
        content[place // 8] ^= 1 << (place % 8)
        with pytest.raises(MaskFormatError):
            bits.decoded(as_tensor(content), "m")


@given(st.lists(st.tuples(st.integers(5, len(CODED) - 1), st.integers(0, 255)), max_size=4))
@settings(deadline=None, max_examples=200)
def test_altered_bytes_with_a_fitting_checksum(changes):
    """Whatever is decoded is the mask that was coded."""
    content = bytearray(CODED)
    for place, value in changes:
        content[place] = value
    content = resealed(bytes(content))
    try:
        found = bits.decoded(as_tensor(content), "m")
    except MaskFormatError:
        return
    assert as_bytes(found)[32:] == as_bytes(bits.pack(MASK))[32:]


def test_memory_is_bounded_by_what_is_given():
    """One byte of streams can claim 2,040 weights."""
    payload = bytes(2000)
    content = CODED[:6] + b"\x38\1" + struct.pack("<Q", 2040 * 1900) + CODED[16:36]
    content += GUIDES[0].key + struct.pack("<Q", 2**40) + GUIDES[1].key + struct.pack("<Q", 2**40)
    content = resealed(content + bytes([63]) * 2**11 + payload)
    tracemalloc.start()
    with pytest.raises(MaskFormatError):
        bits.decoded(as_tensor(content), "m")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8500 * len(payload)


def test_masks_coded_by_context_are_not_used_as_they_are():
    with pytest.raises(MaskFormatError, match=r"coding='context'.*coding=\"bits\""):
        bits.verify(as_tensor(CODED), "layer1.weight")
