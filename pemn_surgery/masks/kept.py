"""When an effective weight that was made may serve the next read.

What it is made of can be written without a trace: ``parameter.data.mul_(.5)`` changes neither the
parameter nor its version. So a weight lasts only where nothing ordinary writes - bits on frozen
numbers in eval mode -, and the layer keeps it. Everything else is made anew for each forward, and
the forward keeps it, so that a layer that runs twelve times in one is masked once. Outside of
forwards nothing else is kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn


class Sources:
    """What one effective weight was made from. It holds the tensors, so that no id is reused."""

    def __init__(
        self, names: tuple[str, ...], mode: tuple[object, ...], tensors: list[Tensor]
    ) -> None:
        # The aliases keep replaced data from being freed and its address from being used again.
        self.tensors = [(tensor, tensor.detach()) for tensor in tensors]
        versions = [(id(t), t._version, t.data_ptr(), t.dtype, t.requires_grad) for t in tensors]
        self.state = (names, mode, versions)


class Kept:
    """The kept effective weight; never copied or pickled with its layer.

    Weight and sources are one value, so that another thread finds both or neither.
    """

    def __init__(self) -> None:
        self._held: tuple[Sources, Tensor, int] | None = None

    @property
    def weight(self) -> Tensor | None:
        """The kept weight, or None."""
        held = self._held
        return None if held is None else held[1]

    @property
    def sources(self) -> Sources | None:
        """What it was made from, or None."""
        held = self._held
        return None if held is None else held[0]

    def serve(self, sources: Sources) -> Tensor | None:
        """Return the kept weight if it was made from exactly these sources, or None.

        Nor is it served after somebody has written into it in place.
        """
        held = self._held
        if held is None or held[0].state != sources.state or held[2] != _version(held[1]):
            return None
        return held[1]

    def keep(self, weight: Tensor, sources: Sources) -> None:
        """Keep a weight until its sources change."""
        self._held = (sources, weight, _version(weight))

    def clear(self) -> None:
        """Forget the kept weight."""
        self._held = None

    def __reduce__(self) -> tuple[type["Kept"], tuple[()]]:
        return Kept, ()


# What the forward that runs has made, by layer; None outside of one.
_FORWARD: ContextVar[dict[nn.Module, Kept] | None] = ContextVar("pemn_forward", default=None)


@contextmanager
def one_forward() -> Iterator[None]:
    """Keep every weight that is made inside until the end; within another one nothing changes."""
    if torch.compiler.is_compiling() or _FORWARD.get() is not None:
        yield
        return
    token = _FORWARD.set({})
    try:
        yield
    finally:
        _FORWARD.reset(token)


def in_this_forward(layer: nn.Module) -> Kept | None:
    """Return what the forward that runs has kept for a layer; None outside of forwards.

    Args:
        layer: What makes an effective weight.
    """
    made = _FORWARD.get()
    return None if made is None else made.setdefault(layer, Kept())


def is_untracked(tensor: Tensor) -> bool:
    """Whether changes of a tensor cannot be seen: no versions, no values, or a subclass."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return not plain or tensor.is_meta or tensor.is_inference()


def _version(weight: Tensor) -> int:
    """Return how often a weight was written to in place; inference tensors do not count it."""
    return 0 if weight.is_inference() else weight._version
