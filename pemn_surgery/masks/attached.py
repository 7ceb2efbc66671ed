"""What is attached to a module: what makes its effective weights, what owns its other tensors."""

from typing import cast

from torch import nn

from pemn_surgery.masks.masked_weight import MaskedWeight, masked_child_name
from pemn_surgery.masks.places import SHARED_MASKS, SHARED_TENSORS
from pemn_surgery.masks.task_tensors import TASK_CHILD, TaskTensors


def find_masked(module: nn.Module, parameter: str) -> MaskedWeight | None:
    """Return what makes this parameter's effective weight, or None where nothing does."""
    child = module._modules.get(masked_child_name(parameter))
    if child is None:
        child = module.__dict__.get(SHARED_MASKS, {}).get(parameter)
    return child if isinstance(child, MaskedWeight) else None


def held_masks(module: nn.Module) -> dict[str, MaskedWeight]:
    """Return what makes a module's effective weights, by the parameter's name on the module."""
    made = {name: find_masked(module, name) for name in names_masked(module)}
    return {name: child for name, child in made.items() if child is not None}


def find_task(module: nn.Module) -> TaskTensors | None:
    """Return the child that owns tensors of this module for tasks, or None."""
    child = module._modules.get(TASK_CHILD)
    return child if isinstance(child, TaskTensors) else None


def find_owned(module: nn.Module, name: str) -> tuple[TaskTensors, str] | None:
    """Return what owns one tensor of a module for tasks, and the tensor's name there, or None."""
    shared = module.__dict__.get(SHARED_TENSORS, {}).get(name)
    child = find_task(module)
    owned = child is not None and name in names_owned(module)
    return shared or ((cast("TaskTensors", child), name) if owned else None)


def names_masked(module: nn.Module) -> tuple[str, ...]:
    """Return the parameters of a module that are masked."""
    return getattr(type(module), "_pemn_masks", ())


def names_owned(module: nn.Module) -> tuple[str, ...]:
    """Return the tensors of a module that tasks own."""
    return getattr(type(module), "_pemn_tensors", ())
