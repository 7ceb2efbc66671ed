"""Walk every model of timm and every model type of transformers: ``python -m tests.zoo``."""

import argparse
import fnmatch
import json
import sys
from pathlib import Path

from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.zoo import report, run


def main() -> int:
    arguments = _parse()
    if arguments.command == "report":
        return report.write(arguments.results, arguments.out)
    done = run.read(arguments.results)
    wanted = [
        (library, name)
        for library in run.LIBRARIES
        if arguments.library in (library, "all")
        for name in run.names(library)
        if fnmatch.fnmatch(name, arguments.only)
    ]
    open_ones = [key for key in wanted if _is_open(done.get(key), again=arguments.again)]
    print(f"{len(wanted)} models, {len(wanted) - len(open_ones)} of them done already")
    failures = _walk(open_ones, arguments)
    return 1 if failures else 0


def _walk(models: list[tuple[str, str]], arguments: argparse.Namespace) -> int:
    failures = 0
    columns = (MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    limits = (arguments.jobs, arguments.timeout, arguments.memory)
    with (
        Progress(*columns, disable=not sys.stderr.isatty()) as progress,
        arguments.results.open("a", encoding="utf-8") as file,
    ):
        task = progress.add_task("", total=len(models))
        for row in run.walk_many(models, *limits):
            file.write(json.dumps(row) + "\n")
            file.flush()
            failures += bool(row["failed"])
            progress.update(task, advance=1, description=f"{failures} failed")
            if row["failed"]:
                print(row["library"], row["name"], row["failed"], row["error"], sep=" | ")
    return failures


def _is_open(row: dict | None, *, again: str) -> bool:
    return row is None or (again == "failed" and bool(row["failed"])) or again == "all"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.zoo",
        description=__doc__,
        epilog="example: python -m tests.zoo run --library timm --only 'resnet*' --results z.jsonl",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    walk = commands.add_parser("run", help="walk models; goes on where it was stopped")
    walk.add_argument("--library", choices=(*run.LIBRARIES, "all"), default="all")
    walk.add_argument("--only", default="*", help="pattern of names")
    walk.add_argument("--jobs", type=int, default=2, help="processes at a time")
    walk.add_argument("--timeout", type=float, default=300, help="seconds a model")
    walk.add_argument("--memory", type=float, default=8, help="GiB a model")
    walk.add_argument("--again", choices=("", "failed", "all"), default="", help="walk these anew")
    walk.add_argument("--results", type=Path, default=Path("zoo.jsonl"))
    table = commands.add_parser("report", help="write the table")
    table.add_argument("--results", type=Path, default=Path("zoo.jsonl"))
    table.add_argument("--out", type=Path, default=Path("docs"), help="folder of zoo.md")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
