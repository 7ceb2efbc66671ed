"""How far a training's rates can carry a score, and what they do to all else that trains.

What a rate can do follows from where the scores begin: Adam and its kin move a score by about the
rate in a step, whatever the gradient's size; SGD by the gradient.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pemn_surgery.masks.adapter_mask import AdapterMask
from pemn_surgery.training.gradients import trained_masks

# What is named in place of rates that reach no threshold lets a score cross its margin so often.
_REACH = 10


def advice_on_rates(
    model: nn.Module, optimizer: Any, scheduler: Any, steps: int, max_grad_norm: float | None
) -> list[str]:
    """Return what speaks against a training's rates before its first step, in sentences.

    Args:
        model: A model with masks.
        optimizer: The optimizer, also as accelerate wraps it; None where there is none yet.
        scheduler: The schedule of its rates, or None for rates that stay.
        steps: Optimizer steps of the whole training.
        max_grad_norm: Norm to which gradients are clipped; 0 or None if they are not.
    """
    masks = [mask for mask, _ in trained_masks(model)]
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not masks or not isinstance(optimizer, Optimizer):
        return []
    if isinstance(optimizer, SGD):
        return _advice_on_sgd(optimizer, masks, max_grad_norm)
    return _advice_on_reach(optimizer, scheduler, masks, steps)


def _advice_on_sgd(
    optimizer: SGD, masks: list[AdapterMask], max_grad_norm: float | None
) -> list[str]:
    scores = {id(mask.scores) for mask in masks}
    said = []
    for group in optimizer.param_groups:
        rate = _first_rate(group)
        others = [one for one in group["params"] if id(one) not in scores]
        if max_grad_norm and len(others) < len(group["params"]):
            said.append(
                f"Gradients are clipped to a norm of {max_grad_norm:g}, Trainer's default, while "
                f"SGD moves scores by {rate:g} times the gradient: the papers' rates are for "
                "gradients as they are. Set max_grad_norm=0."
            )
        if rate >= 1 and others:
            said.append(
                f"SGD trains {len(others)} tensors that are no scores (heads, norms) at a rate of "
                f"{rate:g}, which is meant for scores. Give them their own: "
                f"torch.optim.SGD(param_groups(model, lr={rate:g}, norms=0.1, head=0.1))."
            )
    return list(dict.fromkeys(said))


def _advice_on_reach(
    optimizer: Optimizer, scheduler: Any, masks: list[AdapterMask], steps: int
) -> list[str]:
    margin = margin_of(masks)
    found = group_of(optimizer, masks[0].scores)
    if margin is None or found is None or steps <= 0:
        return []
    index, group = found
    rate = _first_rate(group)
    reach = _sum_of_rates(scheduler, index, rate, steps)
    if reach >= margin or not rate:
        return []
    better = rate * _REACH * margin / reach
    return [
        f"Hardly a mask bit can change: scores begin {margin:.2g} from the threshold, "
        f"{type(optimizer).__name__} moves them by about its rate in a step, and the rates of all "
        f"{steps:,} steps add up to {reach:.2g}. Take a rate of {better:.1g} (the largest is "
        f"{rate:.2g} now), or score_init nearer to the threshold."
    ]


def margin_of(masks: Iterable[AdapterMask]) -> float | None:
    """Return the least distance of a score from its threshold; None where no threshold chooses."""
    least: list[float] = []
    for mask in masks:
        scores = mask.scores
        if scores is not None and scores.numel() and mask.selector.has_threshold:
            least.append(float((scores.detach() - mask.selector.threshold).abs().min()))
    return min(least, default=None)


def group_of(optimizer: Any, score: Tensor | None) -> tuple[int, dict[str, Any]] | None:
    """Return an optimizer's group with this parameter, and its place; None where it is in none."""
    for index, group in enumerate(optimizer.param_groups):
        if any(one is score for one in group["params"]):
            return index, group
    return None


def _first_rate(group: dict[str, Any]) -> float:
    """Return a group's rate before a schedule has changed it."""
    return float(group.get("initial_lr", group["lr"]))


def _sum_of_rates(scheduler: Any, index: int, rate: float, steps: int) -> float:
    """Return the sum of a group's rates over a training; of unknown schedules the most it can be.

    Those of transformers are factors by step.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)
    if isinstance(scheduler, LambdaLR):
        factor = scheduler.lr_lambdas[index]
        return rate * sum(factor(step) for step in range(steps))
    return rate * steps
