"""What a task's files will weigh beside the bytes of their tensors, before there is a task.

On a small model the names of the tensors and the configuration, which both files hold, are as long
as the masks. So a plan counts them: the same configuration and the same header as a save's, with
zeros where a save has digests.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import Tensor, nn

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.atomic import config_text, header_bytes, sealed_metadata
from pemn_surgery.adapters.files.contents import BANK_KEY, KEY_PREFIX, TENSORS, mask_key
from pemn_surgery.coding import bits
from pemn_surgery.masks.task_tensors import TASK_CHILD
from pemn_surgery.numbers.bank import Shape, common_dtype
from pemn_surgery.numbers.fingerprint import types_of
from pemn_surgery.planning.plan import Owned, Plan

_DIGEST = "0" * 16

# safetensors' names, in its own order, which decides the order of tensors in a file.
_TYPES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
}
_ORDER = list(_TYPES.values())


def frame_bytes(plan: Plan, model: nn.Module, config: PemnConfig) -> int:
    """Return the bytes of a task's two files that are neither masks nor the task's other tensors.

    Returns:
        Size of the weights' header, with the seal in it, of ``adapter_config.json``, and of a bank
        that is stored with them. It is exact, unless PEFT shortens ``target_modules``, as it does
        with twenty names or more.
    """
    settings = _settings(plan, model, config)
    header = header_bytes(_header(plan, model), sealed_metadata(settings))
    bank = sum(nbytes for _, _, _, nbytes in _bank_entry(plan, model))
    return len(header) + len(config_text(settings).encode()) + bank


def _settings(plan: Plan, model: nn.Module, config: PemnConfig) -> dict[str, Any]:
    """Return the ``adapter_config.json`` that saving writes, with zeros for digests."""
    saved = copy.copy(config)
    saved.inference_mode = True
    if isinstance(saved.target_modules, str):
        _maybe_include_all_linear_layers(saved, model)
    named = saved.base_model_name_or_path or model.__dict__.get("name_or_path")
    saved.base_model_name_or_path = named or None
    saved.fingerprint = dict.fromkeys(_known_types(plan, model), _DIGEST)
    saved.digest = _DIGEST
    written = saved.to_dict()
    if saved.task_type is None:
        made_of = type(model)
        library = {"parent_library": made_of.__module__}
        written["auto_mapping"] = {"base_model_class": made_of.__name__, **library}
    return {key: list(value) if isinstance(value, set) else value for key, value in written.items()}


def _known_types(plan: Plan, model: nn.Module) -> list[str]:
    if plan.spec.drawn:
        return types_of([])
    tensors = _tensors(model)
    return types_of([tensors[item.name].dtype for item in plan.targets if item.name in tensors])


def _header(plan: Plan, model: nn.Module) -> dict[str, Any]:
    header, offset = {}, 0
    entries = sorted(_entries(plan, model), key=lambda one: (-_ORDER.index(one[1]), one[0]))
    for key, dtype, shape, nbytes in entries:
        place = [offset, offset + nbytes]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": place}
        offset += nbytes
    return header


def _entries(plan: Plan, model: nn.Module) -> Iterator[tuple[str, str, Shape, int]]:
    """Yield the key, type, shape and bytes of each tensor in the file."""
    yield from _bank_entry(plan, model)
    for target in plan.targets:
        size = bits.packed_bytes(target.bits)
        yield mask_key(target.name, "bits"), "U8", (size,), size
        if target.row_scales:
            scales = target.row_scales
            yield mask_key(target.name, "row_scale"), "F32", (scales,), 4 * scales
    tensors = _tensors(model)
    inside = f"{TASK_CHILD}.{TENSORS}."
    for items, within in ((plan.owned, inside), (plan.whole, "")):
        for item in items:
            if item.saved and not item.tied_to:
                prefix = f"{KEY_PREFIX}{item.path}." if item.path else KEY_PREFIX
                key = f"{prefix}{within}{item.tensor}"
                yield key, _type_of(item, tensors), item.shape, item.nbytes


def _bank_entry(plan: Plan, model: nn.Module) -> Iterator[tuple[str, str, Shape, int]]:
    """Yield what a bank that is stored with the masks is in the file."""
    if plan.spec.init == "stored":
        tensors = _tensors(model)
        dtype = common_dtype(tensors[target.name].dtype for target in plan.targets)
        yield BANK_KEY, _TYPES[dtype], (plan.bank_floats,), plan.bank_floats * dtype.itemsize


def _type_of(item: Owned, tensors: Mapping[str, Tensor]) -> str:
    """Return the type that a tensor is saved in: its own, or the wider one that it trains in."""
    held = tensors.get(item.name)
    count = torch.Size(item.shape).numel()
    if held is None or held.element_size() * count != item.nbytes:
        return "F32"
    return _TYPES[held.dtype]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}
