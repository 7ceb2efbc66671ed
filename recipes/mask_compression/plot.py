"""Draw the results: ones by layer and by |weight|, and what stays of one bit a mask.

::

    python recipes/mask_compression/plot.py recipes/mask_compression/compression.png
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pemn_surgery.report import plots

FOLDER = Path(__file__).resolve().parent
BARS = ("gzip", "bz2", "lzma", "lz4", "snappy", "zstd", "brotli", "payload", "bound", "contexts")
COLOURS, MARKERS = ("C0", "C1", "C2", "C3"), {"digits": "o", "rotation": "^"}


def draw(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw the first seed's masks at the recipe's learning rate.

    Args:
        results: What runs wrote, one for each network.
        file: Where; the ending decides the format.

    Raises:
        ImportError: If matplotlib is missing.
    """
    plots.check_plotting()
    from matplotlib.figure import Figure  # draws to a file, needs no screen

    figure = Figure(figsize=(14, 4))
    densities, magnitudes, saved = figure.subplots(1, 3)
    chosen = [(result["case"], row) for result in results for row in _rows(result)]
    nets = list(dict.fromkeys(case for case, _ in chosen))
    for place, (case, row) in enumerate(chosen):
        label, colour = f"{case}, {row['task']}", COLOURS[nets.index(case)]
        shares = [ones / weights for weights, ones in row["layers"].values()]
        _draw_shares(densities, shares, row["task"], label, colour)
        _draw_shares(magnitudes, row["ones_by_magnitude"], row["task"], label, colour)
        _draw_bytes(saved, row, label, colour, place / len(chosen))
    densities.set(title="share of ones by layer", xlabel="layer, first to last")
    magnitudes.set(title="share of ones by |weight| in its layer", xlabel="smallest to largest")
    saved.set(title="bytes, in percent of one bit a mask")
    saved.set_xticks([number + 0.4 for number in range(len(BARS))], BARS, rotation=30)
    for axes in (densities, magnitudes, saved):
        axes.grid(visible=True, axis="y", alpha=0.25)
    magnitudes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def _rows(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    seed, rate = result["seeds"][0], result["rule"]["lr"]
    wanted = {"seed": seed, "rate": rate, "arm": "masks"}
    return [row for row in result["rows"] if wanted.items() <= row.items()]


def _draw_shares(axes: Any, shares: Sequence[float], task: str, label: str, colour: str) -> None:
    places = [number / (len(shares) - 1) for number in range(len(shares))]
    axes.plot(places, shares, MARKERS[task] + "-", color=colour, label=label, markersize=4)


def _draw_bytes(axes: Any, row: Mapping[str, Any], label: str, colour: str, shift: float) -> None:
    sizes = row["bytes"]["packed"] | row["bytes"]
    heights = [100 * 8 * sizes[name] / row["weights"] for name in BARS]
    places = [number + 0.8 * shift for number in range(len(BARS))]
    lighter = 1.0 if row["task"] == "digits" else 0.55
    axes.bar(places, heights, width=0.12, color=colour, alpha=lighter, label=label)


if __name__ == "__main__":
    found = [json.loads(f.read_text(encoding="utf-8")) for f in (FOLDER / "results").glob("*.json")]
    draw(sorted(found, key=lambda result: result["case"]), Path(sys.argv[1]))
