"""Operator calls on tensors of which some have values and some only shapes.

Tensors that do not depend on a weight (ids, masks, positions) keep their values on the CPU, so that
a forward can decide by them; everything that meets a weight has a shape only. Values that a forward
asks for although there are none (``if mask.all()``, ``nonzero`` in a mixture of experts) are made
up.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pemn_surgery.models.operators import TAKES_FORM, is_in_place

# Factories whose values are known although they were asked for on the meta device.
_LIKE = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_tensor")


class Call:
    """One operator call.

    Args:
        func: Torch's function.
        name: Its name.
        args: Its arguments by place.
        kwargs: Its arguments by keyword.
        made_up: What values are that nobody knows.
    """

    def __init__(self, func: Any, name: str, args: tuple, kwargs: dict, made_up: int) -> None:
        self.func, self.name, self.made_up = func, name, made_up
        self.args, self.kwargs = args, kwargs
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        places = [leaf.is_meta for leaf in self.leaves if isinstance(leaf, Tensor)]
        self.on_meta, self.all_on_meta = any(places), all(places)

    def run(self) -> Any:
        """Return the operator's result."""
        if not self.on_meta or self.name in _LIKE:
            return self._call(self._move(_device_cpu))
        if self._has_values() and is_in_place(self.name):
            return self.leaves[0]  # what it would write has a shape only
        if self._has_values() and self.name in TAKES_FORM:  # the first tensor keeps its values
            return self._call(self._as_zeros())
        form = _FORMS.get(self.name)
        known = form(*self.args, **self.kwargs) if form is not None and self.all_on_meta else None
        if known is not None:
            return known
        problems = []
        for prepare in (self._as_shapes, self._as_given, self._as_made_up, self._as_zeros):
            try:
                return self._call(prepare())
            except (RuntimeError, NotImplementedError, IndexError, ValueError) as error:
                problems.append(error)
        if is_in_place(self.name):
            return self.leaves[0]
        raise problems[0]

    def _as_shapes(self) -> list[Any]:
        return self._move(_device_meta, _to_meta)

    def _as_given(self) -> list[Any]:
        return self.leaves

    def _as_made_up(self) -> list[Any]:
        return self._move(_device_cpu, self._make_up)

    def _as_zeros(self) -> list[Any]:
        return self._move(_device_cpu, _zeros_for_shapes)

    def _call(self, leaves: Sequence[Any]) -> Any:
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        if self.name in _LIKE:
            kwargs = {**kwargs, "device": "cpu"}
        return self.func(*args, **kwargs)

    def _move(
        self, device: Callable[[Any], Any], tensor: Callable[[Tensor], Tensor] | None = None
    ) -> list[Any]:
        moved = []
        for leaf in self.leaves:
            if isinstance(leaf, Tensor):
                moved.append(tensor(leaf) if tensor is not None else leaf)
            else:
                moved.append(device(leaf))
        return moved

    def _make_up(self, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        return torch.full(tensor.shape, self.made_up, dtype=tensor.dtype, device="cpu")

    def _has_values(self) -> bool:
        first = self.leaves[0]
        return isinstance(first, Tensor) and not first.is_meta


def _normalised(x: Tensor, *_: Any, **options: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _standardised(x: Tensor, *_: Any, **options: Any) -> Tensor:
    return torch.empty_like(x)


def _projected(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if weight.dim() != 2 or not x.dim() or x.shape[-1] != weight.shape[1]:
        return None
    same = x.dtype == weight.dtype and (bias is None or bias.shape == weight.shape[:1])
    return x.new_empty((*x.shape[:-1], weight.shape[0])) if same else None


def _attended(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor | None:
    same = query.dim() == key.dim() == value.dim() and key.shape[-2] == value.shape[-2]
    if not same or query.shape[:-2] != value.shape[:-2] or query.shape[-1] != key.shape[-1]:
        return None
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


# Operators whose result's form is clear from their arguments. Torch finds it in Python, at up to a
# millisecond a call, most of what a forward on shapes takes. None: torch shall say what is wrong.
_FORMS: dict[str, Callable[..., Tensor | None]] = {
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm"), _normalised),
    **dict.fromkeys(("batch_norm", "gelu"), _standardised),
    "linear": _projected,
    "scaled_dot_product_attention": _attended,
}


def _zeros_for_shapes(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.to("meta")


def _device_cpu(leaf: Any) -> Any:
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


def _device_meta(leaf: Any) -> Any:
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf
