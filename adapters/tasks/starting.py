"""A new task that begins where earlier ones ended.

SupSup's released code calls it ``reinit``: the scores of a new task begin at the mean of those of
earlier tasks, or at those of the one that is nearest (Wortsman et al. 2020).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pemn_surgery.adapters.base import masked_layers
from pemn_surgery.adapters.checks import adapter_configs, check_adapters_exist
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.state import scores_from_mask, unit_in
from pemn_surgery.adapters.tasks.manage import ALIKE
from pemn_surgery.errors import AdapterError
from pemn_surgery.masks.adapter_mask import AdapterMask

# What adapters have in common where the scores of one mean something to the other.
_ALIKE: dict[str, Callable[[PemnConfig], Any]] = {
    **ALIKE,
    "selector": lambda config: config.selector,
    "threshold": lambda config: config.threshold,
    "fixed signs": lambda config: config.has_fixed_signs,
}


def start_from(model: nn.Module, adapter_name: str, others: Sequence[str]) -> None:
    """Let an adapter begin with the mean of the scores of others, and of their scales.

    Of adapters that hold bits the scores are those that `to_trainable` would give them. Where the
    largest sizes are kept, sizes are averaged, and the first one's signs are taken. Norms and heads
    stay as they are. To begin at the nearest task:
    ``start_from(model, "new", [infer_task(model, batch).name])``.

    Args:
        model: A model with masks.
        adapter_name: The adapter that is about to be trained.
        others: The adapters to begin from, each with a mask of every weight that it masks.

    Raises:
        AdapterError: If there is no such adapter, the adapter has no scores, or another one is no
            beginning for it. Nothing has changed then.
    """
    configs = adapter_configs(model)
    check_adapters_exist(configs, [adapter_name, *others])
    _check_alike(configs, adapter_name, others)
    layers = list(masked_layers(model, adapter_name).values())
    masks = [layer.mask_of(adapter_name) for layer in layers]
    for layer, mask in zip(layers, masks, strict=True):
        missing = [name for name in others if name not in layer.pemn_masks]
        if missing or mask.scores is None:
            fault = (
                f"{missing[0]!r} has no mask of {mask.target!r}"
                if missing
                else f"{adapter_name!r} holds bits: call to_trainable(model, {adapter_name!r})"
            )
            _refuse(adapter_name, others, fault)
    with torch.no_grad():
        for layer, mask in zip(layers, masks, strict=True):
            sources = [layer.mask_of(name) for name in others]
            cast("Tensor", mask.scores).copy_(_mean_scores(mask, sources, configs[adapter_name]))
            if mask.row_scale is not None:
                mask.row_scale.copy_(_mean_scale(mask, sources))


def _refuse(adapter_name: str, others: Sequence[str], fault: str) -> None:
    message = (
        f"The adapter {adapter_name!r} cannot begin from {', '.join(map(repr, others))}: {fault}. "
        "Nothing was changed."
    )
    raise AdapterError(message)


def _check_alike(
    configs: Mapping[str, PemnConfig], adapter_name: str, others: Sequence[str]
) -> None:
    if not others or adapter_name in others:
        _refuse(adapter_name, others, "name one or more other adapters")
    for name in others:
        for what, told in _ALIKE.items():
            own, its = told(configs[adapter_name]), told(configs[name])
            if own != its:
                _refuse(adapter_name, others, f"{what} is {own!r}, that of {name!r} {its!r}")


def _mean_scores(mask: AdapterMask, sources: Sequence[AdapterMask], config: PemnConfig) -> Tensor:
    found = [
        scores_from_mask(one.mask(), mask, config) if one.scores is None else one.scores
        for one in sources
    ]
    scores = torch.stack([one.to(mask.store) for one in found])
    if not mask.selector.uses_magnitude:
        return scores.mean(dim=0)
    return scores.abs().mean(dim=0) * torch.where(scores[0] < 0, -1.0, 1.0)


def _mean_scale(mask: AdapterMask, sources: Sequence[AdapterMask]) -> Tensor:
    scales = [cast("Tensor", one.row_scale) * (unit_in(one) / unit_in(mask)) for one in sources]
    return torch.stack([one.to(mask.store.device) for one in scales]).mean(dim=0)
