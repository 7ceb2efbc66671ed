"""All or nothing: what a failed change leaves is what there was.

Surgery touches many modules, and a second library - PEFT, transformers - does so before and after
it. What can go wrong in between cannot be listed: memory, an interrupt, a layer's own code. So
nobody writes steps down to undo them; what could change is written down before the first step,
which costs references and no tensor: classes, attributes, the containers in them, and where each
parameter's values lie.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

_CONTAINERS = (dict, list, set, OrderedDict, defaultdict)


@contextmanager
def undone_on_error(*things: object, values: Iterable[Tensor] = ()) -> Iterator[None]:
    """Put things back as they were if anything is raised inside.

    Replaced weights stay in memory until the end: only then is it sure that nobody wants them back.

    Args:
        *things: Modules, each with all modules below it, and other objects with attributes.
        values: Tensors whose numbers are written to in place; a copy of them is held.
    """
    states = [_State(thing) for thing in _all_of(things)]
    copies = [(tensor, tensor.detach().clone()) for tensor in values]
    try:
        yield
    except BaseException:
        _put_back(states, copies)
        raise


def _put_back(states: list["_State"], copies: list[tuple[Tensor, Tensor]]) -> None:
    for state in states:
        state.restore()
    with torch.no_grad():
        for tensor, before in copies:
            tensor.copy_(before)
    for state in states:
        state.restore_graph()


def _all_of(things: Iterable[object]) -> list[object]:
    """Return the things and the modules below them, each once."""
    found: dict[int, object] = {}
    for thing in things:
        below = thing.modules() if isinstance(thing, nn.Module) else (thing,)
        found.update((id(item), item) for item in below)
    return list(found.values())


class _State:
    """What one object was: its class, its attributes, the containers and parameters in them.

    A model has thousands, each with a dozen containers, most of them empty. So this holds few
    objects of its own: many would set off a collection of all of Python's, which takes longer than
    a load.
    """

    __slots__ = ("attributes", "containers", "empty", "kind", "nodes", "parameters", "thing")

    def __init__(self, thing: Any) -> None:
        self.thing, self.kind = thing, type(thing)
        self.attributes = dict(thing.__dict__)
        held = [value for value in self.attributes.values() if type(value) in _CONTAINERS]
        self.containers = tuple((c, _content(c)) for c in held if c)
        self.empty = tuple(c for c in held if not c)
        own = self.attributes.get("_parameters", {}) if isinstance(thing, nn.Module) else {}
        self.parameters = tuple(_Parameter(p) for p in own.values() if p is not None)
        nodes = thing.graph.nodes if isinstance(thing, GraphModule) else ()
        self.nodes = tuple((n, n.op, n.target, n.args, dict(n.meta)) for n in nodes)

    def restore(self) -> None:
        if type(self.thing) is not self.kind:
            object.__setattr__(self.thing, "__class__", self.kind)
        self.thing.__dict__.clear()
        self.thing.__dict__.update(self.attributes)
        for container in self.empty:
            container.clear()
        for container, before in self.containers:
            _refill(container, before)
        for parameter in self.parameters:
            parameter.restore()

    def restore_graph(self) -> None:
        for node, _, _, _, meta in self.nodes:
            node.meta = meta
        changed = [state for state in self.nodes if (state[0].op, state[0].target) != state[1:3]]
        for node, op, target, arguments, _ in changed:
            node.op, node.target, node.args = op, target, arguments
        if changed:
            self.thing.recompile()


class _Parameter:
    """Where a parameter's values lie, and whether it is trained."""

    __slots__ = ("data", "parameter", "trained")

    def __init__(self, parameter: Any) -> None:
        self.parameter, self.trained = parameter, parameter.requires_grad
        self.data = parameter.data if type(parameter) is nn.Parameter else None

    def restore(self) -> None:
        if self.data is not None and not self._is_in_place(self.data):
            self.parameter.data = self.data
        if self.parameter.requires_grad != self.trained:
            self.parameter.requires_grad = self.trained

    def _is_in_place(self, data: Tensor) -> bool:
        now = self.parameter
        same = now.dtype == data.dtype and now.device == data.device and now.shape == data.shape
        return same and (data.is_meta or now.data_ptr() == data.data_ptr())


def _content(container: Any) -> tuple[Any, ...]:
    """Return what is in a container."""
    return tuple(container.items() if isinstance(container, dict) else container)


def _refill(container: Any, before: tuple[Any, ...]) -> None:
    """Give a container its former content; others may hold the container itself."""
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(before)
