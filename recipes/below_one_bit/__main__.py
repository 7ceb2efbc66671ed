"""Masks below one bit a weight: train them, take flips back, measure what they take.

::

    pemn run recipes/below_one_bit run --work WORK --case digits --lr 1e-2 1e-3 --seeds 0 1 2
    pemn run recipes/below_one_bit takeback --work WORK --case cifar10 --lr 1e-2 --share .35
    pemn run recipes/below_one_bit measure --work WORK --json RESULT --plot PLOT
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pemn_surgery.recipe import Recipe, load
from pemn_surgery.recipe.cli import RecipeCommand, Results, Verb
from pemn_surgery.recipe.options import option
from pemn_surgery.report import tables

RECIPE = load(Path(__file__).resolve().parent)
RUN: Any = RECIPE.module("run")
TAKEBACK: Any = RECIPE.module("takeback")


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """Options of ``measure``."""

    work: Path = option("folder of the masks")
    plot: Path | None = option("draw accuracy and bits here", None)
    threads: int | None = option("torch's threads", 1)


def _measure(recipe: Recipe, options: Measuring, _: Console) -> Results:
    found = measured(recipe, options.work)
    if options.plot:
        recipe.module("plot").save(options.plot, found["summary"])
    yield "below_one_bit", found


def measured(recipe: Recipe, work: Path) -> dict[str, Any]:
    """Code every mask under a folder; contexts of the first seed of every setting."""
    run, measure = recipe.module("run"), recipe.module("measure")
    rows, contexts, kept = [], [], measure.read(work)
    for one in kept:
        model = run.network(recipe, run.job_of(one.settings))
        layers = {layer.target: layer for layer in run.layers(model)}
        config = model.peft_config["default"]
        rows.append(measure.row(one, layers, config))
        tasks = [other for other in kept if other is not one and one.same(other, "task")]
        if one.settings["seed"] == 0:
            found = measure.contexts(one, layers, config, tasks[0] if tasks else None)
            contexts.append({"run": rows[-1], "contexts": found})
    return {"runs": rows, "summary": measure.summary(rows), "contexts": contexts}


def _table(result: dict[str, Any]) -> Table:
    columns = (
        "case",
        "scores",
        "held",
        "epochs",
        "taken back",
        "accuracy",
        "bits a weight",
        "flips",
        "seeds",
    )
    rows = [
        (
            one["case"] if one["case"] == "cifar10" else f"{one['case']}, {one['task']}",
            f"{one['optimizer']} {one['lr']:g}"
            + (f", pull {one['pull']:g}" if one["pull"] else ""),
            f"{one['held']:.0%}" if one["held"] else "-",
            str(one["epochs"]),
            "-" if one["by"] == "none" else f"{one['share']:.0%}, {one['by']}",
            _with_spread(one["accuracy"], len(one["seeds"])),
            f"{one['context']['mean']:.3f}",
            f"{one['changed']['mean']:.1%}",
            str(len(one["seeds"])),
        )
        for one in result["summary"]
    ]
    return tables.table(
        "Accuracy (percent) and bits a weight, by how scores are trained", columns, rows
    )


def _with_spread(value: dict[str, float], seeds: int) -> str:
    return f"{value['mean']:.2f}" + (f" ({value['std']:.2f})" if seeds > 1 else "")


VERBS = {
    "run": Verb(
        "train masks; runs that are there already are left out", RUN.Options, RUN.run, False
    ),
    "takeback": Verb("take flips of a case's runs back", TAKEBACK.Options, TAKEBACK.run, False),
    "measure": Verb("code all masks that were kept", Measuring, _measure),
}
COMMAND = RecipeCommand(RECIPE, __doc__, VERBS, _table)

if __name__ == "__main__":
    raise SystemExit(COMMAND.main())
