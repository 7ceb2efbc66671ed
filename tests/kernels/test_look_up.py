"""Products that are looked up, against a float64 product with the weight that is meant."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pemn_surgery.kernels import look_up
from pemn_surgery.kernels.look_up import count_phases, look_up_by_torch, pack
from tests.kernels.ways import COMPILED, every_way, through
from tests.oracles import assert_same


def numbers(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_of(mask, period):
    """The masked weight, number by number."""
    count, columns = mask.shape
    places = torch.arange(count * columns) % len(period)
    return period[places].view(count, columns) * mask


@st.composite
def cases(draw):
    columns = draw(st.sampled_from([1, 3, 4, 31, 32, 33, 60, 128, 1020, 1100]))
    divisors = [one for one in range(1, columns + 1) if columns % one == 0]
    in_rows = draw(st.sampled_from([1, 1, 2, 3, 5]))
    period = in_rows * columns if in_rows > 1 else draw(st.sampled_from(divisors))
    phases = max(period // columns, 1)
    count = draw(st.integers(16 * phases, 16 * phases + 70))
    return count, columns, period, draw(st.integers(1, 5)), draw(st.floats(0, 1))


@every_way
def test_values(way):
    @settings(max_examples=40, deadline=None)
    @given(cases(), st.integers(0, 99))
    def check(case, seed):
        count, columns, period, samples, density = case
        mask = torch.rand(count, columns, generator=torch.Generator().manual_seed(seed)) < density
        numbers_of = numbers(period, seed + 1)
        packed = pack(mask, numbers_of)
        assert packed is not None
        inputs = numbers((samples, columns), seed + 2)
        with through(way):
            found = packed(inputs)
        wanted = inputs.double() @ weight_of(mask, numbers_of).double().T
        size = inputs.abs().double() @ weight_of(mask, numbers_of).abs().double().T
        assert found.shape == (samples, count)
        assert ((found - wanted).abs() <= 1e-6 * size + 1e-30).all()

    check()


@pytest.mark.skipif(len(COMPILED) < 2, reason="one instruction set alone")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_instruction_set_gives_the_same_bits(threads):
    """Also in any number of threads: each sum is made in one order."""
    mask, period = numbers((1500, 1100), 0) > 0, numbers(3 * 1100, 1)
    packed, inputs = pack(mask, period), numbers((2, 1100), 2)
    before = torch.get_num_threads()
    found = []
    try:
        for way in COMPILED:
            torch.set_num_threads(threads)
            with through(way):
                found.append(packed(inputs))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same(found[0], other)
    torch.set_num_threads(1)
    try:
        with through(next(iter(COMPILED))):
            assert_same(packed(inputs), found[0])
    finally:
        torch.set_num_threads(before)


@every_way
@pytest.mark.parametrize("kept", [False, True])
def test_masks_of_one_kind(way, kept):
    mask, period = torch.full((40, 36), kept), numbers(36, 3)
    inputs = numbers((3, 36), 4)
    with through(way):
        found = pack(mask, period)(inputs)
    one = (inputs.double() * period.double()).sum(1) if kept else torch.zeros(3).double()
    torch.testing.assert_close(found.double(), one[:, None].expand(3, 40), rtol=1e-5, atol=1e-5)


def test_a_bit_a_weight_is_held():
    mask, period = numbers((640, 320), 5) > 0, numbers(320, 6)
    packed = pack(mask, period)
    assert packed.words.numel() * 32 == mask.numel()
    assert packed.words.shape == (1, 40, 10, 16)
    assert tuple(packed.rows.shape) == (1, 320)


@pytest.mark.parametrize(
    ("count", "columns", "period", "phases"),
    [
        (64, 8, 8, 1), (64, 8, 4, 1), (64, 8, 16, 2), (64, 8, 32, 4),
        (64, 8, 40, None),  # too few rows a phase
        (15, 8, 8, None), (64, 8, 12, None), (64, 8, 5, None), (64, 8, 512, None),
        (0, 8, 8, None), (64, 0, 8, None),
    ],
)  # fmt: skip
def test_which_weights_are_looked_up(count, columns, period, phases):
    assert count_phases(count, columns, period) == phases
    if count and columns:
        made = pack(torch.ones(count, columns, dtype=torch.bool), torch.ones(period))
        assert (made is None) == (phases is None)


def test_the_operator_is_what_torch_expects():
    packed = pack(numbers((48, 20), 7) > 0, numbers(20, 8))
    inputs = numbers((2, 20), 9)
    given_to = (inputs, packed.words, packed.rows, packed.count)
    torch.library.opcheck(look_up._look_up, given_to)
    compiled = torch.compile(lambda x: packed(x) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), look_up_by_torch(*given_to) + 1)
