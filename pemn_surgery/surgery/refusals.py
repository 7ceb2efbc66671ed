"""What tools may not do to a module some of whose tensors adapters make.

Pruning, weight and spectral norm, parametrizations and fusions take a parameter's present value and
put something made of it in the parameter's place: masks would reach that no more, or twice.
``torch.jit.script`` compiles what is stored, and ``torch.ao.quantization`` passes by what is not of
the very class that it looks for. All of them are refused before they have changed anything.
"""

import sys
from collections.abc import Collection
from typing import Any, NoReturn

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from pemn_surgery.errors import MaskedWeightError

# Where torch reads a parameter in order to replace it; the third one has two modules.
_REPLACERS = tuple(
    f"torch.nn.utils.{name}" for name in ("prune", "weight_norm", "parametriz", "fusion")
)


def refuse_replacing(module: nn.Module, name: str, reader: str) -> None:
    """Refuse a read by a tool that would replace the parameter.

    A parametrization or pruning that the model came with reads its own originals to make the weight
    of them.

    Raises:
        MaskedWeightError: If such a tool reads.
    """
    if not reader.startswith(_REPLACERS):
        return
    if not (isinstance(module, ParametrizationList) or _is_pruned(module, name)):
        refuse(module, f"{reader} would replace {name!r}")


def refusing_methods(
    original: type[nn.Module], made: Collection[str], allowed: str
) -> dict[str, Any]:
    """Return methods of a swapped class that refuse what would go past its adapters."""

    def delete(self: nn.Module, name: str) -> None:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith(_REPLACERS) or (name in made and not caller.startswith(allowed)):
            refuse(self, f"{caller} would delete {name!r}")
        original.__delattr__(self, name)

    def prepare_scriptable(self: nn.Module) -> NoReturn:
        refuse(self, "torch.jit.script would compile what is stored in place of what is masked")

    def set_qconfig(self: nn.Module, _: Any) -> NoReturn:
        refuse(self, "torch.ao.quantization would pass it by for its class")

    return {
        "__delattr__": delete,
        "__prepare_scriptable__": prepare_scriptable,
        "qconfig": property(None, set_qconfig),
    }


def _is_pruned(module: nn.Module, name: str) -> bool:
    """Tell whether a parameter is what `torch.nn.utils.prune` makes a weight of."""
    pruned = name.removesuffix("_orig")
    return pruned != name and f"{pruned}_mask" in module._buffers


def refuse(module: nn.Module, problem: str) -> NoReturn:
    """Refuse what a tool or a user would do to a module.

    Raises:
        MaskedWeightError: Always.
    """
    targets = [child.target for child in module.children() if hasattr(child, "target")]
    where = f" at {targets[-1]!r}" if targets else ""
    message = (
        f"Adapters make tensors of this {type(module).__name__}{where}, and {problem}. It was left "
        "as it was. Merge first, model.merge_and_unload(), and do this to the plain model."
    )
    raise MaskedWeightError(message)
