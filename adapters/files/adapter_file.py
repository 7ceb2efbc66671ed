"""Reading an adapter's two files without a model: what they hold, and whether they are whole.

A file that `pemn_surgery.adapters.files.atomic` saved holds, beside its tensors, the adapter's
configuration and one digest over both (its *seal*, in the safetensors metadata). A file without
a seal was written by transformers, by another tool or by an early version: its masks have
checksums of their own, nothing else of it is covered. Seals are against damage, not against
forgery: there is no key.

Coded masks stay as they are while a file is read. How much memory their bits take is what the file
claims, so they are decoded once the model has agreed to the sizes (`decode_held`), or, where there
is no model, up to a limit (`read_decoded`).
"""

import copy
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft.config import PeftConfig
from safetensors import safe_open
from torch import Tensor

from pemn_surgery.adapters.files.contents import (
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
from pemn_surgery.adapters.files.disk import named_errors, read_text
from pemn_surgery.adapters.within import set_within
from pemn_surgery.coding import bits, codec
from pemn_surgery.coding.header import inspect
from pemn_surgery.errors import AdapterFileError, ConfigError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
SEAL = "pemn"  # the metadata's key


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
    """
    if _held.get() is not None:  # a loading method that another one calls
        yield
        return
    with set_within(_held, {}), set_within(_wish, wish):
        yield


def is_reading() -> bool:
    """Tell whether a loading method is at work that has checked a file's configuration."""
    return _held.get() is not None


def read_adapter(path: Path) -> Contents:
    """Read and check every mask of a file; within `one_reading` return what was read before.

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

    Masks of ``coding="base"`` stay coded: they take their base.

    Raises:
        AdapterFileError: If the file is missing, truncated, altered or not a safetensors file.
        MaskFormatError: If masks would take far more memory than the file is long, or are no code.
    """
    contents = read_adapter(path)
    check_room(contents.file)
    return _decoded(contents)


def decode_held(file: AdapterFile) -> None:
    """Decode what `one_reading` holds of a file, once a model has the sizes that it claims.

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
    """Return what an adapter file holds, without its tensors."""
    return read_adapter(path).file


def holds_masks(path: Path) -> bool:
    """Tell whether a file has a mask in it, from its header alone.

    Raises:
        AdapterFileError: If the file is missing, truncated, altered or not a safetensors file.
    """
    with _opened(path) as file:
        sealed = SEAL in (file.metadata() or {})
        return sealed or any(map(is_mask_key, file.keys()))


def seal(path: Path, configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the digest that binds it to a file's tensors."""
    return {**configuration, "digest": _digest(_raw(path)[1], configuration)}


def read_json(path: Path) -> dict[str, Any]:
    """Return what an ``adapter_config.json`` holds.

    Raises:
        AdapterFileError: If it cannot be read, or is not a JSON object.
    """
    try:
        written = json.loads(read_text(path))
    except AdapterFileError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: neither JSON nor UTF-8
        refuse_file(path, f"is not JSON ({type(error).__name__}: {error})")
    if not isinstance(written, dict):
        refuse_file(path, f"holds {type(written).__name__}, a configuration is an object")
    return written


def decide(path: Path, written: dict[str, Any], file: AdapterFile) -> Mapping[str, Any]:
    """Return the configuration that belongs to the weights, which decide.

    One of another save lies there after a save that was killed between the two files. In that of
    the same save, what PEFT keeps for itself (the base's name, the task) may be edited.

    Raises:
        AdapterFileError: If it was altered, or belongs to other weights that have no seal.
    """
    sealed = file.sealed
    if sealed is None:
        _check_unsealed(path, written, file)
        return written
    if written.get("digest") != sealed["digest"]:
        return copy.deepcopy(dict(sealed))  # PEFT adds to a configuration's lists
    free = {item.name for item in fields(PeftConfig)} - {"peft_type"}
    altered = [key for key in sealed if key not in free and written.get(key) != sealed[key]]
    if altered:
        key = altered[0]
        refuse_file(
            path,
            f"says {key}={written.get(key)!r}, but the adapter was saved with {sealed[key]!r} "
            f"({len(altered)} such fields)",
        )
    return written


def refuse_file(path: Path, problem: str) -> NoReturn:
    """Refuse an ``adapter_config.json`` (`AdapterFileError`)."""
    message = (
        f"{str(path)!r} {problem}; it is truncated or altered. Nothing was loaded; get it again "
        "from where it was saved."
    )
    raise AdapterFileError(message)


def refuse_option(path: Path, error: ConfigError) -> NoReturn:
    """Refuse an ``adapter_config.json`` with an option that cannot be (`AdapterFileError`)."""
    message = (
        f"{str(path)!r} is no configuration of masks: {error} It is truncated or altered, or of a "
        "later release. Nothing was loaded; get it again from where it was saved, or upgrade "
        "pemn-surgery."
    )
    raise AdapterFileError(message) from error


def _read(path: Path) -> Contents:
    nbytes, tensors, metadata = _raw(path)
    stored = {key: inspect(value, key) for key, value in tensors.items() if is_mask(key)}
    sealed = _sealed(path, tensors, metadata)
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


def _sealed(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Mapping[str, Any] | None:
    """Return the configuration that a file's content was sealed with; None where it has no seal."""
    if SEAL not in metadata:
        return None
    try:
        configuration = json.loads(metadata[SEAL])
    except (ValueError, RecursionError) as error:
        _refuse_seal(path, f"cannot be read ({type(error).__name__}: {error})")
    if not isinstance(configuration, dict):
        _refuse_seal(path, f"is {type(configuration).__name__}, not a configuration")
    said, actual = configuration.get("digest"), _digest(tensors, configuration)
    if actual != said:
        _refuse_seal(path, f"says digest {said!r}, the content has {actual!r}")
    return configuration


def _digest(tensors: Mapping[str, Tensor], configuration: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits over every tensor's name, type, shape and bytes, and the rest.

    A CRC-32 finds every changed byte of a tensor. The configuration's own "digest" does not count.
    """
    rest = {key: value for key, value in configuration.items() if key != "digest"}
    lines = [json.dumps(rest, sort_keys=True), *sorted(_described(tensors))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _described(tensors: Mapping[str, Tensor]) -> Iterable[str]:
    for key, tensor in tensors.items():
        content: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        yield f"{key} {tensor.dtype} {list(tensor.shape)} {zlib.crc32(content):08x}"


def _refuse_seal(path: Path, problem: str) -> NoReturn:
    message = (
        f"The seal of the adapter file {str(path)!r} {problem}: the file was altered after it was "
        "saved. Nothing was loaded; get the file again from where it was saved."
    )
    raise AdapterFileError(message)


def _check_unsealed(path: Path, written: dict[str, Any], file: AdapterFile) -> None:
    """Refuse weights that have lost their seal and are others than the configuration's."""
    digest = written.get("digest")
    if digest is not None and seal(file.path, written)["digest"] != digest:
        refuse_file(
            path,
            f"was saved with other weights (digest {digest!r}) than those of {file.path.name}, "
            'which hold no digest; if that was done on purpose, remove "digest" from it. Otherwise',
        )
