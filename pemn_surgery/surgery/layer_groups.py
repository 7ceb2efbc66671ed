"""timm's layers of parameters, by the names that parameters have under adapters.

timm's optimizers ask a model which parameters belong to which layer (``group_matcher``, for
layer-wise learning rates) and which must not decay (``no_weight_decay``), in patterns of names.
Scores and the task's tensors have other names than the tensors that they stand for, so the answers
are translated.
"""

import fnmatch
import re
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from pemn_surgery.masks.masked_weight import masked_child_name
from pemn_surgery.masks.task_tensors import TASK_CHILD

Rename = Callable[[str], str]  # from a parameter's name now to the base's

# What timm asks a model for.
QUESTIONS = ("group_matcher", "no_weight_decay")

OUTER = "base_model."  # what PEFT's model puts before its tuner's names, which is what is asked

_MASKED = re.compile(rf"(^|\.){masked_child_name('')}([^.]+)\.pemn_masks\.[^.]+\.[^.]+$")
_OWNED = re.compile(rf"(^|\.){TASK_CHILD}\.pemn_tensors\.[^.]+\.")
_WHOLE = re.compile(r"\.(modules_to_save\.[^.]+|original_module)\.")


def base_name(name: str) -> str:
    """Return the base's name of the tensor that a parameter of a model with adapters stands for."""
    name = _OWNED.sub(r"\1", _MASKED.sub(r"\1\2", name))
    return _WHOLE.sub(".", name)


def answer(model: nn.Module, question: str, given: Callable[..., Any], rename: Rename) -> Any:
    """Return a method that answers one of `QUESTIONS` in the names that parameters have now."""
    if question == "no_weight_decay":
        return lambda: _names_of(model, given(), rename)
    return lambda *args, **kwargs: _layers_of(model, given(*args, **kwargs), rename)


def method(original: type[nn.Module], question: str) -> Callable[..., Any]:
    """Return a method for the subclass of a module's class that answers for renamed parameters."""

    def answered(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = getattr(original, question).__get__(self)
        return answer(self, question, given, base_name)(*args, **kwargs)

    return answered


def _layers_of(model: nn.Module, matcher: Any, rename: Rename) -> Callable[[str], int]:
    """Return a parameter's layer by its name now: timm's numbers for the names it knows."""
    from timm.models._manipulate import group_with_matcher  # only a timm model is asked

    names = dict.fromkeys(rename(name) for name, _ in model.named_parameters())
    layers: Any = group_with_matcher(((name, name) for name in names), matcher, reverse=True)
    return lambda name: layers[rename(name)]


def _names_of(model: nn.Module, patterns: Collection[str], rename: Rename) -> set[str]:
    """Return the patterns, and the names now of all parameters that they mean."""
    meant = {
        name
        for name, _ in model.named_parameters()
        if any(fnmatch.fnmatch(rename(name), base_name(pattern)) for pattern in patterns)
    }
    return {*patterns, *meant, *(f"{OUTER}{name}" for name in meant)}
