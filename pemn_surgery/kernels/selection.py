"""Which scores are kept, as two numbers or as a mask; ties go by index, the same everywhere.

Three ways lead to the same mask: compiled code or its twin in numpy for plain tensors in memory, an
operator that ``torch.compile`` takes as one piece, and torch's own operations for whatever it
transforms or records and on other devices: a sort, or on GPUs its radix selection.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pemn_surgery.kernels import library, twin
from pemn_surgery.kernels.library import Kernels
from pemn_surgery.transforms import is_transformed, takes_functions

_OF_NUMPY = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Rule:
    """How scores are chosen.

    Attributes:
        dropped: How many of the smallest magnitudes are dropped; None for a threshold.
        above: Without ``dropped``: scores above this number are kept.
    """

    dropped: int | None
    above: float = 0.0


def keep_largest(scores: Tensor, dropped: int) -> Tensor:
    """Return the bool mask that drops the ``dropped`` smallest by (magnitude, index).

    NaN counts as larger than infinity.

    Args:
        scores: Float tensor of any shape.
        dropped: From 0 to the number of scores.
    """
    if dropped == 0:
        return torch.ones_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
    if torch.compiler.is_compiling() and takes_functions() and not torch.compiler.is_exporting():
        return cast("Tensor", _keep_largest(scores, dropped))
    return _keep_now(scores, dropped)


def choose(scores: Tensor, rule: Rule, kernels: Kernels) -> library.Choice:
    """Return which scores are kept, as compiled code reads it."""
    by_size = rule.dropped is not None
    above = 0.0 if by_size else _rounded(rule.above, scores.dtype)
    chosen = library.Choice(
        scores.data_ptr(), library.kind(scores), by_size, -1, scores.numel(), above
    )
    if rule.dropped:
        kernels.choose(chosen, scores.numel(), rule.dropped, torch.get_num_threads())
    return chosen


@functools.lru_cache(maxsize=64)
def _rounded(number: float, dtype: torch.dtype) -> float:
    """Return a number as torch compares it with tensors of this type."""
    return float(torch.tensor(number, dtype=dtype))


def _keep_now(scores: Tensor, dropped: int) -> Tensor:
    plain = type(scores) in (Tensor, nn.Parameter) and scores.device.type == "cpu"
    if is_transformed() or not plain or scores.dtype not in _OF_NUMPY:
        on_gpu = scores.is_cuda and not is_transformed()
        return keep_by_torch(scores, dropped, _radix_cut if on_gpu else _sorted_cut)
    kernels = library.kernels()
    scores = scores.detach().contiguous()
    if kernels is None or not library.can_read(scores):
        words = twin.words_of(scores)
        return torch.from_numpy(twin.mark(words, *twin.choose(words, dropped))).view(scores.shape)
    chosen = choose(scores, Rule(dropped), kernels)
    return mask_of(chosen, tuple(scores.shape), kernels)


def mask_of(chosen: library.Choice, shape: tuple[int, ...], kernels: Kernels) -> Tensor:
    """Return a choice as a bool mask.

    Args:
        chosen: What `choose` returned; what it points to still lives.
        shape: Shape of the mask.
        kernels: The compiled code.
    """
    mask = torch.empty(shape, dtype=torch.bool)
    kernels.mark(chosen, mask.numel(), torch.get_num_threads(), mask.data_ptr())
    return mask


def keep_by_torch(scores: Tensor, dropped: int, cut_of: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return the mask by operations that torch can transform and record, and any device has.

    Args:
        scores: Float tensor of any shape.
        dropped: From 1 to the number of scores.
        cut_of: From magnitudes (n,) and ``dropped`` to the largest magnitude that is dropped.
    """
    sizes = scores.detach().reshape(-1).abs()
    cut = cut_of(sizes, dropped)
    keep, tied = ~(sizes <= cut), sizes == cut  # NaN is kept
    missing = sizes.numel() - dropped - keep.sum()
    if is_transformed() or scores.is_cuda or missing > 0:  # a GPU is not waited for
        place_from_end = tied.flip(0).cumsum(0).flip(0)
        keep = keep | (tied & (place_from_end <= missing))
    return keep.view(scores.shape)


def _sorted_cut(sizes: Tensor, dropped: int) -> Tensor:
    return sizes.sort().values[dropped - 1]


def _radix_cut(sizes: Tensor, dropped: int) -> Tensor:
    """Select by digits, as torch's ``topk`` does on GPUs: a few passes in place of a sort."""
    return sizes.topk(dropped, largest=False, sorted=False).values.amax()


@torch.library.custom_op("pemn_surgery::keep_largest", mutates_args=())
def _keep_largest(scores: Tensor, dropped: int) -> Tensor:
    return _keep_now(scores, dropped)


@_keep_largest.register_fake
def _(scores: Tensor, dropped: int) -> Tensor:
    return torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
