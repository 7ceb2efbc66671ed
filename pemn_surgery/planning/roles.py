"""What a tensor is to the module that holds it: a layer's weight, an embedding, a norm's gain."""

import math
from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from torch.jit import ScriptModule

from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.masks.sign_delta import Rows
from pemn_surgery.masks.task_tensors import TaskTensors
from pemn_surgery.models.graph_modules import GraphUse
from pemn_surgery.numbers.bank import Shape

# Layers that look rows up.
TABLES = (nn.Embedding, nn.EmbeddingBag)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the model's own modules with their paths, each once, without what was added.

    That is what surgery added, and PEFT's copies of modules that adapters save whole. Scripted ones
    (`scripted_modules`) are not among them: nothing of them can be changed.
    """
    for path, module in _modules(model):
        if not isinstance(module, ScriptModule):
            yield path, module


def scripted_modules(model: nn.Module) -> Iterator[tuple[str, ScriptModule]]:
    """Yield the outermost modules that ``torch.jit`` has made, with their paths."""
    for path, module in _modules(model):
        if isinstance(module, ScriptModule):
            yield path, module


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen or isinstance(module, (MaskedWeight, TaskTensors)):
            return
        seen.add(id(module))
        yield path, module
        for name, child in () if isinstance(module, ScriptModule) else module.named_children():
            if name == "original_module" or not is_saved_by_peft(module):
                yield from walk(f"{path}.{name}" if path else name, child)

    return walk("", model)


def is_saved_by_peft(module: nn.Module) -> bool:
    """Tell whether a module is PEFT's wrapper around one that adapters save whole."""
    return any(base.__name__ == "AuxiliaryTrainingWrapper" for base in type(module).__mro__)


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module normalises activations: by its class's name or running statistics."""
    return "norm" in type(module).__name__.lower() or "running_mean" in module._buffers


def is_weight(module: nn.Module, parameter: str) -> bool:
    """Tell whether a parameter is what a layer multiplies (or convolves) its input with."""
    if isinstance(module, nn.MultiheadAttention):  # its output projection is a Linear of its own
        return parameter.endswith("_proj_weight")
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return parameter.startswith("weight_")
    if "Experts" in type(module).__name__:  # (experts, out, in), or with out and in exchanged
        tensor = module._parameters.get(parameter)
        return tensor is not None and tensor.dim() == 3
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    return parameter == "weight" and (isinstance(module, layers) or _is_transposed_linear(module))


def is_embedding(module: nn.Module, parameter: str, use: GraphUse) -> bool:
    """Tell whether a parameter is looked up by rows: by its module's class, or by its graph."""
    return use.is_embedding or (parameter == "weight" and is_table(module))


def is_table(module: nn.Module) -> bool:
    """Tell whether a module looks rows up, by its class."""
    return isinstance(module, TABLES) or "Embedding" in type(module).__name__


def is_container(module: nn.Module) -> bool:
    """Tell whether a module only holds tensors, as all those of an exported graph do."""
    return type(module).forward is nn.Module.forward


def fan_in_of(module: nn.Module, shape: Shape) -> int:
    """Return how many inputs one output sums over.

    Args:
        module: The layer.
        shape: Shape of its weight: (out, in, ...) but for HF ``Conv1D``, which has (in, out), for
            experts, which have (experts, out, in) or, if ``module.is_transposed``, (experts, in,
            out), and for timm's ``CondConv2d``, which has (experts, everything else).
    """
    if _is_transposed_linear(module):
        return max(shape[0], 1)
    if type(module).__name__ == "CondConv2d":
        return max(math.prod(shape[1:]) // max(cast("Any", module).out_channels, 1), 1)
    if len(shape) == 3 and not isinstance(module, nn.modules.conv._ConvNd):
        return max(shape[1 if getattr(module, "is_transposed", False) else 2], 1)
    return max(math.prod(shape[1:]), 1)


def rows_of(module: nn.Module, shape: Shape) -> Rows:
    """Return where the outputs of a layer lie in its weight.

    Args:
        module: The layer.
        shape: Shape of its weight, as in `fan_in_of`; transposed convolutions have (in, out of one
            group, ...), their inputs group by group. Whatever is none of these has (out, ...).
    """
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return Rows(module.groups, shape[0] // module.groups, shape[1], math.prod(shape[2:]))
    if _is_transposed_linear(module):
        return Rows(1, shape[0], shape[1], 1)
    if type(module).__name__ == "CondConv2d":
        outputs = shape[0] * cast("Any", module).out_channels
        return Rows(1, 1, outputs, math.prod(shape) // outputs)
    if len(shape) == 3 and not isinstance(module, nn.modules.conv._ConvNd):
        experts, first, second = shape
        if getattr(module, "is_transposed", False):
            return Rows(experts, first, second, 1)
        return Rows(1, 1, experts * first, second)
    if len(shape) > 1:
        return Rows(1, 1, shape[0], math.prod(shape[1:]))
    return Rows(1, 1, 1, math.prod(shape))


def _is_transposed_linear(module: nn.Module) -> bool:
    """Tell whether a module is (a subclass of) transformers' ``Conv1D``, without importing it."""
    return any(
        base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils"
        for base in type(module).__mro__
    )
