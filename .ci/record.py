"""Keeps what a run of the tests came to: versions of everything installed, counts, failures."""

import argparse
import importlib.metadata
import json
import platform
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def main() -> None:
    """Write the result file that ``--result`` names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--command", required=True, help="what was run")
    parser.add_argument("--tests", type=Path, required=True, help="pytest's junit.xml")
    parser.add_argument("--result", type=Path, required=True)
    options = parser.parse_args()
    cases = list(ElementTree.parse(options.tests).getroot().iter("testcase"))
    kinds = [_kind(case) for case in cases]
    result = {
        "command": options.command,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "tests": {kind: kinds.count(kind) for kind in ("passed", "failed", "skipped")},
        "failed": [_name(c) for c, kind in zip(cases, kinds, strict=True) if kind == "failed"],
        "versions": _versions(),
    }
    options.result.write_text(json.dumps(result, indent=1) + "\n")


def _kind(case: ElementTree.Element) -> str:
    tags = {child.tag for child in case}
    if tags & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in tags else "passed"


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname')}::{case.get('name')}"


def _versions() -> dict[str, str]:
    found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return dict(sorted(found.items()))


if __name__ == "__main__":
    main()
