"""What tools may not do to a module some of whose tensors adapters make.

Pruning, weight and spectral norm, parametrizations and fusions take a parameter's present value and
put something made of it in the parameter's place: masks would reach that no more, or twice.
``torch.jit.script`` compiles what is stored, and ``torch.ao.quantization`` passes by what is not of
the very class that it looks for. All of them are refused before they have changed anything.

transformers ties and resizes embeddings by its configuration alone. With ``tied="untie"`` a head
has its own weight, with ``tied="both"`` head and embedding share a masked one, and tasks may have
new rows of both: it would tie the head again, and resize one of the two, or what is stored in place
of what tasks have. So on such a model tying again does nothing, and resizing is refused.
"""

import sys
from collections.abc import Collection
from typing import Any, NoReturn, cast

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from pemn_surgery.errors import MaskedWeightError
from pemn_surgery.masks.attached import find_masked
from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.masks.places import FSDP
from pemn_surgery.masks.task_tensors import TaskTensors, TensorSet

# Where torch reads a parameter in order to replace it; the third one has two modules.
_REPLACERS = tuple(
    f"torch.nn.utils.{name}" for name in ("prune", "weight_norm", "parametriz", "fusion")
)


def refuse_replacing(module: nn.Module, name: str, reader: str) -> None:
    """Refuse a read by a tool that would replace the parameter (`MaskedWeightError`).

    A parametrization or pruning that the model came with reads its own originals to make the weight
    of them.
    """
    if not reader.startswith(_REPLACERS):
        return
    if not (isinstance(module, ParametrizationList) or _is_pruned(module, name)):
        refuse(module, f"{reader} would replace {name!r}")


def refusing_methods(original: type[nn.Module], made: Collection[str]) -> dict[str, Any]:
    """Return methods of a swapped class that refuse what would go past its adapters."""

    def delete(self: nn.Module, name: str) -> None:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith(_REPLACERS) or (name in made and not caller.startswith(FSDP)):
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


def tying_methods(original: type[nn.Module]) -> dict[str, Any]:
    """Return methods of a model's swapped class; none for models that do not tie by themselves."""
    kind: Any = original
    if not hasattr(kind, "tie_weights") or not hasattr(kind, "resize_token_embeddings"):
        return {}

    def tie_weights(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return None if decide_ties(self) else kind.tie_weights(self, *args, **kwargs)

    def resize_token_embeddings(
        self: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        held = self.get_input_embeddings()
        same = new_num_tokens in (None, getattr(held, "num_embeddings", None))
        if decide_ties(self) and not (same and kwargs.get("pad_to_multiple_of") is None):
            refuse(
                self,
                f"resize_token_embeddings({new_num_tokens}) would tie the masked head again, or "
                "resize it without the embedding or what tasks have of it: resize before masks are "
                "put on",
            )
        if not same and _is_masked(self.get_output_embeddings()):
            refuse(
                self,
                f"resize_token_embeddings({new_num_tokens}) would put another head in the place of "
                "the masked one: call it on PEFT's model, to more tokens, or resize before masks",
            )
        return kind.resize_token_embeddings(self, new_num_tokens, *args, **kwargs)

    return {"tie_weights": tie_weights, "resize_token_embeddings": resize_token_embeddings}


def decide_ties(model: nn.Module) -> bool:
    """Tell whether adapters have untied a weight, share one with an embedding, or have new rows."""
    if any(_has_new_rows(module) for module in model.modules()):
        return True
    masked = [module for module in model.modules() if isinstance(module, MaskedWeight)]
    holders = [(child, [child.owner, *(m for m, _ in child.shared_with)]) for child in masked]
    return any(
        child.untied or (len(owners) > 1 and any(isinstance(o, nn.Embedding) for o in owners))
        for child, owners in holders
    )


def refuse(module: nn.Module, problem: str) -> NoReturn:
    """Refuse what a tool or a user would do to a module: raise a `MaskedWeightError`."""
    targets = [child.target for child in module.children() if hasattr(child, "target")]
    where = f" at {targets[-1]!r}" if targets else ""
    message = (
        f"Adapters make tensors of this {type(module).__name__}{where}, and {problem}. It was left "
        "as it was. Merge first, model.merge_and_unload(), and do this to the plain model."
    )
    raise MaskedWeightError(message)


def _is_pruned(module: nn.Module, name: str) -> bool:
    """Tell whether a parameter is what `torch.nn.utils.prune` makes a weight of."""
    pruned = name.removesuffix("_orig")
    return pruned != name and f"{pruned}_mask" in module._buffers


def _has_new_rows(module: nn.Module) -> bool:
    return isinstance(module, TaskTensors) and any(
        cast("TensorSet", held).first_rows for held in module.pemn_tensors.values()
    )


def _is_masked(head: nn.Module | None) -> bool:
    return head is not None and find_masked(head, "weight") is not None
