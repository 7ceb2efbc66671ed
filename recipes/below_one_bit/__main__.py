"""Command line of the recipe.

::

    python recipes/below_one_bit run --work WORK --case digits --lr 1e-2 1e-3 --seeds 0 1 2
    python recipes/below_one_bit takeback --work WORK --case cifar10 --lr 1e-2 --share .35
    python recipes/below_one_bit measure --work WORK --json RESULT --plot PLOT
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pemn_surgery.recipe import Recipe, load
from pemn_surgery.recipe_cli import exit_code
from pemn_surgery.report import tables as report

FOLDER = Path(__file__).resolve().parent


def _parser(recipe: Recipe) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python recipes/{FOLDER.name}")
    verbs = parser.add_subparsers(dest="verb", required=True)
    go = verbs.add_parser("run", help="train masks; runs that are there already are left out")
    go.add_argument("--case", required=True, choices=sorted(recipe.cases))
    go.add_argument("--work", type=Path, required=True, help="decoded data, masks")
    go.add_argument("--data", default="", help="folder or hub id, in place of the recipe's")
    optimizers = ["adamw", "sgd"]
    go.add_argument("--optimizer", default="adamw", choices=optimizers, help="of the scores")
    go.add_argument("--lr", type=float, nargs="+", required=True, help="of the scores")
    go.add_argument("--seeds", type=int, nargs="+", default=[0])
    go.add_argument("--pull", type=float, default=0.0, help="of scores toward where they began")
    go.add_argument("--held", type=float, default=0.0, help="share of weights, the smallest")
    go.add_argument("--epochs", type=int, help="default: the recipe's")
    go.add_argument("--task", default="digit", choices=["digit", "parity"])
    back = verbs.add_parser("takeback", help="take flips of all runs of a case back")
    back.add_argument("--case", required=True, choices=sorted(recipe.cases))
    back.add_argument("--work", type=Path, required=True)
    back.add_argument("--data", default="", help="as for run")
    back.add_argument(
        "--by", default="loss", choices=["loss", "size", "margin"], help="the least first"
    )
    back.add_argument("--share", type=float, nargs="+", required=True, help="of flips, 0 to 1")
    back.add_argument("--optimizer", default="adamw", choices=optimizers, help="whose runs")
    back.add_argument("--lr", type=float, nargs="+", required=True, help="whose runs")
    back.add_argument("--epochs", type=int, help="whose runs; default: the recipe's")
    back.add_argument("--pull", type=float, default=0.0, help="whose runs")
    back.add_argument("--held", type=float, default=0.0, help="whose runs")
    measure = verbs.add_parser("measure", help="code all masks that were kept")
    measure.add_argument("--work", type=Path, required=True)
    measure.add_argument("--json", type=Path, help="write the result here")
    measure.add_argument("--plot", type=Path, help="draw accuracy and bits here")
    return parser


def _run(recipe: Recipe, given: argparse.Namespace, console: Console) -> None:
    module = recipe.module("run")
    given.work.mkdir(parents=True, exist_ok=True)
    epochs = given.epochs or recipe.case(given.case).rule["epochs"]
    for seed in given.seeds:
        for lr in given.lr:
            swept = (given.case, given.optimizer, lr, seed, epochs)
            run = module.Run(*swept, given.task, given.pull, given.held)
            file = given.work / f"{run.label}.json"
            if not file.exists():
                found = module.train(recipe, run, given.work, given.data, console)
                file.write_text(json.dumps(found) + "\n", encoding="utf-8")


def _take_back(recipe: Recipe, given: argparse.Namespace, console: Console) -> None:
    run, takeback = recipe.module("run"), recipe.module("takeback")
    given.epochs = given.epochs or recipe.case(given.case).rule["epochs"]
    for kept in recipe.module("measure").read(given.work):
        one = run.run_of(kept.settings)
        keys = ("case", "optimizer", "epochs", "pull", "held")
        asked = one.lr in given.lr and all(getattr(one, k) == getattr(given, k) for k in keys)
        for share in given.share if asked and kept.is_as_trained else ():
            file = given.work / f"{takeback.label(one, given.by, share)}.json"
            if not file.exists():
                found = takeback.take_back(recipe, one, given.by, share, given.work, given.data)
                file.write_text(json.dumps(found) + "\n", encoding="utf-8")
                console.print(f"{file.stem}: {found['history'][-1]['accuracy']:.2f} %")


def measured(recipe: Recipe, work: Path) -> dict[str, Any]:
    """Code every mask under a folder; contexts of the first seed of every setting."""
    run, measure = recipe.module("run"), recipe.module("measure")
    rows, contexts, kept = [], [], measure.read(work)
    for one in kept:
        model = run.network(recipe, run.run_of(one.settings))
        layers = {layer.target: layer for layer in run.layers(model)}
        config = model.peft_config["default"]
        rows.append(measure.row(one, layers, config))
        tasks = [other for other in kept if other is not one and one.same(other, "task")]
        if one.settings["seed"] == 0:
            found = measure.contexts(one, layers, config, tasks[0] if tasks else None)
            contexts.append({"run": rows[-1], "contexts": found})
    return {"runs": rows, "summary": measure.summary(rows), "contexts": contexts}


def _measure(recipe: Recipe, given: argparse.Namespace, console: Console) -> None:
    head = {"recipe": recipe.name, "claim": recipe.claim}
    head |= {"command": f"python recipes/{FOLDER.name} measure --work WORK"}
    found = measured(recipe, given.work)
    console.print(_table(found["summary"]))
    if given.json:
        result = head | report.environment() | found
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if given.plot:
        recipe.module("plot").save(given.plot, found["summary"])


def _table(summary: list[dict[str, Any]]) -> report.Table:
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
        for one in summary
    ]
    return report.table(
        "Accuracy (percent) and bits a weight, by how scores are trained", columns, rows
    )


def _with_spread(value: dict[str, float], seeds: int) -> str:
    return f"{value['mean']:.2f}" + (f" ({value['std']:.2f})" if seeds > 1 else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 130 after Ctrl-C, 1 after a refusal, as shells expect."""
    recipe = load(FOLDER)
    given = _parser(recipe).parse_args(arguments)
    torch.set_num_threads(1)
    verb = {"run": _run, "takeback": _take_back, "measure": _measure}[given.verb]
    return exit_code(partial(verb, recipe, given), Console(), "; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
