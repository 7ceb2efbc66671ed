"""The repeated blocks of a model."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy


@dataclass(frozen=True)
class Block:
    """Modules of the same class and shapes that stand beside each other.

    Attributes:
        pattern: Their path, with ``*`` for the number.
        kind: Their class.
        count: How many there are.
    """

    pattern: str
    kind: str
    count: int


def repeated_blocks(model: nn.Module) -> list[Block]:
    """Find the repeated blocks of a model: siblings of equal class and equal parameter shapes.

    Args:
        model: Any model.

    Returns:
        The outermost repeated blocks; a block within a repeated block is not listed again.
    """
    return list(_blocks("", model, {}))


def _blocks(path: str, module: nn.Module, forms: dict[int, Any]) -> Iterator[Block]:
    alike: dict[Any, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, child in module.named_children():
        key = _form(child, forms) if name.isdigit() else name
        alike[key].append((name, child))
    for members in alike.values():
        name, child = members[0]
        inner = f"{path}.{name}" if path else name
        if len(members) > 1 and next(child.parameters(), None) is not None:
            pattern = f"{path}.*" if path else "*"
            yield Block(pattern, type(child).__name__, len(members))
        else:
            yield from _blocks(inner, child, forms)


def _form(module: nn.Module, forms: dict[int, Any]) -> Any:
    """Return what two modules have in common if they are built alike."""
    if id(module) not in forms:
        shapes = tuple(
            (name, tuple(parameter.shape))
            for name, parameter in module._parameters.items()
            if parameter is not None and not is_lazy(parameter)
        )
        children = tuple((name, _form(child, forms)) for name, child in module.named_children())
        forms[id(module)] = (type(module), shapes, children)
    return forms[id(module)]
