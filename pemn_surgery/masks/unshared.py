"""Whether a gradient may be overwritten: whether nobody but the backward pass holds it.

A gradient of the effective weight becomes that of the scores. Written into the same memory, that
needs none of its own, and none is fetched to be written to. But others may hold the gradient:
hooks, a tensor whose gradient is the same one, another view of its memory. Torch counts all of
these, and steals unshared gradients itself where it accumulates them. Here the counts are compared
with those of gradients that certainly nobody else holds, which a backward pass of our own meets.
"""

import functools
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

_C: Any = torch._C


class _Holders(NamedTuple):
    """How many hold a gradient: its object in Python, torch's behind it, its memory; its base."""

    objects: int
    tensors: int
    storages: int
    base_objects: int
    base_tensors: int


def is_unshared(grads: tuple[Tensor, ...]) -> bool:
    """Tell whether nobody else holds a gradient.

    Args:
        grads: The ``*grads`` of a ``torch.autograd.Function``'s ``backward``, of which nothing was
            unpacked yet; one gradient of any shape.
    """
    if torch.compiler.is_compiling():  # what is compiled has memory of its own
        return False
    (grad,) = grads
    is_plain = type(grad) is Tensor and grad.is_cpu
    del grad
    return is_plain and _holders(grads) in _fresh()


def _holders(grads: tuple[Tensor, ...]) -> _Holders:
    (grad,) = grads
    base: Any = grad._base
    of_base = (0, 0) if base is None else (sys.getrefcount(base), base._use_count())
    memory = _C._storage_Use_Count(grad.untyped_storage()._cdata)
    return _Holders(sys.getrefcount(grad), _C.TensorBase._use_count(grad), memory, *of_base)


@functools.cache
def _fresh() -> frozenset[_Holders]:
    """Return what the gradients of a product of matrices and of one of numbers look like."""
    found: set[_Holders] = set()
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        weight = torch.ones(2, 2, requires_grad=True)
        rows = torch.nn.functional.linear(torch.ones(1, 2), _Fresh.apply(weight, found))
        (rows.sum() + (_Fresh.apply(weight, found) * 2).sum()).backward()
    return frozenset(found)


class _Fresh(torch.autograd.Function):
    """Hands a weight on, and notes how its gradient is held."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, found: set[_Holders]) -> Tensor:
        ctx.found = found
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        ctx.found.add(_holders(grads))
        return None, None
