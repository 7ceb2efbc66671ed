"""A density, or a threshold, that moves while masks train, towards the one they were asked for.

Dropping little at first and more later is what pruning does (Zhu and Gupta, *To prune, or not to
prune*, 2017, equation 1): fast while there is much to drop, slow at the end.
"""

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.errors import AdapterError, ConfigError
from pemn_surgery.masks.selector import Selector


def set_selection(
    model: nn.Module,
    progress: float,
    *,
    density: float | None = None,
    threshold: float | None = None,
) -> None:
    """Choose masks as a training does that has come so far from a first density or threshold.

    With d the density that the adapter was made with, d0 the first and p the progress it is
    d + (d0 - d) (1 - p)^3; thresholds likewise. Saved bits are those of the moment; an adapter that
    is loaded has its own density again.

    Args:
        model: A model with masks whose scores train.
        progress: Share of the way, 0 to 1.
        density: Share of ones at the beginning, of selectors that take one ("topk").
        threshold: Number at the beginning, for "threshold".

    Raises:
        ConfigError: If a number cannot be one.
        AdapterError: If no mask in use has such a selector.
    """
    _check(progress, density, threshold)
    left = (1 - progress) ** 3
    found = False
    for module in model.modules():
        if isinstance(module, PemnLayer):
            for name in module.names_in_use():
                mask = module.mask_of(name)
                chosen = _at(mask.last_selector, left, density, threshold)
                if mask.scores is not None and chosen is not None:
                    found, mask.selector = True, chosen
                    module.forget()
    if not found:
        message = (
            f"No trained mask of this {type(model).__name__} takes "
            f"{'a density' if threshold is None else 'a threshold'}: density is for "
            'selector="topk", threshold for selector="threshold".'
        )
        raise AdapterError(message)


def _check(progress: float, density: float | None, threshold: float | None) -> None:
    if not 0 <= progress <= 1:
        message = f"progress={progress!r}: a share of the training is from 0 to 1."
        raise ConfigError(message)
    if (density is None) == (threshold is None):
        message = f"Got density={density!r} and threshold={threshold!r}: give one of them."
        raise ConfigError(message)
    if density is not None and not 0 < density <= 1:
        message = f"density={density!r}: a share of ones is above 0 and at most 1."
        raise ConfigError(message)


def _at(
    last: Selector, left: float, density: float | None, threshold: float | None
) -> Selector | None:
    """Return the selector with so much of the way left; None where it has no such number."""
    if last.has_threshold:
        return (
            None
            if threshold is None
            else replace(last, threshold=_between(last.threshold, threshold, left))
        )
    return None if density is None else replace(last, density=_between(last.density, density, left))


def _between(last: float, first: float, left: float) -> float:
    return last + (first - last) * left


class SelectionSchedule(TrainerCallback):
    """Moves the density or threshold of masks in a ``Trainer`` (`set_selection`).

    A checkpoint from before the end that is loaded again (``load_best_model_at_end``) has the
    adapter's own density or threshold, not that with which it was evaluated.

    Args:
        density: Share of ones at the beginning, of selectors that take one ("topk").
        threshold: Number at the beginning, for "threshold".
        until: Share of the steps after which masks are chosen as they were asked for.

    Raises:
        ConfigError: If a number cannot be one.

    Example:
        >>> callbacks = [PemnCallback(), SelectionSchedule(density=1.0, until=0.5)]
    """

    def __init__(
        self, *, density: float | None = None, threshold: float | None = None, until: float = 0.75
    ) -> None:
        _check(0.0, density, threshold)
        if not 0 < until <= 1:
            message = f"until={until!r}: a share of the steps is above 0 and at most 1."
            raise ConfigError(message)
        self._first = {"density": density, "threshold": threshold}
        self._until = until

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the step's masks by how far training has come."""
        progress = state.global_step / max(self._until * state.max_steps, 1)
        set_selection(kwargs["model"], min(progress, 1.0), **self._first)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose as the adapter was asked to, wherever training ended."""
        set_selection(kwargs["model"], 1.0, **self._first)
