"""Changes to adapters that a model holds: new names, scores to train on again."""

from typing import Any, cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, set_requires_grad
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from pemn_surgery.adapters.checks import check_adapters_exist, check_name_is_free
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.adapters.names import check_adapter_name, saved_whole
from pemn_surgery.adapters.state import scores_from_mask
from pemn_surgery.errors import AdapterError
from pemn_surgery.masks.adapter_mask import SignDelta


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
    bits, so they are made anew around the selector's border. Signs (``form="sign_delta"``) stay
    bits, and the scales beside them train.

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
    stored = [mask for mask in masks if mask.scores is None and not isinstance(mask, SignDelta)]
    scores = [scores_from_mask(mask.mask(), mask, config) for mask in stored]
    for mask, start in zip(stored, scores, strict=True):
        scores_to_train = nn.Parameter(start.to(mask.store.device), requires_grad=False)
        mask.scores, mask.bits = scores_to_train, None
    for mask in masks:
        if isinstance(mask, SignDelta):
            mask.is_final = False
    config.inference_mode = False
    if any(adapter_name in layer.active_adapters for layer in layers):
        set_requires_grad(model, adapter_name)


def adapter_configs(model: Any) -> dict[str, PemnConfig]:
    """Return the configurations of a model's adapters by name.

    Args:
        model: A PEFT model, or a transformers model with adapters.
    """
    return cast("dict[str, PemnConfig]", getattr(model, "peft_config", {}))


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
