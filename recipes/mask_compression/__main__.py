"""Command line of the recipe.

::

    python recipes/mask_compression run --case resnet20 --work WORK --weights WEIGHTS
    python recipes/mask_compression show
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pemn_surgery.recipe import load
from pemn_surgery.recipe_cli import RecipeCommand
from pemn_surgery.report import tables as report

FOLDER = Path(__file__).resolve().parent
RECIPE = load(FOLDER)


def _add_options(go: argparse.ArgumentParser) -> None:
    go.add_argument("--case", required=True, choices=sorted(RECIPE.cases))
    go.add_argument("--work", type=Path, required=True, help="decoded data, checkpoints, adapters")
    go.add_argument("--weights", type=Path, required=True, help="folder of the published weights")
    go.add_argument("--data", default="", help="folder or hub id, in place of the recipe's")
    go.add_argument("--tasks", nargs="+", default=["digits", "rotation"])
    go.add_argument("--seeds", type=int, nargs="+", default=[0])
    go.add_argument("--rates", type=float, nargs="*", default=[], help="further ones, of masks")
    go.add_argument("--epochs", type=int, help="in place of each task's own number")
    go.add_argument("--limit", type=int, help="cut every split, for a trial")
    go.add_argument("--threads", type=int, default=1, help="torch's threads")
    go.add_argument("--resume", action="store_true", help="continue from the checkpoints, if any")


def _command(given: dict[str, Any]) -> str:
    """Return the command line of a run, with its folders as placeholders."""
    parts = [f"python recipes/{FOLDER.name} run --work WORK --weights WEIGHTS"]
    for name, value in given.items():
        if value and name not in ("work", "weights", "resume"):
            shown = f".../{Path(value).name}" if name == "data" and Path(value).is_dir() else value
            text = " ".join(map(str, shown)) if isinstance(shown, list) else str(shown)
            parts.append(f"--{name} {text}")
    return " ".join(parts)


def _run(given: dict[str, Any], console: Console) -> tuple[str, dict[str, Any]]:
    command, runner = _command(given), RECIPE.module("run")
    torch.set_num_threads(given.pop("threads"))
    options = runner.Options(
        **given | {name: tuple(given[name]) for name in ("tasks", "seeds", "rates")}
    )
    head = {"schema": 1, "recipe": RECIPE.name, "claim": RECIPE.claim, "paper": RECIPE.paper}
    head |= {"case": options.label, "command": command, "seeds": list(options.seeds)}
    return options.label, head | report.environment("cramjam") | runner.run(
        RECIPE, options, console
    )


def _table(result: dict[str, Any]) -> Table:
    return RECIPE.module("tables").tabulate(result, RECIPE.published)


COMMAND = RecipeCommand(
    FOLDER, "learn masks and fine-tune, then compress both", _add_options, _run, _table
)

if __name__ == "__main__":
    raise SystemExit(COMMAND.main())
