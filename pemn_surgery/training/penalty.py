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
from pemn_surgery.training.gradients import trained_masks
from pemn_surgery.training.rates import group_of


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
    for scores, start in beginnings(model):
        _pull(scores, start, amount)


def pull_back_at_rates(model: nn.Module, optimizer: Any, penalty: float) -> None:
    """Do as `pull_back`, each mask by the rate that its optimizer has for it just now."""
    for scores, start in beginnings(model):
        found = group_of(optimizer, scores)
        if found is not None:
            _pull(scores, start, penalty * float(found[1]["lr"]))


def _pull(scores: nn.Parameter, start: float, amount: float) -> None:
    with torch.no_grad():
        scores.add_((start - scores).clamp_(0.0, amount))


def beginnings(model: nn.Module) -> list[tuple[nn.Parameter, float]]:
    """Return the scores that are trained, and where those of each mask began.

    Raises:
        AdapterError: If there are none, or those of a mask did not begin at one number.
    """
    masks = list(trained_masks(model))
    found = [(scores, mask.start) for mask, scores in masks if mask.start is not None]
    if masks and len(found) == len(masks):
        return found
    unknown = [mask.target for mask, _ in masks if mask.start is None]
    fault = f"no scores of this {type(model).__name__} are trained"
    if unknown:
        fault = (
            f"{len(unknown)} of {len(masks)} masks (first: {unknown[0]}) began with drawn scores"
        )
    message = (
        f"A penalty on flips draws scores back to the one number where they began, but {fault}. It "
        'belongs to selector="threshold" with a number as score_init. Nothing was changed.'
    )
    raise AdapterError(message)
