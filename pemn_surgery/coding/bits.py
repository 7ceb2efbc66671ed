"""Masks as they are in memory, one bit a weight: bit ``i % 8`` of byte ``i // 8`` is weight i.

The bytes stand behind a header (`pemn_surgery.coding.header`); unused bits of the last are zero.
"""

import math

import numpy as np
import torch
from torch import Tensor

from pemn_surgery.coding.header import (
    HEADER_BYTES,
    MAGIC,
    UNKNOWN_BASE,
    StoredMask,
    assemble,
    inspect,
    packed_bytes,
)
from pemn_surgery.errors import MaskFormatError
from pemn_surgery.transforms import is_transformed


def pack(mask: Tensor, base: bytes = UNKNOWN_BASE) -> Tensor:
    """Store a mask.

    Args:
        mask: Bool tensor of any shape.
        base: 12 bytes that identify the base that the mask was learned on.

    Returns:
        Uint8 tensor of shape (32 + ceil(n / 8),) on the CPU.
    """
    payload = np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little")
    return assemble("bits", 0, mask.numel(), base, payload)


def with_base(stored: Tensor, base: bytes) -> Tensor:
    """Return the same mask, as `pack` made it, of another base."""
    weights = inspect(stored, "the mask").weights
    return assemble("bits", 0, weights, base, stored.cpu().numpy()[HEADER_BYTES:])


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
    """Return the mask of weights ``start`` to ``stop`` (row by row), as `unpack` does."""
    payload = stored[HEADER_BYTES + start // 8 : HEADER_BYTES + (stop + 7) // 8]
    if stored.device.type == "cpu" and not is_transformed():
        flat = np.unpackbits(payload.numpy(), count=stop - start, bitorder="little")
        return torch.from_numpy(flat.view(np.bool_))
    places = torch.arange(8, dtype=torch.uint8, device=stored.device)
    flat = torch.bitwise_right_shift(payload.unsqueeze(1), places).bitwise_and(1).view(-1)
    return flat[: stop - start].to(torch.bool)


def count_ones(stored: Tensor) -> int:
    """Return the number of ones of a mask that `pack` made; nothing is checked."""
    payload = stored.detach().cpu().numpy()[HEADER_BYTES:]
    return int.from_bytes(payload.tobytes(), "little").bit_count()


def empty(weights: int) -> Tensor:
    """Return the place for a stored mask that is still to be loaded: all bytes zero."""
    return torch.zeros(packed_bytes(weights), dtype=torch.uint8)


def is_loaded(stored: Tensor) -> bool:
    """Tell whether a mask has been written into this place (see `empty`)."""
    return stored.numel() >= len(MAGIC) and bool(stored[: len(MAGIC)].any())


def verify(stored: Tensor, name: str) -> StoredMask:
    """Check a stored mask that is to be used as it is, that is one bit a weight.

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
