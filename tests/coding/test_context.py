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

from pemn_surgery.adapters import PemnConfig
from pemn_surgery.adapters.layer import initial_scores
from pemn_surgery.coding import bits, codec, context
from pemn_surgery.coding.header import inspect
from pemn_surgery.errors import MaskFormatError
from pemn_surgery.numbers import rng
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
    (guide, *others) = guides or [drawn(key("scores", seed), max(weights, 1), weights)]
    size = guide.sizes.astype(float)
    for other in others:
        spread = spread * (0.2 + other.sizes / 256)
    share = 1 / (1 + np.exp(np.clip((127.5 - size) / spread, -30, 30)))
    held = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)).sum()
    return torch.from_numpy(np.random.default_rng(seed).random(weights) < share), float(held)


def guides_of(weights, period=None, seed=0):
    scores = drawn(key("scores", seed), max(weights, 1), weights)
    return [scores] if period is None else [scores, drawn(key("bank", seed), period, weights, 3)]


def check_round_trip(mask, guides=(), kernel=(), base=bytes(12)):
    coded = forced(mask, guides, kernel, base)
    assert inspect(coded, "m").coding == "context"
    oracles.assert_same(codec.decode(coded, "m"), bits.pack(mask, base))
    oracles.assert_same(torch.from_numpy(reader.mask(as_bytes(coded))), mask.view(-1))
    return coded


@given(st.integers(0, 2**40), st.integers(0, 70), st.integers(0, 8))
def test_sizes_are_the_upper_bits_of_the_seeds_integers(seed, weights, log2):
    found = drawn(key("s", seed), max(weights, 1), weights).sizes
    assert (found >> 8 - log2).tolist() == sizes_by_hand(seed, "s", weights, log2)


@pytest.mark.parametrize("fan_in", [1, 27, 144, 4608])
def test_sizes_are_in_the_order_of_the_initial_scores(fan_in):
    """Whatever rounding does to the floats."""
    config = PemnConfig(seed=5)
    scores = initial_scores(config, "layer.weight", (100_000,), fan_in).abs().numpy()
    sizes = drawn(key("scores/layer.weight", 5), 100_000, 100_000).sizes
    order = np.argsort(scores, kind="stable")
    apart = np.diff(scores[order]) > 0
    assert apart.sum() > 90_000
    assert (np.diff(sizes[order].astype(int))[apart] >= 0).all()


KERNELS = [(1, 1), (1,), (3,), (1, 3), (3, 1), (3, 3), (5, 5), (7, 7), (2, 3, 4), (255,)]


def near_by_hand(mask, weight, kernel):
    """Twice the bit to the left and the bit above, found in the mask with its real shape."""
    *above, row, column = (0, *np.unravel_index(weight, mask.shape))
    left = mask[(*above[1:], row, column - 1)] if column else 0
    place = weight % math.prod(kernel)
    upper = mask.reshape(-1)[weight - kernel[-1]] if place >= kernel[-1] else 0
    return 2 * int(left) + int(upper)


@pytest.mark.parametrize("row", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("period", [7, 4000])
def test_buckets_are_counted_by_hand(kernel, period, row):
    places = math.prod(kernel)
    weights = 6 * places
    mask = np.random.default_rng(0).integers(0, 2, (3, 2, *kernel), np.uint8)
    guides = (drawn(key("a"), weights, weights, 3), drawn(key("b"), period, weights, 2))
    first = sizes_by_hand(0, "a", weights, 3)
    second = sizes_by_hand(0, "b", min(period, weights), 2)
    expected = []
    for i in sorted(range(weights), key=lambda i: i % places if row else 0):
        near = 4 * (i % places) + near_by_hand(mask, i, kernel) if row else i % places
        expected.append(near * 32 + first[i] * 4 + second[i % period])
    beside = context.Context(places, kernel[-1] * row, guides)
    found = context.buckets_of(mask.reshape(-1), beside)
    assert [one for _, part in found for one in part] == expected


@given(
    st.integers(0, 70),
    st.sampled_from([(), *KERNELS]),
    st.floats(0.01, 1e6),
    st.integers(0, 2**32 - 1),
    st.one_of(st.none(), st.integers(1, 500)),
    st.binary(min_size=12, max_size=12),
)
@example(0, (3, 3), 1.0, 0, None, bytes(12))
@example(1, (), 1.0, 0, 1, bytes(12))
@settings(deadline=None, max_examples=50)
def test_round_trip(count, kernel, spread, seed, period, base):
    weights = count * math.prod(kernel)
    mask, _ = guided_mask(weights, spread, seed)
    check_round_trip(mask, guides_of(weights, period, seed), kernel, base)
    check_round_trip(mask, (), kernel, base)


@pytest.mark.parametrize("weights", EDGES)
@pytest.mark.parametrize("spread", [0.1, 30])
def test_round_trip_at_the_edges(weights, spread):
    """Also where the weights are no whole kernels."""
    mask, _ = guided_mask(weights, spread)
    check_round_trip(mask, guides_of(weights, 700), (3, 3))


def like_neighbours(count, kernel, seed=0, faithful=0.95):
    """A mask of the shape (count, *kernel) whose bits mostly repeat the one to the left."""
    mask = np.random.default_rng(seed).random((count, *kernel)) < 0.5
    same = np.random.default_rng(seed + 1).random(mask.shape) < faithful
    for column in range(1, kernel[-1]):
        mask[..., column] = np.where(same[..., column], mask[..., column - 1], mask[..., column])
    return torch.from_numpy(mask)


SHAPES = {
    "convolution": (64, 32, 3, 3),
    "transposed": (32, 64, 4, 4),
    "depthwise": (2048, 1, 5, 5),
    "one dimension": (128, 64, 7),
    "three dimensions": (32, 16, 3, 2, 3),
    "one row": (64, 64, 1, 3),
    "stage longer than a piece": (300, 300, 1, 2),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("guided", [False, True])
def test_size_where_neighbours_decide(name, guided):
    """The first column is free, any other holds the entropy beside its left neighbour."""
    shape = SHAPES[name]
    mask = like_neighbours(shape[0] * shape[1], shape[2:]).view(shape)
    guides = guides_of(mask.numel(), 99) if guided else ()
    coded = check_round_trip(mask, guides, shape[2:])
    assert as_bytes(coded)[7] == math.prod(shape[2:])
    assert as_bytes(coded)[32] == shape[-1]
    held = mask.numel() / shape[-1] * (1 + (shape[-1] - 1) * entropy_of(0.975))
    table = 8 * 4 * math.prod(shape[2:])
    assert 0.98 * held <= 8 * coded.numel() <= 1.02 * held + table + 8 * 200
    assert codec.encode(bits.pack(mask), guides, shape[2:]).numel() == coded.numel()


def test_size_where_the_upper_neighbour_decides():
    mask = like_neighbours(2048, (3, 3)).transpose(1, 2).contiguous()
    coded = check_round_trip(mask, (), (3, 3))
    held = mask.numel() / 3 * (1 + 2 * entropy_of(0.975))
    assert 0.98 * held <= 8 * coded.numel() <= 1.02 * held + 8 * 36 + 8 * 200


@pytest.mark.parametrize("kernel", [(), (1, 1), (16, 16)])
def test_masks_without_places_are_coded_by_their_density(kernel):
    mask = torch.from_numpy(np.random.default_rng(0).random(256 * 90) < 0.8)
    coded = codec.encode(bits.pack(mask), (), kernel)
    assert torch.equal(coded, codec.encode(bits.pack(mask)))
    assert inspect(coded, "m").coding == "entropy"


@pytest.mark.parametrize("density", [0, 0.02, 0.5, 0.98, 1])
def test_masks_that_the_guides_say_nothing_about(density):
    mask = torch.from_numpy(np.random.default_rng(3).random(20_000) < density)
    check_round_trip(mask, guides_of(20_000, 999))
    stored = bits.pack(mask)
    assert codec.encode(stored, guides_of(20_000, 999)).numel() == codec.encode(stored).numel()


@given(
    st.sampled_from([18, 72]).flatmap(lambda size: st.binary(min_size=size, max_size=size)),
    st.integers(0, 70).map(lambda count: 9 * count),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=50)
def test_all_levels_hold_every_mask(levels, weights, seed):
    """Levels only say how long a mask becomes."""
    guides = (drawn(key("a"), 600, weights, 1),)
    row = len(levels) // 18 // 4 * 3
    mask = torch.from_numpy(np.random.default_rng(seed).random(weights) < 0.5)
    coded = forced(mask, context=context.Context(9, row, guides, levels))
    oracles.assert_same(codec.decode(coded, "m"), bits.pack(mask))
    oracles.assert_same(torch.from_numpy(reader.mask(as_bytes(coded))), mask)


@pytest.mark.parametrize("spread", [10, 40, 150])
@pytest.mark.parametrize("period", [None, 30_000])
def test_size_is_the_conditional_entropy(spread, period):
    """Within .3 %, and 1 / 700 bit a weight; coarse sizes of weights cost more."""
    weights = 2_000_000
    guides = guides_of(weights, period)
    mask, held = guided_mask(weights, spread, guides=guides)
    stored = bits.pack(mask)
    coded = codec.encode(stored, guides)
    assert inspect(coded, "m").coding == "context"
    assert torch.equal(codec.decode(coded, "m"), stored)
    most = (1.003 if period is None else 1.02) * held + weights / 700
    assert 0.999 * held <= 8 * coded.numel() <= most
    assert 8 * coded.numel() < weights * entropy_of(float(mask.double().mean()))


def entropy_of(density):
    return -sum(p * math.log2(p) for p in (density, 1 - density) if p > 0)


def test_size_where_places_decide():
    """One place in nine is random, the others follow their initial scores to the bit."""
    weights = 900_000
    guides = guides_of(weights)
    mask = torch.from_numpy(guides[0].sizes >= 128)
    random = torch.from_numpy(np.random.default_rng(0).random(weights) < 0.5)
    mask = torch.where(torch.arange(weights) % 9 == 4, random, mask)
    coded = codec.encode(bits.pack(mask), guides, (3, 3))
    assert weights / 9 <= 8 * coded.numel() <= 1.01 * weights / 9 + weights / 700
    assert 8 * codec.encode(bits.pack(mask), guides).numel() > 2 * weights / 9


@given(st.integers(1, 3000), st.floats(0.1, 1000), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_never_longer_than_without_guides(weights, spread, seed):
    mask, _ = guided_mask(weights, spread, seed)
    stored = bits.pack(mask)
    coded = codec.encode(stored, guides_of(weights, 100, seed), (3,))
    assert coded.numel() <= codec.encode(stored).numel() <= stored.numel()
    assert torch.equal(codec.decode(coded, "m"), stored)


GOLDEN = bytes.fromhex(
    "50454d4e01021204900100000000000004b953e3000102030405060708090a0b02da3d76644446700bc77c2acdff"
    "3ef84e9001000000000000b5a801b79087a33869159b432a79fc9d0700000000000000b8f7910011187777000000"
    "000000000000000000000000000000000000000000f7f78cf7020c77770000000000000000f7f78ef704f7290000"
    "00000000000000f79286f702777700f7f7a68c12002a77000000000000000000000000000000009bf784000c7777"
    "77f7f784001b007700a4f718f700001e00f70006f777007700c2c7598388fc0d2ae3962b1017412efeb164e8e62c"
    "0abce493cc2188d609"
)


def test_stored_bytes_keep_their_meaning():
    """400 weights, 4 places in rows of 2, 2 and 1 bits of two guides; both readers."""
    assert (GOLDEN[6:8], GOLDEN[32]) == (b"\x12\4", 2)
    mask = bits.unpack(codec.decode(as_tensor(GOLDEN), "m"), (400,))
    digest = "a8f105dc90a90c7f6028843061e21e123dbb5b0a5ee013112e7f68c597db2538"
    assert hashlib.sha256(bytes(mask.tolist())).hexdigest() == digest
    assert mask.tolist() == reader.mask(GOLDEN).tolist()


GUIDES = [drawn(key("scores"), 3000, 3000), drawn(key("bank"), 50, 3000, 3)]
MASK, _ = guided_mask(3000, 5, guides=GUIDES[:1])
CODED = as_bytes(forced(MASK, GUIDES, (2,)))
LOG2, PLACES = CODED[6], CODED[7]
LEVELS = 33 + 24  # the first of their bytes


NEAR_MASK = like_neighbours(300, (3, 3), faithful=0.9)
NEAR = as_bytes(forced(NEAR_MASK, (), (3, 3)))


def test_what_is_damaged_below_has_one_guide_and_a_table():
    assert (LOG2 >> 4, PLACES) == (0, 1)
    assert 1 <= LOG2 <= 5
    assert len(CODED) < 300
    assert (NEAR[6:8], NEAR[32]) == (b"\0\t", 3)
    assert len(NEAR) < 400


NO_END = "ends before|does not end with|decodes to checksum"
HOSTILE = {
    "header gone": (CODED[:32], "32 bytes, too few for 3000 weights"),
    "header cut": (CODED[:40], f"has 40 bytes, its header needs {LEVELS}"),
    "levels cut": (CODED[:LEVELS], f"57 bytes, its header and levels need {LEVELS + 2**LOG2}"),
    "payload gone": (CODED[: LEVELS + 2**LOG2], "ends before its weights"),
    "payload cut": (CODED[:-1], NO_END),
    "payload too long": (CODED + b"\1", NO_END),
    "payload too long by a zero": (CODED + b"\0", "ends in a byte 0"),
    "fewer weights": (changed(CODED, 8, struct.pack("<Q", 2900)), NO_END),
    "more weights": (changed(CODED, 8, struct.pack("<Q", 3100)), NO_END),
    "2^64 - 1 weights": (changed(CODED, 8, b"\xff" * 8), f"too few for {2**64 - 1} weights"),
    "no weights": (changed(CODED, 8, bytes(8)), NO_END),
    "9 bits": (changed(CODED, 6, b"\x09"), "has 9 and 0 bits of its guides and 1 places"),
    "15 bits of both": (changed(CODED, 6, b"\xff"), "has 15 and 15 bits"),
    "a second guide": (changed(CODED, 6, bytes([LOG2 | 16])), f"{NO_END}|need"),
    "no place": (changed(CODED, 7, b"\0"), "and 0 places, this release reads"),
    "two places": (changed(CODED, 7, b"\2"), NO_END),
    "255 places": (changed(CODED, 7, b"\xff"), "its header and levels need"),
    "no numbers": (changed(CODED, 49, bytes(8)), "guides of no numbers"),
    "short period": (changed(CODED, 49, struct.pack("<Q", 5)), NO_END),
    "key": (changed(CODED, 33, b"\0\0"), NO_END),
    "level": (changed(CODED, LEVELS, bytes([CODED[LEVELS] ^ 1])), NO_END),
    "turned": (changed(CODED, LEVELS, bytes([CODED[LEVELS] ^ 128])), NO_END),
    "base": (changed(CODED, 20, b"\1"), "decodes to checksum"),
    "rows in a kernel of one place": (changed(CODED, 32, b"\1"), f"{NO_END}|need"),
    "rows longer than a kernel": (changed(CODED, 32, b"\2"), "kernels of 1 places in rows of 2"),
    "neighbours, longer rows": (changed(NEAR, 32, b"\x0a"), "kernels of 9 places in rows of 10"),
    "neighbours, other rows": (changed(NEAR, 32, b"\2"), NO_END),
    "neighbours, none": (changed(NEAR, 32, b"\0"), NO_END),
    "neighbours, levels cut": (NEAR[:68], "has 68 bytes, its header and levels need 69"),
    "neighbours, no stream": (NEAR[:69], "ends before its weights"),
    "neighbours, stream cut": (NEAR[:-1], NO_END),
    "neighbours, one weight more": (
        changed(NEAR, 8, struct.pack("<Q", 2701)),
        "has 2701 weights, not whole kernels of 9 places",
    ),
    "neighbours, a kernel less": (changed(NEAR, 8, struct.pack("<Q", 2691)), NO_END),
    "neighbours, a kernel more": (changed(NEAR, 8, struct.pack("<Q", 2709)), NO_END),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused(name):
    assert_refused(*HOSTILE[name], 6e6)


def test_a_long_period_draws_no_more_numbers_than_weights():
    content = resealed(changed(CODED, 49, struct.pack("<Q", 2**63)))
    oracles.assert_same(codec.decode(as_tensor(content), "m"), bits.pack(MASK))


@pytest.mark.parametrize("coded", [CODED, NEAR])
def test_every_flipped_bit_is_noticed(coded):
    assert_every_flipped_bit_is_noticed(coded)


@given(
    st.sampled_from([CODED, NEAR]),
    st.lists(st.tuples(st.integers(5, 300), st.integers(0, 255)), max_size=4),
)
@settings(deadline=None, max_examples=300)
def test_altered_bytes_with_a_fitting_checksum(content, changes):
    assert_refused_or_the_same(content, changes)


@pytest.mark.parametrize("row", [0, 3])
def test_memory_is_bounded_by_what_is_given(row):
    """A byte can hold some 5,000 weights, with two guides of a number for each."""
    mask = torch.ones(9 * 430_000, dtype=torch.bool)
    guides = tuple(drawn(key(name), 2**40, len(mask), 1) for name in "ab")
    levels = bytes([127]) * (36 if row == 0 else 144)
    stored = forced(mask, context=context.Context(9, row, guides, levels))
    content = changed(as_bytes(stored), 20, b"\1")
    tracemalloc.start()
    with pytest.raises(MaskFormatError, match="decodes to checksum"):
        codec.decode(as_tensor(resealed(content)), "m")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(mask) > 3000 * len(content)
    assert peak < codec.room(inspect(stored, "m")) + len(mask) / 8 + 2**20 * 16


def test_claims_of_many_weights_take_little_memory():
    """As long as no stream holds them."""
    content = NEAR[:8] + struct.pack("<Q", 9 * 440_000) + NEAR[16:69] + bytes(2000) + b"\1"
    tracemalloc.start()
    with pytest.raises(MaskFormatError):
        codec.decode(as_tensor(resealed(content)), "m")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 9 * 440_000


def test_masks_coded_by_context_are_not_used_as_they_are():
    with pytest.raises(MaskFormatError, match=r"coding='context'.*coding=\"bits\""):
        bits.verify(as_tensor(CODED), "layer1.weight")
