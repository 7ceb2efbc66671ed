"""What glibc's defaults cost a training step, and what keeping freed memory costs in memory.

A recipe's run of ResNet-32 with masks, batch 256, bfloat16 autocast, channels last, on random
images: as glibc has it, with the settings that runs make (`pemn_surgery.recipe.allocator`), and
with the same ones given by the environment. Every way has processes of its own, which take turns:
seconds of a step by the clock and of the processors, its page faults, the most memory that was
resident, and the last epoch's loss, which must be the same bits in all of them.
"""

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pemn_surgery.recipe import load, runner
from pemn_surgery.recipe.arms import Arm
from pemn_surgery.recipe.options import CaseOptions
from pemn_surgery.recipe.runner import Runner
from pemn_surgery.report.machine import environment
from pemn_surgery.report.tables import table

NAMED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": "104857600"}
WAYS = {"glibc's defaults": {}, "kept": {}, "kept, by the environment": NAMED}
KEYS = ("seconds", "processor_seconds", "faults", "peak_mib")
CASE, ARM = "resnet32", "rp_1e-2"
ROOT = Path(__file__).resolve().parents[2]
BATCH, EPOCHS = 256, 3  # the first epoch is not counted


class Counted(Runner):
    """Notes what each step takes."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.counts: list[list[float]] = []

    def _step(self, arms: Sequence[Arm], batch: Any, steps: int) -> list[torch.Tensor]:
        before = counters()
        losses = super()._step(arms, batch, steps)
        if arms[0].epoch:
            self.counts.append([b - a for a, b in zip(before, counters(), strict=True)])
        return losses


def child(way: str, steps: int, threads: int) -> dict[str, Any]:
    """Train in this process on random images, so many steps an epoch."""
    torch.set_num_threads(threads)
    if way != "kept":
        runner.keep_freed_memory = lambda: False
    recipe, made = load(ROOT / "recipes" / "pemn"), torch.Generator().manual_seed(0)
    train, test = (
        (
            torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=made),
            torch.arange(n) % 10,
        )
        for n in (BATCH * steps, 500)
    )
    task = recipe.images(CASE).task({"train": train, "test": test})
    rule, options = recipe.case(CASE).rule_of(ARM), recipe.arms[ARM]
    with tempfile.TemporaryDirectory() as work:
        given = CaseOptions(case=CASE, work=Path(work), epochs=EPOCHS)
        run = Counted(recipe, given, 0, task, Console(quiet=True))
        build = functools.partial(runner.network_of_arm, recipe, CASE, options, 0)
        arm = run.add(ARM, build, rule, options)
        run.go()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    found = dict(zip(KEYS, map(list, zip(*run.counts, strict=True)), strict=False))
    return {**found, "peak_mib": [peak], "loss": arm.history[-1]["train_loss"]}


def counters() -> tuple[float, float, int]:
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return time.perf_counter(), time.process_time(), faults


def in_process(way: str, given: argparse.Namespace, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.allocator", "--child", way]
    command += ["--steps", str(given.steps), "--threads", str(threads)]
    plain = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(
        command, env=plain | WAYS[way], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(given: argparse.Namespace, threads: int) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(given.processes):
        for way, runs in found.items():
            runs.append(in_process(way, given, threads))
    losses = {run["loss"] for runs in found.values() for run in runs}
    rows = {
        way: {key: spread([value for run in runs for value in run[key]]) for key in KEYS}
        for way, runs in found.items()
    }
    return {"threads": threads, "same_loss": len(losses) == 1, "ways": rows}


def spread(values: list[float]) -> dict[str, float]:
    found = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {key: round(value, 4) for key, value in found.items()}


def show(row: dict[str, Any]) -> None:
    cells = [
        [way, *(f"{found[key]['median']:.2f}" for key in KEYS)]
        for way, found in row["ways"].items()
    ]
    Console().print(table(f"{row['threads']} threads", ("way", *KEYS), cells))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m tests.bench.allocator --json docs/results/allocator.json",
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--processes", type=int, default=3, help="of each way")
    parser.add_argument("--steps", type=int, default=4, help="of an epoch; two are timed")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--child", choices=list(WAYS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.child, given.steps, *given.threads)))  # noqa: T201
        return 0
    rows = []
    for threads in given.threads:
        rows.append(measure(given, threads))
        show(rows[-1])
    if given.json:
        command = " ".join(["python -m tests.bench.allocator", *sys.argv[1:]])
        result = {"command": command, "environment": environment(), "rows": rows}
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
