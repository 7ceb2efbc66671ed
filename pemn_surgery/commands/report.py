"""``pemn report``: a recipe's results beside the published, as tables, plots and a page."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from pemn_surgery.commands.common import add_command, add_json, print_json
from pemn_surgery.report import tables


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "report",
        _run,
        "Show a recipe's results beside the published: tables, plots, a page of HTML.",
        "pemn report recipes/pemn --out docs/pemn",
    )
    parser.add_argument("recipe", help="its folder")
    parser.add_argument("--results", type=Path, help="their folder (default: RECIPE/results)")
    parser.add_argument("--out", type=Path, help="write report.html and its pictures here")
    add_json(parser)


def _run(parsed: argparse.Namespace) -> int:
    from pemn_surgery.recipe import load, summary, summary_page  # they bring torch

    recipe = load(parsed.recipe)
    found = summary.gather(recipe, parsed.results or Path(parsed.recipe) / "results")
    if parsed.out:
        summary_page.write(recipe, found, parsed.out)
    if parsed.json:
        print_json([asdict(b) | {"rows": [asdict(r) for r in rows]} for b, rows in found.items()])
        return 0
    console = Console()
    for budget, rows in found.items():
        console.print(tables.table(budget.title, summary.COLUMNS, summary.cells(budget, rows)))
    if parsed.out:
        console.print(f"written to {parsed.out / 'report.html'}")
    return 0
