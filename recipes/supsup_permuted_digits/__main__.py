"""Command line of the recipe.

::

    python recipes/supsup_permuted_digits run --work WORK [--case outputs_10] [--tasks 50]
    python recipes/supsup_permuted_digits show
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pemn_surgery.recipe import load
from pemn_surgery.recipe_cli import RecipeCommand
from pemn_surgery.report import tables as report

FOLDER = Path(__file__).resolve().parent


def _add_options(go: argparse.ArgumentParser) -> None:
    go.add_argument("--case", default="outputs_100", choices=sorted(load(FOLDER).cases))
    go.add_argument("--work", type=Path, required=True, help="takes the adapters")
    go.add_argument("--tasks", type=int, default=100)
    go.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    go.add_argument("--repeats", type=int, default=2, help="batches a task and batch size")
    go.add_argument("--threads", type=int, default=1, help="torch's threads")


def _command(given: dict[str, Any]) -> str:
    """Return the command line of a run, with its folder as a placeholder."""
    parts = [f"python recipes/{FOLDER.name} run --work WORK"]
    for name, value in given.items():
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        parts.append(f"--{name} {text}" if name != "work" else "")
    return " ".join(part for part in parts if part)


def _run(given: dict[str, Any], _: Console) -> tuple[str, dict[str, Any]]:
    recipe, command = load(FOLDER), _command(given)
    torch.set_num_threads(given.pop("threads"))
    runner = recipe.module("run")
    options = runner.Options(**given | {"seeds": tuple(given["seeds"])})
    head = {"schema": 1, "recipe": recipe.name, "claim": recipe.claim, "paper": recipe.paper}
    head |= {"case": options.case, "tasks": options.tasks, "command": command}
    result = head | report.environment() | runner.run(recipe, options)
    return f"{options.case}-t{options.tasks}", result


def _table(result: dict[str, Any]) -> Table:
    title = f"{result['recipe']}: {result['case']}, {result['tasks']} tasks"
    columns = ("task", "batch", "task found", "accuracy", "seeds")
    rows = [
        (row["task"], str(row["batch"]), _cell(row["found"]), _cell(row["accuracy"]))
        for row in result["summary"]
    ]
    seeds = str(len(result["seeds"]))
    return report.table(title, columns, [(*row, seeds) for row in rows])


def _cell(spread: dict[str, float]) -> str:
    return f"{100 * spread['mean']:.2f} ({100 * spread['std']:.2f})"


COMMAND = RecipeCommand(FOLDER, "train a mask a task, then infer tasks", _add_options, _run, _table)

if __name__ == "__main__":
    raise SystemExit(COMMAND.main())
