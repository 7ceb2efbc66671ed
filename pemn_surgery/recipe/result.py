"""What a run tells: its arms beside the published numbers, with all that is needed to judge it."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from pemn_surgery.recipe.arms import Arm
from pemn_surgery.recipe.file import Recipe
from pemn_surgery.recipe.options import CaseOptions
from pemn_surgery.recipe.runner import of_case

COLUMNS = ("arm", "best (epoch)", "last", "published", "best - published", "bytes", "s/epoch")


def run(
    recipe: Recipe, options: CaseOptions, console: Console
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train all arms of a case; yield the name of each seed's result, and what it holds.

    Raises:
        RecipeError: If the case is unknown, or the work folder holds this run already.
        KeyboardInterrupt: After Ctrl-C; the checkpoint is written and the run can be resumed.
    """
    case = recipe.case(options.case)
    paper = case.epochs or recipe.paper_epochs
    for seed in options.seeds:
        runner = of_case(recipe, options, seed, console)
        runner.go()
        cut = f"; a trial on {options.limit} images of each split" if options.limit else ""
        cut += "; a trial on random images" if options.smoke else ""
        yield (
            runner.label + "".join(f"-{name}" for name in options.arms),
            {
                "case": options.case,
                "seed": seed,
                "epochs": {"run": runner.epochs, "paper": paper},
                "limit": options.limit,
                "note": f"epochs: {runner.epochs} of the paper's {paper}{cut}",
                "arms": {
                    arm.name: summary(arm, case.published.get(arm.name)) for arm in runner.arms
                },
            },
        )


def summary(arm: Arm, published: dict[str, Any] | None) -> dict[str, Any]:
    """Best and last epoch beside the published number, bytes, and the whole history."""
    best = max(arm.history, key=lambda row: row["test_accuracy"])
    keys, files = ("epoch", "test_accuracy"), arm.stored()
    return {
        "best": {key: best[key] for key in keys},
        "last": {key: arm.history[-1][key] for key in keys},
        "published": published,
        "unique": arm.unique,
        "trained": sum(p.numel() for p in arm.model.parameters() if p.requires_grad),
        "bytes": {"total": sum(files.values()), "files": files, "ways": arm.ways()},
        "settings": arm.settings,
        "history": arm.history,
    }


def compare(result: dict[str, Any]) -> Table:
    """Tabulate a result's arms beside the published accuracy."""
    table = Table(title=f"{result['recipe']}: {result['case']} - {result['note']}")
    for title in COLUMNS:
        table.add_column(title, justify="left" if title == "arm" else "right")
    for name, arm in result["arms"].items():
        table.add_row(name, *_cells(arm))
    return table


def _cells(arm: dict[str, Any]) -> list[str]:
    best, published = arm["best"]["test_accuracy"], arm["published"]
    beside = ["-", "-"]
    if published:
        beside = [f"{published['accuracy']:.2f}", f"{best - published['accuracy']:+.2f}"]
    seconds = sum(row["seconds"] for row in arm["history"]) / len(arm["history"])
    found = [f"{best:.2f} ({arm['best']['epoch']})", f"{arm['last']['test_accuracy']:.2f}"]
    return [*found, *beside, f"{arm['bytes']['total']:,}", f"{seconds:.1f}"]
