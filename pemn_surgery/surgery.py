"""The only file that changes a model's modules.

A layer keeps being the same object: its class becomes a subclass of its own class with a property
in place of each tensor that adapters decide. Why not a wrapper, a parametrization or a replaced
layer: people read ``layer.weight``, subclass ``forward``, keep modules in plain lists, test
``isinstance``, name state-dict keys. A property on the class serves all of them, and base
state-dict keys stay what they were (``docs/mechanism.md`` compares the four ways).

What the class swap needs to be safe:

* a class property wins over ``nn.Module``'s lookup in ``_parameters``, so the frozen tensor stays
  registered under its own name;
* the subclass carries the original's ``__name__`` and ``__module__``: wrapping policies, "no split"
  lists and torch.fx's leaf test match by them;
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
from torch.fx import GraphModule, Node
from torch.fx.graph_module import reduce_graph_module

from pemn_surgery import graph_modules
from pemn_surgery.masked import MaskedWeight, masked_child_name
from pemn_surgery.task import TASK_CHILD, TaskTensors

_SHARED = "_pemn_shared"


def find_masked(module: nn.Module, parameter: str) -> MaskedWeight | None:
    """Return what makes this parameter's effective weight, or None where nothing does."""
    child = module._modules.get(masked_child_name(parameter))
    if child is None:
        child = module.__dict__.get(_SHARED, {}).get(parameter)
    return child if isinstance(child, MaskedWeight) else None


def find_task(module: nn.Module) -> TaskTensors | None:
    """Return the child that owns tensors of this module for tasks, or None."""
    child = module._modules.get(TASK_CHILD)
    return child if isinstance(child, TaskTensors) else None


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that the module had before its first swap."""
    return getattr(type(module), "_pemn_original", type(module))


def mask_parameter(child: MaskedWeight) -> None:
    """Put a property in place of a parameter.

    With a bank the layer's own weight is dropped, so that its memory is freed.

    Args:
        child: Makes the effective weight; knows its layer and the parameter's name.
    """
    layer, parameter = child.owner, child.parameter
    layer.add_module(masked_child_name(parameter), child)
    if child.bank is not None:
        layer._parameters[parameter] = None
    _swap(layer, masks=(parameter,))


def untie_parameter(child: MaskedWeight) -> None:
    """Give a layer its own copy of a parameter that it shares with a module that stays.

    Args:
        child: Will make the effective weight; remembers the shared parameter for `unload`.
    """
    shared = cast("nn.Parameter", child.owner._parameters[child.parameter])
    child.untied.append(shared)
    if child.bank is None:
        copied = nn.Parameter(shared.detach().clone(), requires_grad=False)
        child.owner._parameters[child.parameter] = copied


def share_mask(module: nn.Module, parameter: str, child: MaskedWeight) -> None:
    """Let a second module whose weight is tied read the first one's effective weight.

    Args:
        module: The second module.
        parameter: Name of the tied parameter on it.
        child: What makes the first module's effective weight.
    """
    module.__dict__.setdefault(_SHARED, {})[parameter] = child
    child.shared_with.append((module, parameter))
    if child.bank is not None:
        module._parameters[parameter] = None
    _swap(module, masks=(parameter,))


def own_tensors(child: TaskTensors, names: tuple[str, ...]) -> None:
    """Put properties in place of tensors that tasks own.

    Args:
        child: Holds the tasks' copies; knows the module.
        names: Names of the module's parameters and buffers.
    """
    child.owner.add_module(TASK_CHILD, child)
    _swap(child.owner, tensors=names)


def share_tensor(module: nn.Module, name: str, child: TaskTensors, source: str) -> None:
    """Let a second module that is tied to an owned tensor read the owner's copy.

    Args:
        module: The second module.
        name: Name of the tensor on it.
        child: Holds the tasks' copies.
        source: Name of the tensor on the owner.
    """
    shared = module.__dict__.setdefault(_SHARED, {})
    if name not in shared:
        shared[name] = (child, source)
        child.shared_with.append((module, name))
        _swap(module, tensors=(name,))


def restore_parameter(child: MaskedWeight, weight: Tensor | None) -> None:
    """Take the property away again and leave a plain parameter.

    Args:
        child: What made the effective weight.
        weight: Values that the layer shall have; None leaves its own weight as it is.
    """
    layer, parameter = child.owner, child.parameter
    own = layer._parameters.get(parameter)
    if weight is None and child.untied:
        own = child.untied[0]
    elif own is None:
        values = weight if weight is not None else child.fill().clone()
        own = nn.Parameter(values.contiguous(), requires_grad=False)
    elif weight is not None:
        own.data = weight
    layer._parameters[parameter] = own
    del layer._modules[masked_child_name(parameter)]
    _unswap(layer, (parameter,))
    for module, name in child.shared_with:
        module._parameters[name] = own
        _release(module, name)


def restore_tensors(child: TaskTensors, *, keep_active: bool) -> None:
    """Take the properties of owned tensors away again.

    Args:
        child: Holds the tasks' copies.
        keep_active: Whether the active adapter's values become the module's own.
    """
    module = child.owner
    names = cast("tuple[str, ...]", getattr(type(module), "_pemn_tensors", ()))
    for name in names:
        value = child.active_tensor(name) if keep_active else None
        base = child.base(name)
        if value is not None and base is not None:
            base.data = value.detach().to(base.dtype).clone()
    del module._modules[TASK_CHILD]
    _unswap(module, names)
    for second, name in child.shared_with:
        _release(second, name)


def rewrite_graphs(model: nn.Module) -> None:
    """Let every graph call what makes a tensor where it reads the tensor.

    The graph then says itself that a weight is computed. Reading through the property would give
    the same values, but pickle traces a graph module's code anew, and a property's value would be
    frozen into the new graph as a constant.

    Args:
        model: A model whose masks and task tensors are in place.
    """
    for module in graph_modules.graph_modules(model):
        paths = {id(child): path for path, child in module.named_modules()}
        for node in list(module.graph.find_nodes(op="get_attr")):
            path, _, name = node.target.rpartition(".")
            owner = graph_modules.module_at(module, path)
            child = None if owner is None else _maker(owner, name)
            if child is not None and id(child) in paths:
                node.meta[graph_modules.READ] = node.target
                node.op, node.target = "call_module", paths[id(child)]
                if isinstance(child, TaskTensors):
                    node.args = (name,)
        module.recompile()


def graph_reads(model: nn.Module) -> list[tuple[Node, str]]:
    """Return the nodes that `rewrite_graphs` has changed, and what each read before.

    Args:
        model: A model whose graphs may have been rewritten.
    """
    return [
        (node, name)
        for module in graph_modules.graph_modules(model)
        for node, name in graph_modules.reads(module)
        if node.op == "call_module"
    ]


def restore_graphs(reads: list[tuple[Node, str]]) -> None:
    """Let graphs read again what they read before.

    Args:
        reads: What `graph_reads` returned before the children were taken away.
    """
    for node, name in reads:
        node.meta.pop(graph_modules.READ, None)
        node.op, node.target, node.args = "get_attr", name, ()
    for module in {node.graph.owning_module for node, _ in reads}:
        cast("GraphModule", module).recompile()


def _maker(owner: nn.Module, name: str) -> MaskedWeight | TaskTensors | None:
    """Return the child that makes a module's tensor, or None where it is a plain one."""
    masked = find_masked(owner, name)
    if masked is not None:
        return masked
    shared, source = owner.__dict__.get(_SHARED, {}).get(name, (None, name))
    owned = name in getattr(type(owner), "_pemn_tensors", ())
    if shared is not None:
        return shared if source == name else None  # a node's argument is the name that it reads
    return find_task(owner) if owned else None


def _release(module: nn.Module, name: str) -> None:
    """Let a tied second module read its own, equal, tensor again."""
    shared = module.__dict__[_SHARED]
    del shared[name]
    if not shared:
        del module.__dict__[_SHARED]
    _unswap(module, (name,))


def _swap(module: nn.Module, masks: tuple[str, ...] = (), tensors: tuple[str, ...] = ()) -> None:
    """Change the module's class; names that it already has are kept."""
    held = type(module)
    all_masks = dict.fromkeys((*getattr(held, "_pemn_masks", ()), *masks))
    all_tensors = dict.fromkeys((*getattr(held, "_pemn_tensors", ()), *tensors))
    _set_class(module, tuple(all_masks), tuple(all_tensors))


def _unswap(module: nn.Module, names: tuple[str, ...]) -> None:
    """Take names away from the module's class; without any it is the original class again."""
    held = type(module)
    masks = tuple(name for name in getattr(held, "_pemn_masks", ()) if name not in names)
    tensors = tuple(name for name in getattr(held, "_pemn_tensors", ()) if name not in names)
    has_task = TASK_CHILD in module._modules
    if masks or tensors or has_task:
        _set_class(module, masks, tensors)
    else:
        module.__class__ = original_class(module)
        _recompile(module)


def _recompile(module: nn.Module) -> None:
    """Put a graph's code on the class that its graph module has now."""
    if isinstance(module, GraphModule):
        module.recompile()


def _set_class(module: nn.Module, masks: tuple[str, ...], tensors: tuple[str, ...]) -> None:
    original = original_class(module)
    make = _graph_class if issubclass(original, GraphModule) else swapped_class
    module.__class__ = make(original, masks, tensors)
    _recompile(module)


@functools.cache
def swapped_class(
    original: type[nn.Module], masks: tuple[str, ...], tensors: tuple[str, ...]
) -> type[nn.Module]:
    """Return the subclass of a module's class with properties in place of some tensors.

    Args:
        original: The module's own class.
        masks: Parameters whose effective weight a `MaskedWeight` child makes.
        tensors: Parameters and buffers that a `TaskTensors` child chooses.
    """

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        state = original.__getstate__(self) if hasattr(original, "__getstate__") else self.__dict__
        return _rebuild, (original, masks, tensors), state

    namespace: dict[str, Any] = {
        "_pemn_original": original,
        "_pemn_masks": masks,
        "_pemn_tensors": tensors,
        "__reduce_ex__": reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    for name in masks:
        namespace[name] = _property(name, _masked_getter(name))
    for name in tensors:
        namespace[name] = _property(name, _tensor_getter(name))
    if issubclass(original, nn.RNNBase):
        namespace["_flat_weights"] = _property("_flat_weights", _read_flat_weights)
    swapped = cast("type[nn.Module]", type(original.__name__, (original,), namespace))
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
        return _dress(twin, masks, tensors, copy.deepcopy(self.__dict__.get(_SHARED), memo))

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
    _dress(module, masks, tensors, body.get(_SHARED))


def _dress(
    twin: nn.Module, masks: tuple[str, ...], tensors: tuple[str, ...], shared: Any
) -> nn.Module:
    """Give a copy of a graph module what torch leaves out of copies."""
    if shared is not None:
        twin.__dict__[_SHARED] = shared
    for name in masks:
        twin._parameters.setdefault(name, None)
    _set_class(twin, masks, tensors)
    return twin


def _rebuild(
    original: type[nn.Module], masks: tuple[str, ...], tensors: tuple[str, ...]
) -> nn.Module:
    """Make an empty instance, for pickle and deepcopy."""
    swapped = swapped_class(original, masks, tensors)
    return swapped.__new__(swapped)


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
            child = cast("MaskedWeight", self.__dict__[_SHARED][name])
        if not torch.compiler.is_compiling() and _called_by_fsdp():
            return child.own_weight()
        return child.read()

    return getter


def _tensor_getter(name: str) -> Callable[[nn.Module], Tensor | None]:
    def getter(self: nn.Module) -> Tensor | None:
        child, source = cast("TaskTensors | None", self._modules.get(TASK_CHILD)), name
        if child is None or name in self.__dict__.get(_SHARED, {}):
            child, source = cast("tuple[TaskTensors, str]", self.__dict__[_SHARED][name])
        if not torch.compiler.is_compiling() and _called_by_fsdp():
            return child.base(source)
        return child.read(source)

    return getter


def _read_flat_weights(self: nn.Module) -> Any:
    """Return a recurrent layer's weights as they are in force; torch keeps a list of raw ones."""
    return [getattr(self, name) for name in cast("Any", self)._flat_weights_names]


def _called_by_fsdp() -> bool:
    """Tell whether FSDP reads the attribute: two frames up, behind the getter."""
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return caller.startswith("torch.distributed.fsdp")


def _follow_task(swapped: type[nn.Module], original: type[nn.Module]) -> None:
    """Let assigned statistics reach the active task, and let a task hold its norms in eval mode."""

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        child = self.__dict__.get("_modules", {}).get(TASK_CHILD)
        is_buffer = name in self.__dict__.get("_buffers", {})
        if child is None or not is_buffer or not child.write(name, value):
            original.__setattr__(self, name, value)

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        child = find_task(self)
        return original.train(self, mode and not (child is not None and child.keeps_eval()))

    type.__setattr__(swapped, "__setattr__", set_attribute)
    type.__setattr__(swapped, "train", train)
