"""The subclasses that surgery gives to modules: properties in place of some tensors.

What the class swap needs to be safe:

* a class property wins over ``nn.Module``'s lookup in ``_parameters``, so the frozen tensor stays
  registered under its own name;
* the subclass carries the original's ``__name__`` and ``__module__``: wrapping policies, "no split"
  lists and torch.fx's leaf test match by them;
* classes that watch their subclasses (``__init_subclass__``, a metaclass) do not hear of it;
* pickle and deepcopy rebuild the subclass from the original class (``__reduce_ex__``);
* FSDP re-reads parameters with ``getattr`` and must get the raw tensor, and registers plain tensors
  with ``setattr``, hence the setter and the deleter.
"""

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.graph_module import reduce_graph_module

from pemn_surgery.masks import places
from pemn_surgery.masks.attached import (
    find_masked,
    find_owned,
    find_task,
    names_masked,
    names_owned,
)
from pemn_surgery.masks.kept import one_forward
from pemn_surgery.masks.masked_weight import MaskedWeight, masked_child_name
from pemn_surgery.masks.places import FSDP, SHARED_MASKS, SHARED_TENSORS
from pemn_surgery.masks.task_tensors import TASK_CHILD, TaskTensors
from pemn_surgery.surgery import layer_groups
from pemn_surgery.surgery.refusals import refuse_replacing, refusing_methods
from pemn_surgery.surgery.tying import tying_methods
from pemn_surgery.surgery.unwatched import unwatched_subclass
from pemn_surgery.surgery.writing import Makers, writing_methods

# Reads a layer's weight to get it as it is stored.
_BITSANDBYTES = "bitsandbytes."

# What PEFT's own layers answer about their adapters, and people ask the layer for.
_ASKED_OF_LAYERS = ("active_adapters", "adapter_layer_names", "other_param_names", "pemn_masks")


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that the module had before its first swap."""
    return getattr(type(module), "_pemn_original", type(module))


def swap(module: nn.Module, masks: tuple[str, ...] = (), tensors: tuple[str, ...] = ()) -> None:
    """Put properties in place of tensors; those that the module already has are kept.

    Args:
        module: Any module.
        masks: Parameters whose effective weight a `MaskedWeight` child makes.
        tensors: Parameters and buffers that a `TaskTensors` child chooses.
    """
    all_masks = dict.fromkeys((*names_masked(module), *masks))
    all_tensors = dict.fromkeys((*names_owned(module), *tensors))
    _set_class(module, tuple(all_masks), tuple(all_tensors))


def mark_forward(model: nn.Module) -> None:
    """Let a call of a model be one forward, in which every weight is made once (`kept`).

    PEFT's model calls past it and says so itself. A graph module makes a weight where its graph
    reads it, and is left alone.

    Args:
        model: A model with masks.
    """
    if not isinstance(model, GraphModule):
        _set_class(model, names_masked(model), names_owned(model), marked=True)


def unmark_forward(model: nn.Module) -> None:
    """Take the mark of `mark_forward` away again.

    Args:
        model: A model that may have it.
    """
    if _is_marked(model):
        masks, tensors = names_masked(model), names_owned(model)
        if masks or tensors or find_task(model) is not None:
            _set_class(model, masks, tensors, marked=False)
        else:
            _change_class(model, original_class(model))


def _is_marked(module: nn.Module) -> bool:
    return getattr(type(module), "_pemn_marked", False)


def unswap(module: nn.Module, names: tuple[str, ...]) -> None:
    """Take properties away again; without any the module has its original class.

    Args:
        module: A module that was swapped.
        names: Tensors that are plain again.
    """
    masks = tuple(name for name in names_masked(module) if name not in names)
    tensors = tuple(name for name in names_owned(module) if name not in names)
    has_task = TASK_CHILD in module._modules
    if masks or tensors or has_task or _is_marked(module):
        _set_class(module, masks, tensors)
    else:
        _change_class(module, original_class(module))


def _recompile(module: nn.Module) -> None:
    """Put a graph's code on the class that its graph module has now."""
    if isinstance(module, GraphModule):
        module.recompile()


def _set_class(
    module: nn.Module,
    masks: tuple[str, ...],
    tensors: tuple[str, ...],
    marked: bool | None = None,
) -> None:
    original = original_class(module)
    if issubclass(original, GraphModule):
        wanted = _graph_class(original, masks, tensors)
    else:
        kept = _is_marked(module) if marked is None else marked
        wanted = swapped_class(original, masks, tensors, kept)
    _change_class(module, wanted)


def _change_class(module: nn.Module, wanted: type[nn.Module]) -> None:
    before = type(module)
    object.__setattr__(module, "__class__", wanted)  # past a layer's own __setattr__
    _rebind(module, before)
    _recompile(module)


@functools.cache
def swapped_class(
    original: type[nn.Module],
    masks: tuple[str, ...],
    tensors: tuple[str, ...],
    marked: bool = False,
) -> type[nn.Module]:
    """Return the subclass of a module's class with properties in place of some tensors.

    Args:
        original: The module's own class.
        masks: Parameters whose effective weight a `MaskedWeight` child makes.
        tensors: Parameters and buffers that a `TaskTensors` child chooses.
        marked: Whether a call of it is one forward of the model.
    """

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        state = original.__getstate__(self) if hasattr(original, "__getstate__") else self.__dict__
        return _rebuild, (original, masks, tensors, marked), state

    namespace: dict[str, Any] = {
        "_pemn_original": original,
        "_pemn_masks": masks,
        "_pemn_tensors": tensors,
        "_pemn_marked": marked,
        "__reduce_ex__": reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        **refusing_methods(original, {*masks, *tensors}, FSDP),
        **writing_methods(original, {*masks, *tensors}, _makers),
    }
    for name in masks:
        namespace[name] = _property(name, _masked_getter(name))
    for name in _ASKED_OF_LAYERS if masks else ():
        if not hasattr(original, name):  # transformers' models have an active_adapters of their own
            namespace[name] = property(_answer_getter(masks[0], name))
    for name in tensors:
        namespace[name] = _property(name, _tensor_getter(name))
    if "weight" in masks and _reads_packed(original):
        namespace["forward"] = _dense_forward(original)
    if marked:
        namespace["__call__"] = _one_forward(original)
        namespace.update(tying_methods(original))
    if issubclass(original, nn.RNNBase):
        namespace["_flat_weights"] = _property("_flat_weights", _read_flat_weights)
    for question in layer_groups.QUESTIONS:
        if hasattr(original, question):
            namespace[question] = layer_groups.method(original, question)
    swapped = unwatched_subclass(original, namespace)
    if tensors or not masks:
        _follow_task(swapped, original)
    return swapped


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


def _rebuild(
    original: type[nn.Module],
    masks: tuple[str, ...],
    tensors: tuple[str, ...],
    marked: bool,
) -> nn.Module:
    """Make an empty instance, for pickle and deepcopy."""
    swapped = swapped_class(original, masks, tensors, marked)
    return swapped.__new__(swapped)


def _one_forward(original: type[nn.Module]) -> Callable[..., Any]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original.__call__(self, *args, **kwargs)
        with one_forward():
            return original.__call__(self, *args, **kwargs)

    return call


def _property(name: str, getter: Callable[[nn.Module], Any]) -> property:
    def setter(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value  # only FSDP1 comes here, with a plain tensor

    def deleter(self: nn.Module) -> None:
        self.__dict__.pop(name, None)

    return property(getter, setter, deleter)


def _masked_getter(name: str) -> Callable[[nn.Module], Tensor | None]:
    child_name = masked_child_name(name)

    def getter(self: nn.Module) -> Tensor | None:
        child = cast("MaskedWeight | None", self._modules.get(child_name))
        if child is None:
            child = cast("MaskedWeight", self.__dict__[SHARED_MASKS][name])
        if not torch.compiler.is_compiling():
            reader = _reader()
            if reader.startswith((FSDP, _BITSANDBYTES)):
                return places.stored(self, name)
            refuse_replacing(self, name, reader)
        return _here(self, child.owner, child.read())

    return getter


def _answer_getter(parameter: str, name: str) -> Callable[[nn.Module], Any]:
    return lambda self: getattr(find_masked(self, parameter), name)


def _tensor_getter(name: str) -> Callable[[nn.Module], Tensor | None]:
    def getter(self: nn.Module) -> Tensor | None:
        shared = self.__dict__.get(SHARED_TENSORS, {})
        own = cast("TaskTensors", self._modules.get(TASK_CHILD))
        child, source = shared.get(name, (own, name))
        if not torch.compiler.is_compiling():
            reader = _reader()
            if reader.startswith(FSDP):
                return places.stored(self, name)
            refuse_replacing(self, name, reader)
        return _here(self, child.owner, child.read(source))

    return getter


def _here(module: nn.Module, owner: nn.Module, tensor: Tensor | None) -> Tensor | None:
    """Return a tied tensor of another module, on this replica's device where this is a replica.

    Torch makes replicas of modules and not of what ties them, so that is the first model's own.
    """
    if tensor is None or owner is module or not module.__dict__.get("_is_replica"):
        return tensor
    return tensor.to(torch.cuda.current_device()) if tensor.is_cuda else tensor


def _read_flat_weights(self: nn.Module) -> Any:
    """Return a recurrent layer's weights as they are in force; torch keeps a list of raw ones.

    A replica has none yet when torch copies the list.
    """
    return [getattr(self, name, None) for name in cast("Any", self)._flat_weights_names]


def _reads_packed(original: type[nn.Module]) -> bool:
    """Tell whether a layer's own forward reads packed numbers: bitsandbytes, without import."""
    is_theirs = any(base.__module__.startswith(_BITSANDBYTES) for base in original.__mro__)
    return is_theirs and issubclass(original, nn.Linear)


def _dense_forward(original: type[nn.Module]) -> Callable[..., Tensor]:
    """Return a forward that computes with the dequantised, masked weight.

    It casts as bitsandbytes does; while nothing applies it is the original one.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        child = find_masked(self, "weight")
        if child is None or child.is_bare():
            return original.forward(self, x)
        dtype = getattr(self, "compute_dtype", None) or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(x.to(dtype), self.weight.to(dtype), bias).to(x.dtype)

    return forward


def _rebind(module: nn.Module, before: type[nn.Module]) -> None:
    """Let accelerate's hook, which holds the former class's forward, call the present one."""
    held = module.__dict__.get("_old_forward")
    if getattr(held, "__func__", None) is before.forward:
        module.__dict__["_old_forward"] = type(module).forward.__get__(module)


def _reader() -> str:
    """Return the Python module that reads the attribute: two frames up, behind the getter.

    FSDP shards what is stored; bitsandbytes saves and loads it.
    """
    return sys._getframe(2).f_globals.get("__name__", "")


def _follow_task(swapped: type[nn.Module], original: type[nn.Module]) -> None:
    """Let a task hold its norms in eval mode."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        child = find_task(self)
        return original.train(self, mode and not (child is not None and child.keeps_eval()))

    type.__setattr__(swapped, "train", train)


def _makers(module: nn.Module, name: str) -> Makers:
    return Makers(find_masked(module, name), find_owned(module, name))
