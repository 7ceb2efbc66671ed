"""The head of a stored mask, and what every reader of one checks first.

A stored mask is one uint8 tensor: 32 bytes of header, then a payload (``docs/format.md``).
"""

import struct
import zlib
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, cast, get_args

import numpy as np
import torch
from torch import Tensor

from pemn_surgery.errors import MaskFormatError

Array = Any  # of numpy; its element type is in the docstrings
CodingName = Literal["bits", "entropy", "context", "base"]

HEADER_BYTES = 32
MAGIC = b"PEMN"
VERSION = 1
UNKNOWN_BASE = bytes(12)

# A coded weight costs 1 / 710 bit or more (`table.MOST`); bytes that claim more are refused.
MOST_WEIGHTS_A_BYTE = 8192

_LAYOUT = struct.Struct("<4sBBHQI12s")
_CHECKSUM_OFFSET = 16
_CODINGS = get_args(CodingName)


@dataclass(frozen=True)
class StoredMask:
    """What the header of a stored mask says.

    Attributes:
        weights: Number of weights, that is of mask bits.
        checksum: CRC-32 of all bytes but its own four.
        base: First four bytes of the base's fingerprint in float32, bfloat16 and float16.
        coding: "bits", "entropy", "context" or "base".
        options: What the coding needs to know besides, 16 bits.
    """

    weights: int
    checksum: int
    base: bytes
    coding: CodingName = "bits"
    options: int = 0


def packed_bytes(weights: int) -> int:
    """Return the size of a stored mask of so many weights, one bit each, with its header."""
    return HEADER_BYTES + (weights + 7) // 8


def inspect(stored: Tensor, name: str) -> StoredMask:
    """Check a stored mask of any coding: layout, version, coding, length and checksum.

    Raises:
        MaskFormatError: If anything does not hold. `codec.decode` looks into coded payloads.
    """
    content = _content_of(stored, name)
    magic, version, coding, options, weights, checksum, base = cast(
        "tuple[bytes, int, int, int, int, int, bytes]", _LAYOUT.unpack_from(content)
    )
    if magic != MAGIC or (coding == 0 and options):
        refuse(name, f"starts with {content[:8].hex()}, a mask starts with {MAGIC.hex()}")
    if version != VERSION:
        refuse(name, f"has layout version {version}, this release reads {VERSION}", old=False)
    if coding >= len(_CODINGS):
        most = len(_CODINGS) - 1
        refuse(name, f"has coding {coding}, this release reads 0 to {most}", old=False)
    _check_length(len(content), coding, weights, name)
    actual = _checksum(content)
    if actual != checksum:
        refuse(name, f"has checksum {actual:08x}, its header says {checksum:08x}")
    if coding == 0 and weights % 8 and content[-1] >> (weights % 8):
        refuse(name, f"has bits set past its {weights} weights")
    return StoredMask(weights, checksum, base, _CODINGS[coding], options)


def _check_length(nbytes: int, coding: int, weights: int, name: str) -> None:
    """Refuse a number of weights that the bytes cannot hold, before memory is taken for them."""
    needed, most = packed_bytes(weights), MOST_WEIGHTS_A_BYTE * (nbytes - HEADER_BYTES)
    if coding == 0 and nbytes != needed:
        refuse(name, f"has {nbytes} bytes, a mask of {weights} weights needs {needed}")
    if coding and weights > most:
        refuse(name, f"has {nbytes} bytes, too few for {weights} weights (at most {most})")


def assemble(coding: CodingName, options: int, weights: int, base: bytes, payload: Array) -> Tensor:
    """Return a stored mask: header and payload, with their checksum."""
    content = np.empty(HEADER_BYTES + len(payload), np.uint8)
    fields = (MAGIC, VERSION, _CODINGS.index(coding), options, weights, 0, base)
    _LAYOUT.pack_into(content.data, 0, *fields)
    content[HEADER_BYTES:] = payload
    struct.pack_into("<I", content.data, _CHECKSUM_OFFSET, _checksum(content.data))
    return torch.from_numpy(content)


def _checksum(content: memoryview) -> int:
    """Return the CRC-32 of all bytes but the four that hold it."""
    return zlib.crc32(content[_CHECKSUM_OFFSET + 4 :], zlib.crc32(content[:_CHECKSUM_OFFSET]))


def _content_of(stored: Tensor, name: str) -> memoryview:
    """Return a stored mask's bytes, which are not copied where they are on the CPU."""
    if stored.dtype != torch.uint8 or stored.dim() != 1:
        shape = tuple(stored.shape)
        refuse(name, f"is {stored.dtype} of shape {shape}, a mask is one row of torch.uint8")
    if stored.numel() < HEADER_BYTES:
        refuse(name, f"has {stored.numel()} bytes, its header alone needs {HEADER_BYTES}")
    return np.ascontiguousarray(stored.detach().cpu().numpy()).data


def refuse(name: str, problem: str, *, old: bool = True) -> NoReturn:
    """Raise a MaskFormatError for a stored mask: one that is damaged, or of a later release."""
    remedy = "get the file again from where it was saved" if old else "upgrade pemn-surgery"
    message = f"The stored mask {name!r} {problem}. Nothing was loaded; {remedy}."
    raise MaskFormatError(message)
