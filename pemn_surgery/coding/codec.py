"""Stored masks from one bit a weight to a shorter code, for files, and back."""

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pemn_surgery.coding import bits, context
from pemn_surgery.coding.choice import choose
from pemn_surgery.coding.coder import CodeError, Reader, Writer
from pemn_surgery.coding.context import Context, Guide
from pemn_surgery.coding.header import (
    HEADER_BYTES,
    CodingName,
    StoredMask,
    assemble,
    inspect,
    refuse,
)
from pemn_surgery.coding.table import ALL, HALF, MOST, nearest_density
from pemn_surgery.errors import MaskFormatError
from pemn_surgery.numbers.rng import KEY_BYTES
from pemn_surgery.numbers.sizes import LOG2, drawn_sizes

Array = Any  # of numpy; its element type is in the docstrings

_SEED = struct.Struct(f"<{KEY_BYTES}sQ")
_GAIN = 0.999  # bits are read at once: a mask whose code is hardly shorter stays bits


def encode(
    stored: Tensor, guides: Sequence[Guide] | None = None, kernel: Sequence[int] = ()
) -> Tensor:
    """Return a stored mask as it is kept in files with ``coding="entropy"``, "context" or "base".

    Args:
        stored: What `bits.pack` returned.
        guides: At most two; of "base", the base's own is the last. None for "entropy".
        kernel: For "context" and "base", the shape of a convolution's kernel.

    Returns:
        Uint8 tensor on the CPU; ``stored`` itself where no code is shorter by .1 %.

    Raises:
        MaskFormatError: If it is damaged, or coded already.
    """
    header = bits.verify(stored, "mask")
    packed = stored.detach().cpu().numpy()[HEADER_BYTES:]
    found = by_density(packed, header, bits.count_ones(stored))
    if guides or (guides is not None and math.prod(kernel) > 1):
        flags = np.unpackbits(packed, count=header.weights, bitorder="little")
        found = min(found, by_context(flags, choose(flags, guides, kernel), header), key=len)
    return found if len(found) - HEADER_BYTES < _GAIN * len(packed) else stored


def by_density(packed: Array, header: StoredMask, ones: int) -> Tensor:
    """Return a mask coded as independent weights; as bits it has this header, and so many ones."""
    weights, writer = header.weights, Writer()
    turned = 2 * ones < weights
    density = nearest_density(max(ones, weights - ones), weights)
    writer.write(_turned(packed, weights) if turned else packed, weights, density)
    return _coded("entropy", ALL - density if turned else density, header, b"", writer)


def by_context(flags: Array, chosen: Context, header: StoredMask) -> Tensor:
    """Return a mask, uint8 of shape (weights,), coded beside what is known of its weights."""
    writer = Writer()
    context.encode(flags, chosen, writer)
    of_seeds = [guide for guide in chosen.guides if guide.seed is not None and guide.log2]
    of_base = [guide.log2 for guide in chosen.guides if guide.seed is None and guide.log2]
    first, second, *_ = *(guide.log2 for guide in of_seeds), 0, 0
    options = first | (of_base or [second])[0] << 4 | chosen.places << 8
    seeds = b"".join(_SEED.pack(*guide.seed) for guide in of_seeds if guide.seed)
    known = bytes([chosen.row]) + seeds + chosen.levels
    return _coded("base" if of_base else "context", options, header, known, writer)


def _coded(
    coding: CodingName, options: int, header: StoredMask, known: bytes, writer: Writer
) -> Tensor:
    """Return a stored mask whose stream ends with the checksum of the mask as bits."""
    writer.write(np.frombuffer(struct.pack("<I", header.checksum), np.uint8), 32, HALF)
    payload = np.frombuffer(known + writer.stream(), np.uint8)
    return assemble(coding, options, header.weights, header.base, payload)


def decode(
    stored: Tensor, name: str, base_sizes: Callable[[], Array | None] = lambda: None
) -> Tensor:
    """Check a stored mask of any coding, and return it as one bit a weight.

    Args:
        stored: Tensor that should be a stored mask.
        name: The tensor's name, for the error.
        base_sizes: For "base", returns `numbers.sizes.base_sizes` of the frozen numbers under the
            mask, None if they are not at hand.

    Returns:
        What `bits.pack` returned; ``stored`` itself if it is that already.

    Raises:
        MaskFormatError: If anything does not hold. Memory stays within `room`.
    """
    header = inspect(stored, name)
    if header.coding == "bits":
        return stored
    sizes = _sizes(header, base_sizes, name) if header.coding == "base" else None
    payload = stored.detach().cpu().numpy()[HEADER_BYTES:].tobytes()
    try:
        read = _from_density if header.coding == "entropy" else _from_context
        reader, packed = read(payload, header, sizes)
        found = assemble("bits", 0, header.weights, header.base, packed)
        actual = inspect(found, name).checksum
        expected = int.from_bytes(reader.read(32, HALF).tobytes(), "little")
        reader.end()
        if actual != expected:
            message = f"decodes to checksum {actual:08x}, its payload says {expected:08x}"
            raise CodeError(message)
    except CodeError as error:
        problem = f"{error} ({header.weights} weights, coding={header.coding!r})"
        if header.coding == "base":
            problem += (
                "; it was coded beside other numbers than the base's here, which may be held in a "
                "type other than float32 and bfloat16, or it is damaged"
            )
        refuse(name, problem, old=not error.is_newer)
    return found


def room(header: StoredMask) -> int:
    """Return the bytes that decoding a mask takes at most, beside the mask as bits."""
    return int({"bits": 0, "entropy": 0.3}.get(header.coding, 6) * header.weights)


def _sizes(header: StoredMask, base_sizes: Callable[[], Array | None], name: str) -> Array:
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


def _from_density(payload: bytes, header: StoredMask, _: Array | None) -> tuple[Reader, Array]:
    turned = header.options < HALF
    density = ALL - header.options if turned else header.options
    if density > MOST:
        message = f"has density {header.options}, this release reads {ALL - MOST} to {MOST}"
        raise CodeError(message, is_newer=True)
    reader = Reader(payload)
    packed = reader.read(header.weights, density)
    return reader, _turned(packed, header.weights) if turned else packed


def _turned(packed: Array, weights: int) -> Array:
    """Return packed bits, each turned around; unused bits stay zero."""
    found = ~packed
    if weights % 8:
        found[-1] &= (1 << weights % 8) - 1
    return found


def _from_context(payload: bytes, header: StoredMask, sizes: Array | None) -> tuple[Reader, Array]:
    log2s, places = (header.options & 15, header.options >> 4 & 15), header.options >> 8
    if max(log2s) > LOG2 or not places:
        problem = f"has {log2s[0]} and {log2s[1]} bits of its guides and {places} places"
        message = f"{problem}, this release reads 0 to {LOG2} bits of both and 1 to 255 places"
        raise CodeError(message, is_newer=True)
    of_seeds = [log2 for log2 in (log2s if sizes is None else log2s[:1]) if log2]
    begin = 1 + len(of_seeds) * _SEED.size
    _check_length(payload, begin, "header needs")
    seeds: list[tuple[bytes, int]] = [*_SEED.iter_unpack(payload[1:begin])]
    near, all_bits = Context(places, payload[0]), sum(of_seeds) + (sizes is not None) * log2s[1]
    if near.row > places or not all(period for _, period in seeds):
        message = f"has kernels of {places} places in rows of {near.row}, or guides of no numbers"
        raise CodeError(message, is_newer=True)
    end = begin + (near.buckets << all_bits)
    _check_length(payload, end, "header and levels need")
    of_base = [] if sizes is None else [Guide(sizes, log2s[1])]
    guides = [
        Guide(drawn_sizes(*seed, header.weights), log2, seed)
        for seed, log2 in zip(seeds, of_seeds, strict=True)
    ]
    found = Context(places, near.row, (*guides, *of_base), payload[begin:end])
    reader = Reader(payload[end:])
    flags = context.decode(reader, found, header.weights)
    return reader, np.packbits(flags, bitorder="little")


def _check_length(payload: bytes, needed: int, what: str) -> None:
    if len(payload) < needed:
        message = f"has {HEADER_BYTES + len(payload)} bytes, its {what} {HEADER_BYTES + needed}"
        raise CodeError(message)
