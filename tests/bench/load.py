"""How long an adapter takes to load, as bits or coded: onto ViT-B/16, beside one that is there.

Random weights, no network. In every round each step runs once, in an order of its own, so that what
else the machine does meets all alike; medians and all measurements are kept, by the clock and by
the processor. `load_file` is safetensors' bare reading of the same file, which checks nothing.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.report.machine import environment
from pemn_surgery.report.tables import table

MODEL = "vit_base_patch16_224"
WEIGHTS = "adapter_model.safetensors"
BANKS: dict[str, dict[str, Any]] = {
    "rp": {"bank": "rp", "ratio": 1e-2},
    "own": {"bank": "own", "modules_to_save": []},
    "coded": {"bank": "rp", "ratio": 1e-2, "density": 0.9, "coding": "entropy"},
}


class Loads:
    """A pemnified model, an adapter in a folder, and the steps to measure."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.folder = folder
        made = pemnify(timm.create_model(MODEL), **options)
        made.save_pretrained(str(folder))
        torch.manual_seed(0)
        self.model = PeftModel.from_pretrained(timm.create_model(MODEL), str(folder))
        self.weights = sum(file(folder).sizes.values())
        self.nbytes = (folder / WEIGHTS).stat().st_size

    def steps(self) -> dict[str, Callable[[], Any]]:
        return {
            "load_file": lambda: load_file(self.folder / WEIGHTS),
            "read and check": lambda: file(self.folder),
            "load_adapter": lambda: self.model.load_adapter(str(self.folder), "late"),
            "set_adapter": lambda: self.model.set_adapter("late"),
        }

    def round(self, order: random.Random) -> dict[str, tuple[float, float]]:
        """Measure every step once; one adapter is there at the start and at the end."""
        steps = self.steps()
        reading = order.sample(["load_file", "read and check", "load_adapter"], 3)
        found = {name: timed(steps[name]) for name in [*reading, "set_adapter"]}
        self.model.set_adapter("default")
        self.model.delete_adapter("late")
        return found


def file(folder: Path) -> Any:
    return PemnConfig.from_pretrained(str(folder)).origin.file


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    clock, processor = time.perf_counter(), time.thread_time()
    call()
    return time.perf_counter() - clock, time.thread_time() - processor


def measure(options: dict[str, Any], rounds: int, order: random.Random) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="pemn_load_") as folder:
        loads = Loads(Path(folder), options)
        loads.round(order)  # first calls import and allocate
        found = [loads.round(order) for _ in range(rounds)]
        steps = {
            name: {
                kind: milliseconds([one[name][place] for one in found])
                for place, kind in enumerate(("clock_ms", "processor_ms"))
            }
            for name in loads.steps()
        }
        return {
            "options": options, "masked_weights": loads.weights, "file_bytes": loads.nbytes,
            "steps": steps,
        }  # fmt: skip


def milliseconds(seconds: list[float]) -> dict[str, Any]:
    rounded = [round(1000 * value, 2) for value in seconds]
    return {"median": round(statistics.median(rounded), 2), "least": min(rounded), "all": rounded}


def show(bank: str, found: dict[str, Any]) -> None:
    columns = ("step", "median ms", "least ms", "median ms of the processor")
    rows = [
        [
            name,
            f"{step['clock_ms']['median']:.1f}",
            f"{step['clock_ms']['least']:.1f}",
            f"{step['processor_ms']['median']:.1f}",
        ]
        for name, step in found["steps"].items()
    ]
    title = f"{MODEL}, bank={bank}: {found['masked_weights']:,} masks, {found['file_bytes']:,} B"
    Console().print(table(title, columns, rows))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python -m tests.bench.load --json load.json"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the steps")
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    order = random.Random(given.seed)
    results = {bank: measure(options, given.rounds, order) for bank, options in BANKS.items()}
    for bank, found in results.items():
        show(bank, found)
    if given.json:
        result = {
            "command": " ".join(["python -m tests.bench.load", *sys.argv[1:]]),
            "environment": environment(),
            "model": MODEL,
            "rounds": given.rounds,
            "load_average": os.getloadavg(),
            "results": results,
        }
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
