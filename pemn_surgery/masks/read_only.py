"""The type of an effective weight: reads like any tensor, and refuses to be written to.

It is computed, so what is written into it would last until it is computed again: for the next
forward in one mode, never in another. Every operation returns plain tensors, at their full speed,
since torch's functions do not look at the type (as with `torch.nn.Parameter`).
"""

import re
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from pemn_surgery.errors import MaskedWeightError

_OPERATORS = "add|sub|mul|div|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift"
_IN_PLACE = re.compile(rf"[a-z][a-z0-9_]*[a-z0-9]_|__i({_OPERATORS})__|__setitem__")
# They change no value.
_HARMLESS = ("requires_grad_", "share_memory_", "rename_", "detach_")


class ReadOnlyWeight(Tensor):
    """An effective weight.

    Attributes:
        target: Name of the weight, for errors.
    """

    target: str
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The values, read-only too: a write through them would leave no trace."""
        return read_only(_DATA.__get__(self), self.target)

    @data.setter
    def data(self, value: Tensor) -> NoReturn:
        """Refuse other values."""
        _refuse(self, "data = ...")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return a plain tensor: a copy belongs to nobody."""
        return _plain(self).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain tensor."""
        return _plain(self).__reduce_ex__(protocol)


_DATA: Any = Tensor.data


def read_only(weight: Tensor, target: str) -> ReadOnlyWeight:
    """Return an alias of a weight that refuses to be written to."""
    made = weight.as_subclass(ReadOnlyWeight)
    made.target = target
    return made


def _plain(weight: Tensor) -> Tensor:
    return weight.detach().as_subclass(Tensor)


def _refuse(weight: ReadOnlyWeight, write: str) -> NoReturn:
    message = (
        f"{weight.target!r} is computed from frozen numbers and masks, so {write} would not last. "
        "Train or load the masks, or merge first: model.merge_and_unload(). Nothing was changed."
    )
    raise MaskedWeightError(message)


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(self: ReadOnlyWeight, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(self, f"{name}()")

    return refuse


for _name in dir(Tensor):
    if _IN_PLACE.fullmatch(_name) and _name not in _HARMLESS:
        setattr(ReadOnlyWeight, _name, _refusing(_name))
# What torch asks both tensors before it exchanges them.
ReadOnlyWeight._use_count = _refusing("torch.utils.swap_tensors")  # type: ignore[attr-defined]
