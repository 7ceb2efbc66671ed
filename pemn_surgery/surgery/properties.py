"""Reads and writes of the name of a tensor that adapters make or choose, on swapped classes.

A reader of ``module.weight`` gets what is in force. Who shards or saves what is stored gets that:
FSDP re-reads parameters with ``getattr``. It sets and deletes plain tensors under their names,
hence the setter and the deleter.

What is written (``module.bias = nn.Parameter(v)``) is what a reader of the name reads (`places`):
the active adapter's tensor, else the module's own. Masks make a weight of what lies under them, so
there only what they can lie on is taken, and nothing where a bank fills the weight.
"""

import sys
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor, nn

from pemn_surgery.masks import places
from pemn_surgery.masks.attached import find_masked, find_owned
from pemn_surgery.masks.masked_weight import MaskedWeight, masked_child_name
from pemn_surgery.masks.places import FSDP, SHARED_MASKS, SHARED_TENSORS
from pemn_surgery.masks.task_tensors import TASK_CHILD, TaskTensors
from pemn_surgery.surgery.refusals import refuse, refuse_replacing

# Reads a layer's weight to save and load it as it is stored.
BITSANDBYTES = "bitsandbytes."


def masked_property(name: str) -> property:
    """Return the property in place of a parameter whose effective weight a `MaskedWeight` makes."""
    child_name = masked_child_name(name)

    def getter(self: nn.Module) -> Tensor | None:
        child = cast("MaskedWeight | None", self._modules.get(child_name))
        if child is None:
            child = cast("MaskedWeight", self.__dict__[SHARED_MASKS][name])
        if not torch.compiler.is_compiling():
            reader = _caller()
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
            reader = _caller()
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


def writing_methods(original: type[nn.Module], made: Collection[str]) -> dict[str, Any]:
    """Return methods of a swapped class that write what a reader of the name would read."""

    def takes(module: nn.Module, name: str, value: Any, caller: str) -> bool:
        if name not in made or places.moves_stored(caller):
            return False
        return _assign(module, name, value)

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, (MaskedWeight, TaskTensors)) and name in self._modules:
            value.belong_to(self)
        caller = _caller()
        if name in made and places.moves_stored(caller) and _replaces_stored(self, name, value):
            places.store((self, name), cast("Tensor", value))  # not by way of the getter
        elif not takes(self, name, value, caller):
            original.__setattr__(self, name, value)

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if name in made and param is not None:
            _refuse_where_banked(self, name, find_masked(self, name))
        if not takes(self, name, param, _caller()):
            original.register_parameter(self, name, param)

    def register_buffer(
        self: nn.Module, name: str, tensor: Tensor | None, persistent: bool = True
    ) -> None:
        if not takes(self, name, tensor, _caller()):
            original.register_buffer(self, name, tensor, persistent)

    return {
        "__setattr__": set_attribute,
        "register_parameter": register_parameter,
        "register_buffer": register_buffer,
    }


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


def _assign(module: nn.Module, name: str, value: Tensor | None) -> bool:
    """Write where a reader of this name reads; return False where that is the module itself."""
    masked, owned = find_masked(module, name), find_owned(module, name)
    if owned is not None:
        _check_can_be_saved(module, name, value)
        child, source = owned
        if any(child.first_rows(source)):
            refuse(module, f"{name!r} is the base's rows and a task's new ones, no one tensor")
        return child.write(source, value)
    if masked is not None and value is not None:
        _check_can_be_masked(module, name, masked, value)
    return False


def _check_can_be_saved(module: nn.Module, name: str, value: Tensor | None) -> None:
    if isinstance(value, nn.Parameter) and type(value.data) is not Tensor:
        kind = type(value.data).__name__
        problem = f"{name!r} would be a {kind}, which no adapter's file can hold"
        refuse(module, f"{problem}: quantise or shard a model before it gets adapters")


def _replaces_stored(module: nn.Module, name: str, value: Any) -> bool:
    """Tell whether a parameter takes the place of one: FSDP2 does so for every shard."""
    return isinstance(value, nn.Parameter) and module._parameters.get(name) is not None


def _refuse_where_banked(module: nn.Module, name: str, masked: MaskedWeight | None) -> None:
    if masked is not None and masked.bank is not None:
        refuse(module, f"nothing would read a {name!r} of its own: the bank fills it")


def _check_can_be_masked(module: nn.Module, name: str, masked: MaskedWeight, value: Tensor) -> None:
    _refuse_where_banked(module, name, masked)
    if masked.merged_weight is not None:
        refuse(module, f"{name!r} is merged: unmerge_adapter() would take an assigned one away")
    own = masked.own_weight()
    wanted = masked.shape if own is None else tuple(own.shape)
    if tuple(value.shape) != wanted:
        shapes = f"{tuple(value.shape)}, but its masks {masked.shape}"
        refuse(module, f"{name!r} would have the shape {shapes}")
    if type(value.data) is not Tensor:
        kind = type(value.data).__name__
        refuse(module, f"{name!r} would be a {kind}: quantise or tie a model before it gets masks")


def _caller() -> str:
    """Return the Python module that reads or writes: two frames up, behind the method."""
    return sys._getframe(2).f_globals.get("__name__", "")
