"""Bytes of masks and of float weights under general compressors, this project's coder, and bounds.

"Reduction" is the paper's word: the share of the bytes before that is saved, against one bit a mask
or against the float32 weights; negative where the result is longer.
"""

import bz2
import gzip
import importlib.util
import lzma
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from pemn_surgery.adapters.files.contents import MASKS, parameter_name
from pemn_surgery.coding import bits, codec
from pemn_surgery.coding.header import HEADER_BYTES
from pemn_surgery.errors import RecipeError

Tools = dict[str, Callable[[bytes], bytes]]


def tools() -> Tools:
    """Compressors by name, each at its strongest setting but lz4 and snappy, which have one.

    lz4 and snappy are the raw formats without a frame: the paper's -0.39 % of fine-tuned weights is
    what lz4's block format adds to bytes that it cannot compress, one in 255.

    Raises:
        RecipeError: If cramjam, which brings those that Python lacks, is not installed.
    """
    if importlib.util.find_spec("cramjam") is None:
        message = "lz4, snappy, zstd and brotli need cramjam: pip install cramjam"
        raise RecipeError(message)
    import cramjam  # pyright: ignore[reportMissingImports] - a recipe's own need

    return {
        "gzip": lambda data: gzip.compress(data, 9, mtime=0),
        "bz2": lambda data: bz2.compress(data, 9),
        "lzma": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
        "lz4": lambda data: bytes(cramjam.lz4.compress_block(data, store_size=False)),
        "snappy": lambda data: bytes(cramjam.snappy.compress_raw(data)),
        "zstd": lambda data: bytes(cramjam.zstd.compress(data, 22)),
        "brotli": lambda data: bytes(cramjam.brotli.compress(data, 11)),
    }


def read_masks(file: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Read an adapter's masks.

    Args:
        file: ``adapter_model.safetensors``.
        shapes: Shape of each weight by name, as of the base's state dict.

    Returns:
        Bool tensors by the weight's name, in the order of ``shapes``.
    """
    stored = {parameter_name(k): v for k, v in load_file(file).items() if f".{MASKS}." in k}
    return {
        name: bits.unpack(codec.decode(stored[name], name), tuple(shape))
        for name, shape in shapes.items()
        if name in stored
    }


def entropy(share: float) -> float:
    """Bits that one of many independent weights holds, of which this share is one."""
    if not 0 < share < 1:
        return 0.0
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def of_masks(masks: Mapping[str, Tensor], chosen: Tools) -> dict[str, Any]:
    """Measure an adapter's masks.

    Args:
        masks: Bool tensors by name.
        chosen: What `tools` returns.

    Returns:
        ``weights``; ``density`` of all weights, of the emptiest and the fullest layer; ``layers``:
        weights and ones of each; ``bytes`` and ``reduction`` (percent saved of one bit a mask):
        ``ours`` (every mask with its header, as in a file), ``payload`` (without headers),
        ``bound`` (a coder that is told each layer's density and knows nothing else: sum of
        n H(p)), and the tools on all layers' bits in one row (``packed``) and on one byte a mask
        (``unpacked``).
    """
    layers = {name: (mask.numel(), int(mask.sum())) for name, mask in masks.items()}
    weights, ones = (sum(counts) for counts in zip(*layers.values(), strict=True))
    shares = [k / n for n, k in layers.values()]
    sizes = _ours(masks) | _of_tools(masks, chosen)
    sizes["bound"] = sum(n * entropy(k / n) for n, k in layers.values()) / 8
    return {
        "weights": weights,
        "density": {"all": ones / weights, "min": min(shares), "max": max(shares)},
        "layers": layers,
        "bytes": sizes,
        "reduction": reductions(sizes, weights / 8),
    }


def _ours(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    coded = [codec.encode(bits.pack(mask)) for mask in masks.values()]
    whole = sum(code.numel() for code in coded)
    return {"ours": whole, "payload": whole - HEADER_BYTES * len(coded)}


def _of_tools(masks: Mapping[str, Tensor], chosen: Tools) -> dict[str, Any]:
    flat = torch.cat([mask.reshape(-1) for mask in masks.values()]).numpy()
    streams = {"packed": np.packbits(flat, bitorder="little").tobytes(), "unpacked": flat.tobytes()}
    return {
        name: {tool: len(compress(stream)) for tool, compress in chosen.items()}
        for name, stream in streams.items()
    }


def reductions(sizes: Mapping[str, Any], whole: float) -> dict[str, Any]:
    """Return sizes, also nested ones, as percent saved of ``whole``."""
    return {
        name: reductions(size, whole)
        if isinstance(size, Mapping)
        else round(100 * (1 - size / whole), 3)
        for name, size in sizes.items()
    }


def of_floats(tensors: Mapping[str, Tensor], chosen: Tools) -> dict[str, Any]:
    """Measure the tools on tensors in one row, as they lie in memory.

    Args:
        tensors: Tensors of one dtype by name.
        chosen: What `tools` returns.

    Returns:
        ``bytes``: ``raw`` and by tool; ``reduction``: percent saved, by tool.
    """
    raw = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    data = raw.contiguous().view(torch.uint8).numpy().tobytes()
    sizes = {name: len(tool(data)) for name, tool in chosen.items()}
    return {"bytes": {"raw": len(data)} | sizes, "reduction": reductions(sizes, len(data))}
