"""Run PEFT's own tests with masks: ``python -m tests.peft_suite run``."""

import argparse
import json
import os
import sys
from pathlib import Path

from pemn_surgery.report.tables import as_text, table
from tests.peft_suite import expected, report, run
from tests.peft_suite.cases import SUITES


def main() -> int:
    arguments = _parse()
    run.check_packages()
    source = run.prepare(arguments.cache)
    results = []
    for suite in _wanted(arguments.only):
        for file in expected.FILES if arguments.file == "both" else (arguments.file,):
            results.append(run.run_suite(arguments.cache, source, suite, file, arguments.jobs))
            report.write(results, arguments.out)
            if not arguments.json:
                _show(results[-1])
    if arguments.json:
        print(json.dumps(results, indent=1))
    return 0 if results and all(run.is_clean(result) for result in results) else 1


def _wanted(names: list[str]) -> list[str]:
    """Return the suites whose names begin with one of these; all where none is given."""
    return [suite for suite in SUITES if not names or suite.startswith(tuple(names))]


def _show(result: run.Result) -> None:
    heads = ("suite", "file", *run.COUNTS)
    rows = [[str(cell) for cell in row] for row in report.counts([result])][:1]
    print(as_text(table(f"{result['seconds']} s", heads, rows)))
    for one in result["failures"]:
        print("failed", one["test"], one["case"], one["message"], sep=" | ")
    for reason in result["stale"]:
        print("expected, but no such test", reason, sep=" | ")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.peft_suite",
        description=__doc__,
        epilog="example: python -m tests.peft_suite run --only custom --file bits --jobs 2",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "run", help="fetch PEFT's tests, run them, write the table", epilog=parser.epilog
    )
    command.add_argument(
        "--only", action="append", default=[], metavar="SUITE",
        help=f"a test file, or how its name begins; may be given again: {', '.join(SUITES)}",
    )  # fmt: skip
    command.add_argument("--file", choices=(*expected.FILES, "both"), default="both")
    command.add_argument("--jobs", type=int, default=1, help="processes at a time")
    command.add_argument("--json", action="store_true", help="print the results as JSON")
    command.add_argument("--out", type=Path, default=Path("docs"), help="folder of peft_suite.md")
    command.add_argument("--cache", type=Path, default=_cache(), help="default: %(default)s")
    return parser.parse_args()


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pemn_surgery" / "peft_suite"


if __name__ == "__main__":
    sys.exit(main())
