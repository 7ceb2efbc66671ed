"""Which masks no gradient reaches: they cannot learn, however long training takes.

A score's gradient is that of its effective weight times the frozen number. It is zero for good
where the forward never comes by, where the frozen numbers are all zero (heads and gates that start
so), and behind such a layer for as long as it is zero.
"""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.errors import NoGradientWarning

# A gradient this much smaller than the largest of all masks moves nothing that rounding would not.
_UNUSABLE = 1e-12

_LISTED = 5


def masks_without_gradient(model: nn.Module) -> list[str]:
    """Return the trained masks that the last backward pass gave no usable gradient.

    Call it after ``loss.backward()`` and before the gradients are cleared. Gradients that a
    sharding library holds elsewhere (DeepSpeed's ZeRO) are not judged.

    Args:
        model: A model with masks that train.

    Returns:
        Names of their weights: no gradient, or one below 1e-12 of the largest of any mask.
    """
    sizes = {target: _size(scores) for target, scores in _trained_scores(model)}
    largest = max(sizes.values(), default=0.0)
    return [target for target, size in sizes.items() if size <= _UNUSABLE * largest]


def warn_of_no_gradient(model: nn.Module) -> None:
    """Warn of masks that cannot learn; see `masks_without_gradient`.

    Args:
        model: A model, after a backward pass.
    """
    idle = masks_without_gradient(model)
    if not idle:
        return
    trained = len(list(_trained_scores(model)))
    more = f" and {len(idle) - _LISTED} more" if len(idle) > _LISTED else ""
    warnings.warn(
        f"{len(idle)} of {trained} masks got no usable gradient in the first step: "
        f"{', '.join(idle[:_LISTED])}{more}. Either the forward of this batch did not use their "
        "weights, or frozen zeros stand in the way, there or behind. exclude_modules leaves them "
        "unmasked, modules_to_save trains them whole.",
        NoGradientWarning,
        stacklevel=2,
    )


def _trained_scores(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for module in model.modules():
        if isinstance(module, PemnLayer):
            for name in module.names_in_use():
                scores = module.mask_of(name).scores
                if scores is not None and scores.requires_grad and not hasattr(scores, "ds_id"):
                    yield module.target, scores


def _size(scores: Tensor) -> float:
    if scores.grad is None:
        return 0.0
    with torch.no_grad():
        return float(scores.grad.abs().max()) if scores.grad.numel() else 0.0
