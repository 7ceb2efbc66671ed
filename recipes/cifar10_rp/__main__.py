"""CIFAR-10: masks on a short random vector beside dense training.

::

    python recipes/cifar10_rp run --case resnet32 --epochs 10 --work WORK [--data FOLDER]
    python recipes/cifar10_rp show
"""

from pathlib import Path

from pemn_surgery.recipe import load
from pemn_surgery.recipe.cli import RecipeCommand, Verb
from pemn_surgery.recipe.options import CaseOptions
from pemn_surgery.recipe.result import compare, run

VERBS = {"run": Verb("train a case's arms side by side", CaseOptions, run)}
COMMAND = RecipeCommand(load(Path(__file__).resolve().parent), __doc__, VERBS, compare)

if __name__ == "__main__":
    raise SystemExit(COMMAND.main())
