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

from pemn_surgery import bits, buckets, codec, context, deflate, entropy
from pemn_surgery.adapters import PemnConfig
from pemn_surgery.adapters.layer import initial_scores
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
    (guide, *others) = guides or [buckets.Guide(key("scores", seed), max(weights, 1))]
    size = buckets.sizes_of(guide, weights)[:weights].astype(float)
    for other in others:
        spread = spread * (0.2 + np.resize(buckets.sizes_of(other, weights), weights) / 256)
    share = 1 / (1 + np.exp(np.clip((127.5 - size) / spread, -30, 30)))
    held = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)).sum()
    return torch.from_numpy(np.random.default_rng(seed).random(weights) < share), float(held)


def guides_of(weights, period=None, seed=0):
    scores = buckets.Guide(key("scores", seed), max(weights, 1))
    return [scores] if period is None else [scores, buckets.Guide(key("bank", seed), period, 3)]


def check_round_trip(mask, guides=(), kernel=(), base=bytes(12)):
    coded = forced(mask, guides, kernel, base)
    assert bits.inspect(coded, "m") == bits.StoredMask(
        mask.numel(), struct.unpack_from("<I", as_bytes(coded), 16)[0], base, "context"
    )
    oracles.assert_same(codec.decode(coded, "m"), bits.pack(mask, base))
    oracles.assert_same(torch.from_numpy(reader.mask(as_bytes(coded))), mask.view(-1))
    return coded


@given(st.integers(0, 2**40), st.integers(0, 70), st.integers(0, 8))
def test_sizes_are_the_upper_bits_of_the_seeds_integers(seed, weights, log2):
    found = buckets.sizes_of(buckets.Guide(key("s", seed), max(weights, 1)), weights)[:weights]
    assert (found >> 8 - log2).tolist() == sizes_by_hand(seed, "s", weights, log2)


@pytest.mark.parametrize("fan_in", [1, 27, 144, 4608])
def test_sizes_are_in_the_order_of_the_initial_scores(fan_in):
    """Whatever rounding does to the floats."""
    config = PemnConfig(seed=5)
    scores = initial_scores(config, "layer.weight", (100_000,), fan_in).abs().numpy()
    sizes = buckets.sizes_of(buckets.Guide(key("scores/layer.weight", 5), 100_000), 100_000)
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
    guides = [buckets.Guide(key("a"), weights, 3), buckets.Guide(key("b"), period, 2)]
    sizes = [np.resize(buckets.sizes_of(guide, weights), weights) for guide in guides]
    first = sizes_by_hand(0, "a", weights, 3)
    second = sizes_by_hand(0, "b", min(period, weights), 2)
    expected = []
    for i in sorted(range(weights), key=lambda i: i % places if row else 0):
        near = 4 * (i % places) + near_by_hand(mask, i, kernel) if row else i % places
        expected.append(near * 32 + first[i] * 4 + second[i % period])
    known = buckets.arrange(places, kernel[-1] * row, [3, 2], mask.reshape(-1), sizes)
    assert [one for _, part in buckets.buckets_of(known) for one in part] == expected


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
    assert as_bytes(coded)[36] == shape[-1]
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
    assert bits.inspect(coded, "m").coding == "entropy"


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
def test_every_table_holds_every_mask(levels, weights, seed):
    """A table only says how long a mask becomes; bit 6 of its bytes says nothing."""
    guides = (buckets.Guide(key("a"), 600, 1),)
    row = len(levels) // 18 // 4 * 3
    table = buckets.Table(9, row, guides, levels)
    flags = np.random.default_rng(seed).integers(0, 2, weights, np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context, "choose_table", lambda *_: table)
        packed = np.packbits(flags, bitorder="little")
        _, streams = context.encode(packed, weights, guides, (3, 3))
    np.testing.assert_array_equal(context.decode(table, streams, weights), packed)


@pytest.mark.parametrize("spread", [10, 40, 150])
@pytest.mark.parametrize("period", [None, 30_000])
def test_size_is_the_conditional_entropy(spread, period):
    """Within 1 %, and a bit for 255 weights that are certain; coarse sizes of weights cost more."""
    weights = 2_000_000
    guides = guides_of(weights, period)
    mask, held = guided_mask(weights, spread, guides=guides)
    stored = bits.pack(mask)
    coded = codec.encode(stored, guides)
    assert bits.inspect(coded, "m").coding == "context"
    assert torch.equal(codec.decode(coded, "m"), stored)
    most = (1.01 if period is None else 1.02) * held + weights / 255
    assert 0.999 * held <= 8 * coded.numel() <= most
    assert 8 * coded.numel() < weights * entropy_of(float(mask.double().mean()))


def entropy_of(density):
    return -sum(p * math.log2(p) for p in (density, 1 - density) if p > 0)


def test_size_where_places_decide():
    """One place in nine is random, the others follow their initial scores to the bit."""
    weights = 900_000
    guides = guides_of(weights)
    mask = torch.from_numpy(buckets.sizes_of(guides[0], weights) >= 128)
    random = torch.from_numpy(np.random.default_rng(0).random(weights) < 0.5)
    mask = torch.where(torch.arange(weights) % 9 == 4, random, mask)
    coded = codec.encode(bits.pack(mask), guides, (3, 3))
    assert weights / 9 <= 8 * coded.numel() <= 1.01 * weights / 9 + weights / 255
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
    "50454d4e010212049001000000000000b2c8d429000102030405060708090a0bae31867602da3d76644446700bc7"
    "7c2acdff3ef84e9001000000000000b5a801b79087a33869159b432a79fc9d07000000000000008880003c800010"
    "3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3cbcbcbcbcbcbcbcbc3c3c3c3c3c3c3c3c10000c3c3c"
    "3c3c3c3c3c3c3c3c3c3c3c88848400843c08bc8c00000000bc3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3cbcbcbc"
    "bcbcbc88bc88bcbc3cbc3cbc3c3c3c3c3c3c3c3c3c3c3c08043c3c3c3cfd3787a638bc50bec009d0ff6d96f8ff0f"
    "f42b655e33f3fff0ff0f5effbdff7f9551ff7f2bfe07"
)


def test_stored_bytes_keep_their_meaning():
    """400 weights, 4 places in rows of 2, 2 and 1 bits of two guides; both readers."""
    assert (GOLDEN[6:8], GOLDEN[36]) == (b"\x12\4", 2)
    mask = bits.unpack(codec.decode(as_tensor(GOLDEN), "m"), (400,))
    digest = "ca97dd72fced880a166e6cee63a48f94cd1a69dcea28c9634266ef67acc4268e"
    assert hashlib.sha256(bytes(mask.tolist())).hexdigest() == digest
    assert mask.tolist() == reader.mask(GOLDEN).tolist()


GUIDES = [buckets.Guide(key("scores"), 3000), buckets.Guide(key("bank"), 50, 3)]
MASK, _ = guided_mask(3000, 5, guides=GUIDES[:1])
CODED = as_bytes(forced(MASK, GUIDES, (2,)))
LOG2, PLACES = CODED[6], CODED[7]
TABLE = 37 + 24  # the first byte of the table


NEAR_MASK = like_neighbours(300, (3, 3), faithful=0.9)
NEAR = as_bytes(forced(NEAR_MASK, (), (3, 3)))


def test_what_is_damaged_below_has_one_guide_and_a_table():
    assert (LOG2 >> 4, PLACES) == (0, 1)
    assert 1 <= LOG2 <= 5
    assert len(CODED) < 300
    assert (NEAR[6:8], NEAR[36]) == (b"\0\t", 3)
    assert len(NEAR) < 400


HOSTILE = {
    "header cut": (CODED[:40], f"has 40 bytes, its header needs {TABLE}"),
    "table cut": (CODED[:TABLE], f"61 bytes, its header and table need {TABLE + 2**LOG2}"),
    "payload gone": (CODED[: TABLE + 2**LOG2], "too few for 3000 weights"),
    "payload cut": (CODED[:-1], "has a payload that does not end"),
    "payload too long": (CODED + b"\0", "1 bytes behind the codes of its weights"),
    "fewer weights": (changed(CODED, 8, struct.pack("<Q", 2900)), "has a payload|behind the codes"),
    "more weights": (changed(CODED, 8, struct.pack("<Q", 3100)), "has a payload"),
    "2^64 - 1 weights": (changed(CODED, 8, b"\xff" * 8), f"too few for {2**64 - 1} weights"),
    "no weights": (changed(CODED, 8, bytes(8)), "weights where at most 0 are"),
    "9 bits": (changed(CODED, 6, b"\x09"), "has 9 and 0 bits of its guides and 1 places"),
    "15 bits of both": (changed(CODED, 6, b"\xff"), "has 15 and 15 bits"),
    "a second guide": (changed(CODED, 6, bytes([LOG2 | 16])), "has a payload|behind|decodes|need"),
    "no place": (changed(CODED, 7, b"\0"), "and 0 places, this release reads"),
    "two places": (changed(CODED, 7, b"\2"), "has a payload|behind|decodes|too few"),
    "255 places": (changed(CODED, 7, b"\xff"), "its header and table need"),
    "no numbers": (changed(CODED, 53, bytes(8)), "a guide without numbers"),
    "short period": (changed(CODED, 53, struct.pack("<Q", 5)), "has a payload|behind|decodes"),
    "key": (changed(CODED, 37, b"\0\0"), "has a payload|behind|decodes"),
    "level": (changed(CODED, TABLE, b"\x3f"), "has a payload|behind|decodes"),
    "checksum of the bits": (changed(CODED, 32, b"\0\0\0\0"), "its payload says 00000000"),
    "base": (changed(CODED, 20, b"\1"), "decodes to checksum"),
    "rows in a kernel of one place": (
        changed(CODED, 36, b"\1"),
        "has a payload|behind|decodes|need",
    ),
    "rows longer than a kernel": (changed(CODED, 36, b"\2"), "kernels of 1 places in rows of 2"),
    "no row": (NEAR[:36], "has 36 bytes, its header needs 37"),
    "neighbours, longer rows": (changed(NEAR, 36, b"\x0a"), "kernels of 9 places in rows of 10"),
    "neighbours, other rows": (changed(NEAR, 36, b"\2"), "has a payload|decodes"),
    "neighbours, none": (changed(NEAR, 36, b"\0"), "has a payload|behind"),
    "neighbours, table cut": (NEAR[:72], "has 72 bytes, its header and table need 73"),
    "neighbours, no streams": (NEAR[:73], "has 73 bytes, too few for 2700 weights"),
    "neighbours, streams cut": (NEAR[:-1], "has a payload that does not end"),
    "neighbours, too long": (NEAR + b"\0", "1 bytes behind the codes of its weights"),
    "neighbours, one weight more": (
        changed(NEAR, 8, struct.pack("<Q", 2701)),
        "has 2701 weights, not whole kernels of 9 places",
    ),
    "neighbours, a kernel less": (
        changed(NEAR, 8, struct.pack("<Q", 2691)),
        "has a payload of too few bits for its 2691 weights",
    ),
    "neighbours, a kernel more": (
        changed(NEAR, 8, struct.pack("<Q", 2709)),
        "has a payload of too few bits for its 2709 weights",
    ),
    "neighbours, a stream more": (
        changed(NEAR, 37, bytes([37 ^ NEAR[37]])),
        "has a payload|behind|decodes",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused(name):
    assert_refused(*HOSTILE[name], 6e6)


def test_a_long_period_draws_no_more_numbers_than_weights():
    content = resealed(changed(CODED, 53, struct.pack("<Q", 2**63)))
    oracles.assert_same(codec.decode(as_tensor(content), "m"), bits.pack(MASK))


@pytest.mark.parametrize("coded", [CODED, NEAR])
def test_every_flipped_bit_is_noticed(coded):
    assert_every_flipped_bit_is_noticed(coded)


@given(
    st.sampled_from([CODED, NEAR]),
    st.lists(st.tuples(st.integers(5, len(CODED) - 1), st.integers(0, 255)), max_size=4),
)
@settings(deadline=None, max_examples=300)
def test_altered_bytes_with_a_fitting_checksum(content, changes):
    assert_refused_or_the_same(content, changes)


def test_what_follows_a_stream_must_fill_it_up():
    """A stream may hold ones up to its last unit and a unit 0, and no weight more."""
    flags = np.ones(100, np.uint8)
    table = buckets.Table(1, 0, (), bytes([15]))
    model = buckets.model_of(15)
    for held, said in (
        (99, "too few"),
        (100, None),
        (101, "more than|most 100"),
        (200, "most 100"),
    ):
        stream = entropy.encode(np.packbits(np.ones(held, np.uint8)), held, model)
        if said is None:
            found = context.decode(table, stream, 100)
            np.testing.assert_array_equal(np.unpackbits(found)[:96], flags[:96])
        else:
            with pytest.raises(deflate.CodeError, match=said):
                context.decode(table, stream, 100)


@pytest.mark.parametrize("row", [0, 3])
def test_memory_is_bounded_by_what_is_given(row):
    """A byte of streams can hold 2,040 weights, with two guides of a number for each."""
    weights = 9 * 430_000
    stream = entropy.encode(np.full(-(-weights // 8), 255, np.uint8), weights, buckets.model_of(63))
    content = CODED[:6] + b"\x11\x09" + struct.pack("<Q", weights) + CODED[16:36] + bytes([row])
    content += GUIDES[0].key + struct.pack("<Q", 2**40) + GUIDES[1].key + struct.pack("<Q", 2**40)
    content = resealed(content + bytes([63]) * (36 if row == 0 else 144) + stream)
    tracemalloc.start()
    with pytest.raises(MaskFormatError, match="decodes to checksum"):
        codec.decode(as_tensor(content), "m")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert weights > 1500 * len(stream)
    assert peak < 6 * weights + 4e6
    assert peak < 12_500 * len(content)


def test_claims_of_many_weights_take_no_memory():
    """As long as no stream holds them."""
    payload = bytes(2000)
    content = NEAR[:8] + struct.pack("<Q", 9 * 440_000) + NEAR[16:73] + payload
    tracemalloc.start()
    with pytest.raises(MaskFormatError):
        codec.decode(as_tensor(resealed(content)), "m")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6


def test_masks_coded_by_context_are_not_used_as_they_are():
    with pytest.raises(MaskFormatError, match=r"coding='context'.*coding=\"bits\""):
        bits.verify(as_tensor(CODED), "layer1.weight")
