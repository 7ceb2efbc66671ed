"""Products of few inputs with a weight that stays packed: sums that are looked up, by mask bits.

Rows of a weight that begin at the same number of the bank (a *phase*) differ by their masks alone,
so they sum some of the same products of number and input. The 16 sums of each four columns are
made once for all these rows, and four bits of a row say which to add (the method of four Russians;
Arlazarov et al., 1970). What is read from memory is a bit a weight.

Compiled code does it (``packed.h``); elsewhere torch makes the weight and multiplies.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pemn_surgery.kernels import library

_ROWS, _COLUMNS = 16, 32  # of a tile
_FEWEST = 16  # rows of a phase: tables for fewer cost more than they save


@dataclass(frozen=True)
class Packed:
    """A masked weight whose rows share numbers, as compiled code reads it.

    Row r is of phase r % phases and number r // phases in it.

    Attributes:
        words: Int32 tensor of shape (phases, blocks, tiles, 16): of each 16 rows and 32 columns a
            word a row, its lowest bit the first column. Rows and columns that there are not are 0.
        rows: Float32 tensor of shape (phases, columns), the numbers of a phase's rows.
        count: Number of rows.
    """

    words: Tensor
    rows: Tensor
    count: int

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return inputs x weight^T.

        Args:
            inputs: Float32 tensor of shape (samples, columns).

        Returns:
            Float32 tensor of shape (samples, rows of the weight).
        """
        return _look_up(inputs, self.words, self.rows, self.count)


def pack(mask: Tensor, period: Tensor) -> Packed | None:
    """Pack a masked weight; None where too few of its rows share their numbers.

    Args:
        mask: Bool tensor of shape (rows, columns).
        period: Float tensor of shape (n,): the weight's numbers, row by row, which repeat after n.
    """
    count, columns = mask.shape
    phases = count_phases(count, columns, len(period))
    if phases is None:
        return None
    numbers = period.detach().float().reshape(phases, -1)
    rows = numbers.repeat(1, columns // numbers.shape[1])
    each = -(-count // phases)
    blocks, tiles = -(-each // _ROWS), -(-columns // _COLUMNS)
    bits = np.zeros((blocks * _ROWS * phases, tiles * _COLUMNS), dtype=bool)
    bits[:count, :columns] = mask.cpu().numpy()
    by_phase = bits.reshape(blocks, _ROWS, phases, tiles, _COLUMNS).transpose(2, 0, 3, 1, 4)
    words = np.packbits(by_phase, axis=-1, bitorder="little").view("<u4")[..., 0]
    return Packed(torch.from_numpy(words.view(np.int32)).clone(), rows.contiguous(), count)


def count_phases(count: int, columns: int, period: int) -> int | None:
    """Return at how many numbers rows begin; None where rows share too little to be looked up.

    Args:
        count: Number of rows.
        columns: Numbers in a row.
        period: After how many numbers they repeat.
    """
    if not count or not columns or not period:
        return None
    if columns % period and period % columns:
        return None
    phases = max(period // columns, 1)
    return phases if count >= _FEWEST * phases else None


@torch.library.custom_op("pemn_surgery::look_up", mutates_args=(), device_types="cpu")
def _look_up(inputs: Tensor, words: Tensor, rows: Tensor, count: int) -> Tensor:
    kernels = library.kernels()
    inputs = inputs.contiguous()
    if kernels is None or not library.is_in_memory(inputs, words, rows):
        return look_up_by_torch(inputs, words, rows, count)
    phases, blocks = words.shape[:2]
    samples, columns = inputs.shape
    outputs = torch.empty(samples, count)
    failed = kernels.look_up(
        words.data_ptr(), rows.data_ptr(), inputs.data_ptr(), phases, blocks, columns, samples,
        count, torch.get_num_threads(), outputs.data_ptr(),
    )  # fmt: skip
    return look_up_by_torch(inputs, words, rows, count) if failed else outputs


@_look_up.register_fake
def _(inputs: Tensor, words: Tensor, rows: Tensor, count: int) -> Tensor:
    return inputs.new_empty(inputs.shape[0], count)


def look_up_by_torch(inputs: Tensor, words: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return what compiled code returns, by making the weight, up to the rounding of sums."""
    phases, columns = rows.shape
    bits = (words.unsqueeze(-1) >> torch.arange(_COLUMNS, dtype=torch.int32)) & 1
    mask = bits.transpose(2, 3).reshape(phases, -1, words.shape[2] * _COLUMNS)[..., :columns]
    weight = (mask * rows.unsqueeze(1)).transpose(0, 1).reshape(-1, columns)[:count]
    return inputs @ weight.T
