"""Reading an adapter file without a model: what masks it holds, and whether they are whole.

A file that `pemn_surgery.adapters.atomic` saved holds, beside its tensors, the adapter's
configuration and one digest over both (its *seal*, in the safetensors metadata). A file without
a seal was written by transformers, by another tool or by an early version: its masks have
checksums of their own, nothing else of it is covered.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pemn_surgery import bits, codec
from pemn_surgery.bits import StoredMask
from pemn_surgery.errors import AdapterFileError
from pemn_surgery.masked import masked_child_name

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
SEAL = "pemn"  # the metadata's key
KEY_PREFIX = "base_model.model."
MASKS = "pemn_masks"
TENSORS = "pemn_tensors"

# A part of a model may be called like one of these: a key is known by its last three parts.
_MASK_KEY = re.compile(rf"(^|\.){masked_child_name('')}[^.]+\.{MASKS}\.[^.]+$")

_UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, RuntimeError, AttributeError)


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds.

    Attributes:
        path: The file.
        nbytes: Its size.
        masks: Number of weights of each masked parameter, by the parameter's name.
        ones: Number of ones of each mask; those that are float scores, or coded beside the base,
            are not there.
        stored: What the header of each mask says; empty where the file holds float scores.
        others: Shape and dtype of every other tensor, by key.
        scales: Number of row scales beside each mask; empty but for ``form="sign_delta"``.
        sealed: The configuration that the file was saved with, as in ``adapter_config.json``;
            None where the file has no seal.
    """

    path: Path
    nbytes: int
    masks: Mapping[str, int]
    ones: Mapping[str, int]
    stored: Mapping[str, StoredMask]
    others: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    scales: Mapping[str, int]
    sealed: Mapping[str, Any] | None


@dataclass(frozen=True)
class Contents:
    """An adapter file's tensors, and what they are.

    Attributes:
        file: What the file holds.
        tensors: Its tensors by key, on the CPU; coded masks as bits, but for ``coding="base"``.
    """

    file: AdapterFile
    tensors: Mapping[str, Tensor]


_held: ContextVar[dict[Path, Contents] | None] = ContextVar("held", default=None)


@contextmanager
def one_reading() -> Iterator[None]:
    """Read each adapter file once: all who ask within get the same content.

    PEFT asks for an adapter in several steps, and another process may save a new one in between.
    """
    if _held.get() is not None:  # a loading method that another one calls
        yield
        return
    token = _held.set({})
    try:
        yield
    finally:
        _held.reset(token)


def read_adapter(path: Path) -> Contents:
    """Read and check every mask of a file; within `one_reading` return what was read before.

    Args:
        path: ``adapter_model.safetensors`` of an adapter.

    Returns:
        Its tensors, and what they are.

    Raises:
        AdapterFileError: If the file is missing, truncated, altered or not a safetensors file.
    """
    held = _held.get()
    if held is None:
        return _read(path)
    if path not in held:
        held[path] = _read(path)
    return held[path]


def held_tensors(path: Path) -> Mapping[str, Tensor] | None:
    """Return the tensors of a file that `one_reading` has read; None for all others."""
    contents = (_held.get() or {}).get(path)
    return contents.tensors if contents is not None else None


def read_adapter_file(path: Path) -> AdapterFile:
    """Return what an adapter file holds, without its tensors.

    Args:
        path: ``adapter_model.safetensors`` of an adapter.

    Raises:
        AdapterFileError: If the file is missing, truncated, altered or not a safetensors file.
    """
    return read_adapter(path).file


def holds_masks(path: Path) -> bool:
    """Tell whether a file has a mask in it, from its header alone.

    Args:
        path: A safetensors file.

    Raises:
        AdapterFileError: If the file is missing, truncated, altered or not a safetensors file.
    """
    with _opened(path) as file:
        sealed = SEAL in (file.metadata() or {})
        return sealed or any(map(is_mask_key, file.keys()))


def seal(path: Path, configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the digest that binds it to a file's tensors.

    Args:
        path: A whole file.
        configuration: What ``adapter_config.json`` holds.

    Returns:
        The configuration, its "digest" filled in.
    """
    return {**configuration, "digest": _digest(_raw(path)[1], configuration)}


def mask_key(name: str, kind: str) -> str:
    """Return the file's key of a parameter's mask.

    Args:
        name: The parameter's name, for example "layer1.0.conv1.weight".
        kind: "bits", "scores" or "row_scale".
    """
    path, _, parameter = name.rpartition(".")
    module = f"{path}." if path else ""
    return f"{KEY_PREFIX}{module}{masked_child_name(parameter)}.{MASKS}.{kind}"


def is_mask_key(key: str) -> bool:
    """Tell whether a file's key is a mask's: its bits, scores or scales."""
    return _MASK_KEY.search(key) is not None


def parameter_name(key: str) -> str:
    """Return the parameter's name of a mask's key (the inverse of `mask_key`)."""
    module = key.removeprefix(KEY_PREFIX).rpartition(f".{MASKS}.")[0]
    path, _, child = module.rpartition(".")
    parameter = child.removeprefix(masked_child_name(""))
    return f"{path}.{parameter}" if path else parameter


def _read(path: Path) -> Contents:
    nbytes, tensors, metadata = _raw(path)
    stored = {key: bits.inspect(value, key) for key, value in tensors.items() if _is_mask(key)}
    sealed = _sealed(path, metadata)
    if sealed is not None:
        _check_seal(path, tensors, sealed)
    tensors |= {
        key: codec.decode(tensors[key], key)
        for key, header in stored.items()
        if header.coding not in ("bits", "base")  # that takes the base
    }
    return Contents(_sort_out(path, nbytes, tensors, stored, sealed), tensors)


def _raw(path: Path) -> tuple[int, dict[str, Tensor], Mapping[str, str]]:
    """Return a file's size, tensors as they are stored, and metadata."""
    with _opened(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return path.stat().st_size, tensors, file.metadata() or {}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file once, so that another one may take its place meanwhile.

    The default backend opens it again by its name, and would find that one's tensors under this
    one's header. The library checks first that the header is no longer than the file and that the
    tensors' places fill the rest exactly, so no more is allocated than the file is long.
    """
    with _named(path), safe_open(path, framework="pt", backend="pread") as file:
        yield file


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name what safetensors and torch may raise on a header that means nothing."""
    try:
        yield
    except _UNREADABLE as error:
        nbytes = path.stat().st_size if path.is_file() else 0
        message = (
            f"The adapter file {str(path)!r} ({nbytes} bytes) cannot be read: {error}. It is "
            "truncated or altered; nothing was loaded. Get the file again from where it was saved."
        )
        raise AdapterFileError(message) from error


def _sealed(path: Path, metadata: Mapping[str, str]) -> Mapping[str, Any] | None:
    if SEAL not in metadata:
        return None
    try:
        configuration = json.loads(metadata[SEAL])
    except (ValueError, RecursionError) as error:
        _refuse_seal(path, f"cannot be read ({type(error).__name__}: {error})")
    if not isinstance(configuration, dict):
        _refuse_seal(path, f"is {type(configuration).__name__}, not a configuration")
    return configuration


def _check_seal(path: Path, tensors: Mapping[str, Tensor], sealed: Mapping[str, Any]) -> None:
    actual = _digest(tensors, sealed)
    if actual != sealed.get("digest"):
        _refuse_seal(path, f"says digest {sealed.get('digest')!r}, the content has {actual!r}")


def _refuse_seal(path: Path, problem: str) -> NoReturn:
    message = (
        f"The seal of the adapter file {str(path)!r} {problem}: the file was altered after it was "
        "saved. Nothing was loaded; get the file again from where it was saved."
    )
    raise AdapterFileError(message)


def _digest(tensors: Mapping[str, Tensor], configuration: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits over every tensor's name, type, shape and bytes, and the rest.

    Against damage, not against forgery: a CRC-32 finds every changed byte of a tensor.
    """
    rest = {key: value for key, value in configuration.items() if key != "digest"}
    lines = [json.dumps(rest, sort_keys=True), *sorted(_described(tensors))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _described(tensors: Mapping[str, Tensor]) -> Iterable[str]:
    for key, tensor in tensors.items():
        content: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        yield f"{key} {tensor.dtype} {list(tensor.shape)} {zlib.crc32(content):08x}"


def _is_mask(key: str) -> bool:
    """Tell whether a key is a stored mask's: neither scores nor scales."""
    return is_mask_key(key) and not key.endswith((".row_scale", ".scores"))


def _sort_out(
    path: Path,
    nbytes: int,
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, StoredMask],
    sealed: Mapping[str, Any] | None,
) -> AdapterFile:
    masks, ones, others, scales = {}, {}, {}, {}
    for key, tensor in tensors.items():
        if not is_mask_key(key):
            others[key] = (tuple(tensor.shape), tensor.dtype)
        elif key.endswith(".row_scale"):
            scales[parameter_name(key)] = tensor.numel()
        elif key.endswith(".scores"):
            masks[parameter_name(key)] = tensor.numel()
        else:
            masks[parameter_name(key)] = stored[key].weights
            if stored[key].coding != "base":
                ones[parameter_name(key)] = bits.count_ones(tensor)
    headers = {parameter_name(key): header for key, header in stored.items()}
    return AdapterFile(path, nbytes, masks, ones, headers, others, scales, sealed)
