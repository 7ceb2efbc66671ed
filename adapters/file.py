"""Reading an adapter file without a model: what masks it holds, and whether they are whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pemn_surgery import bits
from pemn_surgery.bits import StoredMask
from pemn_surgery.errors import AdapterFileError
from pemn_surgery.masked import masked_child_name

KEY_PREFIX = "base_model.model."
MASKS = "pemn_masks"
TENSORS = "pemn_tensors"


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds.

    Attributes:
        path: The file.
        nbytes: Its size.
        masks: Number of weights of each masked parameter, by the parameter's name.
        ones: Number of ones of each mask; empty where the file holds float scores.
        stored: What the header of each mask says; empty where the file holds float scores.
        others: Shape and dtype of every other tensor, by key.
        scales: Number of row scales beside each mask; empty but for ``form="sign_delta"``.
    """

    path: Path
    nbytes: int
    masks: Mapping[str, int]
    ones: Mapping[str, int]
    stored: Mapping[str, StoredMask]
    others: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    scales: Mapping[str, int]


def read_adapter_file(path: Path) -> AdapterFile:
    """Read and check every mask of a file.

    Args:
        path: ``adapter_model.safetensors`` of an adapter.

    Returns:
        What it holds.

    Raises:
        AdapterFileError: If the file is truncated, altered or not a safetensors file.
    """
    nbytes = path.stat().st_size
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        message = (
            f"The adapter file {str(path)!r} ({nbytes} bytes) cannot be read: {error}. It is "
            "truncated or altered; nothing was loaded. Get the file again from where it was saved."
        )
        raise AdapterFileError(message) from error
    return _sort_out(path, nbytes, tensors)


def mask_key(name: str, kind: str) -> str:
    """Return the file's key of a parameter's mask.

    Args:
        name: The parameter's name, for example "layer1.0.conv1.weight".
        kind: "bits", "scores" or "row_scale".
    """
    path, _, parameter = name.rpartition(".")
    module = f"{path}." if path else ""
    return f"{KEY_PREFIX}{module}{masked_child_name(parameter)}.{MASKS}.{kind}"


def parameter_name(key: str) -> str:
    """Return the parameter's name of a mask's key (the inverse of `mask_key`)."""
    module = key.removeprefix(KEY_PREFIX).rpartition(f".{MASKS}.")[0]
    path, _, child = module.rpartition(".")
    parameter = child.removeprefix(masked_child_name(""))
    return f"{path}.{parameter}" if path else parameter


def _sort_out(path: Path, nbytes: int, tensors: Mapping[str, Tensor]) -> AdapterFile:
    masks, ones, stored, others, scales = {}, {}, {}, {}, {}
    for key, tensor in tensors.items():
        if f".{MASKS}." not in key:
            others[key] = (tuple(tensor.shape), tensor.dtype)
        elif key.endswith(".row_scale"):
            scales[parameter_name(key)] = tensor.numel()
        elif key.endswith(".scores"):
            masks[parameter_name(key)] = tensor.numel()
        else:
            name = parameter_name(key)
            stored[name] = bits.inspect(tensor, key)
            masks[name] = stored[name].weights
            mask = bits.unpack(bits.decoded(tensor, key), (masks[name],))
            ones[name] = int(mask.sum())
    return AdapterFile(path, nbytes, masks, ones, stored, others, scales)
