"""Networks with a share of their weights removed before training: PEMN's baselines."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from pemn_surgery.errors import RecipeError

WAYS = {"random": torch_prune.random_unstructured, "magnitude": torch_prune.l1_unstructured}


def prune(network: nn.Module, way: str, sparsity: float) -> nn.Module:
    """Remove a share of every convolution and linear layer in place; others train (section 4.3).

    Which go is decided once, layer by layer, on the weights that training starts from: "random"
    ones, with torch's global generator, or the smallest by "magnitude". torch's own masks hold them
    at zero.

    Raises:
        RecipeError: If there is no such way, or the share is not below 1.
    """
    if way not in WAYS or not 0 <= sparsity < 1:
        message = f"prune={way!r}, sparsity={sparsity}; give one of {sorted(WAYS)} and 0 to 1"
        raise RecipeError(message)
    for layer in list(_layers(network)):
        WAYS[way](layer, "weight", amount=sparsity)
    return network


def kept(network: nn.Module) -> dict[str, Tensor]:
    """Return what a pruned network's file holds.

    A weight is there in compressed sparse rows, its outputs by all others, as the paper counts it:
    values, their columns and the rows' ends (int32).
    """
    state = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    for name in [name for name in state if name.endswith(".weight_mask")]:
        prefix = name.removesuffix("_mask")
        weight = state.pop(f"{prefix}_orig") * state.pop(name)
        matrix = weight.flatten(1).cpu()
        rows, columns = matrix.nonzero(as_tuple=True)
        state[f"{prefix}.values"] = matrix[rows, columns]
        state[f"{prefix}.columns"] = columns.to(torch.int32)
        state[f"{prefix}.ends"] = rows.bincount(minlength=len(matrix)).cumsum(0).to(torch.int32)
    return state


def read(layer: nn.Module, name: str) -> Tensor:
    """Return a layer's tensor as its next forward reads it, before which torch applies a mask."""
    mask: Tensor | None = getattr(layer, f"{name}_mask", None)
    return getattr(layer, name) if mask is None else mask * getattr(layer, f"{name}_orig")


def is_pruned(network: nn.Module) -> bool:
    """Tell whether `prune` made it."""
    return any(torch_prune.is_pruned(layer) for layer in _layers(network))


def _layers(network: nn.Module) -> Iterator[nn.Module]:
    return (one for one in network.modules() if isinstance(one, nn.Conv2d | nn.Linear))
