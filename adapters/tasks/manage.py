"""Changes to adapters that a model holds: new names, scores to train on again, new from old.

In mask algebra a weight that an adapter does not mask counts as kept. The new adapter holds bits;
make it trainable with `to_trainable`.
"""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast, get_args

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, set_requires_grad
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from pemn_surgery.adapters.base import fingerprint_of
from pemn_surgery.adapters.checks import (
    adapter_configs,
    check_adapters_exist,
    check_name_is_free,
)
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.identity import adapter_identity, made_from
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.adapters.names import check_adapter_name, saved_whole
from pemn_surgery.adapters.state import scores_from_mask
from pemn_surgery.adapters.task_layer import PemnTaskLayer
from pemn_surgery.coding import bits
from pemn_surgery.errors import AdapterError
from pemn_surgery.masks.adapter_mask import AdapterMask
from pemn_surgery.masks.selector import Selector
from pemn_surgery.masks.sign_delta import count_in_units
from pemn_surgery.masks.task_tensors import TensorSet
from pemn_surgery.numbers.fingerprint import Fingerprint

CombinationName = Literal["intersection", "union", "majority", "difference", "xor"]

# What masks have in common where the bits of one mean the same in another.
ALIKE: dict[str, Callable[[PemnConfig], Any]] = {
    "form": lambda config: config.form,
    "scale": lambda config: config.scale,
    "support": lambda config: config.support_in_force,
}
# What of an adapter is no mask, so that no algebra makes one adapter of several.
_NO_MASKS: dict[str, Callable[[PemnConfig], bool]] = {
    "have trained scales beside their masks (scale='row')": lambda config: config.scale == "row",
    "add signs to the weights (form='sign_delta') and keep or drop none of them": lambda config: (
        config.form == "sign_delta"
    ),
    "drop weights that have no bit, by their density (support_others='drawn')": lambda config: (
        config.support_others == "drawn"
    ),
}


def rename_adapter(model: nn.Module, old: str, new: str) -> None:
    """Give an adapter another name; all else stays, also which adapters are active.

    Args:
        model: A model with masks: what `pemnify` returned, or one of transformers'.
        old: Its name.
        new: Its new name.

    Raises:
        AdapterError: If there is no such adapter, or one of the new name.
        AdapterNameError: If no adapter can have the new name.
        AlreadyPemnifiedError: If the new name is taken.
    """
    configs = adapter_configs(model)
    check_adapters_exist(configs, [old])
    if old == new:
        return
    check_adapter_name(new, saved_whole(configs.values()))
    check_name_is_free(model, new)
    if new in configs:
        message = f"The model has an adapter {new!r} already. Choose another name."
        raise AdapterError(message)
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            _rename_within(module, old, new)
    _rename_key(configs, old, new)
    for holder in (model, getattr(model, "base_model", None)):
        if isinstance(holder, (PeftModel, BaseTuner)):
            holder.active_adapter = _renamed(holder.active_adapter, old, new)


def to_trainable(model: nn.Module, adapter_name: str = "default") -> None:
    """Give an adapter that was loaded for inference scores to train on.

    Its masks stay exactly what they are. The magnitudes of earlier scores are not in a file of
    bits, so they are made anew around the selector's border. Signs that come from a fine-tuned
    model stay bits, and the scales beside them train.

    Args:
        model: A model with masks.
        adapter_name: The adapter. It trains once it is active.

    Raises:
        AdapterError: If there is no such adapter, or it is merged.
        MaskNotLoadedError: If its masks were never loaded.
    """
    configs = adapter_configs(model)
    check_adapters_exist(configs, [adapter_name])
    config = configs[adapter_name]
    layers = [module for module in model.modules() if isinstance(module, PemnLayer)]
    if any(adapter_name in layer.merged_adapters for layer in layers):
        message = f"The adapter {adapter_name!r} is merged; call unmerge_adapter() before training."
        raise AdapterError(message)
    masks = [layer.mask_of(adapter_name) for layer in layers if adapter_name in layer.pemn_masks]
    stored = [mask for mask in masks if mask.scores is None and not config.has_fixed_signs]
    scores = [scores_from_mask(mask.mask(), mask, config) for mask in stored]
    for mask, start in zip(stored, scores, strict=True):
        scores_to_train = nn.Parameter(start.to(mask.store.device), requires_grad=False)
        mask.scores, mask.bits = scores_to_train, None
    for layer in layers:
        if adapter_name in layer.pemn_masks:
            count_in_units(layer.mask_of(adapter_name), layer.fan_in)
    for mask in masks:
        mask.is_final = False
    config.inference_mode = False
    if any(adapter_name in layer.active_adapters for layer in layers):
        set_requires_grad(model, adapter_name)


def add_combination(
    model: nn.Module,
    configs: dict[str, PemnConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination: CombinationName,
) -> PemnConfig:
    """Give a model a further adapter that is made from some that it has.

    Arguments and errors are those of `PemnModel.add_weighted_adapter`.

    Returns:
        The new adapter's configuration.
    """
    _check_combination(model, configs, adapters, weights, adapter_name, combination)
    lineage = made_from(combination, [adapter_identity(name, model) for name in adapters])
    shares = torch.tensor(weights, dtype=torch.float64)
    shares = shares / shares.sum()
    masked = [module for module in model.modules() if isinstance(module, PemnLayer)]
    layers = [layer for layer in masked if any(name in layer.pemn_masks for name in adapters)]
    base = fingerprint_of(layers)  # adapters of other weights know other parts of the base
    for layer in layers:
        made = _combination(layer, adapters, shares, combination, base)
        layer.pemn_masks[adapter_name] = made
    for module in model.modules():
        if isinstance(module, PemnTaskLayer) and adapters[0] in module.pemn_tensors:
            _add_tensors(module, adapters, shares, adapter_name, combination)
    for wrapper in _whole_modules(model, adapters):
        source = wrapper.modules_to_save[_holders(wrapper, adapters)[0]]
        wrapper.modules_to_save[adapter_name] = copy.deepcopy(source).requires_grad_(False)
        wrapper._adapters.add(adapter_name)
    config = _combined_config([configs[name] for name in adapters], adapters, layers)
    config.lineage = lineage
    return config


def combined_mask(
    masks: Sequence[Tensor], shares: Sequence[float] | Tensor, combination: CombinationName
) -> Tensor:
    """Return the mask, bool, that some masks of one weight, bool of one shape, make together.

    Only "majority" reads the shares, one number a mask.
    """
    stacked = torch.stack(list(masks))
    if combination == "intersection":
        return stacked.all(dim=0)
    if combination == "union":
        return stacked.any(dim=0)
    if combination == "difference":
        return stacked[0] & ~stacked[1:].any(dim=0)
    if combination == "xor":
        return (~stacked).sum(dim=0) % 2 == 0
    kept = torch.as_tensor(shares, dtype=torch.float64, device=stacked.device)
    return torch.einsum("m...,m->...", stacked.to(torch.float64), kept) > kept.sum() / 2


def _rename_within(module: Any, old: str, new: str) -> None:
    """Rename an adapter in one of PEFT's layers or wrappers."""
    tables = (*module.adapter_layer_names, *module.other_param_names)
    for name in tables:
        _rename_key(getattr(module, name), old, new)
    module._active_adapter = _renamed(module._active_adapter, old, new)
    module.merged_adapters[:] = _renamed(module.merged_adapters, old, new)
    if isinstance(module, AuxiliaryTrainingWrapper):
        module._adapters = set(_renamed(module._adapters, old, new))


def _renamed(names: Any, old: str, new: str) -> Any:
    """Return one name, or a list of names, with one of them changed."""
    if isinstance(names, str):
        return new if names == old else names
    return [new if name == old else name for name in names]


def _rename_key(table: Any, old: str, new: str) -> None:
    """Rename a key in place; the order of a mapping stays."""
    if old not in table:
        return
    items = [(new if key == old else key, value) for key, value in table.items()]
    table.clear()
    for key, value in items:
        table[key] = value


def _check_combination(
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
    for problem, has in _NO_MASKS.items():
        found = [name for name in adapters if has(configs[name])]
        if found:
            message = (
                f"The adapters {', '.join(found)} {problem}: activate several at once, and they "
                "apply in turn."
            )
            raise AdapterError(message)
    for what, told in ALIKE.items():
        found = {name: told(configs[name]) for name in adapters}
        if len(set(found.values())) > 1:
            message = f"The adapters differ in {what} ({found}), so they cannot be one."
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


def _combination(
    layer: PemnLayer,
    adapters: Sequence[str],
    shares: Tensor,
    combination: CombinationName,
    fingerprint: Fingerprint,
) -> AdapterMask:
    """Return a layer's mask of the new adapter, which has no density or threshold of its own."""
    held = {name: layer.mask_of(name) for name in adapters if name in layer.pemn_masks}
    like = next(iter(held.values()))
    ones = torch.ones(like.mask_shape, dtype=torch.bool, device=like.store.device)
    with torch.no_grad():
        masks = [held[name].mask() if name in held else ones for name in adapters]
    stored = bits.pack(combined_mask(masks, shares, combination))
    selector = Selector("threshold", density=0.5, threshold=0.0)
    return type(like)(
        like.target,
        like.shape,
        selector,
        fingerprint,
        scaled=like.scaled,
        stored=stored,
        places=like.places,
        others=like.others,
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


def _combined_config(
    configs: Sequence[PemnConfig], adapters: Sequence[str], layers: Sequence[PemnLayer]
) -> PemnConfig:
    config = configs[0].own_copy()
    config.inference_mode = True
    config.selector, config.threshold, config.score_init = "threshold", 0.0, 0.01
    config.score_mean = config.score_std = None
    config.overall_density = config.density_pattern = None
    config.density = 0.5 if config.density == "erk" else config.density
    config.origin = replace(config.origin, file=None)
    saved = [one.modules_to_save for one in configs if one.modules_to_save]
    config.modules_to_save = saved[0] if saved else None
    if not all(name in layer.pemn_masks for layer in layers for name in adapters):
        _name_targets(config, configs, layers)
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
