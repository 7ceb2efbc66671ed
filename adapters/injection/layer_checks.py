"""Refuses layers that cannot carry masks: a name is taken, a class is closed."""

from collections.abc import Iterator, Mapping
from typing import NoReturn

from torch import nn

from pemn_surgery.errors import UnsupportedModelError
from pemn_surgery.masks.masked_weight import MaskedWeight, masked_child_name
from pemn_surgery.masks.task_tensors import TASK_CHILD, TaskTensors
from pemn_surgery.planning.plan import Plan
from pemn_surgery.surgery.subclasses import can_be_swapped
from pemn_surgery.surgery.swapped import original_class


def check_layers(modules: Mapping[str, nn.Module], plan: Plan) -> None:
    """Refuse layers with a name of ours, and classes that cannot be swapped.

    Another name would do for the first, but adapter files are read by these names.

    Args:
        modules: The model's own modules by path.
        plan: What would be masked, and what the task owns.

    Raises:
        UnsupportedModelError: If a layer has an attribute of the name that its masks or the task's
            tensors need, or its class cannot be given a subclass.
    """
    for path, name in dict.fromkeys(_needed_names(plan)):
        if name and _has_of_its_own(modules[path], name):
            _refuse_name(path, modules[path], name)
        if not can_be_swapped(original_class(modules[path])):
            _refuse_class(path, modules[path])


def _needed_names(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield each module that changes, and the attribute that it gets, if any."""
    for target in plan.targets:
        yield target.path, masked_child_name(target.parameter)
        for tied in target.tied:
            yield tied.rpartition(".")[0], ""
    for item in plan.owned:
        yield item.path, "" if item.tied_to else TASK_CHILD
    for path in plan.frozen_norms:
        yield path, TASK_CHILD


def _has_of_its_own(module: nn.Module, name: str) -> bool:
    """Look the name up without asking for its value: a property may compute something."""
    if isinstance(module._modules.get(name), (MaskedWeight, TaskTensors)):
        return False
    tables = (module.__dict__, module._parameters, module._buffers, module._modules)
    return any(name in table for table in tables) or hasattr(type(module), name)


def _refuse_name(path: str, module: nn.Module, name: str) -> NoReturn:
    kind = original_class(module).__qualname__
    message = (
        f"{path or 'The model'} ({kind}) has an attribute {name!r} of its own, which is where its "
        f"masks or the task's tensors would be, and where adapter files name them. Rename it in "
        f"{kind}, or {_leave_out(path, name)}. Nothing was changed."
    )
    raise UnsupportedModelError(message)


def _refuse_class(path: str, module: nn.Module) -> NoReturn:
    kind = original_class(module).__qualname__
    message = (
        f"The class of {path or 'the model'}, {kind}, watches its subclasses (__init_subclass__) "
        "and has slots or an abstract class before its modules, so that python allows no subclass "
        "that it does not hear of. Put nn.Module's subclass first among its bases and take the "
        f"slots away, or {_leave_out(path, masked_child_name(''))}. Nothing was changed."
    )
    raise UnsupportedModelError(message)


def _leave_out(path: str, name: str) -> str:
    if name == TASK_CHILD:
        return 'let tasks own nothing of it (rest="stats" or "freeze" on the model\'s own weights)'
    return f"leave it out: PemnConfig(exclude_modules=[{path!r}])"
