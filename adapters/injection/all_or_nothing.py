"""PEFT's and transformers' ways to add an adapter, all or nothing.

`PemnModel` undoes its own part. These libraries change the model before and after it: they enter
the adapter's name, note that there are adapters, wrap modules to save, cast. So their methods are
wrapped (`doors`), which does nothing for adapters of other methods. They also write into the
configuration that they are given; so that it stays the caller's, they are given a copy.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any

from torch import Tensor, nn

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.adapter_file import is_reading
from pemn_surgery.surgery.undo import undone_on_error

# Whether one of the methods runs: those that it calls get the model's own configuration.
_adding: ContextVar[bool] = ContextVar("adding", default=False)


def tensors_of(model: nn.Module, adapter_name: str) -> Iterator[Tensor]:
    """Yield an adapter's tensors, which a second load under its name writes to.

    Args:
        model: The model.
        adapter_name: The adapter.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if adapter_name in name.split("."):
            yield tensor


def all_or_nothing(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a model add an adapter or stay as it was."""

    @functools.wraps(method)
    def whole(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if _adding.get() or not any(isinstance(item, PemnConfig) for item in given):
            return method(self, *args, **kwargs)
        made = [self] if "_modules" in self.__dict__ else []  # else it is just being made
        models = [*made, *(item for item in given if isinstance(item, nn.Module))]
        named = {name: _own(item) for name, item in kwargs.items()}
        with undone_on_error(*models), _outermost():
            return method(self, *map(_own, args), **named)

    return whole


def _own(item: Any) -> Any:
    """Return an adapter's own configuration; who loads with one of theirs gets that, as in PEFT."""
    return item.own_copy() if isinstance(item, PemnConfig) and not is_reading() else item


@contextmanager
def _outermost() -> Iterator[None]:
    token = _adding.set(True)
    try:
        yield
    finally:
        _adding.reset(token)
