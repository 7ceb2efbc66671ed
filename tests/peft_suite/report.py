"""The outcome of PEFT's tests as results and as a page of the documentation."""

import importlib.metadata
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pemn_surgery.report.machine import environment
from pemn_surgery.report.tables import as_markdown
from tests.peft_suite import expected, run
from tests.peft_suite.cases import SUITES, VARIANTS

_INTRO = """# PEFT's own tests

<!-- Made by `python -m tests.peft_suite run`; not written by hand. -->

The unedited tests of the installed PEFT's source distribution, without network, with `PemnConfig`
in place of PEFT's own configurations in their tables (`tests/peft_suite/cases.py`) and tiny random
models in place of the hub's. Each file runs twice: once with float scores kept in files and in
loaded models, once with adapters as they are by default, as bits. Tests that no configuration of
ours goes into are left out. Expected failures are strict: one that passes counts as failed.
"""
_HEADS = {
    "passed": "passed",
    "expected": "expected to fail",
    "failed": "failed",
    "skipped": "skipped by PEFT",
    "xfailed": "PEFT's xfail",
}


def write(new: Sequence[run.Result], out: Path) -> None:
    """Write results and page; results of suites that were not run now are kept.

    Args:
        new: What was run now.
        out: The folder of the documentation.
    """
    path = out / "results" / "peft_suite.json"
    made = _environment()
    run_as = {
        "command": " ".join(["python -m tests.peft_suite", *sys.argv[1:]]),
        "date": made["date"],
    }
    results = merged(_kept(path, made["versions"]), [{**run_as, **result} for result in new])
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": made, "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (out / "peft_suite.md").write_text(page(content), encoding="utf-8")


def merged(old: Iterable[run.Result], new: Iterable[run.Result]) -> list[run.Result]:
    """Return all results in the order of the suites, new ones in place of old ones."""
    by_key = {(result["suite"], result["file"]): result for result in (*old, *new)}
    order = [(suite, file) for suite in SUITES for file in expected.FILES]
    return [by_key[key] for key in order if key in by_key]


def page(content: dict[str, Any]) -> str:
    """Return the page of a results file."""
    results, made = content["results"], content["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    machine = f"{made['machine']['cpu']}, {made['machine']['cores']} cores"
    parts = [
        _INTRO,
        f"{made['date']}; {machine}; {versions}.\n",
        "## Outcome by file\n",
        as_markdown(("test file", "adapters as", *_HEADS.values()), [*_lines(results)]),
        "## Expected to fail, and why\n",
        as_markdown(("test file", "adapters as", "test", "tests", "why"), _expected(results)),
        "## Failed\n",
        as_markdown(("test file", "adapters as", "test", "case", "error"), _failures(results)),
        "## Rows of the table of expected failures that fit no test\n",
        as_markdown(("test file", "adapters as", "row"), _stale(results)),
        "## Skipped by PEFT's tests\n",
        as_markdown(("why", "tests"), _skips(results)),
        "## The configurations\n",
        as_markdown(("name", "options"), [(name, f"`{kw}`") for name, kw in VARIANTS.items()]),
    ]
    return "\n".join(parts)


def counts(results: Sequence[run.Result]) -> Iterable[list[Any]]:
    """Yield a line for each result, and one of totals for each kind of adapter file."""
    for result in results:
        yield [result["suite"], result["file"], *(result[name] for name in run.COUNTS)]
    for file in expected.FILES:
        of_file = [result for result in results if result["file"] == file]
        if of_file:
            yield ["all", file, *(sum(r[name] for r in of_file) for name in run.COUNTS)]


def _lines(results: Sequence[run.Result]) -> Iterable[list[Any]]:
    for suite, *rest in counts(results):
        yield ["all" if suite == "all" else f"test_{suite}.py", *rest]


def _expected(results: Sequence[run.Result]) -> list[list[Any]]:
    return [
        [result["suite"], result["file"], test, count, reason]
        for result in results
        for test, reason, count in result["reasons"]
    ]


def _failures(results: Sequence[run.Result]) -> list[list[Any]]:
    return [
        [result["suite"], result["file"], one["test"], one["case"], one["message"]]
        for result in results
        for one in result["failures"]
    ]


def _stale(results: Sequence[run.Result]) -> list[list[Any]]:
    return [[r["suite"], r["file"], reason] for r in results for reason in r["stale"]]


def _skips(results: Sequence[run.Result]) -> list[tuple[str, int]]:
    total: Counter[str] = Counter()
    for result in results:
        total.update(result["skips"])
    return total.most_common()


def _kept(path: Path, versions: dict[str, Any]) -> list[run.Result]:
    """Return earlier results of the same versions."""
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    same = content.get("environment", {}).get("versions") == versions
    return content["results"] if same else []


def _environment() -> dict[str, Any]:
    made = environment()
    for name in (*run.NEEDED, *run.OPTIONAL):
        try:
            made["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            made["versions"][name] = None
    return made
