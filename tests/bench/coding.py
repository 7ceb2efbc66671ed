"""Size and speed of coded masks, beside other ways to code them.

Masks are Bernoulli. Sizes are relative to the entropy of each mask's own density. Speeds are
megabytes of packed bits a second of one core's time (not of the clock: other processes run), with
all checks of a stored mask, medians over repeats in turn; and times relative to numpy.packbits and
numpy.unpackbits of the same mask. Ways whose package is missing are left out.

With ``--contexts``, masks follow drawn initial scores and frozen numbers more or less sharply, and
sizes are relative to the entropy that is left beside those.
"""

import argparse
import importlib.util
import json
import lzma
import math
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console

from pemn_surgery.coding import bits, codec
from pemn_surgery.coding.header import HEADER_BYTES
from pemn_surgery.numbers import rng
from pemn_surgery.report.tables import environment, table

DENSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.93, 0.94, 0.95, 0.975, 0.99)
WEIGHTS = (10_000, 100_000, 1_000_000, 10_000_000)
COMPARED = 1_000_000
SPREADS = (5, 20, 60, 150)  # of 256 sizes: how far around the cut bits leave the initial mask


class Way(NamedTuple):
    """Flags to bytes; bytes, number of weights and density to flags packed."""

    encode: Callable[[np.ndarray, float], Any]
    decode: Callable[[Any, int, float], np.ndarray]
    size: Callable[[Any], int] = len


def pack(flags: np.ndarray) -> np.ndarray:
    return np.packbits(flags, bitorder="little")


def of_bytes(compress: Callable[[bytes], bytes], decompress: Callable[[bytes], bytes]) -> Way:
    return Way(
        lambda flags, _: compress(pack(flags).tobytes()),
        lambda content, *_: np.frombuffer(decompress(content), np.uint8),
    )


def huffman_only(content: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(content) + coder.flush()


def gaps(flags: np.ndarray, _: float) -> bytes:
    """Ones before each zero; 255 for 255 ones alone."""
    runs = np.diff(np.flatnonzero(~flags), prepend=-1, append=len(flags)) - 1
    longest, rest = np.divmod(runs, 255)
    symbols = np.full(int((longest + 1).sum()), 255, np.uint8)
    symbols[np.cumsum(longest + 1) - 1] = rest
    return huffman_only(symbols.tobytes())


def from_gaps(content: bytes, weights: int, _: float) -> np.ndarray:
    symbols = np.frombuffer(zlib.decompress(content, -15), np.uint8)
    ends = np.cumsum(symbols + (symbols < 255).astype(np.int64))
    flags = np.ones(weights + 1, bool)
    flags[ends[symbols < 255] - 1] = False
    return pack(flags[:weights])


def constriction_way() -> Way:
    """Range asymmetric numeral systems over bytes, a static model of the density."""
    import constriction

    def model(density: float) -> Any:
        ones = np.array([byte.bit_count() for byte in range(256)])
        shares = density**ones * (1 - density) ** (8 - ones)
        return constriction.stream.model.Categorical(shares, perfect=False)

    def encode(flags: np.ndarray, density: float) -> np.ndarray:
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(pack(flags).astype(np.int32), model(density))
        return coder.get_compressed()

    def decode(content: np.ndarray, weights: int, density: float) -> np.ndarray:
        coder = constriction.stream.stack.AnsCoder(content)
        return coder.decode(model(density), -(-weights // 8)).astype(np.uint8)

    return Way(encode, decode, lambda content: content.nbytes)


def interleaved_rans_way(lanes: int = 1024) -> Way:
    """Numpy alone: lanes of rANS side by side, bytes as symbols, one stream of 16-bit words."""

    def frequencies(density: float) -> np.ndarray:
        ones = np.array([byte.bit_count() for byte in range(256)])
        shares = density**ones * (1 - density) ** (8 - ones)
        counts = np.maximum((shares * 65536).astype(np.int64), 1)
        counts[counts.argmax()] += 65536 - counts.sum()
        return counts.astype(np.uint32)

    def encode(flags: np.ndarray, density: float) -> bytes:
        counts = frequencies(density)
        first = np.cumsum(counts, dtype=np.uint32) - counts
        symbols = pack(flags)
        rows = np.resize(
            np.pad(symbols, (0, -len(symbols) % lanes)), (-(-len(symbols) // lanes), lanes)
        )
        state, words = np.full(lanes, 65536, np.uint32), []
        for row in rows[::-1]:
            count = counts[row]
            full = (state >> 16) >= count
            words.append(state[full].astype(np.uint16))
            state[full] >>= 16
            state = ((state // count) << 16) + state % count + first[row]
        return state.tobytes() + np.concatenate(words[::-1]).tobytes()

    def decode(content: bytes, weights: int, density: float) -> np.ndarray:
        counts = frequencies(density)
        symbol_at = np.repeat(np.arange(256, dtype=np.uint8), counts)
        offset = np.arange(65536, dtype=np.uint32) - (np.cumsum(counts) - counts)[symbol_at]
        offset, count_at = offset.astype(np.uint32), counts[symbol_at]
        state = np.frombuffer(content[: 4 * lanes], np.uint32).copy()
        words, place = np.frombuffer(content[4 * lanes :], np.uint16), 0
        rows = np.empty((-(-weights // (8 * lanes)), lanes), np.uint8)
        for row in rows:
            slot = state & 65535
            row[:] = symbol_at[slot]
            state = count_at[slot] * (state >> 16) + offset[slot]
            empty = np.flatnonzero(state < 65536)
            state[empty] = state[empty] << 16 | words[place : place + len(empty)]
            place += len(empty)
        return rows.reshape(-1)[: -(-weights // 8)]

    return Way(encode, decode)


def ours(inflate: Any = zlib) -> Way:
    """What `coding="entropy"` writes; the decoder of DEFLATE may be another than zlib."""

    def encode(flags: np.ndarray, _: float) -> torch.Tensor:
        return codec.encode(bits.pack(torch.from_numpy(flags)))

    def decode(stored: torch.Tensor, *_: Any) -> np.ndarray:
        standard, deflate.zlib = deflate.zlib, inflate
        try:
            return codec.decode(stored, "mask").numpy()[HEADER_BYTES:]
        finally:
            deflate.zlib = standard

    return Way(encode, decode, torch.Tensor.numel)


def of_units(width: int) -> Way:
    """What `coding="entropy"` writes for small masks: units, and runs of full ones."""

    def encode(flags: np.ndarray, density: float) -> torch.Tensor:
        stored = bits.pack(torch.from_numpy(flags))
        model = entropy.make_model(width, odds.nearest_odds(density))
        content = entropy.encode(stored.numpy()[HEADER_BYTES:], len(flags), model)
        code = codes.Code(codes.Coding.ENTROPY, width, model.odds, content)
        return codec.sealed(code, bits.verify(stored, "mask"))

    return ours()._replace(encode=encode)


def context_way(guides: list[buckets.Guide]) -> Way:
    """What `coding="context"` writes."""

    def encode(flags: np.ndarray, _: float) -> torch.Tensor:
        return codec.encode(bits.pack(torch.from_numpy(flags)), guides, (3, 3))

    return ours()._replace(encode=encode)


def guided(weights: int, spread: float, seed: int) -> tuple[list[buckets.Guide], np.ndarray]:
    """Return guides, and each weight's probability to be kept."""
    scores = buckets.Guide(rng.key_of(seed, "scores"), weights)
    frozen = buckets.Guide(rng.key_of(seed, "bank"), weights // 100, 3)
    size = buckets.sizes_of(scores, weights).astype(float) - 127.5
    large = np.resize(buckets.sizes_of(frozen, weights), weights) / 128.0
    return [scores, frozen], 1 / (1 + np.exp(-np.clip(size / (spread * (large + 0.1)), -30, 30)))


def measure_contexts(weights: int, spread: float, seed: int, repeats: int) -> dict[str, Any]:
    """Measure `coding="context"` on one mask."""
    guides, share = guided(weights, spread, seed)
    flags = np.random.default_rng(seed).random(weights) < share
    held = float(-(share * np.log2(share) + (1 - share) * np.log2(1 - share)).sum())
    ways = {'coding="context"': context_way(guides)}
    (found,) = measure_flags(ways, flags, float(flags.mean()), repeats)
    left = {"spread": spread, "entropy_a_weight": held / weights}
    return found | left | {"size_to_entropy": 8 * found["bytes"] / held}


def other_ways() -> dict[str, Way]:
    ways = {
        "units of 6 weights and runs of full ones": of_units(6),
        "bytes, zlib Z_HUFFMAN_ONLY": of_bytes(huffman_only, lambda c: zlib.decompress(c, -15)),
        "gaps, zlib Z_HUFFMAN_ONLY": Way(gaps, from_gaps),
        "bytes, zlib level 9": of_bytes(lambda c: zlib.compress(c, 9), zlib.decompress),
        "bytes, lzma": of_bytes(lambda c: lzma.compress(c, preset=6), lzma.decompress),
        "rANS of 1,024 lanes in numpy": interleaved_rans_way(),
    }
    if importlib.util.find_spec("zstandard"):
        import zstandard

        best = zstandard.ZstdCompressor(level=19)
        ways["bytes, zstd 19"] = of_bytes(best.compress, zstandard.ZstdDecompressor().decompress)
    if importlib.util.find_spec("constriction"):
        ways["bytes, constriction ANS"] = constriction_way()
    if importlib.util.find_spec("isal"):
        from isal import isal_zlib

        ways['coding="entropy", read by isal'] = ours(isal_zlib)
    return ways


def measure(ways: dict[str, Way], weights: int, density: float, seed: int, repeats: int) -> list:
    """Measure every way in turn, round by round; check that each returns the mask."""
    return measure_flags(
        ways, np.random.default_rng(seed).random(weights) < density, density, repeats
    )


def measure_flags(ways: dict[str, Way], flags: np.ndarray, density: float, repeats: int) -> list:
    """Measure every way on these flags."""
    packed, actual, weights = pack(flags), float(flags.mean()), len(flags)
    seconds: dict[str, list[list[float]]] = {name: [[], []] for name in ["numpy", *ways]}
    sizes = {}
    for _ in range(repeats):
        seconds["numpy"][0].append(timed(lambda: pack(flags))[0])
        seconds["numpy"][1].append(timed(lambda: np.unpackbits(packed))[0])
        for name, way in ways.items():
            took, coded = timed(lambda way=way: way.encode(flags, actual))
            seconds[name][0].append(took)
            took, found = timed(lambda way=way, coded=coded: way.decode(coded, weights, actual))
            seconds[name][1].append(took)
            sizes[name] = way.size(coded)
            if not np.array_equal(found, packed):
                message = f"{name} does not return the mask"
                raise SystemExit(message)
    return [row(name, weights, density, actual, sizes[name], len(packed), seconds) for name in ways]


def row(
    name: str, weights: int, density: float, actual: float, size: int, packed: int, seconds: dict
) -> dict[str, Any]:
    """Summarise one way."""
    result: dict[str, Any] = {"way": name, "weights": weights, "density": density, "bytes": size}
    result["size_to_entropy"] = 8 * size / (weights * entropy_of(actual))
    for place, direction in enumerate(("encode", "decode")):
        times = sorted(seconds[name][place])
        quarter = len(times) // 4
        result[direction] = {
            "mb_per_s": packed / statistics.median(times) / 1e6,
            "mb_per_s_quartiles": [
                packed / times[-1 - quarter] / 1e6,
                packed / times[quarter] / 1e6,
            ],
            "times_numpy": statistics.median(times) / statistics.median(seconds["numpy"][place]),
        }
    return result


def entropy_of(density: float) -> float:
    return -sum(p * math.log2(p) for p in (density, 1 - density) if p > 0)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.thread_time()
    result = call()
    return time.thread_time() - start, result


def show(title: str, rows: list[dict[str, Any]]) -> None:
    columns = ("way", "weights", "density", "size / entropy", "encode MB/s", "decode MB/s")
    cells = [
        [
            found["way"],
            f"{found['weights']:,}",
            f"{found['density']}",
            f"{found['size_to_entropy']:.4f}",
            *(f"{found[key]['mb_per_s']:.0f}" for key in ("encode", "decode")),
        ]
        for found in rows
    ]
    Console().print(table(title, columns, cells))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python -m tests.bench.coding --json coding.json"
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--contexts", action="store_true", help='coding="context" alone')
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = context_rows(given) if given.contexts else all_rows(given)
    if given.json:
        packages = ("numpy", "zstandard", "constriction", "isal")
        result = {
            "command": " ".join(["python -m tests.bench.coding", *sys.argv[1:]]),
            "environment": environment(),
            "coders": {"zlib": zlib.ZLIB_RUNTIME_VERSION}
            | {name: version(name) for name in packages},
            **found,
        }
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def context_rows(given: argparse.Namespace) -> dict[str, Any]:
    sizes = ((weights, spread) for weights in WEIGHTS for spread in SPREADS)
    rows = [measure_contexts(*size, given.seed, given.repeats) for size in sizes]
    show("context; density: see spread", [row | {"density": row["spread"]} for row in rows])
    return {"seeds": [given.seed], "repeats": [given.repeats], "contexts": rows}


def all_rows(given: argparse.Namespace) -> dict[str, Any]:
    own = {'coding="entropy"': ours()}
    rows = [
        found
        for weights in WEIGHTS
        for density in DENSITIES
        for found in measure(own, weights, density, given.seed, given.repeats)
    ]
    show("by size of the layer", rows)
    both = {**own, **other_ways()}
    compared = [
        found
        for density in DENSITIES
        for found in measure(both, COMPARED, density, given.seed + 1, max(given.repeats // 3, 3))
    ]
    show(f"{COMPARED:,} weights", compared)
    return {
        "seeds": [given.seed, given.seed + 1],
        "repeats": [given.repeats, max(given.repeats // 3, 3)],
        "rows": rows,
        "compared": compared,
    }


def version(package: str) -> str | None:
    found = importlib.util.find_spec(package) and importlib.import_module(package)
    return getattr(found, "__version__", "present") if found else None


if __name__ == "__main__":
    sys.exit(main())
