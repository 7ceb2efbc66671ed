"""All results together: accuracy beside bytes for each case and over all cases of a network.

Everything here is made of result files; nothing is trained.
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import Recipe
from pemn_surgery.recipe.summary import spread
from pemn_surgery.report import page, plots

COLUMNS = ("arm", "test", "bytes", "seconds", "rate", "trained", "seeds", "front")


@dataclass(frozen=True)
class Group:
    """What stands in one table: a case, or the mean over several.

    Attributes:
        stem: What its files' names begin with.
        title: What the table is called.
        metric: What the test split was measured by, in percent.
        said: What there is to know of it.
    """

    stem: str
    title: str
    metric: str
    said: str


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        arm: Its name.
        test: By seed, in percent.
        bytes: Of what it keeps on disk, by seed.
        seconds: Of training, by seed.
        rate: The learning rate that the search chose; None: none, or another one for each case.
        trained: Numbers that were trained.
        total: Numbers of the network with what the method added.
    """

    arm: str
    test: tuple[float, ...]
    bytes: tuple[int, ...]
    seconds: tuple[float, ...]
    rate: float | None
    trained: int
    total: int

    @property
    def accuracy(self) -> float:
        """Mean over seeds."""
        return statistics.mean(self.test)

    @property
    def size(self) -> float:
        """Mean bytes."""
        return statistics.mean(self.bytes)


Table = tuple[Group, list[Row]]


def gather(recipe: Recipe, folder: Path) -> dict[Group, list[Row]]:
    """Read all results of a folder: each case, then the means over cases of one network.

    A RecipeError says that there is none.
    """
    results = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(folder.glob("*.json"))]
    if not results:
        message = f"{folder} has no result; pemn run writes one"
        raise RecipeError(message)
    order = list(recipe.cases)
    results.sort(key=lambda result: order.index(result["settings"]["case"]))
    cases = [(result["settings"], of_result(recipe, result)) for result in results]
    return dict(table for _, table in cases) | dict(_means(cases))


def of_result(recipe: Recipe, result: dict[str, Any]) -> Table:
    """Return the table of one case; arms without a final cell are left out."""
    settings = result["settings"]
    finals = [cell for cell in result["cells"] if cell["stage"] == "final"]
    arms = [arm for arm in recipe.arms if any(cell["arm"] == arm for cell in finals)]
    rows = [_row(arm, [cell for cell in finals if cell["arm"] == arm]) for arm in arms]
    steps = sorted({cell["steps"] for cell in finals if cell["steps"]})
    counts = ", ".join(f"{name} {count:,}" for name, count in settings["rows"].items())
    said = f"{settings['network']}; rows: {counts}; optimizer steps of each method: "
    said += f"{', '.join(map(str, steps))}. Test: {settings['metric']}, in percent."
    limit = settings["limit"]
    stem = f"{settings['case']}-e{settings['epochs']}" + (f"-limit{limit}" if limit else "")
    title = f"{settings['case']}: {settings['epochs']} epochs, {settings['network']}"
    title += f", a trial on {limit:,} rows of each split" if limit else ""
    return Group(stem, title, settings["metric"], said), rows


def _row(arm: str, cells: Sequence[dict[str, Any]]) -> Row:
    cells = sorted(cells, key=lambda cell: cell["seed"])
    test, seconds = (tuple(cell[key] for cell in cells) for key in ("test", "seconds"))
    sizes = tuple(cell["bytes"]["total"] for cell in cells)
    first = cells[0]
    return Row(arm, test, sizes, seconds, first["rate"], first["trained"], first["total"])


def _means(results: Sequence[tuple[dict[str, Any], Table]]) -> Iterator[Table]:
    """Yield the mean over all cases of a network with several, of arms that all of these have.

    Cases of which a part was tried belong to none.
    """
    networks: dict[str, list[Table]] = {}
    for settings, table in results:
        if not settings["limit"]:
            networks.setdefault(settings["network"], []).append(table)
    for number, (network, cases) in enumerate(networks.items()):
        by_arm = [{row.arm: row for row in rows} for _, rows in cases]
        shared = [arm for arm in by_arm[0] if all(arm in rows for rows in by_arm)]
        if len(cases) > 1 and shared:
            title = f"mean of {len(cases)} cases, {network}"
            metrics = "/".join(dict.fromkeys(group.metric for group, _ in cases))
            said = f"{'; '.join(group.title for group, _ in cases)}: means, seed by seed."
            means = [_mean([rows[arm] for rows in by_arm]) for arm in shared]
            yield Group(f"mean-{number}", title, metrics, said), means


def _mean(rows: Sequence[Row]) -> Row:
    """Return the mean over cases; those of the first seeds if cases have more or fewer."""

    def mean(field: str) -> Iterator[float]:
        return map(statistics.mean, zip(*(getattr(row, field) for row in rows), strict=False))

    trained, total = (
        round(statistics.mean(getattr(row, field) for row in rows))
        for field in ("trained", "total")
    )
    sizes, seconds = tuple(map(round, mean("bytes"))), tuple(mean("seconds"))
    return Row(rows[0].arm, tuple(mean("test")), sizes, seconds, None, trained, total)


def front(rows: Sequence[Row]) -> list[str]:
    """Return the arms that no smaller one reaches in accuracy, by size."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.size, -row.accuracy)):
        if not found or row.accuracy > found[-1].accuracy:
            found.append(row)
    return [row.arm for row in found]


def cells(group: Group, rows: Sequence[Row]) -> list[list[str]]:
    """Return a group's table: a row an arm, `COLUMNS`."""
    best = front(rows)
    del group
    return [
        [
            row.arm,
            spread(row.test),
            f"{row.size:,.0f}",
            f"{statistics.mean(row.seconds):.1f}",
            "" if row.rate is None else f"{row.rate:g}",
            f"{row.trained:,}",
            str(len(row.test)),
            "x" if row.arm in best else "",
        ]
        for row in rows
    ]


def write_page(recipe: Recipe, found: Mapping[Group, Sequence[Row]], folder: Path) -> None:
    """Write ``report.html`` and its pictures, as SVG and PNG; an ImportError without matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = [_section(group, rows, folder) for group, rows in found.items()]
    text = page.render(f"{recipe.name}: {recipe.claim}", recipe.paper, sections)
    (folder / "report.html").write_text(text, encoding="utf-8")


def _section(group: Group, rows: Sequence[Row], folder: Path) -> page.Section:
    points = {
        row.arm: (row.size, row.accuracy, statistics.stdev(row.test) if len(row.test) > 1 else 0.0)
        for row in rows
    }
    labels = ("bytes on disk", f"test {group.metric}, %")
    for ending in ("svg", "png"):
        plots.tradeoff(folder / f"{group.stem}.{ending}", points, front(rows), labels, group.title)
    pictures = [(f"{group.stem}.svg", "accuracy by bytes on disk; bars: deviation over seeds")]
    return page.Section(group.title, group.said, COLUMNS, cells(group, rows), pictures)
