"""One choice among the scores of all of an adapter's masks: the largest of them together.

A weight's share of ones follows from its scores beside those of all others (Multi-Prize Lottery
Tickets, Diffenderfer and Kailkhura, ICLR 2021). Each weight still drops its own smallest scores;
only how many is settled by all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pemn_surgery.kernels.selection import keep_largest
from pemn_surgery.masks.kept import steps_taken
from pemn_surgery.masks.selector import Selector, dropped_count
from pemn_surgery.transforms import gathered


class Overall:
    """How many scores each of an adapter's masks drops, counted anew when a score has changed.

    Attributes:
        masks: All masks of the adapter; those that hold bits are chosen already.
    """

    def __init__(self, masks: Sequence[Any]) -> None:
        self.masks = list(masks)
        self._seen: tuple[Any, ...] = ()
        self._dropped: dict[str, int] = {}

    def settled(self, target: str, selector: Selector) -> Selector:
        """Return a mask's selector with its number of scores to drop.

        Args:
            target: Name of the mask's weight.
            selector: The selector of all masks.
        """
        held = {mask.target: mask.scores for mask in self.masks if mask.scores is not None}
        if target not in held:
            return selector
        seen = (selector.density, steps_taken(), *((id(s), _version(s)) for s in held.values()))
        if seen != self._seen:
            self._dropped = counts_of_dropped(held, selector.density)
            self._seen = seen
        return replace(selector, dropped=self._dropped[target])


def counts_of_dropped(scores: Mapping[str, Tensor], density: float) -> dict[str, int]:
    """Return how many scores of each weight are among the smallest magnitudes of all.

    Together they are ``int((1 - density) * n)`` of n; of equal ones those of the name that sorts
    first are dropped first, within a weight those with the lower index.

    Args:
        scores: Float tensors by the name of their weight.
        density: Share of ones of all masks together.
    """
    if not scores:
        return {}
    names = sorted(scores)  # a file has them in another order than the model
    parts = [gathered(scores[name].detach()).reshape(-1) for name in names]
    together = torch.cat([part.to(parts[0].device) for part in parts])
    kept = keep_largest(together, dropped_count(together.numel(), density))
    counted = (len(part) - int(part.sum()) for part in kept.split([len(part) for part in parts]))
    return dict(zip(names, counted, strict=True))


def settled_selectors(
    selectors: Mapping[str, Selector], scores: Mapping[str, Tensor]
) -> dict[str, Selector]:
    """Return selectors that choose masks from all scores of an adapter, weight by weight.

    Args:
        selectors: By weight.
        scores: All scores of the adapter, by weight.
    """
    first = next(iter(selectors.values()), None)
    if first is None or not first.is_overall:
        return dict(selectors)
    counts = counts_of_dropped(scores, first.density)
    return {name: replace(one, dropped=counts[name]) for name, one in selectors.items()}


def _version(scores: Tensor) -> int:
    return 0 if scores.is_inference() else scores._version
