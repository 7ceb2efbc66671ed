"""Modules under a subclass of their own class, and back: the swap, for plain and graph modules.

`subclasses` makes the class; the object, its tensors and whoever holds it stay the same.
"""

import copy
from typing import Any, cast

from torch import nn
from torch.fx import GraphModule
from torch.fx.graph_module import reduce_graph_module

from pemn_surgery.masks.attached import find_task, names_masked, names_owned
from pemn_surgery.masks.places import SHARED_MASKS, SHARED_TENSORS
from pemn_surgery.surgery.subclasses import swapped_class


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that the module had before its first swap."""
    return getattr(type(module), "_pemn_original", type(module))


def swap(module: nn.Module, masks: tuple[str, ...] = (), tensors: tuple[str, ...] = ()) -> None:
    """Put properties in place of tensors; those that the module already has are kept."""
    all_masks = dict.fromkeys((*names_masked(module), *masks))
    all_tensors = dict.fromkeys((*names_owned(module), *tensors))
    _set_class(module, tuple(all_masks), tuple(all_tensors))


def unswap(module: nn.Module, names: tuple[str, ...]) -> None:
    """Take properties away again; without any the module has its original class."""
    masks = tuple(name for name in names_masked(module) if name not in names)
    tensors = tuple(name for name in names_owned(module) if name not in names)
    _set_class(module, masks, tensors)


def mark_forward(model: nn.Module) -> None:
    """Let a call of a model be one forward, in which every weight is made once (`kept`).

    PEFT's model calls past it and says so itself. A graph module makes a weight where its graph
    reads it, and is left alone.
    """
    if not isinstance(model, GraphModule):
        _set_class(model, names_masked(model), names_owned(model), marked=True)


def unmark_forward(model: nn.Module) -> None:
    """Take the mark of `mark_forward` away again."""
    if _is_marked(model):
        _set_class(model, names_masked(model), names_owned(model), marked=False)


def _is_marked(module: nn.Module) -> bool:
    return getattr(type(module), "_pemn_marked", False)


def _set_class(
    module: nn.Module,
    masks: tuple[str, ...],
    tensors: tuple[str, ...],
    marked: bool | None = None,
) -> None:
    """Swap a module's class for what it needs now: its original one where that is nothing."""
    before, original = type(module), original_class(module)
    marked = _is_marked(module) if marked is None else marked
    if not (masks or tensors or marked or find_task(module) is not None):
        wanted = original
    elif issubclass(original, GraphModule):
        wanted = _graph_class(original, masks, tensors)
    else:
        wanted = swapped_class(original, masks, tensors, marked)
    object.__setattr__(module, "__class__", wanted)  # past a layer's own __setattr__
    _rebind(module, before)
    if isinstance(module, GraphModule):
        module.recompile()  # puts the graph's code on the class


def _rebind(module: nn.Module, before: type[nn.Module]) -> None:
    """Let accelerate's hook, which holds the former class's forward, call the present one."""
    held = module.__dict__.get("_old_forward")
    if getattr(held, "__func__", None) is before.forward:
        module.__dict__["_old_forward"] = type(module).forward.__get__(module)


def _graph_class(
    original: type[nn.Module], masks: tuple[str, ...], tensors: tuple[str, ...]
) -> type[nn.Module]:
    """Return the class of a graph module with properties in place of its own tensors.

    Torch makes a class for each graph module and compiles the graph's code onto it. So does this:
    a kept class would be shared by graphs, and be kept for ever. It stands beside torch's class and
    not below it, because torch's ``__call__`` would find itself again there.
    """
    base = original.__mro__[1]
    swapped = cast("Any", swapped_class.__wrapped__(base, masks, tensors))
    swapped._pemn_original = original
    swapped.__name__, swapped.__qualname__ = original.__name__, original.__qualname__

    def deep_copy(self: Any, memo: dict[int, Any]) -> nn.Module:
        twin = base.__deepcopy__(self, memo)  # type: ignore[attr-defined]
        return _dress(twin, masks, tensors, copy.deepcopy(_shared(self.__dict__), memo))

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        _, (body, imports) = base.__reduce__(self)  # type: ignore[misc]
        # In two steps, as the children know their owner: torch's one step would never end.
        return _empty_graph, (base,), (body, imports, masks, tensors), None, None, _fill_graph

    swapped.__deepcopy__, swapped.__reduce_ex__ = deep_copy, reduce
    return swapped


def _empty_graph(base: type[nn.Module]) -> nn.Module:
    """Make an empty graph module, for pickle."""
    return base.__new__(base)


def _fill_graph(module: Any, state: tuple[Any, ...]) -> None:
    """Make a graph module of what `_graph_class` pickled."""
    body, imports, masks, tensors = state
    traced: Any = reduce_graph_module(body, imports)
    module.__dict__.update(traced.__dict__)
    module.graph = traced.graph
    _dress(module, masks, tensors, _shared(body))


def _shared(state: dict[str, Any]) -> dict[str, Any]:
    """Return what a module's state has of other modules' children."""
    return {key: state[key] for key in (SHARED_MASKS, SHARED_TENSORS) if key in state}


def _dress(
    twin: nn.Module, masks: tuple[str, ...], tensors: tuple[str, ...], shared: dict[str, Any]
) -> nn.Module:
    """Give a copy of a graph module what torch leaves out of copies."""
    twin.__dict__.update(shared)
    for name in masks:
        twin._parameters.setdefault(name, None)
    _set_class(twin, masks, tensors)
    return twin
