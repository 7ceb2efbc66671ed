"""Operator calls on tensors of which some have values and some only shapes.

Tensors that do not depend on a weight (ids, masks, positions) keep their values on the CPU, so that
a forward can decide by them; everything that meets a weight has a shape only. Values that a forward
asks for although there are none (``if mask.all()``, ``nonzero`` in a mixture of experts) are made
up.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pemn_surgery.models.operators import is_in_place, look_up


class Call:
    """One operator call; ``made_up`` is what values are that nobody knows."""

    def __init__(self, func: Any, name: str, args: tuple, kwargs: dict, made_up: int) -> None:
        self.func, self.made_up = func, made_up
        self.operator, self.is_in_place = look_up(name), is_in_place(name)
        self.args, self.kwargs = args, kwargs
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        on_meta = [leaf.is_meta for leaf in self.leaves if isinstance(leaf, Tensor)]
        self.on_meta, self.all_on_meta = any(on_meta), all(on_meta)

    def run(self) -> Any:
        """Return the operator's result."""
        if not self.on_meta or self.operator.kind == "filled":
            return self._call(self._move("cpu"))
        if self._has_values() and self.is_in_place:
            return self.leaves[0]  # what it would write has a shape only
        if self._has_values() and self.operator.kind == "form":  # the first tensor keeps its values
            return self._call(self._as_zeros())
        shape = self.operator.shape if self.all_on_meta else None
        known = shape(*self.args, **self.kwargs) if shape is not None else None
        if known is not None:
            return known
        problems = []
        made_up = functools.partial(self._move, "cpu", self._make_up)
        for prepare in (self._as_shapes, lambda: self.leaves, made_up, self._as_zeros):
            try:
                return self._call(prepare())
            except (RuntimeError, NotImplementedError, IndexError, ValueError) as error:
                problems.append(error)
        if self.is_in_place:
            return self.leaves[0]
        raise problems[0]

    def _as_shapes(self) -> list[Any]:
        return self._move("meta", lambda x: x if x.is_meta else x.to("meta"))

    def _as_zeros(self) -> list[Any]:
        return self._move("cpu", lambda x: torch.zeros_like(x, device="cpu") if x.is_meta else x)

    def _call(self, leaves: Sequence[Any]) -> Any:
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        if self.operator.kind == "filled":  # though it was asked for on the meta device
            kwargs = {**kwargs, "device": "cpu"}
        return self.func(*args, **kwargs)

    def _move(self, device: str, tensor: Callable[[Tensor], Tensor] = lambda x: x) -> list[Any]:
        """Return the arguments with other tensors, and with this device wherever one is named."""
        moved = [tensor(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return [torch.device(device) if isinstance(x, torch.device) else x for x in moved]

    def _make_up(self, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        return torch.full(tensor.shape, self.made_up, dtype=tensor.dtype, device="cpu")

    def _has_values(self) -> bool:
        first = self.leaves[0]
        return isinstance(first, Tensor) and not first.is_meta
