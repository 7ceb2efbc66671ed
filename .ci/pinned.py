"""Tells whether every installed package is pinned in constraints.txt, to this version."""

import importlib.metadata
import re
import sys
from pathlib import Path

# What every virtual environment has before anything is installed, and what is installed.
_NOT_PINNED = {"pip", "pemn-surgery"}


def main() -> None:
    """Print what is not pinned, and exit with 1 if there is any."""
    pins = re.findall(r"^([a-z0-9-]+)==(\S+)", Path("constraints.txt").read_text(), re.MULTILINE)
    held = {_plain(d.metadata["Name"]): d.version for d in importlib.metadata.distributions()}
    loose = sorted(set(held.items()) - set(pins) - {(name, held.get(name)) for name in _NOT_PINNED})
    for name, version in loose:
        sys.stdout.write(f"constraints.txt has no {name}=={version}: run .ci/constrain\n")
    sys.stdout.write(f"{len(held) - len(loose)} packages as pinned, {len(loose)} not\n")
    sys.exit(bool(loose))


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
