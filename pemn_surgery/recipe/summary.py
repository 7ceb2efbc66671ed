"""All results of a recipe together: ours beside the published, over seeds, by budget; their page.

What was trained as long as in the paper is never in one table with what was not.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe.file import Recipe
from pemn_surgery.report import page, plots

COLUMNS = (
    "arm", "frozen numbers", "published", "best epoch", "last epoch", "best - published", "seeds",
    "bytes", "times smaller",
)  # fmt: skip
_FULL = "Trained as long as in the paper."
_REDUCED = "Trained for less than in the paper: columns compare with each other, not with it."


@dataclass(frozen=True)
class Budget:
    """How long a case was trained: in tables apart.

    Attributes:
        case: Its name.
        epochs: That were run.
        paper: Epochs of the paper.
        limit: Images of each split; None: all.
    """

    case: str
    epochs: int
    paper: int
    limit: int | None

    @property
    def is_full(self) -> bool:
        """Whether it is the paper's."""
        return self.epochs == self.paper and self.limit is None

    @property
    def stem(self) -> str:
        """What its files' names begin with."""
        return f"{self.case}-e{self.epochs}" + (f"-limit{self.limit}" if self.limit else "")

    @property
    def title(self) -> str:
        """What a table of it is called."""
        if self.is_full:
            return f"{self.case}: {self.epochs} epochs, as published"
        images = f", {self.limit:,} images a split" if self.limit else ""
        return f"{self.case}: reduced to {self.epochs} of {self.paper} epochs{images}"


@dataclass(frozen=True)
class Row:
    """One arm at one budget.

    Attributes:
        arm: Its name.
        unique: Frozen numbers that masks choose from; of others the weights.
        best: Test accuracy of each seed's best epoch, in percent.
        last: That of its last epoch.
        ways: Bytes of what a user would keep, by how it is kept.
        published: The paper's, or none.
    """

    arm: str
    unique: int
    best: tuple[float, ...]
    last: tuple[float, ...]
    ways: dict[str, int]
    published: dict[str, Any] | None

    @property
    def is_masked(self) -> bool:
        """Whether it has masks."""
        return len(self.ways) > 1


def gather(recipe: Recipe, folder: Path) -> dict[Budget, list[Row]]:
    """Read all results that ``run`` wrote to a folder: rows of each budget, full ones first.

    A RecipeError says that there is none, or that two hold one arm of one seed at one budget.
    """
    found: dict[Budget, dict[str, dict[int, dict[str, Any]]]] = {}
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        length = result["epochs"]
        budget = Budget(result["case"], length["run"], length["paper"], result["limit"])
        for arm, one in result["arms"].items():
            seeds = found.setdefault(budget, {}).setdefault(arm, {})
            if result["seed"] in seeds:
                message = f"{file}: {arm!r} with seed {result['seed']} is in another result, too"
                raise RecipeError(message)
            seeds[result["seed"]] = one
    if not found:
        message = f"{folder} has no result; pemn run writes one"
        raise RecipeError(message)
    return {budget: _rows(recipe, found[budget]) for budget in _ordered(recipe, found)}


def _ordered(recipe: Recipe, budgets: Any) -> list[Budget]:
    cases = list(recipe.cases)
    return sorted(budgets, key=lambda b: (not b.is_full, cases.index(b.case), -b.epochs))


def _rows(recipe: Recipe, arms: dict[str, dict[int, dict[str, Any]]]) -> list[Row]:
    rows = []
    for name in (name for name in recipe.arms if name in arms):
        seeds = [arms[name][seed] for seed in sorted(arms[name])]
        best, last = (tuple(s[k]["test_accuracy"] for s in seeds) for k in ("best", "last"))
        first = seeds[0]
        rows.append(
            Row(name, first["unique"], best, last, first["bytes"]["ways"], first["published"])
        )
    return rows


def cells(budget: Budget, rows: Sequence[Row]) -> list[list[str]]:
    """Return a budget's table: a row an arm, `COLUMNS`."""
    dense = _dense(rows)
    return [_cells(budget, row, dense) for row in rows]


def _dense(rows: Sequence[Row]) -> int:
    """Bytes of the dense network's file; 0 where it was not trained."""
    return sum(sum(row.ways.values()) for row in rows if row.arm == "dense")


def _cells(budget: Budget, row: Row, dense: int) -> list[str]:
    shown, difference = "", ""
    if row.published:
        deviation = row.published.get("std")
        beside = "figure" if row.published.get("figure") else deviation and f"{deviation:.2f}"
        shown = f"{row.published['accuracy']:.2f}" + (f" ({beside})" if beside else "")
        if budget.is_full:
            difference = f"{statistics.mean(row.best) - row.published['accuracy']:+.2f}"
    least = min(row.ways.values())
    smaller = f"{dense / least:.1f}" if dense else ""
    spreads = (spread(row.best), spread(row.last))
    return [
        row.arm, f"{row.unique:,}" if row.is_masked else "", shown, *spreads, difference,
        str(len(row.best)), f"{least:,}", smaller,
    ]  # fmt: skip


def spread(values: Sequence[float]) -> str:
    """Mean, and sample deviation of several."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({statistics.stdev(values):.2f})"


def by_unique(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Points (frozen numbers, accuracy) of masks: ours, and the published."""
    masked = [row for row in rows if row.is_masked]
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "published": []}
    for row in masked:
        found["ours"].append((row.unique, statistics.mean(row.best)))
        if row.published:
            found["published"].append((row.unique, row.published["accuracy"]))
    return {name: points for name, points in found.items() if points}


def by_size(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Points (times smaller than the dense file, accuracy), a series for each way of keeping."""
    dense = _dense(rows)
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for way, size in row.ways.items() if dense else ():
            name = way if row.is_masked else row.arm.partition("_")[0]
            series.setdefault(name, []).append((dense / size, statistics.mean(row.best)))
    return series


def write_page(recipe: Recipe, found: Mapping[Budget, Sequence[Row]], folder: Path) -> None:
    """Write ``report.html`` and its pictures, as SVG and PNG; an ImportError without matplotlib."""
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
