"""Reading an adapter file without a model: what masks it holds, and whether they are whole.

A file that `pemn_surgery.adapters.files.atomic` saved holds, beside its tensors, the adapter's
configuration and one digest over both (its *seal*, in the safetensors metadata). A file without
a seal was written by transformers, by another tool or by an early version: its masks have
checksums of their own, nothing else of it is covered.

Coded masks stay as they are while a file is read. How much memory their bits take is what the file
claims, so they are decoded once the model has agreed to the sizes (`decode_held`), or, where there
is no model, up to a limit (`read_decoded`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pemn_surgery.adapters.files.contents import (
    FINGERPRINT,
    KEY_PREFIX,
    MASKS,
    TENSORS,
    AdapterFile,
    Wish,
    check_room,
    is_fingerprint_key,
    is_mask,
    is_mask_key,
    mask_key,
    parameter_name,
    sort_out,
)
from pemn_surgery.adapters.files.disk import named_errors
from pemn_surgery.adapters.files.seal import SEAL, check_seal, digest_of, sealed_configuration
from pemn_surgery.coding import bits, codec
from pemn_surgery.coding.header import inspect

__all__ = [
    "CONFIG",
    "FINGERPRINT",
    "KEY_PREFIX",
    "MASKS",
    "TENSORS",
    "WEIGHTS",
    "AdapterFile",
    "Contents",
    "Wish",
    "decode_held",
    "held_tensors",
    "holds_masks",
    "ignores_sizes",
    "is_fingerprint_key",
    "is_mask_key",
    "is_reading",
    "mask_key",
    "one_reading",
    "parameter_name",
    "put_on_base",
    "read_adapter",
    "read_adapter_file",
    "read_decoded",
    "seal",
]

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Contents:
    """An adapter file's tensors, and what they are.

    Attributes:
        file: What the file holds.
        tensors: Its tensors by key, on the CPU.
        coded: Keys of the masks among them that are to be decoded, but for ``coding="base"``.
    """

    file: AdapterFile
    tensors: Mapping[str, Tensor]
    coded: frozenset[str] = frozenset()


_held: ContextVar[dict[Path, Contents] | None] = ContextVar("held", default=None)
_wish: ContextVar[Wish | None] = ContextVar("wish", default=None)


@contextmanager
def one_reading(wish: Wish | None = None) -> Iterator[None]:
    """Read each adapter file once: all who ask within get the same content.

    PEFT asks for an adapter in several steps, and another process may save a new one in between.

    Args:
        wish: What is asked for of all files that are read within.
    """
    if _held.get() is not None:  # a loading method that another one calls
        yield
        return
    token, asked = _held.set({}), _wish.set(wish)
    try:
        yield
    finally:
        _held.reset(token)
        _wish.reset(asked)


def is_reading() -> bool:
    """Tell whether a loading method is at work that has checked a file's configuration."""
    return _held.get() is not None


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


def read_decoded(path: Path) -> Contents:
    """Read a file as `read_adapter` does, with its masks as bits, where no model is at hand.

    Args:
        path: ``adapter_model.safetensors`` of an adapter.

    Returns:
        Its tensors, but that masks of ``coding="base"`` stay coded: they take their base.

    Raises:
        AdapterFileError: If the file is missing, truncated, altered or not a safetensors file.
        MaskFormatError: If masks would take far more memory than the file is long, or are no code.
    """
    contents = read_adapter(path)
    check_room(contents.file)
    return _decoded(contents)


def decode_held(file: AdapterFile) -> None:
    """Decode what `one_reading` holds of a file, once a model has the sizes that it claims.

    Args:
        file: What was read and compared with the model.

    Raises:
        MaskFormatError: If a mask is no code of so many weights.
    """
    held = _held.get() or {}
    contents = held.get(file.path)
    if contents is not None and contents.file is file:
        held[file.path] = _decoded(contents)


def ignores_sizes() -> bool:
    """Tell whether the load within `one_reading` leaves out tensors of other sizes."""
    wish = _wish.get()
    return wish is not None and wish.ignores_sizes


def put_on_base(file: AdapterFile, base: bytes) -> None:
    """Name another base in the masks that `one_reading` holds of a file.

    Their base was compared with the model's by the names in the file; from now on it goes by the
    model's own.

    Args:
        file: What was read, its masks decoded.
        base: 12 bytes that identify the base.
    """
    held = _held.get() or {}
    contents = held.get(file.path)
    if contents is not None and contents.file is file:
        tensors = {key: _on_base(key, value, base) for key, value in contents.tensors.items()}
        held[file.path] = Contents(file, tensors)


def _on_base(key: str, value: Tensor, base: bytes) -> Tensor:
    if is_fingerprint_key(key):
        return torch.tensor(list(base), dtype=value.dtype)
    return bits.with_base(value, base) if is_mask(key) else value


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
    return {**configuration, "digest": digest_of(_raw(path)[1], configuration)}


def _read(path: Path) -> Contents:
    nbytes, tensors, metadata = _raw(path)
    stored = {key: inspect(value, key) for key, value in tensors.items() if is_mask(key)}
    sealed = sealed_configuration(path, metadata)
    if sealed is not None:
        check_seal(path, tensors, sealed)
    wish = _wish.get() or Wish()
    file = sort_out(path, nbytes, tensors, stored, sealed, wish)
    seen = {wish.renamed(key): value for key, value in tensors.items()}
    return Contents(file, seen, frozenset(mask_key(name, "bits") for name in file.coded))


def _decoded(contents: Contents) -> Contents:
    """Return the contents with coded masks as bits, but for those that take their base."""
    tensors, file = dict(contents.tensors), contents.file
    for key in contents.coded:
        tensors[key] = codec.decode(tensors[key], key)
        file.masks[parameter_name(key)].count(tensors[key])
    return Contents(file, tensors)


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
    with named_errors(path), safe_open(path, framework="pt", backend="pread") as file:
        yield file
