"""Read an adapter file from docs/format.md alone: standard library and numpy, nothing of ours."""

import json
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "U8": "u1"}


def read(path):
    """Every tensor by key; masks as flat arrays of bool, bfloat16 as its words of 16 bits."""
    content, found = Path(path).read_bytes(), {}
    size = 8 + int.from_bytes(content[:8], "little")
    for key, entry in json.loads(content[8:size]).items():
        if key != "__metadata__":
            start, end = entry["data_offsets"]
            data = content[size + start : size + end]
            values = np.frombuffer(data, DTYPES[entry["dtype"]]).reshape(entry["shape"])
            found[key] = mask(data) if key.endswith(".pemn_masks.bits") else values
    return found


def mask(stored):
    """One stored mask, of either coding."""
    n, crc = int.from_bytes(stored[8:16], "little"), int.from_bytes(stored[16:20], "little")
    if stored[:5] != b"PEMN\1" or zlib.crc32(stored[:16] + stored[20:]) != crc:
        raise ValueError(stored[:20])
    if stored[5] == 0:
        return np.unpackbits(np.frombuffer(stored[32:], "u1"), count=n, bitorder="little") == 1
    width, inverted, odds = stored[6] & 127, stored[6] >> 7, stored[7]
    units = expand(inflate(stored[36:], width, odds), width)
    bits = np.unpackbits(units[:, None], axis=1, count=width, bitorder="little").reshape(-1)[:n]
    packed = np.packbits(bits ^ inverted, bitorder="little").tobytes()
    as_bits = b"PEMN\1\0\0\0" + stored[8:16] + stored[20:32] + packed
    if zlib.crc32(as_bits) != int.from_bytes(stored[32:36], "little"):
        raise ValueError(stored[:36])
    return (bits ^ inverted) == 1


def expand(symbols, width):
    """The units that symbols stand for."""
    full, longest = 2**width - 1, 255 // (2**width - 1)
    runs = [s // full * [full] + [s % full] for s in range(longest * full)] + [longest * [full]]
    return np.array([unit for symbol in symbols for unit in runs[symbol]], "u1")


def inflate(payload, width, odds):
    """The symbols of a payload: zlib reads it behind a head that announces the code."""
    *lengths, end = code_lengths(weights(width, odds))
    lengths = [*lengths, *[0] * (256 - len(lengths)), end, 1, 1]
    fields = [(2, 10), (5, 3), (0, 5), (1, 5), (15, 4), (0, 9)] + [(4, 3)] * 16
    fields += [(int(f"{length:04b}"[::-1], 2), 4) for length in lengths]
    bits = "".join(f"{value:0{size}b}" for value, size in reversed(fields))
    return zlib.decompress(int(bits, 2).to_bytes(140, "little") + payload, wbits=-15)


def weights(width, odds):
    """How often each symbol is expected, and 1 for the end."""
    ones, full, found = (16 + odds % 16) << odds // 16, 2**width - 1, []
    both, most = ones + 16, 255 // full * width
    for run, unit in (divmod(symbol, full) for symbol in range(255 // full * full + 1)):
        length = min((run + 1) * width, most)
        zeros = 0 if run == 255 // full else width - bin(unit).count("1")
        share = ones ** (length - zeros) * 16**zeros * both ** (most - length)
        found.append(max(share * 2**32 // both**most, 1))
    return [*found, 1]


def code_lengths(weights):
    """Package-merge: the best code of at most 15 bits."""
    coins = row = sorted(((w, [s]) for s, w in enumerate(weights)), key=lambda coin: coin[0])
    for _ in range(14):
        packed = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(row[::2], row[1::2], strict=False)]
        row = sorted(coins + packed, key=lambda coin: coin[0])
    count = Counter(symbol for _, symbols in row[: 2 * len(coins) - 2] for symbol in symbols)
    return [count[symbol] for symbol in range(len(coins))]
