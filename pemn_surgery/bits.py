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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, cast, get_args

import numpy as np
import torch
from torch import Tensor

from pemn_surgery import buckets, context, entropy, symbols
from pemn_surgery.errors import MaskFormatError
from pemn_surgery.rng import KEY_BYTES

CodingName = Literal["bits", "entropy", "context", "base"]

HEADER_BYTES = 32
VERSION = 1
UNKNOWN_BASE = bytes(12)

_MAGIC = b"PEMN"
_LAYOUT = struct.Struct("<4sBBBBQI12s")
_CODING_OFFSET = 5
_CHECKSUM_OFFSET = 16
_CODINGS = get_args(CodingName)
_BITS, _ENTROPY, _CONTEXT, _BASE = range(4)
_INVERTED = 0x80
_CODED_HEADER_BYTES = HEADER_BYTES + 4  # and the checksum of the mask as bits
_GUIDE = struct.Struct(f"<{KEY_BYTES}sQ")


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
    return _sealed((_BITS, 0, 0, mask.numel()), base, payload.tobytes())


def coded(
    stored: Tensor,
    guides: Sequence[buckets.Guide | buckets.BaseGuide] | None = None,
    kernel: Sequence[int] = (),
) -> Tensor:
    """Return a stored mask as it is kept in files with ``coding="entropy"``, "context" or "base".

    Args:
        stored: What `pack` returned.
        guides: For "context", the numbers that the initial scores were made of, and if it is known
            those that the frozen weights are; may be none. For "base", the last is a `BaseGuide`.
            None for "entropy".
        kernel: For "context" and "base", the shape of a convolution's kernel.

    Returns:
        Uint8 tensor on the CPU, within 1 % of the mask's entropy where it is large (see
        ``docs/coding.md``); ``stored`` itself where no code is shorter.
    """
    header = verify(stored, "mask")
    payload = stored.detach().cpu().numpy()[HEADER_BYTES:]
    choices = [_with_density(header, payload, count_ones(stored))]
    if guides or (guides is not None and math.prod(kernel) > 1):
        choices.append(_with_contexts(header, payload, guides, kernel))
    return min((stored, *(choice for choice in choices if choice is not None)), key=torch.numel)


def _with_density(header: StoredMask, payload: np.ndarray, ones: int) -> Tensor | None:
    """Return a mask coded by its density, None where that is one half."""
    inverted = 2 * ones < header.weights
    model = entropy.choose_model(max(ones, header.weights - ones) / max(header.weights, 1))
    if model is None:
        return None
    code = entropy.encode(_flipped(payload, header.weights, inverted), header.weights, model)
    which = (_ENTROPY, model.width | inverted * _INVERTED, model.odds, header.weights)
    return _sealed(which, header.base, struct.pack("<I", header.checksum) + code)


def _with_contexts(
    header: StoredMask,
    payload: np.ndarray,
    guides: Sequence[buckets.Guide | buckets.BaseGuide],
    kernel: Sequence[int],
) -> Tensor:
    """Return a mask coded beside what is known of its weights."""
    table, streams = context.encode(payload, header.weights, guides, kernel)
    drawn = [guide for guide in table.guides if isinstance(guide, buckets.Guide)]
    of_base = [g.log2 for g in table.guides if isinstance(g, buckets.BaseGuide) and g.log2]
    coding = _BASE if of_base else _CONTEXT
    first, second = (*(guide.log2 for guide in drawn), 0, 0)[:2]
    log2s = first | (of_base[0] if of_base else second) << 4
    kept = [_GUIDE.pack(guide.key, guide.period) for guide in drawn if guide.log2]
    start = struct.pack("<IB", header.checksum, table.row)
    code = b"".join([start, *kept, table.levels, streams])
    return _sealed((coding, log2s, table.places, header.weights), header.base, code)


def decoded(
    stored: Tensor, name: str, base_sizes: Callable[[], np.ndarray | None] = lambda: None
) -> Tensor:
    """Check a stored mask of any coding, and return it as one bit a weight.

    Args:
        stored: Tensor that should be a stored mask.
        name: The tensor's name, for the error.
        base_sizes: For "base", returns `buckets.base_sizes` of the frozen numbers under the mask,
            None if they are not at hand.

    Returns:
        What `pack` returned; ``stored`` itself if it is that already.

    Raises:
        MaskFormatError: If anything does not hold. Memory stays within some 2,500 bytes for each
            one given (a mask of ones alone is so much shorter), 12,500 for one coded by
            context, whatever the header says.
    """
    header = inspect(stored, name)
    if header.coding == "bits":
        return stored
    content = _content(stored, name)
    sizes = _sizes_for(header, base_sizes, name)
    try:
        payload = _payload(content, header, sizes, name).tobytes()
    except symbols.CodeError as error:
        _refuse_code(name, str(error), header)
    found = _sealed((_BITS, 0, 0, header.weights), header.base, payload)
    (expected,) = struct.unpack_from("<I", content, HEADER_BYTES)
    (actual,) = struct.unpack_from("<I", found[:HEADER_BYTES].numpy().tobytes(), _CHECKSUM_OFFSET)
    if actual != expected:
        problem = f"decodes to checksum {actual:08x}, its payload says {expected:08x}"
        _refuse_code(name, problem, header)
    return found


def _sizes_for(
    header: StoredMask, base_sizes: Callable[[], np.ndarray | None], name: str
) -> np.ndarray | None:
    """Return the sizes of the base's numbers where a mask is coded beside them."""
    sizes = base_sizes() if header.coding == "base" else None
    if header.coding == "base" and (sizes is None or len(sizes) != header.weights):
        there = "they are not at hand" if sizes is None else f"there are {len(sizes)}"
        message = (
            f"The stored mask {name!r} is coded beside the {header.weights} frozen numbers under "
            f'it (coding="base"), but {there}. Load the adapter with PeftModel.from_pretrained on '
            "its base, whole and in float32 or bfloat16; to read its files alone, save it from "
            "there with another coding. Nothing was loaded."
        )
        raise MaskFormatError(message)
    return sizes


def _payload(content: bytes, header: StoredMask, sizes: np.ndarray | None, name: str) -> np.ndarray:
    """Return a coded mask's packed bits."""
    if header.coding in ("context", "base"):
        table, streams = _context_parts(content, name, sizes)
        return context.decode(table, streams, header.weights)
    model, inverted = _model(content, name)
    payload = entropy.decode(content[_CODED_HEADER_BYTES:], header.weights, model)
    return _flipped(payload, header.weights, inverted)


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
        MaskFormatError: If anything does not hold. A coded payload is not decoded (see `decoded`).
    """
    content = _content(stored, name)
    magic, version, coding, code, odds, weights, checksum, base = cast(
        "tuple[bytes, int, int, int, int, int, int, bytes]", _LAYOUT.unpack_from(content)
    )
    if magic != _MAGIC or (coding == _BITS and (code or odds)):
        _refuse(name, f"starts with {content[:8].hex()}, a mask starts with {_MAGIC.hex()}")
    if version != VERSION:
        _refuse(name, f"has layout version {version}, this release reads {VERSION}", old=False)
    if coding >= len(_CODINGS):
        _refuse(name, f"has coding {coding}, this release reads 0 to {_BASE}", old=False)
    _check_length(content, coding, weights, name)
    actual = _checksum(content)
    if actual != checksum:
        _refuse(name, f"has checksum {actual:08x}, its header says {checksum:08x}")
    if coding == _BITS and weights % 8 and content[-1] >> (weights % 8):
        _refuse(name, f"has bits set past its {weights} weights")
    return StoredMask(weights, checksum, base, _CODINGS[coding])


def _check_length(content: bytes, coding: int, weights: int, name: str) -> None:
    """Refuse a number of weights that the bytes cannot hold, before memory is taken for them."""
    if coding == _BITS:
        needed = packed_bytes(weights)
        if len(content) != needed:
            _refuse(name, f"has {len(content)} bytes, a mask of {weights} weights needs {needed}")
        return
    if coding in (_CONTEXT, _BASE):
        most = context.most_weights(len(_context_parts(content, name)[-1]))
    else:
        most = _model(content, name)[0].most_weights(len(content) - _CODED_HEADER_BYTES)
    if weights > most:
        _refuse(name, f"has {len(content)} bytes, too few for {weights} weights (at most {most})")


def _model(content: bytes, name: str) -> tuple[symbols.Model, bool]:
    """Return which code a coded mask has, and whether it is inverted."""
    if len(content) < _CODED_HEADER_BYTES:
        needed = _CODED_HEADER_BYTES
        _refuse(name, f"has {len(content)} bytes, the header of a coded mask needs {needed}")
    width, odds = content[6], content[7]
    if width & ~_INVERTED not in symbols.WIDTHS:
        _refuse(name, f"has code {width}, this release reads {symbols.WIDTHS}", old=False)
    return symbols.Model(width & ~_INVERTED, odds), bool(width & _INVERTED)


def _context_parts(
    content: bytes, name: str, sizes: np.ndarray | None = None
) -> tuple[buckets.Table, bytes]:
    """Return table and streams of a mask coded by context; ``sizes`` are those of the base."""
    log2s, places = (content[6] & 15, content[6] >> 4), content[7]
    if max(log2s) > buckets.MOST_LOG2 or not places:
        needed = "0 to 8 bits of both and 1 to 255 places"
        problem = f"has {log2s[0]} and {log2s[1]} bits of its guides and {places} places"
        _refuse(name, f"{problem}, this release reads {needed}", old=False)
    is_beside_base = content[_CODING_OFFSET] == _BASE
    used = [log2 for log2 in (log2s[:1] if is_beside_base else log2s) if log2]
    begin = _CODED_HEADER_BYTES + 1 + len(used) * _GUIDE.size
    row = _row(content, begin, places, name)
    read = _GUIDE.iter_unpack(content[_CODED_HEADER_BYTES + 1 : begin])
    pairs = zip(read, used, strict=True)
    drawn = tuple(buckets.Guide(key, period, log2) for (key, period), log2 in pairs)
    if not all(guide.period for guide in drawn):
        _refuse(name, "has a guide without numbers", old=False)
    guides = (*drawn, buckets.BaseGuide(sizes, log2s[1])) if is_beside_base else drawn
    end = begin + buckets.Table(places, row, guides, b"").buckets
    if len(content) < end:
        _refuse(name, f"has {len(content)} bytes, its header and table need {end}")
    return buckets.Table(places, row, guides, content[begin:end]), content[end:]


def _row(content: bytes, needed: int, places: int, name: str) -> int:
    """Return the width of a kernel whose neighbours are looked at, 0 if they are not."""
    if len(content) < needed:
        _refuse(name, f"has {len(content)} bytes, its header needs {needed}")
    row = content[_CODED_HEADER_BYTES]
    if row > places:
        _refuse(name, f"has kernels of {places} places in rows of {row}", old=False)
    return row


def _flipped(payload: np.ndarray, weights: int, inverted: bool) -> np.ndarray:
    """Return packed bits, each turned around if asked for; unused bits stay zero."""
    if not inverted:
        return payload
    flipped = ~payload
    if weights % 8:
        flipped[-1] &= 2 ** (weights % 8) - 1
    return flipped


def _sealed(which: tuple[int, int, int, int], base: bytes, payload: bytes) -> Tensor:
    """Return header and payload with their checksum."""
    *coding, weights = which
    content = bytearray(_LAYOUT.pack(_MAGIC, VERSION, *coding, weights, 0, base) + payload)
    struct.pack_into("<I", content, _CHECKSUM_OFFSET, _checksum(content))
    return torch.frombuffer(content, dtype=torch.uint8)


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


def _refuse_code(name: str, problem: str, header: StoredMask) -> NoReturn:
    if header.coding == "base":
        problem += (
            "; it was coded beside other numbers than the base's here, which may be held in a type "
            "other than float32 and bfloat16, or it is damaged"
        )
    _refuse(name, problem)


def _refuse(name: str, problem: str, *, old: bool = True) -> NoReturn:
    remedy = "get the file again from where it was saved" if old else "upgrade pemn-surgery"
    message = f"The stored mask {name!r} {problem}. Nothing was loaded; {remedy}."
    raise MaskFormatError(message)
