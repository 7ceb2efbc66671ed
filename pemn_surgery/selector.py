"""Scores to mask: the one selection that forward, merge and save share.

A selector is a pure function of the scores: equal scores give equal masks on every device.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pemn_surgery.errors import NonFiniteScoresError

SelectorName = Literal["topk", "threshold"]


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
    if torch.compiler.is_compiling() or missing > 0:
        tied = magnitude == cut
        place_from_end = tied.flip(0).cumsum(0).flip(0)
        keep = keep | (tied & (place_from_end <= missing))
    return keep.view(scores.shape)


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
