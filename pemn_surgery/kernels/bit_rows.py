"""Products of few inputs with a masked weight that is never made: its numbers, kept or dropped.

Bits are read as an adapter has them, and each number of the bank where a row needs it. Unlike
looked-up sums (`look_up`) that asks nothing of the bank; it reads as many numbers as there are
weights, but a bank that repeats stays in the cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pemn_surgery.kernels import library


@dataclass(frozen=True)
class BitRows:
    """A masked weight as its parts, by which compiled code multiplies.

    Attributes:
        bits: Uint8 tensor of a bit a weight, row by row, the lowest of a byte first.
        numbers: Float32 tensor: row r begins at number r x columns % period, and is there whole.
        period: After how many numbers they repeat.
        count: Number of rows.
    """

    bits: Tensor
    numbers: Tensor
    period: int
    count: int

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return inputs x weight^T.

        Args:
            inputs: Float32 tensor of shape (samples, columns).

        Returns:
            Float32 tensor of shape (samples, rows of the weight).
        """
        return _dot_rows(inputs, self.bits, self.numbers, self.period, self.count)


def bit_rows(bits: Tensor, period: Tensor, count: int, columns: int) -> BitRows:
    """Put a masked weight's parts together.

    Args:
        bits: Uint8 tensor of a bit a weight.
        period: Float32 tensor of shape (n,): the weight's numbers, which repeat after n.
        count: Number of rows.
        columns: Numbers in a row.
    """
    length, numbers = len(period), period.detach()
    if length < count * columns:  # what a row needs behind the last number
        more = numbers.repeat(-(-columns // length))[:columns]
        numbers = torch.cat([numbers, more])
    return BitRows(bits, numbers.contiguous(), length, count)


@torch.library.custom_op("pemn_surgery::dot_rows", mutates_args=(), device_types="cpu")
def _dot_rows(inputs: Tensor, bits: Tensor, numbers: Tensor, period: int, count: int) -> Tensor:
    kernels = library.kernels()
    inputs = inputs.contiguous()
    if kernels is None or not library.is_in_memory(inputs, bits, numbers):
        return dot_rows_by_torch(inputs, bits, numbers, period, count)
    samples, columns = inputs.shape
    outputs = torch.empty(samples, count)
    kernels.dot_rows(
        bits.data_ptr(), numbers.data_ptr(), period, inputs.data_ptr(), columns, samples, count,
        torch.get_num_threads(), outputs.data_ptr(),
    )  # fmt: skip
    return outputs


@_dot_rows.register_fake
def _(inputs: Tensor, bits: Tensor, numbers: Tensor, period: int, count: int) -> Tensor:
    return inputs.new_empty(inputs.shape[0], count)


def dot_rows_by_torch(
    inputs: Tensor, bits: Tensor, numbers: Tensor, period: int, count: int
) -> Tensor:
    """Return what compiled code returns, by making the weight, up to the rounding of sums."""
    columns = inputs.shape[1]
    places = torch.arange(count * columns)
    mask = (bits[places // 8] >> (places % 8)) & 1
    weight = (numbers[places % period] * mask).view(count, columns)
    return inputs @ weight.T
