"""Read an adapter file from docs/format.md alone: standard library and numpy, nothing of ours."""

import json
import zlib

import numpy as np


def read(path, weights=None):
    """Tensors by key; masks as flat bools, bfloat16 as its words; weights: the base's, as such."""
    types = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "U8": "u1"}
    content, found = path.read_bytes(), {}
    size = 8 + int.from_bytes(content[:8], "little")
    for key, entry in json.loads(content[8:size]).items():
        if key != "__metadata__":
            data = content[size:][slice(*entry["data_offsets"])]
            values = np.frombuffer(data, types[entry["dtype"]]).reshape(entry["shape"])
            found[key] = mask(data, (weights or {}).get(key)) if ".bits" in key else values
    return found


def mask(stored, weight=None):
    """One stored mask, of any coding."""
    n, crc = int.from_bytes(stored[8:16], "little"), int.from_bytes(stored[16:20], "little")
    if stored[:5] != b"PEMN\1" or zlib.crc32(stored[:16] + stored[20:]) != crc:
        raise ValueError(stored[:20])
    if stored[5] == 0:
        return np.unpackbits(np.frombuffer(stored[32:], "u1"), count=n, bitorder="little") == 1
    if stored[5] == 1:
        bits = stream(stored[36:], n, stored[6] & 127, stored[7])[0] ^ stored[6] >> 7
    else:
        bits = context(stored, n, (stored[6] & 15, stored[6] >> 4), stored[7], weight)
    crc = zlib.crc32(b"PEMN\1\0\0\0" + stored[8:16] + stored[20:32])
    if zlib.crc32(np.packbits(bits, bitorder="little"), crc).to_bytes(4, "little") != stored[32:36]:
        raise ValueError(stored[:36])
    return bits == 1


def context(stored, n, log2s, taps, weight):
    """The bits of a mask coded by context, or beside the base's weights too."""
    row, at, sizes, streams, bits = stored[36], 37, np.zeros(n, int), {}, np.zeros(n, int)
    for log2 in filter(None, log2s[: 4 - stored[5]]):
        *key, period = np.frombuffer(stored[at : at + 24], "<u8")
        words = np.random.Philox(key=np.array(key)).random_raw(int(period) // 2 + 1).astype("<u8")
        size = abs(2 * words.view("<u4").astype("i8") + 1 - 2**32) >> 1
        sizes, at = (sizes << log2) | size[np.arange(n) % int(period)] >> 31 - log2, at + 24
    if stored[5] == 3:
        smaller = np.searchsorted(np.sort(weight & 32767), weight & 32767)
        sizes = (sizes << log2s[1]) | smaller * 256 // n >> 8 - log2s[1]
    end = at + (taps * (4 if row else 1) << sum(log2s))
    table, rest = stored[at:end], stored[end:]
    for level in sorted({entry % 64 for entry in table}):
        found, rest = stream(rest, None, 8 if level < 7 else 6 if level < 15 else 1, 4 * level + 2)
        streams[level] = iter(found)
    for i in sorted(range(n), key=lambda i: row and i % taps):
        near = row and 2 * (i % taps % row and bits[i - 1]) + (i % taps >= row and bits[i - row])
        entry = table[(i % taps * (4 if row else 1) + near << sum(log2s)) + sizes[i]]
        bits[i] = next(streams[entry % 64]) ^ entry >> 7
    return bits


def stream(payload, n, width, odds):
    """n bits of a code (package-merge, read by zlib behind a head; None: all), and what follows."""
    full, longest, a = 2**width - 1, 255 // (2**width - 1), (16 + odds % 16) << odds // 16
    runs = [s // full * [full] + [s % full] for s in range(longest * full)] + [longest * [full]]
    sizes = [(len(run) * width, sum(bin(unit).count("1") for unit in run)) for run in runs]
    shares = [2**32 * a**ones * 16 ** (size - ones) // (a + 16) ** size for size, ones in sizes]
    coins = row = sorted((max(w, 1), [s]) for s, w in [*enumerate(shares), (256, 1)])
    for _ in range(14):
        packed = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(row[::2], row[1::2], strict=False)]
        row = sorted(coins + packed, key=lambda coin: coin[0])
    chosen = [symbol for _, symbols in row[: 2 * len(coins) - 2] for symbol in symbols]
    fields = [(2, 10), (5, 3), (0, 5), (1, 5), (15, 4), (0, 9)] + [(4, 3)] * 16
    fields += [(int(f"{size:04b}"[::-1], 2), 4) for size in [*np.bincount(chosen).tolist(), 1, 1]]
    head = int("".join(f"{value:0{size}b}" for value, size in reversed(fields)), 2)
    inflate = zlib.decompressobj(-15)
    units = [u for s in inflate.decompress(head.to_bytes(140, "little") + payload) for u in runs[s]]
    found = np.unpackbits(np.c_[np.array(units, "u1")], axis=1, count=width, bitorder="little")
    return found.reshape(-1)[:n], inflate.unused_data
