"""Heads of a task's own size: copies of whole modules take the number of outputs that a file has.

PEFT copies a module that is saved whole from the base, so that all tasks on one model would need
heads of one size. What comes out of a head is the task's alone: its layers may have any number of
outputs, while everything else has to be as in the base.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedConfig

from pemn_surgery.adapters.files.adapter_file import KEY_PREFIX

Shape = tuple[int, ...]


def outputs_of(layer: nn.Module) -> str:
    """Return the attribute that says how many outputs a layer has; "" if nothing may change it.

    Args:
        layer: Any module; of linear layers and convolutions the first dimension is the outputs.
    """
    if isinstance(layer, nn.Linear):
        return "out_features"
    is_convolution = isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return "out_channels" if is_convolution and layer.groups == 1 else ""


def take_sizes(model: nn.Module, adapter_name: str, shapes: Mapping[str, Shape]) -> None:
    """Give an adapter's copies of whole modules the numbers of outputs that its file has.

    Args:
        model: The model, with a copy of every such module.
        adapter_name: The adapter.
        shapes: Shapes of the file's tensors by key, with or without the adapter's name.
    """
    given = {_plain(key, adapter_name): shape for key, shape in shapes.items()}
    for path, wrapper in model.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
            for below, layer in wrapper.modules_to_save[adapter_name].named_modules():
                name = _plain(f"{path}.{below}" if below else path, adapter_name)
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

    Args:
        model: The model, from which PEFT takes its wrappers off meanwhile.
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
    """Tell whether two shapes differ in the number of outputs alone.

    Args:
        given: The one.
        held: The other.
    """
    return given != tuple(held) and len(given) == len(held) > 0 and given[1:] == tuple(held[1:])


def _plain(key: str, adapter_name: str) -> str:
    """Return the name that a tensor or module has in the base."""
    name = key.removeprefix(KEY_PREFIX)
    return f"{name}.".replace(f".modules_to_save.{adapter_name}.", ".").removesuffix(".")
