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
from pemn_surgery.masks.adapter_mask import AdapterMask

# A gradient this much smaller than the largest of all masks moves nothing that rounding would not.
_UNUSABLE = 1e-12

_LISTED = 5

_STEPS = 10


def masks_without_gradient(model: nn.Module) -> list[str]:
    """Return the trained masks that the last backward pass gave no usable gradient.

    Call it after ``loss.backward()`` and before the gradients are cleared. Gradients that a
    sharding library holds elsewhere (DeepSpeed's ZeRO) are not judged.

    Args:
        model: A model with masks that train.

    Returns:
        Names of their weights: no gradient, or one below 1e-12 of the largest of any mask.
    """
    sizes = {mask.target: _size(scores) for mask, scores in trained_masks(model)}
    largest = max(sizes.values(), default=0.0)
    return [target for target, size in sizes.items() if size <= _UNUSABLE * largest]


class GradientWatch:
    """Looks at the first steps of a training, and then warns of masks that cannot learn.

    One step is not enough: an expert may get no sample of a batch, and a norm that starts at zero
    and is trained lets gradients pass after the first step.
    """

    def __init__(self) -> None:
        self._idle: set[str] | None = None
        self._steps = 0

    def look(self, model: nn.Module) -> None:
        """Look at the gradients of a step; warn if it is the last to be looked at."""
        if self._steps < _STEPS and self._idle != set():
            found = masks_without_gradient(model)
            self._idle = set(found) & (set(found) if self._idle is None else self._idle)
            self._steps += 1
            if self._steps == _STEPS:
                self.warn(model)

    def warn(self, model: nn.Module) -> None:
        """Warn of masks that got no usable gradient in any step so far; once."""
        targets = [mask.target for mask, _ in trained_masks(model)]
        idle = [target for target in targets if target in (self._idle or ())]
        self._idle = set()
        if idle:
            more = f" and {len(idle) - _LISTED} more" if len(idle) > _LISTED else ""
            warnings.warn(
                f"{len(idle)} of {len(targets)} masks got no usable gradient in the first "
                f"{self._steps} steps: {', '.join(idle[:_LISTED])}{more}. Either no forward used "
                "their weights, or frozen zeros stand in the way, there or behind. exclude_modules "
                "leaves them unmasked, modules_to_save trains them whole.",
                NoGradientWarning,
                stacklevel=2,
            )


def trained_masks(model: nn.Module) -> Iterator[tuple[AdapterMask, nn.Parameter]]:
    """Yield the masks in use whose scores are trained, but for those that ZeRO-3 has spread."""
    for module in model.modules():
        if isinstance(module, PemnLayer):
            for name in module.names_in_use():
                mask = module.mask_of(name)
                scores = mask.scores
                if scores is not None and scores.requires_grad and not hasattr(scores, "ds_id"):
                    yield mask, scores


def _size(scores: Tensor) -> float:
    if scores.grad is None:
        return 0.0
    with torch.no_grad():
        return float(scores.grad.abs().max()) if scores.grad.numel() else 0.0
