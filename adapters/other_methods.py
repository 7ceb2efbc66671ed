"""Other methods of PEFT beside masks: neither lies on the other.

Masks would mask the other's matrices. The other would merge into a masked weight, which is
computed, and save masks under names that nothing can load.
"""

import functools
from collections.abc import Callable
from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pemn_surgery.adapters.registry import PREFIX
from pemn_surgery.errors import AlreadyPemnifiedError
from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.masks.task_tensors import TaskTensors


def check_no_other_method(model: nn.Module) -> None:
    """Refuse a model that carries adapters of another method of PEFT, whose matrices it would mask.

    Args:
        model: The model.

    Raises:
        AlreadyPemnifiedError: If it does.
    """
    others = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        and not isinstance(module, (MaskedWeight, TaskTensors))
    }
    if others:
        first = next(iter(others))
        message = (
            f"The model carries {_method_of(others[first])} adapters in {len(others)} layers "
            f"(first: {first}), and masks cannot lie on those. Merge them into the model first "
            "(merge_and_unload() of its PeftModel), or take a model without them. Nothing was "
            "changed."
        )
        raise AlreadyPemnifiedError(message)


def refusing_masks(begin: Callable[..., None]) -> Callable[..., None]:
    """Let PEFT's other methods refuse a model with masks."""

    @functools.wraps(begin)
    def refusing(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if getattr(self, "prefix", None) != PREFIX:
            _check_no_masks(model, _method_of(self))
        begin(self, model, *args, **kwargs)

    return refusing


def _check_no_masks(model: nn.Module, method: str) -> None:
    masked = [module.target for module in model.modules() if isinstance(module, MaskedWeight)]
    if masked:
        message = (
            f"{method} adapters cannot lie on masks, and the model has {len(masked)} masked "
            f"weights (first: {masked[0]}): they would change weights that are computed. Merge the "
            "masks first, model.merge_and_unload(), or take a model without. Nothing was changed."
        )
        raise AlreadyPemnifiedError(message)


def _method_of(layer: object) -> str:
    """Return PEFT's name of the method whose tuner lies in the same package as a layer's class."""
    tuners = PEFT_TYPE_TO_TUNER_MAPPING.items()
    places = {_package(tuner): kind.value for kind, tuner in tuners}
    return places.get(_package(type(layer)), type(layer).__name__)


def _package(of: type) -> str:
    return of.__module__.rpartition(".")[0]
