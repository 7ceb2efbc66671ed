"""Initial values of tensors, by the methods with which modules, timm and transformers give them."""

import inspect
from collections.abc import Callable, Iterator, Set
from typing import Any, cast

import torch
from torch import nn

from pemn_surgery.errors import MetaTensorError
from pemn_surgery.planning.roles import base_modules

# In this order: what a layer draws for itself, what timm computes, what a model sets over both.
_INITIALISERS = (
    "reset_parameters",
    "_reset_parameters",
    "init_non_persistent_buffers",
    "init_weights",
)
# Transformers' mark on modules and tensors that its initialisers shall pass by.
INITIALISED = "_is_hf_initialized"

# What to do about tensors that would stay without values.
HOW_TO_FILL = (
    "Give them values first, model.load_state_dict(values, assign=True, strict=False), or "
    "build the model on a real device. Nothing was changed."
)


def initialise(model: nn.Module, lacking: Set[int], device: torch.device) -> None:
    """Run the initialisers of all modules that lack values, children first.

    Args:
        model: The model.
        lacking: The ``id`` of every module that itself holds a tensor without values.
        device: Where new tensors shall lie.

    Raises:
        MetaTensorError: If one of them fails.
    """
    modules = list(base_modules(model))
    with torch.inference_mode(mode=False), torch.no_grad(), device:
        for path, module in reversed(modules):
            if any(id(inner) in lacking for inner in module.modules()):
                for method in _initialisers(module):
                    _call(path, module, method)
        for _, module in modules:
            module.__dict__.pop(INITIALISED, None)
        for path, module in modules:
            if _is_transformers(module):
                _call(path, module, cast("Any", type(module)).initialize_weights)
        for _, module in modules:
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()  # torch's second list of the same parameters


def _initialisers(module: nn.Module) -> Iterator[Callable[[nn.Module], Any]]:
    for name in _INITIALISERS:
        method = getattr(type(module), name, None)
        again = name == "init_weights" and _is_transformers(module)
        if method is not None and not again and _takes_nothing(method):
            yield method


def _is_transformers(module: nn.Module) -> bool:
    """Tell whether a module is a transformers model, without importing transformers."""
    return any(base.__name__ == "PreTrainedModel" for base in type(module).__mro__)


def _takes_nothing(method: Callable[..., Any]) -> bool:
    """Tell whether a method can be called with nothing but its module."""
    try:
        inspect.signature(method).bind(None)
    except TypeError:
        return False
    return True


def _call(path: str, module: nn.Module, method: Callable[[nn.Module], Any]) -> None:
    try:
        method(module)
    except Exception as error:
        message = (
            f"{type(module).__name__}.{method.__name__} of {path or 'the model'!r} could not "
            "compute initial values for tensors on the meta device: "
            f"{type(error).__name__}: {error}. {HOW_TO_FILL}"
        )
        raise MetaTensorError(message) from error
