"""Scores to mask: the one selection that forward, merge and save share.

A selector is a pure function of the scores: equal scores give equal masks on every device. One that
draws is made of another (`Selector.drawing`) for the forwards of training alone.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pemn_surgery.errors import NonFiniteScoresError
from pemn_surgery.kernels.selection import Rule, keep_largest

SelectorName = Literal["topk", "topk_overall", "topk_signed", "threshold", "sample"]

# Selectors that are told how many weights to keep.
TAKES_DENSITY: frozenset[str] = frozenset({"topk", "topk_overall", "topk_signed"})
# Selectors that compare every score with one number.
HAS_THRESHOLD: frozenset[str] = frozenset({"threshold", "sample"})


@dataclass(frozen=True)
class Selector:
    """How a mask is chosen from scores.

    Attributes:
        name: "topk" keeps the largest magnitudes, "topk_overall" those among all of an adapter's
            (`overall`), "topk_signed" the largest numbers, "threshold" every score S above one,
            mu; "sample" keeps each with the chance sigmoid(S - mu) while
            it trains, and those whose chance is above one half, S > mu, else.
        density: Share of ones for "topk" and "topk_signed"; of all masks for "topk_overall".
        threshold: The number mu for "threshold" and "sample".
        draws: Whether masks of "sample" are drawn, by torch's global generator of the device.
        dropped: How many of the scores "topk_overall" drops; None: as "topk", before all are known.
    """

    name: SelectorName
    density: float
    threshold: float
    draws: bool = False
    dropped: int | None = None

    def drawing(self) -> "Selector":
        """Return what chooses masks in the forwards of training."""
        return replace(self, draws=True) if self.name == "sample" else self

    def mask(self, scores: Tensor) -> Tensor:
        """Return the bool mask of the scores' shape and device."""
        if self.uses_magnitude:
            return keep_largest(scores, self._count_dropped(scores.numel()))
        if self.name == "topk_signed":
            return signed_topk_mask(scores, self.density)
        if self.draws:
            return self.chosen_from(scores.detach()).bernoulli().bool()
        return threshold_mask(scores, self.threshold)

    def rule(self, weights: int) -> Rule | None:
        """Return how the kernels choose among so many scores; None where they know no such way."""
        if self.uses_magnitude:
            return Rule(self._count_dropped(weights))
        is_compared = self.has_threshold and not self.draws
        return Rule(None, self.threshold) if is_compared else None

    def _count_dropped(self, weights: int) -> int:
        return dropped_count(weights, self.density) if self.dropped is None else self.dropped

    def chosen_from(self, scores: Tensor) -> Tensor:
        """Return what a mask is chosen by, whose gradient is the mask's: |S|, a chance, or S."""
        if self.uses_magnitude:
            return scores.abs()
        return (scores - self.threshold).sigmoid() if self.is_sampled else scores

    def score_grad(self, grad: Tensor, scores: Tensor) -> Tensor:
        """Return dL/dS of dL/dM: times sign(S), p (1 - p) of the chance p, or nothing."""
        if self.uses_magnitude:
            return grad * scores.sign()
        if self.is_sampled:
            chance = self.chosen_from(scores)
            return grad * (chance * (1 - chance))
        return grad

    @property
    def uses_magnitude(self) -> bool:
        """Whether the mask depends on |S|, so that the gradient of a score carries sign(S)."""
        return self.name in ("topk", "topk_overall")

    @property
    def is_overall(self) -> bool:
        """Whether the masks of an adapter are chosen together."""
        return self.name == "topk_overall"

    @property
    def is_sampled(self) -> bool:
        """Whether scores are chances, so that the gradient of one carries p (1 - p)."""
        return self.name == "sample"

    @property
    def has_threshold(self) -> bool:
        """Whether every score is compared with one number."""
        return self.name in HAS_THRESHOLD


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
