"""The modules of a model, and what a tensor is to the one that holds it: a table, a norm's gain."""

from collections.abc import Iterator

from torch import nn
from torch.jit import ScriptModule

from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.masks.task_tensors import TaskTensors
from pemn_surgery.models.graph_modules import GraphUse

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
                yield from walk(full_name(path, name), child)

    return walk("", model)


def full_name(path: str, name: str) -> str:
    """Return the name in the whole model of what the module at a path calls by a name."""
    return f"{path}.{name}" if path else name


def is_saved_by_peft(module: nn.Module) -> bool:
    """Tell whether a module is PEFT's wrapper around one that adapters save whole."""
    return any(base.__name__ == "AuxiliaryTrainingWrapper" for base in type(module).__mro__)


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module normalises activations: by its class's name or running statistics."""
    return "norm" in type(module).__name__.lower() or "running_mean" in module._buffers


def is_embedding(module: nn.Module, parameter: str, use: GraphUse) -> bool:
    """Tell whether a parameter is looked up by rows: by its module's class, or by its graph."""
    return use.is_embedding or (parameter == "weight" and is_table(module))


def is_table(module: nn.Module) -> bool:
    """Tell whether a module looks rows up, by its class."""
    return isinstance(module, TABLES) or "Embedding" in type(module).__name__


def is_container(module: nn.Module) -> bool:
    """Tell whether a module only holds tensors, as all those of an exported graph do."""
    return type(module).forward is nn.Module.forward
