"""The page of a recipe's results: a table and two pictures for each budget."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pemn_surgery.recipe.file import Recipe
from pemn_surgery.recipe.summary import COLUMNS, Budget, Row, by_size, by_unique, cells
from pemn_surgery.report import page, plots

_FULL = "Trained as long as in the paper."
_REDUCED = "Trained for less than in the paper: columns compare with each other, not with it."


def write(recipe: Recipe, found: Mapping[Budget, Sequence[Row]], folder: Path) -> None:
    """Write ``report.html`` and its pictures, as SVG and PNG.

    Raises:
        ImportError: If matplotlib is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sections = [_section(budget, rows, folder) for budget, rows in found.items()]
    text = page.render(f"{recipe.name}: {recipe.claim}", recipe.paper, sections)
    (folder / "report.html").write_text(text, encoding="utf-8")


def _section(budget: Budget, rows: Sequence[Row], folder: Path) -> page.Section:
    said = _FULL if budget.is_full else _REDUCED
    pictures = _pictures(budget, rows, folder)
    return page.Section(budget.title, said, COLUMNS, cells(budget, rows), pictures)


def _pictures(budget: Budget, rows: Sequence[Row], folder: Path) -> list[tuple[str, str]]:
    """Draw accuracy against frozen numbers and against file size, where there are several."""
    unique = by_unique(rows)
    if not budget.is_full:
        unique.pop("published", None)
    made = []
    for name, points, label, said in (
        ("unique", unique, "frozen numbers", "accuracy by frozen numbers"),
        ("size", by_size(rows), "times smaller than dense", "accuracy by file size"),
    ):
        if sum(map(len, points.values())) > 2:
            stem = f"{budget.stem}-{name}"
            for ending in ("svg", "png"):
                labels = (label, "test accuracy, %")
                plots.scatter(folder / f"{stem}.{ending}", points, labels, budget.title)
            made.append((f"{stem}.svg", said))
    return made
