"""Which adapters apply in a layer: at this moment, or for the length of a call.

Layers hold it as attributes, which anyone may set at any time. Two kinds of readers need what it
was, not what it is: a call in one thread while another thread switches adapters, and the second run
of a forward under activation checkpointing. And one needs what nobody has set: a group of a batch
whose samples name their adapters. These read through a `Call`, which a context variable holds, so
that it reaches every layer below and no other thread.

* `Running`: a call of the whole model. Whoever switches adapters hands it first what it is about
  to change (`switching`), so it goes on with that.
* `Recorded`: a function that runs again. What a layer says the first time, it says the second time.
* `Chosen`: one adapter, or none, in every layer of a model.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pemn_surgery.masks.kept import one_forward
from pemn_surgery.masks.mixture import Mixture

DELETED = (
    "The {} of adapter {!r} went while a call that reads it had not ended, or before its forward "
    "ran again for the gradient (activation checkpointing). Delete adapters between calls, after "
    "the backward pass."
)


class InForce(NamedTuple):
    """What one layer reads.

    Attributes:
        names: The adapters that apply, in the order in which they were activated.
        merged_weight: The effective weight that adapters were merged to, in place of them.
        mixture: What is read in place of both.
    """

    names: tuple[str, ...]
    merged_weight: Tensor | None = None
    mixture: Mixture | None = None


class Layer(Protocol):
    """Something that adapters apply in."""

    def now(self) -> InForce:
        """Return what its attributes say."""
        ...

    def holds(self, name: str) -> bool:
        """Tell whether there is anything of an adapter in it."""
        ...

    def parts_of(self, names: Iterable[str]) -> Iterable[Tensor]:
        """Return the tensors of adapters that may be trained in it."""
        ...


class Call:
    """What a call reads in place of the layers' attributes."""

    def of(self, layer: Layer) -> InForce:
        """Return what is in force in a layer."""
        raise NotImplementedError


class Running(Call):
    """A call of the whole model: what is switched while it runs stays what it was."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.before: dict[Layer, InForce] = {}

    def of(self, layer: Layer) -> InForce:
        """Return what is in force in a layer, or was before somebody began to switch.

        In this order: who looks up first what was kept may miss it and then read what replaced it.
        """
        now = layer.now()
        return self.before.get(layer, now)


class Recorded(Call):
    """A function that runs twice: what it reads first is what it reads again.

    That a tensor is trained belongs to it: whoever activates another adapter freezes this one.
    """

    def __init__(self, outer: Call | None) -> None:
        self.outer = outer
        self.read: dict[Layer, InForce] = {}
        self.trained: dict[Tensor, bool] = {}

    def of(self, layer: Layer) -> InForce:
        """Return what is in force in a layer, or was when it was first asked."""
        found = self.read.get(layer)
        if found is None:
            found = layer.now() if self.outer is None else self.outer.of(layer)
            self.read[layer] = found
            for tensor in layer.parts_of(found.names):
                self.trained[tensor] = tensor.requires_grad
        return found

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """Let tensors ask for gradients as they did when they were first read."""
        now = {tensor: tensor.requires_grad for tensor in self.trained}
        try:
            _ask_for_gradients(self.trained)
            yield
        finally:
            _ask_for_gradients(now)


def _ask_for_gradients(wanted: Mapping[Tensor, bool]) -> None:
    for tensor, trained in wanted.items():
        if tensor.requires_grad != trained:
            tensor.requires_grad_(trained)


class Chosen(Call):
    """The same adapters in every layer of one model, whatever is active."""

    def __init__(self, names: tuple[str, ...], layers: Set[Layer]) -> None:
        self.names, self.layers = names, layers

    def of(self, layer: Layer) -> InForce:
        """Return those of the chosen adapters that the layer has anything of.

        Layers of another model, which this one calls, read their own attributes.
        """
        if layer not in self.layers:
            return layer.now()
        return InForce(tuple(name for name in self.names if layer.holds(name)))


_CALL: ContextVar[Call | None] = ContextVar("pemn_call", default=None)

# Held while adapters are switched, and for the moment in which a call begins: a call sees all of a
# switch or nothing of it.
_SWITCHING = threading.RLock()
_running: set[Running] = set()

# Dynamo cannot follow context variables in older torch.
_TRACED = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)


def read(layer: Layer) -> InForce:
    """Return what is in force in a layer for this call.

    Compiled code reads the attributes, whose changes it is compiled anew for, or what a mixed batch
    has chosen.
    """
    if torch.compiler.is_compiling():
        call = _CALL.get() if _TRACED else None
        return call.of(layer) if isinstance(call, Chosen) else layer.now()
    call = _CALL.get()
    return layer.now() if call is None else call.of(layer)


def current() -> Call | None:
    """Return the call that runs in this context."""
    return _CALL.get()


def follows_compiled() -> bool:
    """Tell whether compiled code sees what a `Chosen` call chose."""
    return _TRACED


@contextmanager
def use(call: Call) -> Iterator[None]:
    """Let layers be read through a call."""
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)  # whatever began inside and was not ended


@contextmanager
def use_in_generator(call: Call) -> Iterator[None]:
    """Let layers be read through a call, while a generator waits.

    Its end may come late, when what it ran in has ended with an error (torch closes the generator
    of a checkpoint only in newer releases), or from another thread, which collects the generator.
    """
    token = _CALL.set(call)
    try:
        yield
    finally:
        if _CALL.get() is call:
            with contextlib.suppress(ValueError):
                _CALL.reset(token)


@contextmanager
def running() -> Iterator[None]:
    """Read what is in force when this begins, whatever other threads switch before it ends."""
    call = Running()
    with _SWITCHING:
        _running.add(call)
    try:
        with use(call), one_forward():
            yield
    finally:
        with _SWITCHING:
            _running.discard(call)


@contextmanager
def switching(layers: Iterable[Layer]) -> Iterator[None]:
    """Change what is in force in layers; calls that run in other threads go on as they began.

    Calls that are about to begin wait until the change is complete.
    """
    with _SWITCHING:
        others = [call for call in _running if call.thread != threading.get_ident()]
        if others:
            for layer in layers:
                for call in others:
                    call.before.setdefault(layer, layer.now())
        yield
