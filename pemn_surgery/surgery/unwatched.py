"""Subclasses that the class below does not hear of."""

import functools
from abc import ABCMeta
from typing import Any, cast

from torch import nn


def unwatched_subclass(original: type[nn.Module], namespace: dict[str, Any]) -> type[nn.Module]:
    """Make a subclass past the class's own ``__init_subclass__`` and metaclass.

    A layer that registers its subclasses, wants arguments for them or forbids them means those that
    people write. This one stands for the layer itself, under the same name, and would even push the
    layer out of such a register. The standard library's abstract classes are the exception: each
    needs caches of its own.

    Raises:
        TypeError: If python allows no such subclass (`can_be_swapped`).
    """
    meta: Any = type(original)
    maker: Any = ABCMeta if issubclass(meta, ABCMeta) else type
    watchers = [base for base in original.__mro__[:-1] if "__init_subclass__" in vars(base)]
    watched = any(base.__module__ != "typing" for base in watchers)  # Generic and Protocol may look
    first = nn.Module if watched else original  # python asks the first bases, not later ones
    made = maker.__new__(meta, original.__name__, (first,), namespace)
    if watched:
        type.__setattr__(made, "__bases__", (original,))
    return cast("type[nn.Module]", made)


@functools.cache
def can_be_swapped(original: type[nn.Module]) -> bool:
    """Tell whether python lets a class be swapped for a subclass that it does not hear of.

    It does not where the class watches its subclasses and has slots, or an abstract class first.
    """
    try:
        unwatched_subclass(original, {})
    except TypeError:
        return False
    return True
