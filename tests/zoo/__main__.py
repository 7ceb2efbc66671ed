"""Walk every model of timm, every type and every head of transformers: ``python -m tests.zoo``."""

import argparse
import fnmatch
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pemn_surgery.report.machine import environment
from tests.zoo import heads, report, run


def main() -> int:
    arguments = _parse()
    if arguments.command == "report":
        return report.write(arguments.results, arguments.heads, arguments.out)
    wanted = _heads(arguments) if arguments.command == "heads" else _models(arguments)
    done = run.read(arguments.results)
    open_ones = [key for key in wanted if _is_open(done.get(key), again=arguments.again)]
    print(f"{len(wanted)} models, {len(wanted) - len(open_ones)} of them done already")
    check_many = heads.check_many if arguments.command == "heads" else run.walk_many
    return 1 if _walk(open_ones, check_many, arguments) else 0


def _models(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    return [
        (library, name)
        for library in run.LIBRARIES
        if arguments.library in (library, "all")
        for name in run.names(library)
        if fnmatch.fnmatch(name, arguments.only)
    ]


def _heads(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    return [
        (heads.LIBRARY, name)
        for name, tasks in heads.tasks().items()
        if fnmatch.fnmatch(name, arguments.only)
        and any(fnmatch.fnmatch(task, arguments.task) for task in tasks)
    ]


def _walk(
    models: list[tuple[str, str]],
    check_many: Callable[..., Iterator[dict[str, Any]]],
    arguments: argparse.Namespace,
) -> int:
    failures = 0
    columns = (MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    limits = (arguments.jobs, arguments.timeout, arguments.memory)
    with (
        Progress(*columns, disable=not sys.stderr.isatty()) as progress,
        arguments.results.open("a", encoding="utf-8") as file,
    ):
        if models:
            file.write(json.dumps({"environment": environment()}) + "\n")
        task = progress.add_task("", total=len(models))
        for row in check_many(models, *limits):
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
    _add_limits(walk, "pattern of names", "zoo.jsonl", seconds=300)
    head = commands.add_parser("heads", help="run every head of transformers on example inputs")
    head.add_argument("--task", default="*", help="pattern of tasks: MULTIPLE_CHOICE, *LM")
    _add_limits(head, "pattern of type/class: bert/*", "zoo_heads.jsonl", seconds=120)
    table = commands.add_parser("report", help="write the table")
    table.add_argument("--results", type=Path, default=Path("zoo.jsonl"), help="of `run`")
    table.add_argument("--heads", type=Path, default=Path("zoo_heads.jsonl"), help="of `heads`")
    table.add_argument("--out", type=Path, default=Path("docs"), help="folder of zoo.md")
    return parser.parse_args()


def _add_limits(
    parser: argparse.ArgumentParser, only: str, results: str, *, seconds: float
) -> None:
    parser.add_argument("--only", default="*", help=only)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=seconds, help="seconds a model")
    parser.add_argument("--memory", type=float, default=8, help="GiB a model")
    parser.add_argument("--again", choices=("", "failed", "all"), default="", help="check anew")
    parser.add_argument(
        "--results", type=Path, default=Path(results), help="file to add to, one line a model"
    )


if __name__ == "__main__":
    sys.exit(main())
