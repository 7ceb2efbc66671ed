"""Stored masks from one bit a weight to a shorter code, for files, and back."""

import math
import struct
from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from pemn_surgery import bits, codes
from pemn_surgery.bits import CHECKSUM_OFFSET, HEADER_BYTES, StoredMask
from pemn_surgery.buckets import BaseGuide, Guide
from pemn_surgery.codes import Code, Coding
from pemn_surgery.deflate import CodeError
from pemn_surgery.errors import MaskFormatError


def encode(
    stored: Tensor,
    guides: Sequence[Guide | BaseGuide] | None = None,
    kernel: Sequence[int] = (),
) -> Tensor:
    """Return a stored mask as it is kept in files with ``coding="entropy"``, "context" or "base".

    Args:
        stored: What `bits.pack` returned.
        guides: For "context", the numbers that the initial scores were made of, and if it is known
            those that the frozen weights are; may be none. For "base", the last is a `BaseGuide`.
            None for "entropy".
        kernel: For "context" and "base", the shape of a convolution's kernel.

    Returns:
        Uint8 tensor on the CPU, within 1 % of the mask's entropy where it is large (see
        ``docs/coding.md``); ``stored`` itself where no code is shorter.

    Raises:
        MaskFormatError: If it is damaged, or coded already.
    """
    header = bits.verify(stored, "mask")
    packed = stored.detach().cpu().numpy()[HEADER_BYTES:]
    found = [codes.by_density(packed, header.weights, bits.count_ones(stored))]
    if guides or (guides is not None and math.prod(kernel) > 1):
        found.append(codes.by_context(packed, header.weights, guides, kernel))
    coded = (sealed(code, header) for code in found if code is not None)
    return min((stored, *coded), key=torch.numel)


def sealed(code: Code, header: StoredMask) -> Tensor:
    """Return a code as a stored mask.

    Args:
        code: The mask's code.
        header: Of the mask as bits.
    """
    checksum = struct.pack("<I", header.checksum)
    content = np.frombuffer(checksum + code.content, np.uint8)
    which = (code.coding, code.first, code.second)
    return bits.sealed(which, header.weights, header.base, content)


def decode(
    stored: Tensor, name: str, base_sizes: Callable[[], np.ndarray | None] = lambda: None
) -> Tensor:
    """Check a stored mask of any coding, and return it as one bit a weight.

    Args:
        stored: Tensor that should be a stored mask.
        name: The tensor's name, for the error.
        base_sizes: For "base", returns `buckets.base_sizes` of the frozen numbers under the mask,
            None if they are not at hand.

    Returns:
        What `bits.pack` returned; ``stored`` itself if it is that already.

    Raises:
        MaskFormatError: If anything does not hold. Memory stays within some 2,500 bytes for each
            one given (a mask of ones alone is so much shorter), 12,500 for one coded by
            context, whatever the header says.
    """
    header = bits.inspect(stored, name)
    if header.coding == "bits":
        return stored
    sizes = _sizes(header, base_sizes, name)
    content = bits.content_of(stored, name)
    try:
        packed = codes.decode(content, header.weights, sizes)
    except CodeError as error:
        _refuse(name, str(error), header)
    found = bits.sealed((Coding.BITS, 0, 0), header.weights, header.base, packed)
    (expected,) = struct.unpack_from("<I", content, HEADER_BYTES)
    (actual,) = struct.unpack_from("<I", found.numpy().data, CHECKSUM_OFFSET)
    if actual != expected:
        problem = f"decodes to checksum {actual:08x}, its payload says {expected:08x}"
        _refuse(name, problem, header)
    return found


def room(header: StoredMask) -> int:
    """Return the bytes that decoding a mask takes at most, beside the mask as bits.

    Args:
        header: What `bits.inspect` returned.
    """
    of_a_weight = 1.3 if header.coding == "entropy" else 6
    return 0 if header.coding == "bits" else int(of_a_weight * header.weights)


def _sizes(
    header: StoredMask, base_sizes: Callable[[], np.ndarray | None], name: str
) -> np.ndarray | None:
    """Return the sizes of the base's numbers where a mask is coded beside them."""
    if header.coding != "base":
        return None
    sizes = base_sizes()
    if sizes is None or len(sizes) != header.weights:
        there = "they are not at hand" if sizes is None else f"there are {len(sizes)}"
        message = (
            f"The stored mask {name!r} is coded beside the {header.weights} frozen numbers under "
            f'it (coding="base"), but {there}. Load the adapter with PeftModel.from_pretrained on '
            "its base, whole and in float32 or bfloat16; to read its files alone, save it from "
            "there with another coding. Nothing was loaded."
        )
        raise MaskFormatError(message)
    return sizes


def _refuse(name: str, problem: str, header: StoredMask) -> NoReturn:
    if header.coding == "base":
        problem += (
            "; it was coded beside other numbers than the base's here, which may be held in a type "
            "other than float32 and bfloat16, or it is damaged"
        )
    bits.refuse(name, problem)
