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
    """One stored mask, of any coding; that coded by its density is as one with one bucket."""
    n, crc = int.from_bytes(stored[8:16], "little"), int.from_bytes(stored[16:20], "little")
    assert (stored[:5], zlib.crc32(stored[:16] + stored[20:])) == (b"PEMN\1", crc)
    if stored[5] == 0:
        return np.unpackbits(np.frombuffer(stored[32:], "u1"), count=n, bitorder="little") == 1
    sizes, streams, bits, code = np.zeros(n, int), {}, np.zeros(n, int), ()
    log2s, taps, row, at = (stored[6] & 15, stored[6] >> 4), stored[7], stored[36], 37
    if stored[5] == 1:
        log2s, taps, row, at, code = (0, 0), 1, 0, 36, (stored[6] & 127, stored[7])
    for log2 in filter(None, log2s[: 4 - stored[5]]):
        *key, period = np.frombuffer(stored[at : at + 24], "<u8")
        words = np.random.Philox(key=np.array(key)).random_raw(int(period) // 2 + 1).astype("<u8")
        size = abs(2 * words.view("<u4").astype("i8") + 1 - 2**32) >> 1
        sizes, at = (sizes << log2) | size[np.arange(n) % int(period)] >> 31 - log2, at + 24
    if stored[5] == 3:
        smaller = np.searchsorted(np.sort(weight & 32767), weight & 32767)
        sizes = (sizes << log2s[1]) | smaller * 256 // n >> 8 - log2s[1]
    end = at + (stored[5] > 1) * (taps * (4 if row else 1) << sum(log2s))
    table, rest = stored[at:end] or bytes([stored[6] & 128]), stored[end:]
    for level in sorted({entry % 64 for entry in table}):
        width = 8 if level < 7 else 6 if level < 15 else 1
        streams[level], rest = stream(rest, *(code or (width, 4 * level + 2)))
    for i in sorted(range(n), key=lambda i: row and i % taps):
        near = row and 2 * (i % taps % row and bits[i - 1]) + (i % taps >= row and bits[i - row])
        entry = table[(i % taps * (4 if row else 1) + near << sum(log2s)) + sizes[i]]
        bits[i] = next(streams[entry % 64]) ^ entry >> 7
    same = b"PEMN\1\0\0\0" + stored[8:16] + stored[20:32]
    same += np.packbits(bits, bitorder="little").tobytes()
    assert zlib.crc32(same) == int.from_bytes(stored[32:36], "little")
    return bits == 1


def stream(payload, width, odds):
    """The bits of a code (package-merge, read by zlib behind a head), and what follows."""
    a, units = (16 + odds % 16) << odds // 16, [f"{u:0{width}b}"[::-1] for u in range(2**width)]
    groups = [[units[-1] * run + u] for run in range(255 // (2**width - 1)) for u in units[:-1]]
    groups += [[units[-1] * (255 // (2**width - 1))]]
    if width == 16:
        own, payload = payload[0], payload[1:]
        ends = [*range(1, own + 1), *range(own + 256, 256 * (256 - own) + own, 256), 65536]
        units.sort(key=lambda unit: unit.count("0"))
        groups = [units[i:j] for i, j in zip([0, *ends], ends, strict=False)]
    both = [sum(a ** run.count("1") * 16 ** run.count("0") for run in runs) for runs in groups]
    shares = [(w << 32) // (a + 16) ** len(runs[0]) for w, runs in zip(both, groups, strict=True)]
    coins = row = sorted((max(w, 1), [s]) for s, w in [*enumerate(shares), (256, 1)])
    for _ in range(14):
        packed = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(row[::2], row[1::2], strict=False)]
        row = sorted(coins + packed, key=lambda coin: coin[0])
    sizes = np.bincount([s for _, symbols in row[: 2 * len(coins) - 2] for s in symbols]).tolist()
    head = 2 | 5 << 10 | 1 << 18 | 15 << 23 | sum(4 << place for place in range(36, 84, 3))
    head |= sum(int(f"{n:04b}"[::-1], 2) << 84 + 4 * i for i, n in enumerate([*sizes, 1, 1]))
    inflate, found = zlib.decompressobj(-15), ""
    symbols = inflate.decompress(head.to_bytes(140, "little") + payload)
    rest = list(inflate.unused_data)
    for s in symbols:
        found += groups[s][rest.pop(0) + 256 * (s == 255 and rest.pop()) if groups[s][1:] else 0]
    return iter(np.frombuffer(found.encode(), "u1") - 48), bytes(rest)
