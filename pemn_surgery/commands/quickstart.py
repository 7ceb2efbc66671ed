"""``pemn quickstart``."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from pemn_surgery.commands.common import add_command, add_json, positive, print_json


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "quickstart",
        _run,
        "Train two tasks on one shared random vector, beside dense and LoRA; needs no download.",
        "pemn quickstart --out quickstart",
    )
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="folder for results")
    parser.add_argument("--epochs", type=positive, default=6, help="epochs of each training")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, bank and batches")
    add_json(parser)


def _run(parsed: argparse.Namespace) -> int:
    from pemn_surgery.commands import quickstart_run

    with quickstart_run.new_progress() as progress:
        result = quickstart_run.run(parsed.out, parsed.epochs, parsed.seed, progress)
    verified = result["verified_in_new_process"]
    if parsed.json:
        print_json(result)
    else:
        console = Console()
        console.print(quickstart_run.table(result))
        found = "equal bit for bit" if verified else "NOT EQUAL"
        console.print(f"Both mask adapters reloaded in a new process: logits {found}.")
        console.print(
            f"Adapters, results.json and quickstart.png are in {escape(str(parsed.out))}."
        )
    return 0 if verified else 1
