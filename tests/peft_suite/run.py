"""Fetching PEFT's tests, running them, and what came of it."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.peft_suite import cache, expected

Outcome = Mapping[str, str]
Result = dict[str, Any]

NEEDED = ("diffusers", "parameterized")  # PEFT's test modules import them
OPTIONAL = ("bitsandbytes", "torchao")  # bases that PEFT quantises in its tests
COUNTS = ("passed", "expected", "failed", "skipped", "xfailed")
_ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = "peft_tests"


def check_packages() -> None:
    """Refuse early where PEFT's tests could not be imported."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        message = f'PEFT\'s tests import {", ".join(missing)}: pip install -e ".[peft-suite]"'
        raise SystemExit(message)


def prepare(folder: Path) -> Path:
    """Put PEFT's tests and the fabricated models below a folder, unless they are there.

    Args:
        folder: A cache outside of the repository.

    Returns:
        Where the tests of the installed PEFT lie.
    """
    source = folder / f"peft-{importlib.metadata.version('peft')}"
    if not (source / _PACKAGE / "__init__.py").exists():
        _unpack(_download(source), source / _PACKAGE)
    stamp = folder / "models.txt"
    if not stamp.exists() or stamp.read_text() != _state_of_models():
        cache.build(folder)
        stamp.write_text(_state_of_models())
    return source


def run_suite(folder: Path, source: Path, suite: str, file: str, jobs: int) -> Result:
    """Run one of PEFT's test files and say what came of it.

    Args:
        folder: The cache.
        source: Where the tests lie.
        suite: Which file, without "test_" and ".py".
        file: What adapters are saved as, "scores" or "bits".
        jobs: Processes of pytest-xdist.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "outcomes.json"
        command = _command(suite, file, jobs, written)
        done = subprocess.run(
            command, cwd=source, env=_environment(folder), check=False, capture_output=True,
            text=True,
        )  # fmt: skip
        if done.returncode not in (0, 1):  # neither passed nor failed: nothing was run
            message = f"pytest ended with {done.returncode} on {suite}:\n{done.stdout[-4000:]}"
            raise SystemExit(message + done.stderr[-4000:])
        outcomes = json.loads(written.read_text(encoding="utf-8"))
    return summary(suite, file, outcomes) | {"seconds": round(time.perf_counter() - started)}


def summary(suite: str, file: str, outcomes: Iterable[Outcome]) -> Result:
    """Return counts, failures, expected failures by reason, and rows of the table that fit none."""
    outcomes = list(outcomes)
    counts = Counter(outcome["outcome"] for outcome in outcomes)
    reasons: Counter[tuple[str, str]] = Counter()
    for outcome in outcomes:
        row = expected.find(suite, outcome["test"], outcome["case"], file)
        if row is not None and outcome["outcome"] == "expected":
            reasons[outcome["test"], row.reason] += 1
    return {
        "suite": suite,
        "file": file,
        **{name: counts[name] for name in COUNTS},
        "failures": [_failure(outcome) for outcome in outcomes if outcome["outcome"] == "failed"],
        "reasons": [[test, reason, count] for (test, reason), count in sorted(reasons.items())],
        "skips": Counter(o["message"] for o in outcomes if o["outcome"] == "skipped"),
        "stale": [f"{row.test}: {row.reason}" for row in expected.unused(suite, file, outcomes)],
    }


def is_clean(result: Result) -> bool:
    """Tell whether something was run and nothing unexpected happened."""
    ran = result["passed"] + result["expected"] > 0
    return ran and not result["failed"] and not result["stale"]


def _failure(outcome: Outcome) -> dict[str, str]:
    return {name: outcome[name] for name in ("test", "case", "message")}


def _command(suite: str, file: str, jobs: int, written: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "pytest", "-c", "pytest.ini", "-p", "tests.peft_suite.plugin"),
        *("-p", "no:cacheprovider", "-W", "ignore", "-q", "--tb=line"),
        *(("-n", str(jobs)) if jobs > 1 else ()),
        f"{_PACKAGE}/test_{suite}.py",
        *("--pemn-file", file, "--pemn-outcomes", str(written)),
    ]


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment of a process that sees only the fabricated models."""
    path = [str(_ROOT), ".", *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**os.environ, **ours, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}


def _download(folder: Path) -> Path:
    """Return PEFT's source distribution, fetched by pip.

    Without build isolation, so that pip reads its metadata with the setuptools that is installed.
    """
    name = f"peft=={importlib.metadata.version('peft')}"
    options = ("--no-binary", "peft", "--no-deps", "--no-build-isolation", "--dest", str(folder))
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", *options, name], check=True)
    return next(folder.glob("peft-*.tar.gz"))


def _unpack(archive: Path, into: Path) -> None:
    """Unpack the tests under another name than that of our own package ``tests``."""
    into.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as files:
        for member in files.getmembers():
            parts = Path(member.name).parts
            content = files.extractfile(member)
            if content is not None and parts[1:-1] == ("tests",) and parts[-1].endswith(".py"):
                (into / parts[-1]).write_bytes(content.read())
    (into.parent / "pytest.ini").write_text("[pytest]\n")
    (into / "__init__.py").write_text("")


def _state_of_models() -> str:
    """Return what the fabricated models depend on."""
    code = (Path(__file__).parent / "cache.py").read_bytes()
    version = importlib.metadata.version("transformers")
    return f"{hashlib.sha256(code).hexdigest()} transformers {version}\n"
