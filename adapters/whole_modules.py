"""Modules that a task has whole, as copies: heads and layers that no mask lies on.

``modules_to_save`` puts a wrapper of PEFT's around a module, which chooses by attributes of its own
whose copy runs. Where a model with masks runs in a `Call`
(`pemn_surgery.masks.in_force`), the wrapper answers for that call; everywhere else, and for every
other method, it answers as PEFT wrote it.

PEFT makes the copies from the base, so that all tasks on one model would need heads of one size.
What comes out of a head is the task's alone: its layers may have any number of outputs, while
everything else has to be as in the base.

A module that takes the place of another after masks were put on a model
(``model.reset_classifier(5)``, timm's ``freeze_batch_norm_2d``) takes with it what an adapter had
there. A new layer is saved whole; of everything else a file would be wrong, and is refused.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pemn_surgery.adapters.base import WRAPPED, masked_layers
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.contents import KEY_PREFIX
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.errors import AdapterError, PemnWarning
from pemn_surgery.masks import in_force
from pemn_surgery.masks.adapter_mask import Parts
from pemn_surgery.masks.in_force import InForce, Layer
from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.masks.task_tensors import TaskTensors
from pemn_surgery.numbers import bank as banks
from pemn_surgery.planning.plan import Plan
from pemn_surgery.planning.roles import full_name

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WholeModule:
    """A wrapper of PEFT's, as a layer that a `Call` can be asked about."""

    wrapper: AuxiliaryTrainingWrapper

    def now(self) -> InForce:
        """Return what its attributes say."""
        active = self.wrapper._active_adapter
        names = (active,) if isinstance(active, str) else tuple(active)
        return InForce(() if self.wrapper._disable_adapters else names)

    def holds(self, name: str) -> bool:
        """Tell that any name may be chosen: PEFT runs the original where it has no copy."""
        return True

    def parts_of(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Yield the parameters of adapters' copies."""
        for name, parameter in self.wrapper.named_parameters():
            if any(f".{adapter}." in name for adapter in names):
                yield parameter


def choosing_layers(model: nn.Module) -> Iterator[Layer]:
    """Yield everything in a model that chooses between adapters."""
    for module in model.modules():
        if isinstance(module, (MaskedWeight, TaskTensors)):
            yield module
        elif isinstance(module, AuxiliaryTrainingWrapper):
            yield WholeModule(module)


def check_whole_modules(
    model: nn.Module, plan: Plan, config: PemnConfig, saves_whole: Callable[[str], bool]
) -> None:
    """Refuse an adapter that masks what another one of the model saves whole, or the reverse.

    PEFT keeps a whole copy of the module for each adapter that saves it, so the masks of one would
    be part of the other's copy, and neither file could be written or read.

    Raises:
        AdapterError: If there is such a module.
    """
    parts = [item.path for item in (*plan.targets, *plan.owned)]
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            held = [part for part in parts if f"{part}.".startswith(f"{path}.")]
            if held:
                others = ", ".join(map(repr, sorted(module._adapters)))
                _refuse_shared(config, path, f"masked or trained by the new one, whole by {others}")
        elif isinstance(module, (MaskedWeight, TaskTensors)) and saves_whole(path):
            _refuse_shared(
                config, path.rpartition(".")[0], "whole by the new one, masked by others"
            )


def _refuse_shared(config: PemnConfig, path: str, how: str) -> NoReturn:
    message = (
        f"All adapters of one model must agree on the modules that are trained and saved whole: "
        f"{path!r} would be {how} (the new adapter has modules_to_save={config.modules_to_save}). "
        "Give them the same modules_to_save, leave the module out with exclude_modules, or load "
        "the adapter onto a model of its own. Nothing was changed."
    )
    raise AdapterError(message)


def answering(answer: Callable[[tuple[str, ...]], Any]) -> Callable[[property], property]:
    """Let a property of PEFT's wrappers answer from the names in force in the call that runs."""

    def wrap(theirs: property) -> property:
        plain = cast("Callable[[Any], Any]", theirs.fget)

        def get(self: AuxiliaryTrainingWrapper) -> Any:
            if torch.compiler.is_compiling() and not in_force.follows_compiled():
                return plain(self)
            if in_force.current() is None:
                return plain(self)
            return answer(in_force.read(WholeModule(self)).names)

        return property(get, doc=theirs.__doc__)

    return wrap


def one_or_list(names: tuple[str, ...]) -> str | list[str]:
    """Return adapters' names as PEFT's ``active_adapter`` does."""
    return names[0] if len(names) == 1 else list(names)


def outputs_of(layer: nn.Module) -> str:
    """Return the attribute that says how many outputs a layer has; "" if nothing may change it.

    The first dimension of such a layer's tensors is the outputs.
    """
    if isinstance(layer, nn.Linear):
        return "out_features"
    is_convolution = isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return "out_channels" if is_convolution and layer.groups == 1 else ""


def take_sizes(model: nn.Module, adapter_name: str, shapes: Mapping[str, Shape]) -> None:
    """Give an adapter's copies of whole modules the numbers of outputs that its file has.

    The shapes are of the file's tensors by key, with or without the adapter's name.
    """
    given = {_name_in_base(key, adapter_name): shape for key, shape in shapes.items()}
    for path, wrapper in model.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
            for below, layer in wrapper.modules_to_save[adapter_name].named_modules():
                name = _name_in_base(f"{path}.{below}".strip("."), adapter_name)
                _take_size(layer, name, given)


def _take_size(layer: nn.Module, name: str, shapes: Mapping[str, Shape]) -> None:
    attribute = outputs_of(layer)
    for parameter, held in list(layer._parameters.items()):
        shape = shapes.get(f"{name}.{parameter}")
        if attribute and held is not None and shape is not None and is_resized(shape, held.shape):
            empty = held.detach().new_empty(shape)
            new = nn.Parameter(empty, requires_grad=held.requires_grad)
            layer._parameters[parameter] = new
            setattr(cast("Any", layer), attribute, shape[0])


@contextmanager
def told_sizes(model: nn.Module) -> Iterator[None]:
    """Let a model say how many classes it has when a task's head takes the place of its own.

    transformers and timm note the number beside the head, and transformers saves it.
    """
    sizes = dict(size for module in model.modules() for size in _changes(module))
    yield
    for module in model.modules() if sizes else ():
        for name in ("num_labels", "num_classes"):
            if module.__dict__.get(name) in sizes:
                setattr(cast("Any", module), name, sizes[module.__dict__[name]])
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig) and config.num_labels in sizes:
            config.num_labels = sizes[config.num_labels]


def _changes(module: nn.Module) -> Iterator[tuple[int, int]]:
    """Yield the base's and the active task's number of outputs where these differ."""
    if not isinstance(module, ModulesToSaveWrapper) or not module.active_adapters:
        return
    copies = module.modules_to_save._modules.get(module.active_adapters[0])
    if copies is None:  # an adapter without a copy
        return
    for own, of_task in zip(module.original_module.modules(), copies.modules(), strict=True):
        name = outputs_of(own)
        if name and getattr(own, name) != getattr(of_task, name):
            yield getattr(own, name), getattr(of_task, name)


def is_resized(given: Shape, held: Shape) -> bool:
    """Tell whether two shapes differ in the number of outputs alone."""
    return given != tuple(held) and len(given) == len(held) > 0 and given[1:] == tuple(held[1:])


def _name_in_base(key: str, adapter_name: str) -> str:
    name = key.removeprefix(KEY_PREFIX)
    return f"{name}.".replace(f".modules_to_save.{adapter_name}.", ".").removesuffix(".")


def new_layers(
    model: nn.Module, config: PemnConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of layers that took the place of an adapter's, and note them as whole.

    The configuration gets new layers into its ``modules_to_save``.

    Raises:
        AdapterError: If something else than a layer has taken the place of what the task owned, or
            the bank would be another one without the layer.
    """
    layers = list(masked_layers(model, adapter_name).values())
    parts = layers[0].mask_of(adapter_name).parts if layers else None
    if parts is None:
        return {}
    modules = {path_in_base(path): (path, module) for path, module in model.named_modules()}
    masked = [name for name in parts.masked if name not in {layer.target for layer in layers}]
    paths = {name.rpartition(".")[0] for name in masked} | _no_longer_whole(modules, parts)
    lost = [n for n in parts.owned if n not in _owned(model, adapter_name)]
    lost = [name for name in lost if name.rpartition(".")[0] not in paths]
    present = {path for path in paths if path in modules and modules[path][1].state_dict()}
    _warn_of_gone(adapter_name, paths - present)
    _refuse_lost(adapter_name, lost, modules)
    if not present:
        return {}
    _check_same_bank(layers, present)
    known = config.modules_to_save or []
    config.save_whole([path for path in sorted(present) if path not in known])
    new = [modules[path] for path in sorted(present)]
    keys = [full_name(path, name) for path, module in new for name in module.state_dict()]
    return {key: state_dict[key] for key in keys}


def _no_longer_whole(modules: Mapping[str, tuple[str, nn.Module]], parts: Parts) -> set[str]:
    wrapped = [p for p, (_, module) in modules.items() if isinstance(module, ModulesToSaveWrapper)]
    return {
        path
        for path in parts.whole
        if not any(path == whole or path.startswith(f"{whole}.") for whole in wrapped)
    }


def _owned(model: nn.Module, adapter_name: str) -> set[str]:
    """Return the names of the tensors that a task has its own copy of."""
    found = set()
    for module in model.modules():
        if isinstance(module, TaskTensors) and adapter_name in module.pemn_tensors:
            held = cast("nn.Module", module.pemn_tensors[adapter_name])
            names = [*held._parameters, *held._buffers]
            found |= {full_name(module.target, name) for name in names}
    return found


def path_in_base(path: str) -> str:
    """Return what the base calls a module of a model with adapters, whatever is wrapped around."""
    path = f"{path}."
    for wrapper in WRAPPED:
        path = path.replace(wrapper, "")
    return path.removeprefix(KEY_PREFIX).removesuffix(".")


def _warn_of_gone(adapter_name: str, gone: Collection[str]) -> None:
    if gone:
        warnings.warn(
            f"{', '.join(sorted(gone))} of adapter {adapter_name!r} is gone from the model, and "
            "what was trained there is in no file: this one fits a model without it.",
            PemnWarning,
            stacklevel=2,
        )


def _refuse_lost(
    adapter_name: str, lost: list[str], modules: Mapping[str, tuple[str, nn.Module]]
) -> None:
    if not lost:
        return
    path = lost[0].rpartition(".")[0]
    now = f"a {type(modules[path][1]).__name__}" if path in modules else "gone"
    message = (
        f"{len(lost)} tensors of adapter {adapter_name!r} are no longer in the model (first: "
        f"{lost[0]!r}, whose module is {now} now): it was replaced after masks were put on the "
        'model. Replace modules before, and freeze norms by PemnConfig(rest="freeze"). Nothing was '
        "saved; torch.save(model.state_dict(), ...) keeps everything that was trained."
    )
    raise AdapterError(message)


def _check_same_bank(layers: list[PemnLayer], paths: Collection[str]) -> None:
    """Refuse where the bank of the weights that are left is another one."""
    bank = layers[0].bank
    if bank is None:
        return
    weights = [(layer.target, tuple(layer.shape), layer.fan) for layer in layers]
    if banks.lay_out(layers[0].spec, weights) != bank.layout:
        message = (
            f"{', '.join(sorted(paths))} was replaced after masks were put on the model, and "
            "without it the seed draws another bank for the other weights. Nothing was saved: "
            "merge (model.merge_and_unload()), or replace the layer before masks are put on."
        )
        raise AdapterError(message)
