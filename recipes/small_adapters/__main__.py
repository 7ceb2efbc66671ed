"""Small adapters on pretrained models: accuracy beside bytes on disk, at equal steps.

::

    pemn run recipes/small_adapters run --case trec --data DATA --work WORK
    pemn run recipes/small_adapters run --data DATA --weights WEIGHTS --minutes 60 --resume
    pemn run recipes/small_adapters show
    pemn report recipes/small_adapters --out PAGE
"""

from pathlib import Path
from typing import Any

from rich.table import Table

from pemn_surgery.recipe import load
from pemn_surgery.recipe.cli import RecipeCommand, Verb
from pemn_surgery.report import tables

RECIPE = load(Path(__file__).resolve().parent)
RUN: Any = RECIPE.module("run")
REPORT: Any = RECIPE.module("report")
EXPORT: Any = RECIPE.module("method_comparison")


def _table(result: dict[str, Any]) -> Table:
    group, rows = REPORT.of_result(RECIPE, result)
    return tables.table(group.title, REPORT.COLUMNS, REPORT.cells(group, rows))


VERBS = {
    "run": Verb("search each method's rate, train it, measure its file", RUN.Options, RUN.run),
    "method_comparison": Verb(
        "write the results as PEFT's method_comparison has them", EXPORT.Options, EXPORT.run, False
    ),
}
COMMAND = RecipeCommand(RECIPE, __doc__, VERBS, _table, REPORT)

if __name__ == "__main__":
    raise SystemExit(COMMAND.main())
