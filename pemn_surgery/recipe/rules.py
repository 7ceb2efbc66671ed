"""How an arm is trained: the papers' optimizers and schedules by name."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from pemn_surgery.errors import RecipeError


def triangle(lr: float, step: int, steps: int) -> float:
    """Rise to ``lr`` at 40 % of the run, fall to ``lr / 20`` at 80 %, to 0 at its end.

    Linear in between. Steps count from 0; a step takes the rate of its end, so that the first
    is above 0 and the last is 0 (PEMN, after ConvMixer's CIFAR-10 code).
    """
    done = (step + 1) / steps
    if done <= 0.4:
        return lr * done / 0.4
    if done <= 0.8:
        return lr + (lr / 20 - lr) * (done - 0.4) / 0.4
    return lr / 20 * (1 - done) / 0.2


def cosine(lr: float, step: int, steps: int) -> float:
    """Fall from ``lr`` at step 0 towards 0 along half a cosine (Loshchilov and Hutter, 2017)."""
    return lr * (1 + math.cos(math.pi * step / steps)) / 2


def warm_cosine(lr: float, step: int, steps: int) -> float:
    """Rise to ``lr`` over 40/150 of the run, then half a cosine to 0 (Self-Masking Networks).

    Steps count from 0; while rising a step takes the rate of its end, so that the first is above 0.
    """
    warm = max(round(steps * 40 / 150), 1)
    return lr * (step + 1) / warm if step < warm else cosine(lr, step - warm, steps - warm)


def warm_linear(lr: float, step: int, steps: int) -> float:
    """Rise to ``lr`` over .06 of the run, then a line to 0 (BERT and its descendants).

    Steps count from 0; while rising a step takes the rate of its end, so that the first is above 0.
    """
    warm = max(round(0.06 * steps), 1)
    return lr * (step + 1) / warm if step < warm else lr * (steps - step) / (steps - warm)


def one_cycle(lr: float, step: int, steps: int) -> float:
    """Half a cosine from ``lr / 25`` up over .3 of the run, one down to ``lr / 250,000``.

    The defaults of torch's OneCycleLR (after Smith and Topin, 2018); steps count from 0.
    """
    top, last = 0.3 * steps - 1, steps - 1
    if step <= top:
        return lr + (lr / 25 - lr) * (1 + math.cos(math.pi * step / top)) / 2
    low = lr / 25 / 1e4
    return low + (lr - low) * (1 + math.cos(math.pi * (step - top) / (last - top))) / 2


MakeOptimizer = Callable[[Iterable[nn.Parameter], "Rule"], torch.optim.Optimizer]


def _made_by(kind: Any, *fields: str) -> MakeOptimizer:
    """Return what makes an optimizer of a class from the rate and these fields of a rule."""
    return lambda weights, rule: kind(weights, rule.lr, **{f: getattr(rule, f) for f in fields})


SCHEDULES: dict[str, Callable[[float, int, int], float]] = {
    function.__name__: function
    for function in (triangle, cosine, warm_cosine, warm_linear, one_cycle)
}
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw": _made_by(torch.optim.AdamW, "weight_decay"),
    "adam": _made_by(torch.optim.Adam, "weight_decay"),
    "sgd": _made_by(torch.optim.SGD, "momentum", "weight_decay"),
}
# Parts of a model for which a rule can say what is otherwise, by the names of their parameters.
_PARTS = {"scores": re.compile(r"\.pemn_masks\."), "head": re.compile(r"(^|\.)head\.")}


@dataclass(frozen=True)
class Rule:
    """How an arm is trained.

    Attributes:
        optimizer: Key of `OPTIMIZERS`.
        lr: Learning rate at its highest.
        schedule: Key of `SCHEDULES`: the learning rate of every step.
        batch: Rows a step.
        weight_decay: Of all that is trained.
        momentum: Of "sgd".
        augmentation: What the data set does to an epoch's rows.
        whole_batches: Leave out the rows at an epoch's end that make no whole batch.
        scores: What is otherwise for the scores of masks, by field; None: nothing.
        head: What is otherwise for a module that is named so, a classifier; None: nothing.
    """

    optimizer: str
    lr: float
    schedule: str
    batch: int
    weight_decay: float = 0.0
    momentum: float = 0.0
    augmentation: str = "none"
    whole_batches: bool | None = None
    scores: dict[str, Any] | None = None
    head: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse names that are in no table."""
        for table, key in ((SCHEDULES, self.schedule), (OPTIMIZERS, self.optimizer)):
            if key not in table:
                message = f"{key!r} in a rule is unknown; give one of {sorted(table)}"
                raise RecipeError(message)

    def settings(self) -> dict[str, Any]:
        """What a checkpoint keeps; fields that a rule does not use are as if there were none."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return SCHEDULES[self.schedule](self.lr, step, steps)

    def optimizers(self, model: nn.Module) -> dict[str, tuple[torch.optim.Optimizer, "Rule"]]:
        """Return what trains a model, each with its rule: all at once, or parts apart."""
        rest = {name: p for name, p in model.named_parameters() if p.requires_grad}
        parts: dict[str, tuple[list[nn.Parameter], Rule]] = {}
        for part, pattern in _PARTS.items():
            if otherwise := getattr(self, part):
                names = [name for name in rest if pattern.search(name)]
                own = replace(self, **{**dict.fromkeys(_PARTS), **otherwise})
                parts[part] = [rest.pop(name) for name in names], own
        found = {"optimizer": ([*rest.values()], self), **parts}
        return {k: (OPTIMIZERS[r.optimizer](weights, r), r) for k, (weights, r) in found.items()}
