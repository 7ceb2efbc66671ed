"""An adapter file's seal: the configuration it was saved with, and one digest over everything.

It lies in the safetensors metadata. It is against damage, not against forgery: there is no key.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from pemn_surgery.errors import AdapterFileError

SEAL = "pemn"  # the metadata's key


def sealed_configuration(path: Path, metadata: Mapping[str, str]) -> Mapping[str, Any] | None:
    """Return the configuration that a file was saved with; None where it has no seal.

    Args:
        path: The file, for the error.
        metadata: Its metadata.

    Raises:
        AdapterFileError: If the seal is no configuration.
    """
    if SEAL not in metadata:
        return None
    try:
        configuration = json.loads(metadata[SEAL])
    except (ValueError, RecursionError) as error:
        _refuse(path, f"cannot be read ({type(error).__name__}: {error})")
    if not isinstance(configuration, dict):
        _refuse(path, f"is {type(configuration).__name__}, not a configuration")
    return configuration


def check_seal(path: Path, tensors: Mapping[str, Tensor], sealed: Mapping[str, Any]) -> None:
    """Refuse a file whose content is not what was sealed.

    Args:
        path: The file, for the error.
        tensors: Its tensors as they are stored.
        sealed: What `sealed_configuration` returned.

    Raises:
        AdapterFileError: If the digests differ.
    """
    actual = digest_of(tensors, sealed)
    if actual != sealed.get("digest"):
        _refuse(path, f"says digest {sealed.get('digest')!r}, the content has {actual!r}")


def digest_of(tensors: Mapping[str, Tensor], configuration: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits over every tensor's name, type, shape and bytes, and the rest.

    Against damage, not against forgery: a CRC-32 finds every changed byte of a tensor.

    Args:
        tensors: Tensors as they are stored, on the CPU.
        configuration: What ``adapter_config.json`` holds; its own "digest" does not count.
    """
    rest = {key: value for key, value in configuration.items() if key != "digest"}
    lines = [json.dumps(rest, sort_keys=True), *sorted(_described(tensors))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _described(tensors: Mapping[str, Tensor]) -> Iterable[str]:
    for key, tensor in tensors.items():
        content: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        yield f"{key} {tensor.dtype} {list(tensor.shape)} {zlib.crc32(content):08x}"


def _refuse(path: Path, problem: str) -> NoReturn:
    message = (
        f"The seal of the adapter file {str(path)!r} {problem}: the file was altered after it was "
        "saved. Nothing was loaded; get the file again from where it was saved."
    )
    raise AdapterFileError(message)
