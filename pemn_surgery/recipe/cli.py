"""The command line that recipes share: its verbs write results, ``show`` tabulates all of them."""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import summary
from pemn_surgery.recipe.file import Recipe
from pemn_surgery.recipe.options import add_options, command, from_words
from pemn_surgery.recipe.stopping import TimeIsUp
from pemn_surgery.report import machine

Results = Iterable[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Verb:
    """What one verb of a recipe's command line does, and a dataclass of its `option`.

    ``run`` maps recipe, options and console to names and results, which JSON can hold; they are
    written as they come, if the verb has any, and one that comes again replaces the earlier.
    """

    help: str
    options: type
    run: Callable[[Recipe, Any, Console], Results]
    has_results: bool = True


@dataclass(frozen=True)
class RecipeCommand:
    """A recipe's command line: ``text`` is its help, ``tabulate`` makes a result a table.

    ``report`` puts all results together for ``pemn report``: a module with what `summary` has.
    """

    recipe: Recipe
    text: str | None
    verbs: dict[str, Verb]
    tabulate: Callable[[dict[str, Any]], Table]
    report: Any = summary

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run the command line.

        Returns:
            0, also where the minutes that were given are over; 2 after a refusal, 130 after Ctrl-C.
        """
        given, console = vars(self._parser().parse_args(arguments)), Console()
        try:
            self._do(given, console)
        except RecipeError as error:
            Console(stderr=True).print(f"[bold red]RecipeError[/]: {escape(str(error))}")
            return 2
        except KeyboardInterrupt as stop:
            how = "; add --resume to the same command to go on" if "resume" in given else ""
            console.print(f"{str(stop) or 'stopped'}{how}")
            return 0 if isinstance(stop, TimeIsUp) else 130
        return 0

    def _parser(self) -> ArgumentParser:
        folder = self.recipe.folder
        made: dict[str, Any] = {"formatter_class": RawDescriptionHelpFormatter}
        made |= {"description": self.text}
        parser = ArgumentParser(prog=f"pemn run recipes/{folder.name}", **made)
        parser.add_argument("--results", type=Path, default=folder / "results", help="their folder")
        verbs = parser.add_subparsers(dest="verb", required=True)
        verbs.add_parser("show", help="tabulate the results")
        for name, verb in self.verbs.items():
            one = verbs.add_parser(name, help=verb.help, **made)
            if verb.has_results:
                one.add_argument(
                    "--json", type=Path, help="write the result (several: a list) here"
                )
            add_options(one, verb.options, {"case": sorted(self.recipe.cases)})
        return parser

    def _do(self, given: dict[str, Any], console: Console) -> None:
        results = given.pop("results")
        if given["verb"] == "show":
            self._show(results, console)
            return
        verb, file = given.pop("verb"), given.pop("json", None)
        torch.set_num_threads(given.get("threads") or torch.get_num_threads())
        folder = given["work"] if given.get("smoke") else results  # never beside real results
        options = self._options(verb, given, None if file else folder)
        head = self._head(command(self.recipe.folder.name, verb, options))
        found: dict[str, dict[str, Any]] = {}
        try:
            for label, body in self.verbs[verb].run(self.recipe, options, console):
                found[label] = head | body
                whole = [*found.values()] if file and len(found) > 1 else found[label]
                self._write(file or folder / f"{label}.json", whole)
        finally:
            for label, result in found.items():
                console.print(f"written to {file or folder / f'{label}.json'}")
                console.print(self.tabulate(result))

    def _options(self, verb: str, given: dict[str, Any], results: Path | None) -> Any:
        kind = self.verbs[verb].options
        takes_results = any(one.name == "results" for one in fields(kind))
        return from_words(kind, given | ({"results": results} if takes_results else {}))

    def _head(self, line: str) -> dict[str, Any]:
        named = {key: getattr(self.recipe, key) for key in ("claim", "paper")}
        head = {"schema": 1, "recipe": self.recipe.name} | named | {"command": line}
        return head | machine.environment()

    def _write(self, file: Path, result: Any) -> None:
        """Write under another name, then rename: what a killed run has written is whole."""
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)

    def _show(self, results: Path, console: Console) -> None:
        files = sorted(results.glob("*.json"))
        if not files:
            console.print(f"no result in {results}; the verb run writes one")
        for file in files:
            console.print(self.tabulate(json.loads(file.read_text(encoding="utf-8"))))
