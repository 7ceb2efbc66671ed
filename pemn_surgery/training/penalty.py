"""Rare flips: scores are drawn back to where they began, unless the loss keeps them away.

A bit that differs from the initial mask costs space in a coded file. The penalty is the sum of
|S - S0| over the scores below their beginning S0, and it is applied as AdamW applies weight decay:
not through the gradient, which Adam would rescale, but as a step of its own after the optimizer's,
S <- S + min(rate x penalty, S0 - S) (soft thresholding, the proximal step of a lasso). So a score
whose gradients have no lasting direction stays on its side of the threshold.
"""

from typing import Any

import torch
from torch import nn

from pemn_surgery.errors import AdapterError
from pemn_surgery.masks.adapter_mask import AdapterMask
from pemn_surgery.training.rates import group_of, trained_masks


def pull_back(model: nn.Module, amount: float) -> None:
    """Move every score that lies below its beginning back by at most this much.

    Args:
        model: A model with masks whose scores train and began at one number
            (``selector="threshold"``).
        amount: The rate of the scores times the penalty; with Adam, whose steps are about as long
            as the rate, penalties from 0 to 1 make sense.

    Raises:
        AdapterError: If no scores are trained, or those of a mask did not begin at one number.
    """
    for mask, start in _beginnings(model):
        scores = mask.scores
        if scores is not None:
            with torch.no_grad():
                scores.add_((start - scores).clamp_(0.0, amount))


def pull_back_at_rate(model: nn.Module, optimizer: Any, penalty: float) -> None:
    """Do as `pull_back`, by the rate that an optimizer has for the scores just now."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    first = next(iter(trained_masks(model)), None)
    found = None if first is None else group_of(optimizer, first.scores)
    if found is not None:
        pull_back(model, penalty * float(found[1]["lr"]))


def _beginnings(model: nn.Module) -> list[tuple[AdapterMask, float]]:
    masks = list(trained_masks(model))
    unknown = [mask.target for mask in masks if mask.start is None]
    if unknown or not masks:
        fault = (
            f"{len(unknown)} of {len(masks)} masks (first: {unknown[0]}) began with drawn scores"
            if unknown
            else f"no scores of this {type(model).__name__} are trained"
        )
        message = (
            f"A penalty on flips draws scores back to the one number where they began, but {fault}."
            ' It belongs to selector="threshold" with a number as score_init. Nothing was changed.'
        )
        raise AdapterError(message)
    return [(mask, mask.start) for mask in masks if mask.start is not None]
