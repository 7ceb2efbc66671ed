"""Masks as bytes: one bit a weight behind a header of 32 bytes.

A stored mask is one uint8 tensor (``docs/format.md`` has the reasons):

====== ===== =========================================================
offset bytes content
====== ===== =========================================================
0      4     ``PEMN``
4      1     version of this layout, 1
5      1     coding, 0 = one bit a weight
6      2     zero
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
from typing import cast

import numpy as np
import torch
from torch import Tensor

from pemn_surgery.errors import MaskFormatError

HEADER_BYTES = 32
VERSION = 1
CODING_BITS = 0
UNKNOWN_BASE = bytes(12)

_MAGIC = b"PEMN"
_LAYOUT = struct.Struct("<4sBBHQI12s")
_CHECKSUM_OFFSET = 16


@dataclass(frozen=True)
class StoredMask:
    """What the header of a stored mask says.

    Attributes:
        weights: Number of weights, that is of mask bits.
        checksum: CRC-32 of all bytes but its own four.
        base: 12 bytes that identify the base, see the module's table.
    """

    weights: int
    checksum: int
    base: bytes


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
    content = bytearray(_LAYOUT.pack(_MAGIC, VERSION, CODING_BITS, 0, mask.numel(), 0, base))
    content += payload.tobytes()
    struct.pack_into("<I", content, _CHECKSUM_OFFSET, _checksum(content))
    return torch.frombuffer(content, dtype=torch.uint8)


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
    if stored.device.type == "cpu" and not torch.compiler.is_compiling():
        flat = np.unpackbits(payload.numpy(), count=stop - start, bitorder="little")
        return torch.from_numpy(flat.view(np.bool_))
    places = torch.arange(8, dtype=torch.uint8, device=stored.device)
    flat = torch.bitwise_right_shift(payload.unsqueeze(1), places).bitwise_and(1).view(-1)
    return flat[: stop - start].to(torch.bool)


def empty(weights: int) -> Tensor:
    """Return the place for a stored mask that is still to be loaded: all bytes zero."""
    return torch.zeros(packed_bytes(weights), dtype=torch.uint8)


def is_loaded(stored: Tensor) -> bool:
    """Tell whether a mask has been written into this place (see `empty`)."""
    return stored.numel() >= len(_MAGIC) and bool(stored[: len(_MAGIC)].any())


def verify(stored: Tensor, name: str) -> StoredMask:
    """Check a stored mask from outside: layout, version, coding, length and checksum.

    Args:
        stored: Tensor that should be a stored mask.
        name: The tensor's name, for the error.

    Returns:
        What the header says.

    Raises:
        MaskFormatError: If anything does not hold.
    """
    content = _content(stored, name)
    magic, version, coding, reserved, weights, checksum, base = cast(
        "tuple[bytes, int, int, int, int, int, bytes]", _LAYOUT.unpack_from(content)
    )
    if magic != _MAGIC or reserved != 0:
        _refuse(name, f"starts with {content[:8].hex()}, a mask starts with {_MAGIC.hex()}")
    if version != VERSION:
        _refuse(name, f"has layout version {version}, this release reads {VERSION}", old=False)
    if coding != CODING_BITS:
        _refuse(name, f"has coding {coding}, this release reads {CODING_BITS}", old=False)
    if len(content) != packed_bytes(weights):
        needed = packed_bytes(weights)
        _refuse(name, f"has {len(content)} bytes, a mask of {weights} weights needs {needed}")
    actual = _checksum(content)
    if actual != checksum:
        _refuse(name, f"has checksum {actual:08x}, its header says {checksum:08x}")
    if weights % 8 and content[-1] >> (weights % 8):
        _refuse(name, f"has bits set past its {weights} weights")
    return StoredMask(weights, checksum, base)


def _checksum(content: bytes | bytearray) -> int:
    """Return the CRC-32 of all bytes but the four that hold it."""
    view = memoryview(content)
    return zlib.crc32(view[_CHECKSUM_OFFSET + 4 :], zlib.crc32(view[:_CHECKSUM_OFFSET]))


def _content(stored: Tensor, name: str) -> bytes:
    if stored.dtype != torch.uint8 or stored.dim() != 1:
        shape = tuple(stored.shape)
        _refuse(name, f"is {stored.dtype} of shape {shape}, a mask is one row of torch.uint8")
    if stored.numel() < HEADER_BYTES:
        _refuse(name, f"has {stored.numel()} bytes, its header alone needs {HEADER_BYTES}")
    return stored.detach().cpu().numpy().tobytes()


def _refuse(name: str, problem: str, *, old: bool = True) -> None:
    remedy = "get the file again from where it was saved" if old else "upgrade pemn-surgery"
    message = f"The stored mask {name!r} {problem}. Nothing was loaded; {remedy}."
    raise MaskFormatError(message)
