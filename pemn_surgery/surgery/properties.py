"""Properties of swapped classes: who reads a tensor's name on a module gets what is in force.

Who shards or saves what is stored gets that: FSDP re-reads parameters with ``getattr``. It sets and
deletes plain tensors under their names, hence the setter and the deleter.
"""

import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from pemn_surgery.masks import places
from pemn_surgery.masks.attached import find_masked
from pemn_surgery.masks.masked_weight import MaskedWeight, masked_child_name
from pemn_surgery.masks.places import FSDP, SHARED_MASKS, SHARED_TENSORS
from pemn_surgery.masks.task_tensors import TASK_CHILD, TaskTensors
from pemn_surgery.surgery.refusals import refuse_replacing

# Reads a layer's weight to get it as it is stored.
BITSANDBYTES = "bitsandbytes."


def masked_property(name: str) -> property:
    """Return the property in place of a parameter whose effective weight a `MaskedWeight` makes."""
    child_name = masked_child_name(name)

    def getter(self: nn.Module) -> Tensor | None:
        child = cast("MaskedWeight | None", self._modules.get(child_name))
        if child is None:
            child = cast("MaskedWeight", self.__dict__[SHARED_MASKS][name])
        if not torch.compiler.is_compiling():
            reader = _reader()
            if reader.startswith((FSDP, BITSANDBYTES)):
                return places.stored(self, name)
            refuse_replacing(self, name, reader)
        return _here(self, child.owner, child.read())

    return _property(name, getter)


def owned_property(name: str) -> property:
    """Return the property in place of a tensor that a `TaskTensors` chooses."""

    def getter(self: nn.Module) -> Tensor | None:
        shared = self.__dict__.get(SHARED_TENSORS, {})
        own = cast("TaskTensors", self._modules.get(TASK_CHILD))
        child, source = shared.get(name, (own, name))
        if not torch.compiler.is_compiling():
            reader = _reader()
            if reader.startswith(FSDP):
                return places.stored(self, name)
            refuse_replacing(self, name, reader)
        return _here(self, child.owner, child.read(source))

    return _property(name, getter)


def flat_weights_property() -> property:
    """Return the property for a recurrent layer's weights in force; torch keeps a list of raw ones.

    A replica has none yet when torch copies the list.
    """

    def getter(self: Any) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    return _property("_flat_weights", getter)


def answer_property(parameter: str, name: str) -> property:
    """Return the property by which a layer answers what is asked of its masks."""
    return property(lambda self: getattr(find_masked(self, parameter), name))


def _property(name: str, getter: Callable[[nn.Module], Any]) -> property:
    def setter(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value  # only FSDP1 comes here, with a plain tensor

    def deleter(self: nn.Module) -> None:
        self.__dict__.pop(name, None)

    return property(getter, setter, deleter)


def _here(module: nn.Module, owner: nn.Module, tensor: Tensor | None) -> Tensor | None:
    """Return a tied tensor of another module, on this replica's device where this is a replica.

    Torch makes replicas of modules and not of what ties them, so that is the first model's own.
    """
    if tensor is None or owner is module or not module.__dict__.get("_is_replica"):
        return tensor
    return tensor.to(torch.cuda.current_device()) if tensor.is_cuda else tensor


def _reader() -> str:
    """Return the Python module that reads the attribute: two frames up, behind the getter.

    FSDP shards what is stored; bitsandbytes saves and loads it.
    """
    return sys._getframe(2).f_globals.get("__name__", "")
