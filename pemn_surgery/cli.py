"""The ``pemn`` command."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from pemn_surgery import __version__
from pemn_surgery.commands import diff, inspect, merge, plan, quickstart
from pemn_surgery.errors import PemnError

_FAILED = 2
_INTERRUPTED = 130
_COMMANDS = (quickstart, plan, inspect, diff, merge)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Words behind ``pemn``; None takes the process's.

    Returns:
        0, 1 if a verification failed, 2 after an error that is named, 130 after Ctrl-C.
    """
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except (PemnError, ImportError, OSError) as error:
        Console(stderr=True).print(
            f"[bold red]{type(error).__name__}[/]: {escape(str(error))}",
            highlight=False,
            soft_wrap=True,
        )
        return _FAILED
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted.")
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pemn", description="Binary masks on shared frozen weights, for timm and transformers."
    )
    parser.add_argument("--version", action="version", version=f"pemn-surgery {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
