"""Every row of the PEMN paper's tables, and its figures from the results.

::

    pemn run recipes/pemn --case resnet32 --arms rp_1e-2 dense --work WORK [--data FOLDER]
    pemn run recipes/pemn --case resnet32 --arms mp --device cuda --minutes 8 --resume
    pemn run recipes/pemn show
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
