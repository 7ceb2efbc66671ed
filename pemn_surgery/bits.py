"""Masks as bytes: one bit a weight behind a header of 32 bytes, or a shorter code for files.

A stored mask is one uint8 tensor (``docs/format.md`` has the reasons, and the bytes of coded ones):

====== ===== =========================================================
offset bytes content
====== ===== =========================================================
0      4     ``PEMN``
4      1     version of this layout, 1
5      1     coding, 0 = one bit a weight (1 = entropy, 2 = context and
             3 = base, files only)
6      2     zero (the other codings: which code)
8      8     number of weights n
16     4     CRC-32 of all the other bytes
20     12    base: first four bytes of its fingerprint in float32,
             bfloat16 and float16, zero where unknown
32     n/8   payload: weight i is bit ``i % 8`` of byte ``i // 8``
====== ===== =========================================================

Numbers are little-endian. The last byte is filled up with zero bits.
"""

import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, cast, get_args

import numpy as np
import torch
from torch import Tensor

from pemn_surgery import codes
from pemn_surgery.codes import Coding
from pemn_surgery.deflate import CodeError
from pemn_surgery.errors import MaskFormatError
from pemn_surgery.transforms import is_transformed

Array = Any  # of numpy; its element type is in the docstrings
CodingName = Literal["bits", "entropy", "context", "base"]

HEADER_BYTES = 32
VERSION = 1
UNKNOWN_BASE = bytes(12)
CHECKSUM_OFFSET = 16

_MAGIC = b"PEMN"
_LAYOUT = struct.Struct("<4sBBBBQI12s")
_CODINGS = get_args(CodingName)  # in the order of `Coding`


@dataclass(frozen=True)
class StoredMask:
    """What the header of a stored mask says.

    Attributes:
        weights: Number of weights, that is of mask bits.
        checksum: CRC-32 of all bytes but its own four.
        base: 12 bytes that identify the base, see the module's table.
        coding: "bits", "entropy", "context" or "base".
    """

    weights: int
    checksum: int
    base: bytes
    coding: CodingName = "bits"


def packed_bytes(weights: int) -> int:
    """Return the size in bytes of the stored mask of so many weights, header included."""
    return HEADER_BYTES + (weights + 7) // 8


def pack(mask: Tensor, base: bytes = UNKNOWN_BASE) -> Tensor:
    """Store a mask.

    Args:
        mask: Bool tensor of any shape.
        base: 12 bytes that identify the base that the mask was learned on.

    Returns:
        Uint8 tensor of shape (32 + ceil(n / 8),) on the CPU.
    """
    payload = np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little")
    return sealed((Coding.BITS, 0, 0), mask.numel(), base, payload)


def with_base(stored: Tensor, base: bytes) -> Tensor:
    """Return the same mask of another base.

    Args:
        stored: Uint8 tensor made by `pack`.
        base: 12 bytes that identify the base.
    """
    weights = inspect(stored, "the mask").weights
    return sealed((Coding.BITS, 0, 0), weights, base, stored.cpu().numpy()[HEADER_BYTES:])


def unpack(stored: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the bool mask of the given shape, on the device of ``stored``; nothing is checked.

    Use `verify` once on bytes that come from outside. This function holds only tensor
    operations off the CPU and under torch.compile, so that it can be traced.

    Args:
        stored: Uint8 tensor made by `pack`.
        shape: Shape of the weight.
    """
    return unpack_piece(stored, 0, math.prod(shape)).view(shape)


def unpack_piece(stored: Tensor, start: int, stop: int) -> Tensor:
    """Return the mask of weights ``start`` to ``stop`` (row by row), as `unpack` does.

    Args:
        stored: Uint8 tensor made by `pack`.
        start: First weight, a multiple of 8.
        stop: One past the last weight.

    Returns:
        Bool tensor of shape (stop - start,).
    """
    payload = stored[HEADER_BYTES + start // 8 : HEADER_BYTES + (stop + 7) // 8]
    if stored.device.type == "cpu" and not is_transformed():
        flat = np.unpackbits(payload.numpy(), count=stop - start, bitorder="little")
        return torch.from_numpy(flat.view(np.bool_))
    places = torch.arange(8, dtype=torch.uint8, device=stored.device)
    flat = torch.bitwise_right_shift(payload.unsqueeze(1), places).bitwise_and(1).view(-1)
    return flat[: stop - start].to(torch.bool)


def count_ones(stored: Tensor) -> int:
    """Return the number of ones of a stored mask; nothing is checked.

    Args:
        stored: Uint8 tensor made by `pack`.
    """
    payload = stored.detach().cpu().numpy()[HEADER_BYTES:]
    return int.from_bytes(payload.tobytes(), "little").bit_count()


def empty(weights: int) -> Tensor:
    """Return the place for a stored mask that is still to be loaded: all bytes zero."""
    return torch.zeros(packed_bytes(weights), dtype=torch.uint8)


def is_loaded(stored: Tensor) -> bool:
    """Tell whether a mask has been written into this place (see `empty`)."""
    return stored.numel() >= len(_MAGIC) and bool(stored[: len(_MAGIC)].any())


def verify(stored: Tensor, name: str) -> StoredMask:
    """Check a stored mask that is to be used as it is, that is one bit a weight.

    Args:
        stored: Tensor that should be a stored mask.
        name: The tensor's name, for the error.

    Returns:
        What the header says.

    Raises:
        MaskFormatError: If `inspect` finds a fault, or the mask is coded.
    """
    header = inspect(stored, name)
    if header.coding != "bits":
        message = (
            f"The stored mask {name!r} has coding={header.coding!r}, which is for files and must "
            "be decoded by PEFT's loaders (PeftModel.from_pretrained, PeftModel.load_adapter). "
            'Load it with those, or recode it: save it again with coding="bits" in its PemnConfig.'
        )
        raise MaskFormatError(message)
    return header


def inspect(stored: Tensor, name: str) -> StoredMask:
    """Check a stored mask of any coding: layout, version, coding, length and checksum.

    Args:
        stored: Tensor that should be a stored mask.
        name: The tensor's name, for the error.

    Returns:
        What the header says.

    Raises:
        MaskFormatError: If anything does not hold. `codec.decode` looks into coded payloads.
    """
    content = content_of(stored, name)
    magic, version, coding, code, odds, weights, checksum, base = cast(
        "tuple[bytes, int, int, int, int, int, int, bytes]", _LAYOUT.unpack_from(content)
    )
    if magic != _MAGIC or (coding == Coding.BITS and (code or odds)):
        refuse(name, f"starts with {content[:8].hex()}, a mask starts with {_MAGIC.hex()}")
    if version != VERSION:
        refuse(name, f"has layout version {version}, this release reads {VERSION}", old=False)
    if coding >= len(_CODINGS):
        refuse(name, f"has coding {coding}, this release reads 0 to {max(Coding)}", old=False)
    _check_length(content, coding, weights, name)
    actual = _checksum(content)
    if actual != checksum:
        refuse(name, f"has checksum {actual:08x}, its header says {checksum:08x}")
    if coding == Coding.BITS and weights % 8 and content[-1] >> (weights % 8):
        refuse(name, f"has bits set past its {weights} weights")
    return StoredMask(weights, checksum, base, _CODINGS[coding])


def _check_length(content: memoryview, coding: int, weights: int, name: str) -> None:
    """Refuse a number of weights that the bytes cannot hold, before memory is taken for them."""
    if coding == Coding.BITS:
        needed = packed_bytes(weights)
        if len(content) != needed:
            refuse(name, f"has {len(content)} bytes, a mask of {weights} weights needs {needed}")
        return
    try:
        most = codes.most_weights(content)
    except CodeError as error:
        refuse(name, str(error), old=not error.is_newer)
    if weights > most:
        refuse(name, f"has {len(content)} bytes, too few for {weights} weights (at most {most})")


def sealed(which: tuple[int, int, int], weights: int, base: bytes, payload: Array) -> Tensor:
    """Return a stored mask of any coding: header and payload with their checksum.

    Args:
        which: Bytes 5 to 7 of the header.
        weights: Number of weights.
        base: 12 bytes that identify the base.
        payload: What follows the header, uint8.
    """
    content = np.empty(HEADER_BYTES + len(payload), np.uint8)
    view = content.data
    _LAYOUT.pack_into(view, 0, _MAGIC, VERSION, *which, weights, 0, base)
    content[HEADER_BYTES:] = payload
    struct.pack_into("<I", view, CHECKSUM_OFFSET, _checksum(view))
    return torch.from_numpy(content)


def _checksum(content: memoryview) -> int:
    """Return the CRC-32 of all bytes but the four that hold it."""
    return zlib.crc32(content[CHECKSUM_OFFSET + 4 :], zlib.crc32(content[:CHECKSUM_OFFSET]))


def content_of(stored: Tensor, name: str) -> memoryview:
    """Return a stored mask's bytes, which are not copied where they are on the CPU.

    Args:
        stored: Tensor that should be a stored mask.
        name: The tensor's name, for the error.

    Raises:
        MaskFormatError: If it is no row of bytes, or shorter than a header.
    """
    if stored.dtype != torch.uint8 or stored.dim() != 1:
        shape = tuple(stored.shape)
        refuse(name, f"is {stored.dtype} of shape {shape}, a mask is one row of torch.uint8")
    if stored.numel() < HEADER_BYTES:
        refuse(name, f"has {stored.numel()} bytes, its header alone needs {HEADER_BYTES}")
    return np.ascontiguousarray(stored.detach().cpu().numpy()).data


def refuse(name: str, problem: str, *, old: bool = True) -> NoReturn:
    """Refuse a stored mask.

    Args:
        name: The tensor's name.
        problem: What is wrong with it, after its name.
        old: Whether it is damaged, not of a later release.

    Raises:
        MaskFormatError: Always.
    """
    remedy = "get the file again from where it was saved" if old else "upgrade pemn-surgery"
    message = f"The stored mask {name!r} {problem}. Nothing was loaded; {remedy}."
    raise MaskFormatError(message)
