"""Read an adapter file from docs/format.md alone: standard library and numpy, nothing of ours."""

import json
import zlib
from functools import cache

import numpy as np


def read(path, weights=None):
    """Tensors by key; masks as flat bools, bfloat16 as its words; weights: the base's, as such."""
    types = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "U8": "u1"}
    content, found = path.read_bytes(), {}
    size = 8 + int.from_bytes(content[:8], "little")
    for key, entry in json.loads(content[8:size]).items():
        if key != "__metadata__":
            data = content[size:][slice(*entry["data_offsets"])]
            found[key] = np.frombuffer(data, types[entry["dtype"]]).reshape(entry["shape"])
            found[key] = mask(data, (weights or {}).get(key)) if ".bits" in key else found[key]
    return found


def mask(stored, weight=None):
    """One stored mask, of any coding."""
    n, crc = int.from_bytes(stored[8:16], "little"), int.from_bytes(stored[16:20], "little")
    assert (stored[:5], zlib.crc32(stored[:16] + stored[20:])) == (b"PEMN\1", crc)
    if stored[5] == 0:
        return np.unpackbits(np.frombuffer(stored[32:], "u1"), count=n, bitorder="little") == 1
    sizes, density = np.zeros(n, int), stored[6] + 256 * stored[7]
    kinds = [((0, max(density, 65536 - density)), density < 32768)] * (stored[5] == 1)
    heads = ((0, 0), 1, 0, 32), ((stored[6] & 15, stored[6] >> 4), stored[7], stored[32], 33)
    log2s, taps, row, at = heads[stored[5] > 1]
    for log2 in filter(None, log2s[: 4 - stored[5]]):
        *key, period = np.frombuffer(stored[at : at + 24], "<u8")
        words = np.random.Philox(key=np.array(key)).random_raw(int(period) // 2 + 1).astype("<u8")
        size = abs(2 * words.view("<u4").astype("i8") + 1 - 2**32) >> 1
        sizes, at = (sizes << log2) | size[np.arange(n) % int(period)] >> 31 - log2, at + 24
    if stored[5] == 3:
        size = np.searchsorted(np.sort(weight & 32767), weight & 32767) * 256 // n
        sizes = (sizes << log2s[1]) | size >> 8 - log2s[1]
    end = at + (stored[5] > 1) * (taps * (4 if row else 1) << sum(log2s))
    for level in stored[at:end]:
        ones = (12 + level % 128 % 12) << level % 128 // 12
        kinds.append(((level % 128, min(65536 * ones // (ones + 12), 65472)), level >= 128))
    words = np.frombuffer(stored[end:] + bytes((end - len(stored)) % 4), "<u4").tolist()
    bits, stages, state = np.zeros(n + 32, int), taps if row else 1, 0
    for start in [*(k for s in range(stages) for k in range(s, n, stages * 2**18)), n]:
        of_kind = {(0, 32768): [(i, False) for i in range(n, n + 32)]} if start == n else {}
        for i in range(start, min(start + stages * 2**18, n), stages):
            t = i % taps
            near = row and 2 * (t % row and bits[i - 1]) + (t >= row and bits[i - row])
            bucket = (t * (4 if row else 1) + near << sum(log2s)) + sizes[i]
            of_kind.setdefault(kinds[bucket][0], []).append((i, kinds[bucket][1]))
        for (_, density), weights in sorted(of_kind.items()):
            while weights:
                while state < 2**32 and words:
                    state = state << 32 | words.pop()
                table = frequencies(density, count := 8 if len(weights) >= 8 else 1)
                symbol = int(np.searchsorted(np.cumsum(table), state % 2**24, "right"))
                state = state // 2**24 * table[symbol] + state % 2**24 - sum(table[:symbol])
                for place, (i, turned) in enumerate(weights[:count]):
                    bits[i] = (symbol - 1 >> place & 1) ^ turned
                weights = weights[count:]
    same = zlib.crc32(b"PEMN\1\0\0\0" + stored[8:16] + stored[20:32])
    same = zlib.crc32(np.packbits(bits[:n], bitorder="little"), same)
    assert same == np.packbits(bits[n:], bitorder="little").view("<u4")[0]
    assert (state, words, stored[-1:] == b"\0") == (0, [], False)
    return bits[:n] == 1


@cache
def frequencies(density, count):
    both = [(k.bit_count(), count - k.bit_count()) for k in range(2**count - 1)]
    found = [max(density**k * (65536 - density) ** z << 24 >> 16 * count, 1) for k, z in both]
    return [1, *found, 2**24 - 1 - sum(found)]
