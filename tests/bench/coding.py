"""Size and speed of coded masks.

Masks are Bernoulli. Sizes are relative to the entropy of each mask's own density. Speeds are
megabytes of packed bits a second of one core's time (not of the clock: other processes run), with
all checks of a stored mask, medians over repeats in turn; and times relative to numpy.packbits and
numpy.unpackbits of the same mask. "in Python" is the coder that serves without constriction.

With ``--contexts``, masks follow drawn initial scores and frozen numbers more or less sharply, and
sizes are relative to the entropy that is left beside those.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from rich.console import Console

from pemn_surgery.coding import bits, codec, coder
from pemn_surgery.coding.context import Guide
from pemn_surgery.coding.header import HEADER_BYTES
from pemn_surgery.numbers import rng
from pemn_surgery.report.machine import environment
from pemn_surgery.report.tables import table
from tests.stored import drawn

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


def ours() -> Way:
    """What `coding="entropy"` writes."""

    def encode(flags: np.ndarray, _: float) -> torch.Tensor:
        return codec.encode(bits.pack(torch.from_numpy(flags)))

    def decode(stored: torch.Tensor, *_: Any) -> np.ndarray:
        return codec.decode(stored, "mask").numpy()[HEADER_BYTES:]

    return Way(encode, decode, torch.Tensor.numel)


def plain() -> Way:
    """The same where constriction is not installed."""

    def without(call: Callable[..., Any]) -> Callable[..., Any]:
        def other(*arguments: Any) -> Any:
            with mock.patch.object(coder, "library", return_value=None):
                return call(*arguments)

        return other

    way = ours()
    return way._replace(encode=without(way.encode), decode=without(way.decode))


def context_way(guides: list[Guide]) -> Way:
    """What `coding="context"` writes."""

    def encode(flags: np.ndarray, _: float) -> torch.Tensor:
        return codec.encode(bits.pack(torch.from_numpy(flags)), guides, (3, 3))

    return ours()._replace(encode=encode)


def guided(weights: int, spread: float, seed: int) -> tuple[list[Guide], np.ndarray]:
    """Return guides, and each weight's probability to be kept."""
    scores = drawn(rng.key_of(seed, "scores"), weights, weights)
    frozen = drawn(rng.key_of(seed, "bank"), weights // 100, weights, 3)
    size = scores.sizes.astype(float) - 127.5
    large = frozen.sizes / 128.0
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
        packages = ("numpy", "constriction")
        result = {
            "command": " ".join(["python -m tests.bench.coding", *sys.argv[1:]]),
            "environment": environment(),
            "packages": {name: version(name) for name in packages},
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
    both = {**own, "in Python": plain()}
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
    found = importlib.util.find_spec(package)
    return importlib.metadata.version(package) if found else None


if __name__ == "__main__":
    sys.exit(main())
