"""Writes to the name of a tensor that adapters make or choose: ``module.bias = nn.Parameter(v)``.

What is written is what a reader of the name reads (`places`): the active adapter's tensor, else the
module's own. Masks make a weight of what lies under them, so there only what they can lie on is
taken, and nothing where a bank fills the weight.
"""

import sys
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from pemn_surgery.masks import places
from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.masks.task_tensors import TaskTensors
from pemn_surgery.surgery.refusals import refuse


class Makers(NamedTuple):
    """What makes or chooses the tensor of one name.

    Attributes:
        masked: Makes the effective weight, if masks lie on it.
        owned: Holds the tasks' tensors, if tasks own it, and its name there.
    """

    masked: MaskedWeight | None
    owned: tuple[TaskTensors, str] | None


FindMakers = Callable[[nn.Module, str], Makers]


def writing_methods(
    original: type[nn.Module], made: Collection[str], find: FindMakers
) -> dict[str, Any]:
    """Return methods of a swapped class that write what a reader of the name would read."""

    def takes(module: nn.Module, name: str, value: Any, caller: str) -> bool:
        if name not in made or places.moves_stored(caller):
            return False
        return _assign(module, name, value, find(module, name))

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
            _refuse_where_banked(self, name, find(self, name).masked)
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


def _assign(module: nn.Module, name: str, value: Tensor | None, makers: Makers) -> bool:
    """Write where a reader of this name reads; return False where that is the module itself.

    Raises:
        MaskedWeightError: If masks lie on the tensor, and cannot lie on this one, or if a task owns
            it, and no file can hold this one.
    """
    if makers.owned is not None:
        _check_can_be_saved(module, name, value)
        child, source = makers.owned
        if any(child.first_rows(source)):
            refuse(module, f"{name!r} is the base's rows and a task's new ones, no one tensor")
        return child.write(source, value)
    if makers.masked is not None and value is not None:
        _check_can_be_masked(module, name, makers.masked, value)
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
    """Return the Python module that writes: two frames up, behind the method."""
    return sys._getframe(2).f_globals.get("__name__", "")
