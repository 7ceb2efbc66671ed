"""``pemn report``: a recipe's results beside the published, as tables, plots and a page."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from pemn_surgery.commands.common import add_command, add_json
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
    from pemn_surgery.recipe import load, summary  # with it comes torch, which only this needs

    recipe = load(parsed.recipe)
    found = summary.gather(recipe, parsed.results or Path(parsed.recipe) / "results")
    if parsed.out:
        write(recipe, found, parsed.out)
    if parsed.json:
        json.dump(
            [asdict(b) | {"rows": [asdict(r) for r in rows]} for b, rows in found.items()],
            sys.stdout,
            indent=1,
        )
        sys.stdout.write("\n")
        return 0
    console = Console()
    for budget, rows in found.items():
        console.print(tables.table(budget.title, summary.COLUMNS, summary.cells(budget, rows)))
    if parsed.out:
        console.print(f"written to {parsed.out / 'report.html'}")
    return 0


def write(recipe: Any, found: dict[Any, list[Any]], folder: Path) -> None:
    """Write the page and its pictures.

    Args:
        recipe: Whose results they are.
        found: What `summary.gather` returned.
        folder: Made where it is not there.
    """
    from pemn_surgery.recipe import summary
    from pemn_surgery.report import page

    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    for budget, rows in found.items():
        full = "Trained as long as in the paper." if budget.is_full else _REDUCED
        shown = page.Section(
            budget.title, full, summary.COLUMNS, summary.cells(budget, rows),
            _pictures(summary, budget, rows, folder),
        )  # fmt: skip
        sections.append(shown)
    text = page.render(f"{recipe.name}: {recipe.claim}", recipe.paper, sections)
    (folder / "report.html").write_text(text, encoding="utf-8")


_REDUCED = "Trained for less than in the paper: columns compare with each other, not with it."


def _pictures(summary: Any, budget: Any, rows: list[Any], folder: Path) -> list[tuple[str, str]]:
    """Draw accuracy against frozen numbers and against file size, where there are several."""
    from pemn_surgery.report import plots

    stem = budget.title.partition(":")[0] + f"-e{budget.epochs}"
    stem += f"-limit{budget.limit}" if budget.limit else ""
    made = []
    for name, points, label, said in (
        ("unique", summary.by_unique(rows), "frozen numbers", "accuracy by frozen numbers"),
        ("size", summary.by_size(rows), "times smaller than dense", "accuracy by file size"),
    ):
        if not budget.is_full:
            points.pop("published", None)
        if sum(map(len, points.values())) > 2:
            for ending in ("svg", "png"):
                file = folder / f"{stem}-{name}.{ending}"
                plots.scatter(file, points, (label, "test accuracy, %"), f"{budget.title}")
            made.append((f"{stem}-{name}.svg", said))
    return made
