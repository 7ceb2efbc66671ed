"""The command line that recipes share: ``run`` writes a result, ``show`` tabulates all of them."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pemn_surgery.errors import RecipeError


def exit_code(action: Callable[[Console], None], console: Console, how_to_go_on: str = "") -> int:
    """Run a recipe's command; return 130 after Ctrl-C, 1 after a refusal, as shells expect.

    Args:
        action: What to do.
        console: Where it, and what ended it, is shown.
        how_to_go_on: Said after Ctrl-C.
    """
    try:
        action(console)
    except RecipeError as error:
        console.print(f"[red]{error}")
        return 1
    except KeyboardInterrupt as stop:
        console.print(f"{str(stop) or 'stopped'}{how_to_go_on}")
        return 130
    return 0


@dataclass(frozen=True)
class RecipeCommand:
    """What a recipe adds to the command line that all of them share.

    Attributes:
        folder: The recipe's folder; results lie in its ``results/``.
        run_help: What ``run`` does.
        add_options: Adds the options of ``run`` to its parser.
        run: From the options by name and the console to the result's name and the result, which
            JSON can hold.
        tabulate: From a result to the table that a reader gets.
    """

    folder: Path
    run_help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[dict[str, Any], Console], tuple[str, dict[str, Any]]]
    tabulate: Callable[[dict[str, Any]], Table]

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run the command line; 130 after Ctrl-C, 1 after a refusal, as shells expect."""
        given, console = vars(self._parser().parse_args(arguments)), Console()
        verb, results, resumes = given.pop("verb"), given.pop("results"), "resume" in given
        show, run = partial(self._show, results), partial(self._run, given, results)
        how = "; add --resume to the same command to go on" if resumes else ""
        return exit_code(show if verb == "show" else run, console, how)

    def _parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(prog=f"python recipes/{self.folder.name}")
        default = self.folder / "results"
        parser.add_argument("--results", type=Path, default=default, help="where they are")
        verbs = parser.add_subparsers(dest="verb", required=True)
        verbs.add_parser("show", help="tabulate the results")
        self.add_options(verbs.add_parser("run", help=self.run_help))
        return parser

    def _run(self, given: dict[str, Any], results: Path, console: Console) -> None:
        name, result = self.run(given, console)
        file = results / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        console.print(self.tabulate(result))
        console.print(f"written to {file}")

    def _show(self, results: Path, console: Console) -> None:
        files = sorted(results.glob("*.json"))
        if not files:
            console.print(f"no result in {results}; the verb run writes one")
        for file in files:
            console.print(self.tabulate(json.loads(file.read_text(encoding="utf-8"))))
