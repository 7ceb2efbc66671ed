"""Modules that took the place of others after masks were put on a model, when it is saved.

``model.reset_classifier(5)``, ``model.fc = nn.Linear(...)``, timm's ``freeze_batch_norm_2d``: the
module that an adapter had masked, or whose tensors were the task's, is gone from the model, and
with it what the adapter had there. A new layer is saved whole; of everything else a file would be
wrong, and is refused.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import cast

from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from pemn_surgery.adapters.base import WRAPPED, masked_layers
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.adapter_file import KEY_PREFIX
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.errors import AdapterError, PemnWarning
from pemn_surgery.masks.adapter_mask import Parts
from pemn_surgery.masks.task_tensors import TaskTensors
from pemn_surgery.numbers import bank as banks


def new_layers(
    model: nn.Module, config: PemnConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of layers that took the place of an adapter's, and note them as whole.

    Args:
        model: The model.
        config: The adapter's configuration; gets new layers into its ``modules_to_save``.
        adapter_name: The adapter.
        state_dict: The model's.

    Raises:
        AdapterError: If something else than a layer has taken the place of what the task owned, or
            the bank would be another one without the layer.
    """
    layers = list(masked_layers(model, adapter_name).values())
    parts = layers[0].mask_of(adapter_name).parts if layers else None
    if parts is None:
        return {}
    modules = {_plain(path): (path, module) for path, module in model.named_modules()}
    masked = [name for name in parts.masked if name not in {layer.target for layer in layers}]
    paths = {name.rpartition(".")[0] for name in masked} | _no_longer_whole(modules, parts)
    lost = [n for n in parts.owned if n not in _owned(model, adapter_name)]
    lost = [name for name in lost if name.rpartition(".")[0] not in paths]
    present = {path for path in paths if path in modules and _has_tensors(modules[path][1])}
    _warn_of_gone(adapter_name, paths - present)
    _refuse_lost(adapter_name, lost, modules)
    if not present:
        return {}
    _check_same_bank(layers, present)
    known = config.modules_to_save or []
    config.save_whole([path for path in sorted(present) if path not in known])
    return {
        key: state_dict[key]
        for path in sorted(present)
        for key in _keys(modules[path][0], modules[path][1])
    }


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
            found |= {f"{module.target}.{name}" if module.target else name for name in names}
    return found


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in _keys("", module))


def _keys(path: str, module: nn.Module) -> Iterator[str]:
    """Yield the keys of a plain module's parameters and persistent buffers."""
    for name in module.state_dict():
        yield f"{path}.{name}" if path else name


def _plain(path: str) -> str:
    """Return the path that a module has in the base."""
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
    """Refuse where the bank of the weights that are left is another one.

    Raises:
        AdapterError: If it is.
    """
    bank = layers[0].bank
    if bank is None:
        return
    weights = [(layer.target, tuple(layer.shape), layer.fan_in) for layer in layers]
    if banks.lay_out(layers[0].spec, weights) != bank.layout:
        message = (
            f"{', '.join(sorted(paths))} was replaced after masks were put on the model, and "
            "without it the seed draws another bank for the other weights. Nothing was saved: "
            "merge (model.merge_and_unload()), or replace the layer before masks are put on."
        )
        raise AdapterError(message)
