"""``pemn run`` and ``pemn report``: a recipe's command line, its results beside the published."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from pemn_surgery.commands.common import add_command, add_json, print_json
from pemn_surgery.report import tables


def add(commands: Any) -> None:
    """Add the commands."""
    parser = add_command(
        commands,
        "run",
        _run_recipe,
        "Train a recipe's networks and write its result, or tabulate those that are there.",
        "pemn run recipes/pemn --case resnet32 --arms rp_1e-2 dense --epochs 10 --work WORK",
    )
    parser.add_argument("recipe", help="its folder")
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="of the recipe: a verb (run if there is none) and its options; --help lists them",
    )
    parser = add_command(
        commands,
        "report",
        _report,
        "Show a recipe's results beside the published: tables, plots, a page of HTML.",
        "pemn report recipes/pemn --out docs/pemn",
    )
    parser.add_argument("recipe", help="its folder")
    parser.add_argument("--results", type=Path, help="their folder (default: RECIPE/results)")
    parser.add_argument("--out", type=Path, help="write report.html and its pictures here")
    add_json(parser)


def _run_recipe(parsed: argparse.Namespace) -> int:
    from pemn_surgery.recipe import load  # with it comes torch, which only this needs

    command = load(parsed.recipe).module("__main__").COMMAND
    words, named = parsed.words, (*command.verbs, "show", "-h", "--help")
    return command.main(words if words and words[0] in named else ["run", *words])


def _report(parsed: argparse.Namespace) -> int:
    from pemn_surgery.recipe import load  # with it comes torch, which only this needs

    recipe = load(parsed.recipe)
    report = recipe.module("__main__").COMMAND.report
    found = report.gather(recipe, parsed.results or Path(parsed.recipe) / "results")
    if parsed.out:
        report.write_page(recipe, found, parsed.out)
    if parsed.json:
        print_json([asdict(b) | {"rows": [asdict(r) for r in rows]} for b, rows in found.items()])
        return 0
    console = Console()
    for budget, rows in found.items():
        console.print(tables.table(budget.title, report.COLUMNS, report.cells(budget, rows)))
    if parsed.out:
        console.print(f"written to {parsed.out / 'report.html'}")
    return 0
