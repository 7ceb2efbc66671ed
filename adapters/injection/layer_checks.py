"""What cannot carry masks (a name is taken, a class is closed) or lie in an adapter's file."""

import warnings
from collections.abc import Iterator, Mapping
from typing import NoReturn

import torch
from torch import Tensor, nn

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.quantised import resolve_backend
from pemn_surgery.errors import PemnWarning, UnsupportedModelError
from pemn_surgery.masks.masked_weight import MaskedWeight, masked_child_name
from pemn_surgery.masks.task_tensors import TASK_CHILD, TaskTensors
from pemn_surgery.planning.plan import Plan
from pemn_surgery.planning.roles import base_modules
from pemn_surgery.surgery.subclasses import can_be_swapped
from pemn_surgery.surgery.swapped import original_class


def check_layers(modules: Mapping[str, nn.Module], plan: Plan) -> None:
    """Refuse layers with a name of ours, and classes that cannot be swapped.

    Another name would do for the first, but adapter files are read by these names.

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


def warn_of_extra_state(model: nn.Module, config: PemnConfig) -> None:
    """Say what neither seed nor file brings back: state that modules keep beside their tensors."""
    if not config.bank_spec.generated or config.origin.file is not None:
        return
    plain = nn.Module.get_extra_state
    keeping = [p for p, m in base_modules(model) if type(m).get_extra_state is not plain]
    if keeping:
        warnings.warn(
            f"{len(keeping)} modules keep state beside their tensors (get_extra_state; first: "
            f"{keeping[0]!r}), which no adapter's file holds: where it is random or trained, seed "
            "and file do not make this model again. A buffer does.",
            PemnWarning,
            stacklevel=2,
        )


def check_is_plain(name: str, tensor: Tensor) -> None:
    """Refuse to save what a library stores its own way (torchao; `UnsupportedModelError`)."""
    if type(tensor) not in (Tensor, nn.Parameter):
        message = (
            f"{name!r} is a {type(tensor).__name__}, which an adapter's file (safetensors) cannot "
            "hold: it was quantised after the adapter was made. Save before that, or merge first, "
            "model.merge_and_unload(), and quantise the plain model. Nothing was saved."
        )
        raise UnsupportedModelError(message)


def check_can_be_stored(model: nn.Module, plan: Plan) -> None:
    """Refuse tensors that a file cannot hold, before anything changes (`UnsupportedModelError`).

    safetensors has no name for complex128; of quantised numbers it would hold those without their
    scales (bitsandbytes), or none (torchao).
    """
    modules = dict(base_modules(model))
    for item in (*plan.owned, *plan.whole):
        tensors = modules[item.path]._parameters | modules[item.path]._buffers
        held = tensors.get(item.tensor)
        backend = resolve_backend(modules[item.path]) if item.tensor == "weight" else None
        if backend is not None:
            message = (
                f"{item.name!r} is stored as {backend.backend_name} (quantised) and would be the "
                "task's, but no adapter's file can hold it. On a model's own weights rest="
                '"stats" or "norms" leaves it to the base; drawn numbers need a base that is not '
                "quantised. Nothing was changed."
            )
            raise UnsupportedModelError(message)
        if held is not None and held.dtype == torch.complex128:
            message = (
                f"{item.name!r} is complex128, which an adapter's file (safetensors) cannot hold; "
                "complex64 it can. Nothing was changed."
            )
            raise UnsupportedModelError(message)
