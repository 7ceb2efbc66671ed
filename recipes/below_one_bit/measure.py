"""What kept masks take in a file, and what else could guess their bits."""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pemn_surgery.adapters.base import drawn_guides
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.coding import bits, codec

Array = Any  # of numpy; its element type is in the docstrings
SETTINGS = ("case", "task", "optimizer", "lr", "pull", "held", "epochs", "by", "share")
AS_TRAINED = {"by": "none", "share": 0.0}  # no flips taken back
RANKS, LARGE = 64, 8  # sizes of initial scores and of frozen numbers among the contexts


@dataclass(frozen=True)
class Kept:
    """One run, as trained or with flips taken back.

    Attributes:
        settings: What `run.train` or `takeback.take_back` returned.
        masks: Bool arrays, the masks of the last epoch by weight.
    """

    settings: dict[str, Any]
    masks: dict[str, Array]

    @property
    def is_as_trained(self) -> bool:
        """Whether no flips were taken back."""
        return self.settings["by"] == "none"

    def same(self, other: "Kept", *keys: str) -> bool:
        """Tell whether another run differs in nothing but these settings."""
        kept = {*SETTINGS, "seed"} - set(keys)
        return all(self.settings[key] == other.settings[key] for key in kept)


def read(work: Path) -> list[Kept]:
    """Return all runs under a folder."""
    return [_read(file) for file in sorted(work.glob("*.json"))]


def _read(file: Path) -> Kept:
    settings = AS_TRAINED | json.loads(file.read_text(encoding="utf-8"))
    last, masks = settings["epochs"], {}
    with np.load(file.with_suffix(".npz")) as packed:
        for name, shape in settings["shapes"].items():
            flat = np.unpackbits(
                packed[f"{last}/{name}"], count=math.prod(shape), bitorder="little"
            )
            masks[name] = flat.astype(bool)
    return Kept(settings, masks)


def row(kept: Kept, layers: dict[str, PemnLayer], config: Any) -> dict[str, Any]:
    """Return a run's accuracy in percent, and bits a weight.

    "entropy", "score" (by the initial score alone) and "context" are stored bytes, headers
    included; "bound" is that of independent bits, "ideal" a static code by the initial score.
    "changed" is the share of bits that differ from the initial mask, which the layers have.
    """
    sums = dict.fromkeys(("entropy", "score", "context", "bound", "ideal", "changed"), 0.0)
    for name, mask in kept.masks.items():
        layer, stored = layers[name], bits.pack(torch.from_numpy(mask))
        guides = drawn_guides(layer, config, None)
        sums["entropy"] += 8 * codec.encode(stored).numel()
        coded = codec.encode(stored, guides, layer.shape[2:])
        if not torch.equal(codec.decode(coded, name), stored):
            message = f"{name} is not decoded as it was"
            raise SystemExit(message)
        sums["context"] += 8 * coded.numel()
        sums["score"] += 8 * codec.encode(stored, guides[:1]).numel()
        sums["bound"] += ideal(mask, np.zeros(mask.size, int), 1)[0]
        ranks = guides[0].sizes
        sums["ideal"] += ideal(mask, ranks // (256 // RANKS), RANKS)[0]
        sums["changed"] += int(
            (mask != layers[name].mask_of("default").mask().flatten().numpy()).sum()
        )
    weights = sum(mask.size for mask in kept.masks.values())
    head = {key: kept.settings[key] for key in (*SETTINGS, "seed")}
    accuracy = kept.settings["history"][-1]["accuracy"]
    return head | {"accuracy": accuracy} | {key: value / weights for key, value in sums.items()}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and sample deviation over seeds."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in rows:
        found.setdefault(tuple(one[key] for key in SETTINGS), []).append(one)
    return [
        dict(zip(SETTINGS, settings, strict=True))
        | {"seeds": sorted(one["seed"] for one in same)}
        | {key: _spread([one[key] for one in same]) for key in ("accuracy", "context", "changed")}
        for settings, same in sorted(found.items())
    ]


def _spread(values: list[float]) -> dict[str, float]:
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "std": std}


def contexts(
    kept: Kept, layers: dict[str, PemnLayer], config: Any, other: Kept | None
) -> dict[str, dict[str, float]]:
    """Return, for each context, ideal bits a weight and those of its table (a byte a bucket).

    Every table is that of the very mask, weight by weight; side information that the mask itself
    gives (how many of a row changed) is counted with three bits a row.
    """
    sums: dict[str, list[float]] = {}
    for name, mask in kept.masks.items():
        task = None if other is None else other.masks[name]
        for context, buckets, count, extra in _contexts(mask, layers[name], config, task):
            code, table = ideal(mask, buckets, count)
            total = sums.setdefault(context, [0.0, 0.0])
            total[0], total[1] = total[0] + code, total[1] + table + extra
    weights = sum(mask.size for mask in kept.masks.values())
    return {key: {"code": a / weights, "table": b / weights} for key, (a, b) in sums.items()}


def _contexts(
    mask: Array, layer: PemnLayer, config: Any, other: Array | None
) -> Iterator[tuple[str, Array, int, float]]:
    """Yield name, bucket of each weight, number of buckets, bits beside the table."""
    scores, *frozen = drawn_guides(layer, config, None)
    n, each = mask.size, np.arange(mask.size)
    places, columns, rows = math.prod(layer.shape[2:]), layer.shape[1], layer.shape[0]
    rank = scores.sizes.astype(int)
    changed = mask != (rank >= 128)
    rank //= 256 // RANKS
    place, column, line = each % places, each // places % columns, each // (places * columns)
    yield "nothing", np.zeros(n, int), 1, 0.0
    yield "density of the row", _eighths(mask, line, rows)[line], 8, 3.0 * rows
    yield "density of the column", _eighths(mask, column, columns)[column], 8, 3.0 * columns
    yield "score", rank, RANKS, 0.0
    if frozen:
        large = frozen[0].sizes.astype(int) // (256 // LARGE)
        yield "score, frozen number", rank * LARGE + large, RANKS * LARGE, 0.0
    yield "score, place in the kernel", rank * places + place, RANKS * places, 0.0
    near = {
        "left neighbour changed": (1, place > 0),
        "same place, channel before changed": (places, column > 0),
        "same place, row before changed": (places * columns, line > 0),
    }
    for name, (step, there) in near.items():
        before = np.where(there, np.roll(changed, step), 2)
        yield f"score, {name}", rank * 3 + before, RANKS * 3, 0.0
    share = _eighths(changed, line, rows)[line]
    yield "score, share of the row that changed", rank * 8 + share, RANKS * 8, 3.0 * rows
    share = _eighths(changed, column, columns)[column]
    yield "score, share of the column that changed", rank * 8 + share, RANKS * 8, 3.0 * columns
    if other is not None:
        yield "other task's mask", other.astype(int), 2, 0.0
        yield "score, other task's mask", rank * 2 + other, RANKS * 2, 0.0
        both = (rank * places + place) * 2 + other
        yield "score, place in the kernel, other task's mask", both, RANKS * places * 2, 0.0


def _eighths(flags: Array, group: Array, count: int) -> Array:
    """Return which eighth of all groups each group's sum is in."""
    sums = np.bincount(group, weights=flags, minlength=count)
    return np.argsort(np.argsort(sums)) * 8 // count


def ideal(mask: Array, buckets: Array, count: int) -> tuple[float, float]:
    """Return the bits of a static code with the shares of ones in each bucket, and of its table."""
    sizes = np.bincount(buckets, minlength=count)
    used = sizes > 0
    share = np.bincount(buckets, weights=mask, minlength=count)[used] / sizes[used]
    share = np.clip(share, 1e-12, 1 - 1e-12)
    bits_each = -share * np.log2(share) - (1 - share) * np.log2(1 - share)
    return float(sizes[used] @ bits_each), 8.0 * used.sum()
