"""Command line of the recipe.

::

    python recipes/cifar10_rp run --case resnet32 --epochs 10 --work WORK [--data FOLDER]
    python recipes/cifar10_rp show
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pemn_surgery.recipe import Options, compare, load, run
from pemn_surgery.recipe_cli import RecipeCommand

FOLDER = Path(__file__).resolve().parent


def _add_options(go: argparse.ArgumentParser) -> None:
    go.add_argument("--case", required=True, choices=sorted(load(FOLDER).cases))
    go.add_argument("--epochs", type=int, required=True, help="the schedule stretches to them")
    go.add_argument("--work", type=Path, required=True, help="decoded data, checkpoints, log")
    go.add_argument("--data", default="", help="folder or hub id, in place of the recipe's")
    go.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    go.add_argument("--device", default="cpu")
    go.add_argument("--threads", type=int, help="torch's threads (default: torch's choice)")
    go.add_argument("--seed", type=int, default=0)
    go.add_argument("--limit", type=int, help="cut every split, for a trial")
    go.add_argument("--resume", action="store_true", help="continue from the checkpoints, if any")


def _run(given: dict[str, Any], console: Console) -> tuple[str, dict[str, Any]]:
    torch.set_num_threads(given.pop("threads") or torch.get_num_threads())
    options = Options(**given)
    return options.label, run(load(FOLDER), options, console)


COMMAND = RecipeCommand(FOLDER, "train a case's arms side by side", _add_options, _run, compare)

if __name__ == "__main__":
    raise SystemExit(COMMAND.main())
