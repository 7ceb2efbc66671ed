"""The generator: golden values, an independent Philox, the distributions, the streams."""

import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pemn_surgery.numbers import rng
from tests import oracles

CHUNK = 65536
FLOAT_DRAWS = {"uniform": rng.uniform, "normal": rng.normal, "signs": rng.signs}

# Verified against tests/oracles.py and statistics.NormalDist; they must never change.
GOLDEN = {
    (0, "bank"): {
        "integers": [
            2223558707, 2579977418, 3128379533, 698655261,
            1414199490, 2692857961, 2273560672, 2071914603,
        ],
        "uniform": [
            "0x1.2234p-7", "0x1.9c754p-5", "0x1.d3ba4p-4", "-0x1.596d78p-3",
            "-0x1.5da84p-4", "0x1.040ep-4", "0x1.e0f2p-7", "-0x1.2046p-7",
        ],
        "normal": [
            "0x1.10e06ap-4", "0x1.87ea84p-2", "0x1.d2e3a6p-1", "-0x1.79aeecp+0",
            "-0x1.53677ep-1", "0x1.f174ep-2", "0x1.c47dap-4", "-0x1.0f0f76p-4",
        ],
        "signs": [1, 1, 1, -1, -1, 1, 1, -1],
        "permutation": [3, 4, 7, 0, 6, 1, 5, 2],
    },
    (1234, "scores/fc.weight"): {
        "integers": [
            357823607, 2236391941, 4132514784, 3942428136,
            2765698565, 741274199, 1539212773, 1792873278,
        ],
        "uniform": [
            "-0x1.aab03p-3", "0x1.53288p-7", "0x1.d944acp-3", "0x1.abf2b4p-3",
            "0x1.26c9bp-4", "-0x1.4f4438p-3", "-0x1.220bd8p-4", "-0x1.522edp-5",
        ],
        "normal": [
            "-0x1.098facp+1", "0x1.3ef272p-4", "0x1.551756p+1", "0x1.0b1c6ap+1",
            "0x1.1b6610p-1", "-0x1.6a7c78p+0", "-0x1.16a20ap-1", "-0x1.4030dep-2",
        ],
        "signs": [-1, 1, 1, 1, 1, -1, -1, -1],
        "permutation": [0, 5, 6, 7, 1, 4, 3, 2],
    },
}  # fmt: skip


def hexed(values):
    return [float.fromhex(value) for value in values]


@pytest.mark.parametrize(("seed", "stream"), GOLDEN)
def test_golden_values(seed, stream):
    golden = GOLDEN[seed, stream]
    assert rng.integers(seed, stream, 8).tolist() == golden["integers"]
    assert rng.uniform(seed, stream, 8, 0.25).tolist() == hexed(golden["uniform"])
    assert rng.normal(seed, stream, 8, 1.5).tolist() == hexed(golden["normal"])
    assert rng.signs(seed, stream, 8, 0.125).tolist() == [0.125 * s for s in golden["signs"]]
    assert rng.permutation(seed, stream, 8).tolist() == golden["permutation"]


def test_philox_oracle_gives_the_published_answer():
    """The known answer of Random123's kat_vectors for philox4x64, 10 rounds, all zero."""
    assert oracles.philox_block([0, 0, 0, 0], [0, 0]) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


@given(st.integers(-(2**80), 2**80), st.text(max_size=30), st.integers(0, 70))
def test_integers_are_philox(seed, stream, count):
    drawn = rng.integers(seed, stream, count)
    assert drawn.dtype == np.uint32
    assert drawn.shape == (count,)
    assert drawn.tolist() == oracles.integers(seed, stream, count)


@given(st.integers(0, 1 << 40), st.integers(0, 50), st.floats(2.0**-10, 1024.0, width=32))
def test_uniform_is_its_formula(seed, count, bound):
    """x = bound * (2 k / 2^24 - 1) with k the upper 24 bits, rounded once."""
    drawn = rng.uniform(seed, "s", count, bound)
    words = oracles.integers(seed, "s", count)
    exact = [Fraction(bound) * (Fraction(word >> 8, 1 << 23) - 1) for word in words]
    expected = [np.float32(float(value)) for value in exact]  # 48 bits: float64 is exact
    assert drawn.dtype == np.float32
    assert drawn.tolist() == [float(value) for value in expected]
    assert all(-bound <= value < bound for value in drawn.tolist())


@given(st.integers(0, 1 << 40), st.integers(0, 50), st.sampled_from([1.0, 0.125, 0.3, 2.5]))
def test_normal_is_the_inverse_distribution(seed, count, std):
    drawn = rng.normal(seed, "s", count, std)
    inverse = NormalDist().inv_cdf
    expected = [inverse((w + 0.5) / 2**32) * std for w in oracles.integers(seed, "s", count)]
    assert drawn.dtype == np.float32
    assert drawn.shape == (count,)
    assert np.allclose(drawn, np.array(expected), rtol=2**-23, atol=0)


def test_normal_quantile_everywhere():
    """The whole range, the joints of the rational functions and both ends, to 1e-15."""
    ends = np.array([0, 1, 2, 3, 17, 2**16, 2**32 - 1, 2**32 - 2, 2**31, 2**31 - 1], dtype=float)
    joints = np.array([0.075 * 2**32, 0.925 * 2**32, 0.5 * 2**32]).round()
    near = np.concatenate([joints + step for step in range(-2, 3)])
    words = np.concatenate([ends, near, np.linspace(0, 2**32 - 1, 4001).round()])
    probability = (words + 0.5) * 2.0**-32
    actual = rng._normal_quantile(probability)
    expected = np.array([NormalDist().inv_cdf(p) for p in probability])
    assert len(actual) > 4000
    assert np.allclose(actual, expected, rtol=4e-15, atol=0)
    assert np.array_equal(actual, -rng._normal_quantile(1.0 - probability))
    assert actual.max() == -actual.min()
    assert math.isclose(actual.max(), -NormalDist().inv_cdf(2**-33), rel_tol=1e-14)
    against_scipy = stats.norm.ppf(probability)
    assert np.allclose(actual, against_scipy, rtol=1e-13, atol=0)


def test_log_matches_libm():
    values = np.concatenate([np.logspace(-30, 30, 2001), [0.5, 1.0, 0.70710678118654757, 2.0]])
    expected = np.array([math.log(value) for value in values])
    assert np.allclose(rng._log(values), expected, rtol=3e-16, atol=1e-17)


@given(st.integers(0, 1 << 40), st.integers(0, 60), st.sampled_from([0.125, 0.3, 1.0]))
def test_signs_are_the_top_bit(seed, count, magnitude):
    drawn = rng.signs(seed, "s", count, magnitude)
    size = float(np.float32(magnitude))
    words = oracles.integers(seed, "s", count)
    assert drawn.dtype == np.float32
    assert drawn.tolist() == [size if word >= 1 << 31 else -size for word in words]


@given(st.integers(0, 1 << 40), st.integers(0, 200))
def test_permutation_sorts_the_stream(seed, count):
    words = oracles.integers(seed, "p", count)
    expected = sorted(range(count), key=lambda place: (words[place], place))
    actual = rng.permutation(seed, "p", count)
    assert actual.dtype == np.int64
    assert actual.tolist() == expected
    assert sorted(actual.tolist()) == list(range(count))


def test_permutation_keeps_the_order_of_equal_numbers(monkeypatch):
    monkeypatch.setattr(rng, "integers", lambda *_: np.array([5, 1, 5, 1, 5] * 20, dtype=np.uint32))
    ones = [place for place in range(100) if place % 5 in (1, 3)]
    fives = [place for place in range(100) if place % 5 not in (1, 3)]
    assert rng.permutation(0, "p", 100).tolist() == ones + fives


@pytest.mark.parametrize("name", FLOAT_DRAWS)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_a_shorter_draw_is_the_beginning_of_a_longer_one(name, count):
    longest = FLOAT_DRAWS[name](3, "long", 2 * CHUNK + 9, 0.5)
    shorter = FLOAT_DRAWS[name](3, "long", count, 0.5)
    assert shorter.shape == (count,)
    assert np.array_equal(shorter, longest[:count])


@pytest.mark.parametrize("count", [0, 1, 3, CHUNK - 1, CHUNK + 1])
def test_integer_prefix(count):
    longest = rng.integers(3, "long", CHUNK + 9)
    assert np.array_equal(rng.integers(3, "long", count), longest[:count])


@pytest.mark.parametrize("name", FLOAT_DRAWS)
def test_chunks_do_not_show(name, monkeypatch):
    """The same numbers with another (even) chunk: nothing repeats or is lost at a border."""
    expected = FLOAT_DRAWS[name](3, "long", 1001, 0.5)
    monkeypatch.setattr(rng, "_CHUNK", 64)
    assert np.array_equal(FLOAT_DRAWS[name](3, "long", 1001, 0.5), expected)
    beyond = FLOAT_DRAWS[name](3, "long", 64 + 8, 0.5)[64:]
    assert np.array_equal(beyond, expected[64:72])


# Fixed seeds: these either always hold or never do. 200,000 numbers each.
SEEDS = [0, 1, 2026]
MANY = 200_000


@pytest.mark.parametrize("seed", SEEDS)
def test_uniform_distribution(seed):
    values = rng.uniform(seed, "ks", MANY, 2.0).astype(np.float64)
    assert stats.kstest(values, stats.uniform(-2, 4).cdf).pvalue > 1e-3
    assert abs(values.mean()) < 5 * (2 / math.sqrt(3)) / math.sqrt(MANY)
    assert abs(values.std() - 2 / math.sqrt(3)) < 0.01
    counts = np.histogram(values, bins=64, range=(-2, 2))[0]
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_normal_distribution(seed):
    values = rng.normal(seed, "ks", MANY, 0.5).astype(np.float64) / 0.5
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert abs(values.mean()) < 5 / math.sqrt(MANY)
    assert abs(values.std() - 1) < 5 / math.sqrt(2 * MANY)
    assert abs(stats.skew(values)) < 5 * math.sqrt(6 / MANY)
    assert abs(stats.kurtosis(values)) < 5 * math.sqrt(24 / MANY)
    for limit in (2.0, 3.0, 4.0):
        expected = 2 * NormalDist().cdf(-limit) * MANY
        assert abs((np.abs(values) > limit).sum() - expected) < 5 * math.sqrt(expected) + 1


@pytest.mark.parametrize("seed", SEEDS)
def test_signs_are_fair(seed):
    values = rng.signs(seed, "ks", MANY, 0.5)
    assert set(values.tolist()) == {-0.5, 0.5}
    assert abs(int((values > 0).sum()) - MANY / 2) < 5 * math.sqrt(MANY) / 2


def test_every_bit_is_fair():
    words = rng.integers(5, "bits", MANY)
    ones = [int(((words >> np.uint32(bit)) & np.uint32(1)).sum()) for bit in range(32)]
    assert len(ones) == 32
    assert all(abs(count - MANY / 2) < 5 * math.sqrt(MANY) / 2 for count in ones), ones


def test_streams_and_seeds_are_independent():
    pairs = [(0, "bank"), (1, "bank"), (0, "scores/a"), (0, "scores/b"), (-1, "bank"), (10, "bank")]
    draws = np.stack([rng.normal(seed, stream, 50_000, 1.0) for seed, stream in pairs])
    correlation = np.corrcoef(draws)
    off = np.abs(correlation - np.eye(len(pairs)))
    assert off.max() < 5 / math.sqrt(50_000)
    assert len({draw.tobytes() for draw in draws}) == len(pairs)
    shifted = np.corrcoef(draws[0][1:], draws[0][:-1])[0, 1]
    assert abs(shifted) < 5 / math.sqrt(50_000)


def test_seed_and_stream_do_not_run_together():
    """'1' + ':2:x' and '1:2' + ':x' would be one key if the parts were merely joined."""
    assert rng.integers(1, "2", 4).tolist() != rng.integers(12, "", 4).tolist()
    assert rng.integers(0, "bank", 4).tolist() != rng.integers(0, "Bank", 4).tolist()
