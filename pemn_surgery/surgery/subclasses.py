"""The subclasses that surgery gives to modules: properties in place of some tensors.

What makes them safe:

* a class property wins over ``nn.Module``'s lookup in ``_parameters``, so the frozen tensor stays
  registered under its own name;
* the subclass carries the original's ``__name__`` and ``__module__``: wrapping policies, "no split"
  lists and torch.fx's leaf test match by them;
* classes that watch their subclasses (``__init_subclass__``, a metaclass) do not hear of it;
* pickle and deepcopy rebuild the subclass from the original class (``__reduce_ex__``).
"""

import functools
from abc import ABCMeta
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from pemn_surgery.masks.attached import find_masked, find_task
from pemn_surgery.masks.kept import one_forward
from pemn_surgery.surgery import layer_groups
from pemn_surgery.surgery.properties import (
    BITSANDBYTES,
    answer_property,
    flat_weights_property,
    masked_property,
    owned_property,
    writing_methods,
)
from pemn_surgery.surgery.refusals import refusing_methods, tying_methods

# What PEFT's own layers answer about their adapters, and people ask the layer for.
_ASKED_OF_LAYERS = ("active_adapters", "adapter_layer_names", "other_param_names", "pemn_masks")


@functools.cache
def swapped_class(
    original: type[nn.Module],
    masks: tuple[str, ...],
    tensors: tuple[str, ...],
    marked: bool = False,
) -> type[nn.Module]:
    """Return the subclass of a module's class with properties in place of some tensors.

    Args:
        original: The module's own class.
        masks: Parameters whose effective weight a `MaskedWeight` child makes.
        tensors: Parameters and buffers that a `TaskTensors` child chooses.
        marked: Whether a call of it is one forward of the model.
    """

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        state = original.__getstate__(self) if hasattr(original, "__getstate__") else self.__dict__
        return _rebuild, (original, masks, tensors, marked), state

    questions = [name for name in layer_groups.QUESTIONS if hasattr(original, name)]
    # transformers' models have an active_adapters of their own
    asked = [name for name in _ASKED_OF_LAYERS if masks and not hasattr(original, name)]
    namespace: dict[str, Any] = {
        "_pemn_original": original,
        "_pemn_masks": masks,
        "_pemn_tensors": tensors,
        "_pemn_marked": marked,
        "__reduce_ex__": reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        **refusing_methods(original, {*masks, *tensors}),
        **writing_methods(original, {*masks, *tensors}),
        **{name: masked_property(name) for name in masks},
        **{name: answer_property(masks[0], name) for name in asked},
        **{name: owned_property(name) for name in tensors},
        **{name: layer_groups.method(original, name) for name in questions},
    }
    if "weight" in masks and _reads_packed(original):
        namespace["forward"] = _dense_forward(original)
    if marked:
        namespace["__call__"] = _one_forward(original)
        namespace.update(tying_methods(original))
    if issubclass(original, nn.RNNBase):
        namespace["_flat_weights"] = flat_weights_property()
    swapped = _unwatched_subclass(original, namespace)
    if tensors or not masks:
        _follow_task(swapped, original)
    return swapped


@functools.cache
def can_be_swapped(original: type[nn.Module]) -> bool:
    """Tell whether python lets a class be swapped for a subclass that it does not hear of.

    It does not where the class watches its subclasses and has slots, or an abstract class first.
    """
    try:
        _unwatched_subclass(original, {})
    except TypeError:
        return False
    return True


def _unwatched_subclass(original: type[nn.Module], namespace: dict[str, Any]) -> type[nn.Module]:
    """Make a subclass past the class's own ``__init_subclass__`` and metaclass.

    A layer that registers its subclasses, wants arguments for them or forbids them means those that
    people write. This one stands for the layer itself, under the same name, and would even push the
    layer out of such a register. The standard library's abstract classes are the exception: each
    needs caches of its own.
    """
    meta: Any = type(original)
    maker: Any = ABCMeta if issubclass(meta, ABCMeta) else type
    watchers = [base for base in original.__mro__[:-1] if "__init_subclass__" in vars(base)]
    watched = any(base.__module__ != "typing" for base in watchers)  # Generic and Protocol may look
    first = nn.Module if watched else original  # python asks the first bases, not later ones
    made = maker.__new__(meta, original.__name__, (first,), namespace)
    if watched:
        type.__setattr__(made, "__bases__", (original,))
    return cast("type[nn.Module]", made)


def _rebuild(
    original: type[nn.Module],
    masks: tuple[str, ...],
    tensors: tuple[str, ...],
    marked: bool,
) -> nn.Module:
    """Make an empty instance, for pickle and deepcopy."""
    swapped = swapped_class(original, masks, tensors, marked)
    return swapped.__new__(swapped)


def _one_forward(original: type[nn.Module]) -> Callable[..., Any]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original.__call__(self, *args, **kwargs)
        with one_forward():
            return original.__call__(self, *args, **kwargs)

    return call


def _reads_packed(original: type[nn.Module]) -> bool:
    """Tell whether a layer's own forward reads packed numbers: bitsandbytes, without import."""
    is_theirs = any(base.__module__.startswith(BITSANDBYTES) for base in original.__mro__)
    return is_theirs and issubclass(original, nn.Linear)


def _dense_forward(original: type[nn.Module]) -> Callable[..., Tensor]:
    """Return a forward that computes with the dequantised, masked weight.

    It casts as bitsandbytes does; while nothing applies it is the original one.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        child = find_masked(self, "weight")
        if child is None or child.is_bare():
            return original.forward(self, x)
        dtype = getattr(self, "compute_dtype", None) or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(x.to(dtype), self.weight.to(dtype), bias).to(x.dtype)

    return forward


def _follow_task(swapped: type[nn.Module], original: type[nn.Module]) -> None:
    """Let a task hold its norms in eval mode."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        child = find_task(self)
        return original.train(self, mode and not (child is not None and child.keeps_eval()))

    type.__setattr__(swapped, "train", train)
