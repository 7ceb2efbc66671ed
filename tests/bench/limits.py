"""What a mask would cost if moving its bytes were all of it, beside what it was measured to cost.

Forward: scores and frozen numbers are read, the effective weight is written, 12 bytes a weight in
float32. Backward: the weight's gradient, scores and frozen numbers are read, the scores' gradient
is written, 16 bytes. How fast one thread moves bytes is measured on a sum of products of arrays
that no cache holds.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pemn_surgery import plan
from pemn_surgery.report.machine import environment
from pemn_surgery.report.tables import table
from tests.bench.training import ROWS

BYTES = 12 + 16  # a weight
COUNT = 10_000_000


def bandwidth(rounds: int) -> float:
    """Bytes a second of reading three arrays and writing a fourth; the median round."""
    one, two, three = (torch.randn(COUNT) for _ in range(3))
    out, seconds = torch.empty(COUNT), []
    for _ in range(rounds):
        started = time.perf_counter()
        torch.addcmul(one, two, three, out=out)
        seconds.append(time.perf_counter() - started)
    return 16 * COUNT / statistics.median(seconds)


def limits(measured: dict[str, Any], speed: float) -> list[dict[str, Any]]:
    """For each network its weights, the limit, and what a step with masks took (mp, float32)."""
    found = {row["row"]: row for row in measured["rows"] if row["precision"] == "fp32"}
    rows = []
    for name, (make, _) in ROWS.items():
        weights = plan(make(), bank="mp").masked_weights
        step = found[name]["ms"]["dense"]["median"] / 1000
        took = found[name]["ratio"]["top-k mp"]["of_medians"]
        limit = round(1 + BYTES * weights / speed / step, 3)
        rows.append({"row": name, "weights": weights, "limit": limit, "measured": took})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m tests.bench.limits --json docs/results/limits.json",
    )
    parser.add_argument("--training", type=Path, default=Path("docs/results/training.json"))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    speed = bandwidth(given.rounds)
    rows = limits(json.loads(given.training.read_text(encoding="utf-8")), speed)
    cells = [
        [r["row"], f"{r['weights']:,}", f"{r['limit']:.2f}", f"{r['measured']:.2f}"] for r in rows
    ]
    title = f"{speed / 1e9:.1f} GB/s"
    Console().print(table(title, ("step", "weights", "limit", "measured"), cells))
    if given.json:
        command = " ".join(["python -m tests.bench.limits", *sys.argv[1:]])
        result = {"command": command, "environment": environment(), "bytes_a_second": round(speed)}
        given.json.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
