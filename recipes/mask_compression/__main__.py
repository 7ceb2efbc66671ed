"""Masks learned on pretrained ResNets, fully fine-tuned weights beside them, and both compressed.

::

    pemn run recipes/mask_compression run --case resnet20 --work WORK --weights WEIGHTS
    pemn run recipes/mask_compression show
"""

from pathlib import Path
from typing import Any

from rich.table import Table

from pemn_surgery.recipe import load
from pemn_surgery.recipe.cli import RecipeCommand, Verb

RECIPE = load(Path(__file__).resolve().parent)
RUN: Any = RECIPE.module("run")


def _table(result: dict[str, Any]) -> Table:
    return RECIPE.module("tables").tabulate(result, RECIPE.published)


VERBS = {"run": Verb("learn masks and fine-tune, then compress both", RUN.Options, RUN.run)}
COMMAND = RecipeCommand(RECIPE, __doc__, VERBS, _table)

if __name__ == "__main__":
    raise SystemExit(COMMAND.main())
