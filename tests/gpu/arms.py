"""A recipe's arms in one call together, beside one after the other: milliseconds of a step of all.

Steps are those of `pemn run recipes/pemn` with and without ``--together``, on random images.
"""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pemn_surgery.recipe import load, runner
from pemn_surgery.recipe.options import CaseOptions
from tests.bench import training

RECIPE = load(Path(__file__).resolve().parents[2] / "recipes" / "pemn")
ROWS = [("resnet32", 2), ("resnet32", 4), ("resnet32", 10), ("convmixer_d6_h256", 4)]
Split = tuple[torch.Tensor, torch.Tensor]


def measure(
    case: str, count: int, rounds: int, device: torch.device, batch: int | None = None
) -> dict[str, Any]:
    """Time a step of the recipe's first ``count`` arms, the rule's batch or this one."""
    rows = batch or RECIPE.cases[case].rule["batch"]
    images = torch.randint(256, (rows, 3, 32, 32), dtype=torch.uint8)
    split = images.to(device), (torch.arange(rows) % 10).to(device)
    with tempfile.TemporaryDirectory() as work:
        options = CaseOptions(case=case, work=Path(work), epochs=1, device=str(device))
        runs = [started(options, count, split, together) for together in (False, True)]
    ways = {
        "one after the other": lambda: [runs[0]._step([arm], split, 1) for arm in runs[0].arms],
        "together": lambda: runs[1]._step(runs[1].arms, split, 1),
    }
    taken = training.in_turn(ways, rounds, device)
    alone = taken["one after the other"]
    return {
        "case": case,
        "arms": [arm.name for arm in runs[0].arms],
        "batch": rows,
        "ms": {name: training.summary(times) for name, times in taken.items()},
        "ratio": {name: training.ratio(times, alone) for name, times in taken.items()},
    }


def started(options: CaseOptions, count: int, split: Split, together: bool) -> runner.Runner:
    """A run of the first arms, all of them in training."""
    case, images = options.case, RECIPE.images(options.case)
    task = images.task({"train": split, "test": split})
    given = dataclasses.replace(options, work=options.work / str(together))
    run = runner.Runner(RECIPE, given, 0, task, Console(quiet=True))
    if together:
        run.take_together(RECIPE.network(case))
    for name, changes in list(RECIPE.arms.items())[:count]:
        build = functools.partial(runner.network_of_arm, RECIPE, case, changes, 0)
        run.add(name, build, RECIPE.case(case).rule_of(name), changes).model.train()
    return run
