"""Command line of the recipe.

::

    python recipes/cifar10_rp run --case resnet32 --epochs 10 --work WORK [--data FOLDER]
    python recipes/cifar10_rp show
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import Options, compare, load, run

FOLDER = Path(__file__).resolve().parent


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python recipes/{FOLDER.name}")
    parser.add_argument("--results", type=Path, default=FOLDER / "results", help="where they are")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("show", help="tabulate the results beside the published numbers")
    go = verbs.add_parser("run", help="train a case's arms side by side")
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
    return parser


def _show(results: Path, console: Console) -> None:
    files = sorted(results.glob("*.json"))
    if not files:
        console.print(f"no result in {results}; the verb run writes one")
    for file in files:
        console.print(compare(json.loads(file.read_text(encoding="utf-8"))))


def _run(given: dict[str, Any], results: Path, console: Console) -> None:
    torch.set_num_threads(given.pop("threads") or torch.get_num_threads())
    options = Options(**given)
    result = run(load(FOLDER), options, console)
    file = results / f"{options.label}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(compare(result))
    console.print(f"written to {file}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 130 after Ctrl-C, 1 after a refusal, as shells expect."""
    given, console = vars(_parser().parse_args(arguments)), Console()
    verb, results = given.pop("verb"), given.pop("results")
    try:
        _show(results, console) if verb == "show" else _run(given, results, console)
    except RecipeError as error:
        console.print(f"[red]{error}")
        return 1
    except KeyboardInterrupt as stop:
        console.print(f"{stop or 'stopped'}; add --resume to the same command to go on")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
