"""transformers' own tying and resizing of embeddings, where adapters decide a tied weight.

With ``tied="untie"`` a head has its own weight, with ``tied="both"`` head and embedding share a
masked one, and tasks may have new rows of both. transformers goes by its configuration alone: it
would tie the head again, and resize one of the two, or what is stored in place of what tasks have.
So on such a model tying again does nothing, and resizing is refused.
"""

from typing import Any, cast

from torch import nn

from pemn_surgery.masks.attached import find_masked
from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.masks.task_tensors import TaskTensors, TensorSet
from pemn_surgery.surgery.refusals import refuse


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


def _has_new_rows(module: nn.Module) -> bool:
    return isinstance(module, TaskTensors) and any(
        cast("TensorSet", held).first_rows for held in module.pemn_tensors.values()
    )


def _is_masked(head: nn.Module | None) -> bool:
    return head is not None and find_masked(head, "weight") is not None
