"""What an adapter is, whatever it is called and however its file is coded.

Its *identity* is a digest of what it does to a base, and not of the base: which weights its masks
are of and every bit of them, what a bit means, and every other tensor that it saves.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

from peft.tuners.tuners_utils import onload_layer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from pemn_surgery.adapters.base import masked_layers
from pemn_surgery.adapters.checks import adapter_configs, check_adapters_exist
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.adapter_file import one_reading, read_decoded
from pemn_surgery.adapters.files.contents import (
    BANK_KEY,
    AdapterFile,
    is_mask_key,
    mask_key,
    plain_name,
)
from pemn_surgery.adapters.files.file_checks import check_without_base
from pemn_surgery.adapters.files.opening import open_adapter
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.adapters.task_layer import PemnTaskLayer
from pemn_surgery.adapters.whole_modules import path_in_base
from pemn_surgery.coding.header import HEADER_BYTES
from pemn_surgery.errors import AdapterFileError
from pemn_surgery.masks.task_tensors import TensorSet
from pemn_surgery.numbers.digest import Named, bytes_of, digest_of
from pemn_surgery.planning.roles import full_name
from pemn_surgery.transforms import gathered

_DIGITS = 16

# By the parameter's name: the mask as bits, and the scales beside it.
Masks = Mapping[str, tuple[Tensor, Tensor | None]]


def adapter_identity(adapter: str | Path, model: nn.Module | None = None) -> str:
    """Return 16 hexadecimal digits that two adapters have in common if and only if they are equal.

    Equal are masks on the same weights with the same bits that mean the same, and equal other
    tensors; no matter the adapter's name, its file's coding, whether it was loaded or trained in
    place, or its base.

    Args:
        adapter: Folder of an adapter; with ``model`` the name of one that the model has.
        model: A model that has it.

    Raises:
        AdapterFileError: If the folder has no masks as bits, or a file is truncated or altered.
        AdapterError: If the model has no such adapter.
        MaskNotLoadedError: If a mask of the model's was never loaded.
    """
    if model is not None:
        return _of_held(model, str(adapter))
    with one_reading():
        config, file = open_adapter(adapter)
        if not holds_bits(file):
            check_without_base(file)
            _refuse_scores(adapter)
        return identity_of_file(config, file)


def holds_bits(file: AdapterFile) -> bool:
    """Tell whether a file alone tells its masks: not scores, nor what only the base can decode."""
    headers = file.headers
    return len(headers) == len(file.masks) and all(h.coding != "base" for h in headers.values())


def identity_of_file(config: PemnConfig, file: AdapterFile) -> str:
    """Return the identity of an adapter in a file that `holds_bits`."""
    tensors = read_decoded(file.path).tensors
    masks = {
        name: (tensors[mask_key(name, "bits")], tensors.get(mask_key(name, "row_scale")))
        for name in file.masks
    }
    kept = (key for key in tensors if not is_mask_key(key) and key != BANK_KEY)
    others = ((plain_name(key), tensors[key]) for key in kept)
    return _identity(config, masks, others)


def made_from(how: str, identities: Iterable[str]) -> dict[str, Any]:
    """Return the lineage of an adapter that was made from others, or from tensors."""
    return {"by": how, "of": list(identities)}


def identity_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return 16 hexadecimal digits of a state dict, or of masks, that an adapter is made from."""
    plain = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    return digest_of(lambda: sorted(plain.items()))[:_DIGITS]


def others_of(config: PemnConfig) -> list[Any]:
    """Return what decides how weights without a bit are masked (``support_others="drawn"``)."""
    return [config.seed, config.density, config.overall_density, config.density_pattern]


def payload_digest(stored: Tensor) -> str:
    """Return the digest of a mask's bits, without their header, which names the base."""
    return hashlib.sha256(bytes_of(stored)[HEADER_BYTES:]).hexdigest()


def tensor_digest(value: Tensor) -> str:
    """Return the digest of a tensor with its type and shape."""
    start = f"{value.dtype} {list(value.shape)} ".encode()
    return hashlib.sha256(start + bytes(bytes_of(value))).hexdigest()


def _of_held(model: nn.Module, name: str) -> str:
    configs = adapter_configs(model)
    check_adapters_exist(configs, [name])
    masks = {layer.target: _held_bits(layer, name) for layer in masked_layers(model, name).values()}
    return _identity(configs[name], masks, _saved_tensors(model, name))


def _held_bits(layer: PemnLayer, name: str) -> tuple[Tensor, Tensor | None]:
    with onload_layer(layer):
        mask = layer.mask_of(name)
        return mask.as_bits(), mask.saved_scale


def _identity(config: PemnConfig, masks: Masks, others: Named) -> str:
    lines = [json.dumps(_meaning(config), sort_keys=True), *sorted(_lines(masks, others))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:_DIGITS]


def _lines(masks: Masks, others: Named) -> Iterable[str]:
    for name, (stored, scale) in masks.items():
        scaled = "" if scale is None else tensor_digest(gathered(scale))
        yield f"mask {name!r} {payload_digest(stored)} {scaled}"
    for name, value in others:
        yield f"tensor {name!r} {tensor_digest(gathered(value))}"


def _meaning(config: PemnConfig) -> dict[str, Any]:
    """Return what the settings say of every bit: what it does, and to which weight."""
    support = config.support_in_force
    meaning: dict[str, Any] = {"form": config.form, "scale": config.scale}
    if support is not None:
        seed = None if support.reads_base else support.seed
        meaning["support"] = [support.share, support.by, seed]
    if support is not None and config.support_others == "drawn":
        meaning["others"] = others_of(config)
    return meaning


def _saved_tensors(model: nn.Module, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the unmasked tensors that an adapter saves, by their names in the base."""
    for path, module in model.named_modules():
        if isinstance(module, PemnTaskLayer) and adapter in module.pemn_tensors:
            held = cast("TensorSet", module.pemn_tensors[adapter]).state_dict()
            yield from ((full_name(module.target, name), held[name]) for name in held)
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            whole = module.modules_to_save[adapter].state_dict()
            yield from ((full_name(path_in_base(path), name), whole[name]) for name in whole)


def _refuse_scores(folder: str | Path) -> NoReturn:
    message = (
        f"{str(folder)!r} holds float scores, and an identity is of masks. Give the folder of an "
        "adapter that save_pretrained made; a Trainer's checkpoint holds scores."
    )
    raise AdapterFileError(message)
