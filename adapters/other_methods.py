"""Models that carry adapters of another method of PEFT, on which masks cannot lie."""

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pemn_surgery.errors import AlreadyPemnifiedError
from pemn_surgery.masked import MaskedWeight
from pemn_surgery.task import TaskTensors


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


def _method_of(layer: object) -> str:
    """Return PEFT's name of the method whose tuner lies in the same package as a layer's class."""
    tuners = PEFT_TYPE_TO_TUNER_MAPPING.items()
    places = {_package(tuner): kind.value for kind, tuner in tuners}
    return places.get(_package(type(layer)), type(layer).__name__)


def _package(of: type) -> str:
    return of.__module__.rpartition(".")[0]
