"""Another task's masks in the place of an adapter's: what PEFT calls hot-swapping.

The tensors stay and their values are copied over, so a compiled model is not compiled again. Masks
of one weight always have one size: there is nothing to pad, and no factor outside of the tensors.

PEFT's ``hotswap_adapter`` can be told of a method by its table of configuration keys; what it then
calls, and what prepares a model, knows LoRA alone. Those two are looked up in PEFT's module at each
call, so wrapping them there (`doors`) serves users who imported ``hotswap_adapter`` before this
package.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

from peft.utils import set_peft_model_state_dict
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor, nn

from pemn_surgery.adapters.base import fingerprint_now
from pemn_surgery.adapters.checks import adapter_configs, check_not_merged
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.adapter_file import one_reading
from pemn_surgery.adapters.files.file_checks import check_swap_fits
from pemn_surgery.adapters.files.opening import adapter_folder, check_adapter
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.adapters.names import without_name
from pemn_surgery.errors import AdapterFileError, ArchitectureError
from pemn_surgery.numbers import fingerprint as fingerprints


def swap_masks(
    model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str, config: PemnConfig
) -> None:
    """Copy another adapter's masks and tensors over those of one that a model has.

    Raises:
        UnsupportedModelError: If the adapter is merged.
        FingerprintError: If the masks were trained on another base.
        ArchitectureError: If masks or tensors differ from those that the model has, or masks lie on
            other weights (``support``).
        MaskFormatError: If a mask is damaged.
    """
    inner = cast("nn.Module", getattr(model, "_orig_mod", model))  # behind torch.compile
    check_not_merged(inner, adapter_name)
    given = {without_name(key, adapter_name): value for key, value in state_dict.items()}
    held = get_peft_model_state_dict(inner, adapter_name=adapter_name, save_embedding_layers=False)
    check_swap_fits(given, held)
    _check_same_support(config, adapter_configs(inner)[adapter_name], adapter_name)
    base = fingerprint_now(inner, adapter_name)
    fingerprints.check_fingerprint(config.origin.fingerprint or {}, base, "the given model")
    set_peft_model_state_dict(inner, given, adapter_name=adapter_name)
    adapter_configs(inner)[adapter_name].lineage = config.lineage


class SavedTensors(dict[str, Tensor]):
    """A local adapter's tensors as they were checked.

    Attributes:
        digest: That of their configuration; None where the file has no seal.
    """

    digest: str | None = None


def or_checked(load: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Check an adapter of masks when its tensors are read, and remember which save they are of."""

    @functools.wraps(load)
    def load_peft_weights(model_id: str, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        with one_reading():
            checked = check_adapter(adapter_folder(model_id, kwargs))
            tensors = load(model_id, *args, **kwargs)
        if checked is None or checked.origin.file is None:
            return tensors
        saved = SavedTensors(tensors)
        saved.digest = (checked.origin.file.sealed or {}).get("digest")
        return saved

    return load_peft_weights


def or_as_saved(insert: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Leave the keys of masks as their file has them."""

    @functools.wraps(insert)
    def _insert_adapter_name_into_state_dict(
        state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        if isinstance(state_dict, SavedTensors):
            return state_dict
        return insert(state_dict, *args, **kwargs)

    return _insert_adapter_name_into_state_dict


def or_masks(swap: Callable[..., None]) -> Callable[..., None]:
    """Swap masks with `swap_masks`."""

    @functools.wraps(swap)
    def hotswap_adapter_from_state_dict(
        model: nn.Module,
        state_dict: dict[str, Tensor],
        adapter_name: str,
        config: Any,
        parameter_prefix: str = "lora_",
    ) -> None:
        if isinstance(config, PemnConfig):
            _check_same_save(state_dict, config)
            swap_masks(model, state_dict, adapter_name, config)
        else:
            swap(model, state_dict, adapter_name, config, parameter_prefix)

    return hotswap_adapter_from_state_dict


def or_nothing_to_do(convert: Callable[[nn.Module], bool]) -> Callable[[nn.Module], bool]:
    """Tell PEFT that masks are ready to be swapped: they have no scalings."""

    @functools.wraps(convert)
    def _convert_scalings_to_tensor(model: nn.Module) -> bool:
        has_masks = any(isinstance(module, PemnLayer) for module in model.modules())
        return convert(model) or has_masks

    return _convert_scalings_to_tensor


def _check_same_support(given: PemnConfig, held: PemnConfig, adapter_name: str) -> None:
    """Refuse masks of other weights than those that the adapter in place has masks of."""
    wanted, found = held.support_in_force, given.support_in_force
    if wanted != found:
        message = (
            f"The adapter cannot take the place of {adapter_name!r}, which masks other weights "
            f"({wanted}; it {found}). Load it under a name of its own (load_adapter). Nothing was "
            "changed."
        )
        raise ArchitectureError(message)


def _check_same_save(state_dict: dict[str, Tensor], config: PemnConfig) -> None:
    """Refuse tensors that were saved after PEFT had read and compared the configuration."""
    file = config.origin.file
    read = None if file is None else file.sealed
    if isinstance(state_dict, SavedTensors) and read and state_dict.digest != read["digest"]:
        message = (
            f"The adapter in {str(file and file.path.parent)!r} was saved anew while "
            f"it was read (digest {read['digest']!r}, then {state_dict.digest!r}). Nothing was "
            "changed; swap it again."
        )
        raise AdapterFileError(message)
