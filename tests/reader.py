"""Read an adapter file from docs/format.md alone: standard library and numpy, nothing of ours."""

import json
import zlib
from pathlib import Path

import numpy as np


def read(path):
    """Every tensor by key; masks as flat arrays of bool, bfloat16 as its words of 16 bits."""
    types = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "U8": "u1"}
    content, found = Path(path).read_bytes(), {}
    size = 8 + int.from_bytes(content[:8], "little")
    for key, entry in json.loads(content[8:size]).items():
        if key != "__metadata__":
            data = content[size:][slice(*entry["data_offsets"])]
            values = np.frombuffer(data, types[entry["dtype"]]).reshape(entry["shape"])
            found[key] = mask(data) if key.endswith(".pemn_masks.bits") else values
    return found


def mask(stored):
    """One stored mask, of any coding."""
    n, crc = int.from_bytes(stored[8:16], "little"), int.from_bytes(stored[16:20], "little")
    if stored[:5] != b"PEMN\1" or zlib.crc32(stored[:16] + stored[20:]) != crc:
        raise ValueError(stored[:20])
    if stored[5] == 0:
        return np.unpackbits(np.frombuffer(stored[32:], "u1"), count=n, bitorder="little") == 1
    if stored[5] == 1:
        bits = stream(stored[36:], n, stored[6] & 127, stored[7])[0] ^ stored[6] >> 7
    else:
        bits = context(stored, n, (stored[6] & 15, stored[6] >> 4), stored[7])
    packed = np.packbits(bits, bitorder="little").tobytes()
    as_bits = b"PEMN\1\0\0\0" + stored[8:16] + stored[20:32] + packed
    if zlib.crc32(as_bits) != int.from_bytes(stored[32:36], "little"):
        raise ValueError(stored[:36])
    return bits == 1


def context(stored, n, log2s, places):
    """The bits of a mask coded by context."""
    bucket, at = np.arange(n) % places, 36
    for log2 in filter(None, log2s):
        *key, period = np.frombuffer(stored, "<u8", 3, at)
        words = np.random.Philox(key=np.array(key)).random_raw(int(period) // 2 + 1).astype("<u8")
        sizes = abs(2 * words.view("<u4").astype("i8") + 1 - 2**32) >> 1
        bucket, at = (bucket << log2) | sizes[np.arange(n) % int(period)] >> 31 - log2, at + 24
    end = at + (places << sum(log2s))
    chosen, rest = np.frombuffer(stored[at:end], "u1")[bucket], stored[end:]
    bits = np.zeros(n, "u1")
    for level in np.unique(chosen % 64).tolist():
        there, width = chosen % 64 == level, 8 if level < 7 else 6 if level < 15 else 1
        bits[there], rest = stream(rest, there.sum(), width, 4 * level + 2)
    return bits ^ chosen >> 7


def stream(payload, n, width, odds):
    """The first n bits of a code (package-merge, read by zlib behind a head), and what follows."""
    full, longest, a = 2**width - 1, 255 // (2**width - 1), (16 + odds % 16) << odds // 16
    runs = [s // full * [full] + [s % full] for s in range(longest * full)] + [longest * [full]]
    sizes = [(len(run) * width, sum(bin(unit).count("1") for unit in run)) for run in runs]
    shares = [2**32 * a**ones * 16 ** (size - ones) // (a + 16) ** size for size, ones in sizes]
    coins = [(max(share, 1), [symbol]) for symbol, share in enumerate([*shares, 1])]
    coins = row = sorted(coins, key=lambda coin: coin[0])
    for _ in range(14):
        packed = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(row[::2], row[1::2], strict=False)]
        row = sorted(coins + packed, key=lambda coin: coin[0])
    chosen = [symbol for _, symbols in row[: 2 * len(coins) - 2] for symbol in symbols]
    *lengths, end = np.bincount(chosen).tolist()
    lengths = [*lengths, *[0] * (256 - len(lengths)), end, 1, 1]
    fields = [(2, 10), (5, 3), (0, 5), (1, 5), (15, 4), (0, 9)] + [(4, 3)] * 16
    fields += [(int(f"{length:04b}"[::-1], 2), 4) for length in lengths]
    head = int("".join(f"{value:0{size}b}" for value, size in reversed(fields)), 2)
    inflater = zlib.decompressobj(-15)
    symbols = inflater.decompress(head.to_bytes(140, "little") + payload)
    units = np.array([unit for symbol in symbols for unit in runs[symbol]], "u1")[:, None]
    found = np.unpackbits(units, axis=1, count=width, bitorder="little").reshape(-1)[:n]
    return found, inflater.unused_data
