"""Scores to mask: the one selection that forward, merge and save share.

A selector is a pure function of the scores: equal scores give equal masks on every device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pemn_surgery.errors import NonFiniteScoresError
from pemn_surgery.transforms import is_transformed

SelectorName = Literal["topk", "threshold"]

# Selectors that are told how many weights to keep.
TAKES_DENSITY: frozenset[str] = frozenset({"topk"})

# Scores looked at together by `counted_topk_mask`: their temporaries stay in the cache.
_PIECE = 1 << 16


@dataclass(frozen=True)
class Selector:
    """How a mask is chosen from scores.

    Attributes:
        name: "topk" keeps the largest magnitudes, "threshold" every score above a number.
        density: Share of ones for "topk".
        threshold: The number mu for "threshold".
    """

    name: SelectorName
    density: float
    threshold: float

    def mask(self, scores: Tensor) -> Tensor:
        """Return the bool mask of the scores' shape and device."""
        if self.name == "topk":
            return topk_mask(scores, self.density)
        return threshold_mask(scores, self.threshold)

    def mask_in_little_memory(self, scores: Tensor) -> Tensor:
        """Return the same mask of finite float32 scores on the CPU, with one byte a weight."""
        if self.name == "topk":
            return counted_topk_mask(scores, self.density)
        return threshold_mask(scores, self.threshold)

    @property
    def uses_magnitude(self) -> bool:
        """Whether the mask depends on |S|, so that the gradient of a score carries sign(S)."""
        return self.name == "topk"


def dropped_count(weights: int, density: float) -> int:
    """Return how many weights "topk" drops: ``int((1 - density) * n)`` (PEMN, section 3.1)."""
    return int((1 - density) * weights)


def topk_mask(scores: Tensor, density: float) -> Tensor:
    """Drop the ``int((1 - density) * n)`` scores of smallest magnitude (edge-popup, PEMN).

    Of equal magnitudes the one with the lower index (row by row) is dropped first, so the number
    of ones is exact.

    Args:
        scores: Float tensor of any shape.
        density: Share of ones.

    Returns:
        Bool tensor of the scores' shape.
    """
    dropped = dropped_count(scores.numel(), density)
    if dropped == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    magnitude = _sortable(scores.detach().reshape(-1).abs())
    cut = _kth_smallest(magnitude, dropped)
    keep = magnitude > cut
    missing = magnitude.numel() - dropped - keep.sum()
    if is_transformed() or missing > 0:
        tied = magnitude == cut
        place_from_end = tied.flip(0).cumsum(0).flip(0)
        keep = keep | (tied & (place_from_end <= missing))
    return keep.view(scores.shape)


def counted_topk_mask(scores: Tensor, density: float) -> Tensor:
    """Return `topk_mask` by counting instead of ordering: beside the scores, only the mask is made.

    Magnitudes order like their bits without the sign. Two passes count the upper and the lower
    half of those bits and so find the cut.

    Args:
        scores: Contiguous float32 tensor on the CPU, all finite.
        density: Share of ones.

    Returns:
        Bool tensor of the scores' shape.
    """
    keep = np.ones(scores.numel(), dtype=np.bool_)
    dropped = dropped_count(scores.numel(), density)
    if dropped:
        flat = scores.detach().view(-1).numpy().view(np.uint32)
        upper, place = _find_rank(_count_upper(flat), dropped)
        lower, place = _find_rank(_count_lower(flat, upper), place)
        _drop_up_to((upper << 16) + lower, place, flat, keep)
    return torch.from_numpy(keep).view(scores.shape)


def threshold_mask(scores: Tensor, threshold: float) -> Tensor:
    """Keep the scores above a threshold: M = 1[S > mu] (Piggyback; Self-Masking Networks, sec. 3).

    Args:
        scores: Float tensor of any shape.
        threshold: The number mu.

    Returns:
        Bool tensor of the scores' shape.
    """
    return scores.detach() > threshold


def check_finite(scores: Tensor, name: str) -> None:
    """Refuse scores that no mask can be chosen from.

    Args:
        scores: Float tensor.
        name: What the scores belong to, for the error.

    Raises:
        NonFiniteScoresError: If a score is NaN or infinite.
    """
    bad = scores.numel() - int(torch.isfinite(scores).sum())
    if bad:
        message = (
            f"{bad} of the {scores.numel()} scores of {name!r} are NaN or infinite, so their mask "
            "means nothing. Go back to an earlier checkpoint and lower the learning rate."
        )
        raise NonFiniteScoresError(message)


def _sortable(values: Tensor) -> Tensor:
    """Return half-precision values as float32 (exact): selection kernels want it."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _kth_smallest(values: Tensor, k: int) -> Tensor:
    """Return the k-th smallest value, counted from 1. On CUDA a sort is the faster way."""
    if values.is_cuda:
        return values.sort().values[k - 1]
    return values.kthvalue(k).values


def _magnitudes(flat: NDArray[np.uint32]) -> Iterator[tuple[slice, NDArray[np.uint32]]]:
    """Yield pieces of float32 bits without the sign, and where they lie."""
    for start in range(0, flat.size, _PIECE):
        piece = slice(start, start + _PIECE)
        yield piece, flat[piece] & np.uint32(0x7FFFFFFF)


def _count_upper(flat: NDArray[np.uint32]) -> NDArray[np.int64]:
    counts = np.zeros(1 << 15, dtype=np.int64)
    for _, magnitude in _magnitudes(flat):
        counts += np.bincount(magnitude >> 16, minlength=counts.size)
    return counts


def _count_lower(flat: NDArray[np.uint32], upper: int) -> NDArray[np.int64]:
    counts = np.zeros(1 << 16, dtype=np.int64)
    for _, magnitude in _magnitudes(flat):
        lower = magnitude[magnitude >> 16 == upper] & np.uint32(0xFFFF)
        counts += np.bincount(lower, minlength=counts.size)
    return counts


def _find_rank(counts: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """Return which value has this rank, counted from 1, and its rank among its equals."""
    totals = counts.cumsum()
    value = int(np.searchsorted(totals, rank))
    return value, rank - int(totals[value] - counts[value])


def _drop_up_to(cut: int, equals: int, flat: NDArray[np.uint32], keep: NDArray[np.bool_]) -> None:
    """Drop all below the cut, and the first ``equals`` of those at it."""
    for piece, magnitude in _magnitudes(flat):
        keep[piece] = magnitude >= cut
        first = np.flatnonzero(magnitude == cut)[:equals]
        keep[piece][first] = False
        equals -= first.size
