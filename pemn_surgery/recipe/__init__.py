"""Running experiments: what every recipe shares, from its file to the table of its result.

Here live the recipe's file, options, rules, the one training loop, arms with their checkpoints, and
the command line; what belongs to one claim alone lives in ``recipes/``, never here, and nothing
else of the package imports this.
"""

from pemn_surgery.recipe.file import Case, Recipe, load

__all__ = ["Case", "Recipe", "load"]
