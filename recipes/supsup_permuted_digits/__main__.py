"""Permuted digits: a mask a task on one random network, then the question which task a batch is of.

::

    pemn run recipes/supsup_permuted_digits run --work WORK [--case outputs_10] [--tasks 50]
    pemn run recipes/supsup_permuted_digits show
"""

from pathlib import Path
from typing import Any

from rich.table import Table

from pemn_surgery.recipe import load
from pemn_surgery.recipe.cli import RecipeCommand, Verb
from pemn_surgery.report import tables

RECIPE = load(Path(__file__).resolve().parent)
RUN: Any = RECIPE.module("run")


def _table(result: dict[str, Any]) -> Table:
    title = f"{result['recipe']}: {result['case']}, {result['tasks']} tasks"
    columns = ("task", "batch", "task found", "accuracy", "seeds")
    rows = [
        (row["task"], str(row["batch"]), _cell(row["found"]), _cell(row["accuracy"]))
        for row in result["summary"]
    ]
    seeds = str(len(result["seeds"]))
    return tables.table(title, columns, [(*row, seeds) for row in rows])


def _cell(spread: dict[str, float]) -> str:
    return f"{100 * spread['mean']:.2f} ({100 * spread['std']:.2f})"


VERBS = {"run": Verb("train a mask a task, then infer tasks", RUN.Options, RUN.run)}
COMMAND = RecipeCommand(RECIPE, __doc__, VERBS, _table)

if __name__ == "__main__":
    raise SystemExit(COMMAND.main())
