"""An optimizer's groups: scores want other rates than norms and heads."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from pemn_surgery.errors import AdapterError
from pemn_surgery.masks.adapter_mask import AdapterMask
from pemn_surgery.masks.task_tensors import TensorSet


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    scales: float | None = None,
    norms: float = 1e-3,
    head: float = 1e-3,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Return a model's trained parameters as an optimizer's groups, each with its own rate.

    Scores, scales and norms never decay: decay draws scores to zero, which is the threshold, or
    the border of "topk".

    Args:
        model: A model with masks that train.
        lr: Rate of the scores.
        scales: Rate of the scales beside masks (``scale="row"``, sign deltas). Default: ``lr``.
        norms: Rate of the task's other tensors: norms, biases, tables.
        head: Rate of modules that are trained whole, and of all else that trains.
        weight_decay: Weight decay of these modules.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and ``name``; those without parameters are
        left out.

    Raises:
        AdapterError: If no scores are trained.

    Example:
        >>> optimizer = torch.optim.AdamW(param_groups(model, lr=3e-3))
        >>> Trainer(model=model, args=args, train_dataset=data, optimizers=(optimizer, None))
    """
    found = _by_kind(model)
    if not found["scores"] and not found["scales"]:
        message = (
            f"No scores or scales of this {type(model).__name__} are trained, so that there is "
            "nothing to give rates to. Add an adapter with pemnify(model, ...), or load it with "
            "is_trainable=True."
        )
        raise AdapterError(message)
    rates = {"scores": lr, "scales": lr if scales is None else scales, "norms": norms, "head": head}
    return [
        {
            "params": found[name],
            "lr": rate,
            "weight_decay": weight_decay if name == "head" else 0.0,
            "name": name,
        }
        for name, rate in rates.items()
        if found[name]
    ]


def _by_kind(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the parameters that are trained: scores, scales, norms and the like, all else."""
    found: dict[str, list[nn.Parameter]] = {"scores": [], "scales": [], "norms": [], "head": []}
    seen: set[int] = set()

    def take(kind: str, parameters: Iterable[nn.Parameter | None]) -> None:
        for parameter in parameters:
            if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                found[kind].append(parameter)

    for module in model.modules():
        if isinstance(module, AdapterMask):
            take("scores", [module.scores])
            take("scales", [module.row_scale])
        elif isinstance(module, TensorSet):
            take("norms", module.parameters())
    take("head", model.parameters())
    return found
