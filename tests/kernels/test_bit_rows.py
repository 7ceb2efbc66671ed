"""Products number by number under bits, against a float64 product with the weight that is meant."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pemn_surgery.coding import bits
from pemn_surgery.coding.header import HEADER_BYTES
from pemn_surgery.kernels import bit_rows as module
from pemn_surgery.kernels.bit_rows import bit_rows, dot_rows_by_torch
from tests.kernels.ways import COMPILED, every_way, through
from tests.oracles import assert_same


def numbers(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(mask, period):
    return bit_rows(bits.pack(mask)[HEADER_BYTES:], period, *mask.shape)


def weight_of(mask, period):
    """The masked weight, number by number."""
    places = torch.arange(mask.numel()) % len(period)
    return period[places].view(mask.shape) * mask


@every_way
def test_values(way):
    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(1, 40), st.sampled_from([1, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100]),
        st.floats(0.001, 1.2), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99),
    )  # fmt: skip
    def check(count, columns, share, samples, density, seed):
        period = max(int(share * count * columns), 1)
        mask = torch.rand(count, columns, generator=torch.Generator().manual_seed(seed)) < density
        values, inputs = numbers(period, seed + 1), numbers((samples, columns), seed + 2)
        with through(way):
            found = made(mask, values)(inputs)
        weight = weight_of(mask, values).double()
        size = inputs.abs().double() @ weight.abs().T
        assert found.shape == (samples, count)
        assert ((found - inputs.double() @ weight.T).abs() <= 1e-6 * size + 1e-30).all()

    check()


@pytest.mark.skipif(len(COMPILED) < 2, reason="one instruction set alone")
@pytest.mark.parametrize("samples", [1, 3, 4, 6, 8])
def test_every_instruction_set_gives_the_same_bits(samples):
    mask, period = numbers((1030, 1101), 0) > 0, numbers(5000, 1)
    inputs = numbers((samples, 1101), 2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for way in COMPILED:
                with through(way):
                    found.append(made(mask, period)(inputs))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same(found[0], other)


def test_nothing_is_copied_of_a_vector_as_long_as_the_weight():
    values = numbers(24 * 16 + 5, 3)
    packed = made(numbers((24, 16), 4) > 0, values[: 24 * 16])
    assert packed.numbers.data_ptr() == values.data_ptr()
    repeated = made(numbers((24, 16), 4) > 0, values[:50])
    assert len(repeated.numbers) == 50 + 16


def test_the_operator_is_what_torch_expects():
    packed, inputs = made(numbers((48, 20), 7) > 0, numbers(33, 8)), numbers((2, 20), 9)
    given_to = (inputs, packed.bits, packed.numbers, packed.period, packed.count)
    torch.library.opcheck(module._dot_rows, given_to)
    torch.testing.assert_close(packed(inputs), dot_rows_by_torch(*given_to))
