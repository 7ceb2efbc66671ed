"""Scores to mask: the one selection that forward, merge and save share.

A selector is a pure function of the scores: equal scores give equal masks on every device.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pemn_surgery.errors import NonFiniteScoresError
from pemn_surgery.kernels.selection import Rule, keep_largest

SelectorName = Literal["topk", "topk_signed", "threshold"]

# Selectors that are told how many weights to keep.
TAKES_DENSITY: frozenset[str] = frozenset({"topk", "topk_signed"})


@dataclass(frozen=True)
class Selector:
    """How a mask is chosen from scores.

    Attributes:
        name: "topk" keeps the largest magnitudes, "topk_signed" the largest numbers, "threshold"
            every score above one.
        density: Share of ones for "topk" and "topk_signed".
        threshold: The number mu for "threshold".
    """

    name: SelectorName
    density: float
    threshold: float

    def mask(self, scores: Tensor) -> Tensor:
        """Return the bool mask of the scores' shape and device."""
        if self.name == "topk":
            return topk_mask(scores, self.density)
        if self.name == "topk_signed":
            return signed_topk_mask(scores, self.density)
        return threshold_mask(scores, self.threshold)

    def rule(self, weights: int) -> Rule | None:
        """Return how the kernels choose among so many scores; None where they know no such way."""
        if self.name == "topk":
            return Rule(dropped_count(weights, self.density))
        return Rule(None, self.threshold) if self.has_threshold else None

    @property
    def uses_magnitude(self) -> bool:
        """Whether the mask depends on |S|, so that the gradient of a score carries sign(S)."""
        return self.name == "topk"

    @property
    def has_threshold(self) -> bool:
        """Whether every score is compared with one number."""
        return self.name == "threshold"


def dropped_count(weights: int, density: float) -> int:
    """Return how many weights "topk" drops: ``int((1 - density) * n)`` (PEMN, section 3.1)."""
    return int((1 - density) * weights)


def topk_mask(scores: Tensor, density: float) -> Tensor:
    """Drop the ``int((1 - density) * n)`` scores of smallest magnitude (edge-popup, PEMN).

    Of equal magnitudes the one with the lower index (row by row) is dropped first, so the number
    of ones is exact. NaN counts as larger than infinity; `check_finite` refuses it.

    Args:
        scores: Float tensor of any shape.
        density: Share of ones.

    Returns:
        Bool tensor of the scores' shape.
    """
    return keep_largest(scores, dropped_count(scores.numel(), density))


def signed_topk_mask(scores: Tensor, density: float) -> Tensor:
    """Drop the ``int((1 - density) * n)`` smallest scores, signs counting.

    Of equal ones the one with the lower index is dropped first. NaN counts as the largest.

    Args:
        scores: Float tensor of any shape.
        density: Share of ones.

    Returns:
        Bool tensor of the scores' shape.
    """
    flat = scores.detach().reshape(-1)
    dropped = flat.argsort(stable=True)[: dropped_count(flat.numel(), density)]
    kept = torch.ones_like(flat, dtype=torch.bool)
    return kept.index_fill(0, dropped, False).view(scores.shape)


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
