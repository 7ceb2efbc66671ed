"""New adapters out of old ones: mask algebra.

A weight that an adapter does not mask counts as kept. The new adapter holds bits; make it trainable
with `to_trainable`.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast, get_args

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from pemn_surgery.adapters.base import fingerprint_of
from pemn_surgery.adapters.checks import check_adapters_exist, check_name_is_free
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.adapters.names import check_adapter_name, saved_whole
from pemn_surgery.adapters.task_layer import PemnTaskLayer
from pemn_surgery.coding import bits
from pemn_surgery.errors import AdapterError
from pemn_surgery.masks.adapter_mask import AdapterMask
from pemn_surgery.masks.selector import Selector
from pemn_surgery.masks.task_tensors import TensorSet
from pemn_surgery.numbers.fingerprint import Fingerprint

CombinationName = Literal["intersection", "union", "majority", "difference"]


def add_combination(
    model: nn.Module,
    configs: dict[str, PemnConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination: CombinationName,
) -> PemnConfig:
    """Give a model a further adapter that is made from some that it has.

    Args:
        model: The model with the adapters.
        configs: Their configurations by name.
        adapters: The adapters to combine.
        weights: Their shares of a majority, and of the mean of tensors that are not masked.
        adapter_name: The new adapter.
        combination: A weight is kept where all adapters keep it ("intersection"), one does
            ("union"), more than half of the shares do ("majority"), or the first does and no other
            ("difference").

    Returns:
        The new adapter's configuration.

    Raises:
        AdapterError: If the adapters cannot be combined so.
        AlreadyPemnifiedError: If the name is taken.
        AdapterNameError: If no adapter can have the name.
    """
    _check(model, configs, adapters, weights, adapter_name, combination)
    shares = torch.tensor(weights, dtype=torch.float64)
    shares = shares / shares.sum()
    layers = _masked_layers(model, adapters)
    fingerprint = fingerprint_of(layers)  # adapters of other weights know other parts of the base
    for layer in layers:
        masks = _masks(layer, adapters)
        stored = bits.pack(combined_mask(masks, shares, combination))
        _put(layer, adapters, adapter_name, fingerprint, stored)
    for module in model.modules():
        if isinstance(module, PemnTaskLayer) and adapters[0] in module.pemn_tensors:
            _add_tensors(module, adapters, shares, adapter_name, combination)
    for wrapper in _whole_modules(model, adapters):
        _add_whole_module(wrapper, _holders(wrapper, adapters)[0], adapter_name)
    return _combined_config(model, configs, adapters)


def combined_mask(
    masks: Sequence[Tensor], shares: Sequence[float] | Tensor, combination: CombinationName
) -> Tensor:
    """Return the mask that some masks of one weight make together.

    Args:
        masks: Bool tensors of one shape.
        shares: One number a mask; only "majority" reads them.
        combination: As in `add_combination`.

    Returns:
        Bool tensor of that shape.
    """
    stacked = torch.stack(list(masks))
    if combination == "intersection":
        return stacked.all(dim=0)
    if combination == "union":
        return stacked.any(dim=0)
    if combination == "difference":
        return stacked[0] & ~stacked[1:].any(dim=0)
    kept = torch.as_tensor(shares, dtype=torch.float64, device=stacked.device)
    return torch.einsum("m...,m->...", stacked.to(torch.float64), kept) > kept.sum() / 2


def _check(
    model: nn.Module,
    configs: dict[str, PemnConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination: str,
) -> None:
    check_adapters_exist(configs, adapters)
    check_adapter_name(adapter_name, saved_whole(configs.values()))
    check_name_is_free(model, adapter_name)
    if combination not in get_args(CombinationName):
        choices = ", ".join(get_args(CombinationName))
        message = f"There is no combination_type {combination!r}; choose one of {choices}."
        raise AdapterError(message)
    if len(set(adapters)) != len(adapters) or not adapters:
        message = f"Different adapters are needed to combine; got {list(adapters)}."
        raise AdapterError(message)
    if len(weights) != len(adapters) or not all(weight > 0 for weight in weights):
        message = f"{len(adapters)} weights above 0 are needed, one an adapter; got {weights}."
        raise AdapterError(message)
    signed = [name for name in adapters if configs[name].form == "sign_delta"]
    if signed:
        message = (
            f"The adapters {', '.join(signed)} add signs to the weights (form='sign_delta') and "
            "keep or drop none of them: activate several at once, and they add up."
        )
        raise AdapterError(message)
    scales = {name: configs[name].scale for name in adapters}
    if len(set(scales.values())) > 1:
        message = f"The adapters scale their masks differently ({scales}), so they cannot be one."
        raise AdapterError(message)
    for wrapper in _whole_modules(model, adapters):
        holders = _holders(wrapper, adapters)
        if len(holders) > 1:
            message = (
                f"Adapters {', '.join(holders)} each have their own copy of a whole module "
                f"(modules_to_save: {type(wrapper.original_module).__name__}), of which no mean "
                "is taken. Combine adapters of which at most one has it."
            )
            raise AdapterError(message)


def _whole_modules(model: nn.Module, adapters: Sequence[str]) -> list[ModulesToSaveWrapper]:
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return [wrapper for wrapper in wrappers if _holders(wrapper, adapters)]


def _holders(wrapper: ModulesToSaveWrapper, adapters: Sequence[str]) -> list[str]:
    return [name for name in adapters if name in wrapper.modules_to_save]


def _masked_layers(model: nn.Module, adapters: Sequence[str]) -> list[PemnLayer]:
    """Return what makes the weights that at least one of these adapters masks."""
    layers = [module for module in model.modules() if isinstance(module, PemnLayer)]
    return [layer for layer in layers if any(name in layer.pemn_masks for name in adapters)]


def _masks(layer: PemnLayer, adapters: Sequence[str]) -> list[Tensor]:
    held = {name: layer.mask_of(name) for name in adapters if name in layer.pemn_masks}
    device = next(iter(held.values())).store.device
    ones = torch.ones(layer.shape, dtype=torch.bool, device=device)
    with torch.no_grad():
        return [held[name].mask() if name in held else ones for name in adapters]


def _put(
    layer: PemnLayer,
    adapters: Sequence[str],
    adapter_name: str,
    fingerprint: Fingerprint,
    stored: Tensor,
) -> None:
    """Give a layer the new adapter's mask, which has no density or threshold of its own."""
    like = next(layer.mask_of(name) for name in adapters if name in layer.pemn_masks)
    selector = Selector("threshold", density=0.5, threshold=0.0)
    layer.pemn_masks[adapter_name] = AdapterMask(
        like.target, like.shape, selector, fingerprint, scaled=like.scaled, stored=stored
    )


def _add_tensors(
    layer: PemnTaskLayer,
    adapters: Sequence[str],
    shares: Tensor,
    adapter_name: str,
    combination: CombinationName,
) -> None:
    """Take the mean of the adapters' unmasked tensors; the first one's for a difference."""
    held = [
        (cast("TensorSet", layer.pemn_tensors[name]), share)
        for name, share in zip(adapters, shares.tolist(), strict=True)
        if name in layer.pemn_tensors
    ]
    made = copy.deepcopy(held[0][0]).requires_grad_(False)
    others = [] if combination == "difference" else held
    with torch.no_grad():
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            given = [(source(name), share) for source, share in others if source.holds(name)]
            if given and tensor.is_floating_point():
                whole = sum(share for _, share in given)
                parts = [cast("Tensor", value).double() * (share / whole) for value, share in given]
                tensor.copy_(torch.stack(parts).sum(dim=0))
    layer.pemn_tensors[adapter_name] = made


def _add_whole_module(wrapper: ModulesToSaveWrapper, source: str, adapter_name: str) -> None:
    wrapper.modules_to_save[adapter_name] = copy.deepcopy(wrapper.modules_to_save[source])
    wrapper.modules_to_save[adapter_name].requires_grad_(False)
    wrapper._adapters.add(adapter_name)


def _combined_config(
    model: nn.Module, configs: dict[str, PemnConfig], adapters: Sequence[str]
) -> PemnConfig:
    config = configs[adapters[0]].own_copy()
    config.inference_mode = True
    config.selector, config.threshold, config.score_init = "threshold", 0.0, 0.01
    config.overall_density = config.density_pattern = None
    config.density = 0.5 if config.density == "erk" else config.density
    config.origin = replace(config.origin, file=None)
    saved = [configs[name].modules_to_save for name in adapters if configs[name].modules_to_save]
    config.modules_to_save = saved[0] if saved else None
    layers = _masked_layers(model, adapters)
    if not all(name in layer.pemn_masks for layer in layers for name in adapters):
        _name_targets(config, [configs[name] for name in adapters], layers)
    return config


def _name_targets(
    config: PemnConfig, others: Sequence[PemnConfig], layers: Sequence[PemnLayer]
) -> None:
    """Let a configuration ask for exactly the weights of these layers."""
    names = [layer.target for layer in layers]
    paths = dict.fromkeys(re.escape(name.rpartition(".")[0]) for name in names)
    config.target_modules = "|".join(paths)  # a pattern matches whole paths
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    asked = [name for other in others for name in other.target_parameters or ()]
    found = [name for other in others for name in other.functional_weights or ()]
    config.target_parameters = list(dict.fromkeys(asked)) or None
    config.functional_weights = [name for name in dict.fromkeys(found) if name in names]
