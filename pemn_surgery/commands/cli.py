"""The ``pemn`` command."""

import argparse
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from pemn_surgery import __version__
from pemn_surgery.commands import diff, inspect, merge, pack, plan, quickstart, recipes
from pemn_surgery.errors import PemnError

_FAILED = 2
_INTERRUPTED = 130
_PIPE_CLOSED = 141  # as a shell says of a program that the end of a pipe has stopped
_COMMANDS = (quickstart, plan, inspect, diff, pack, merge, recipes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Words behind ``pemn``; None takes the process's.

    Returns:
        0, 1 if a verification failed, 2 after an error that is named, 130 after Ctrl-C, 141 if
        nobody reads what is printed.
    """
    parsed = _parser().parse_args(arguments)
    try:
        code = parsed.run(parsed)
        sys.stdout.flush()  # so that a reader who is gone is met here
        return code
    except BrokenPipeError:
        _forget_output()
        return _PIPE_CLOSED
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
    parser.add_argument("--version", action="store_true", help="say it, and what chooses masks")
    parser.set_defaults(
        run=lambda parsed: _print_version() if parsed.version else _print_help(parser)
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser


def _print_help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 0


def _print_version() -> int:
    from pemn_surgery.kernels import library  # with it comes torch, which only this needs

    sys.stdout.write(f"pemn-surgery {__version__}\nkernels: {library.describe()}\n")
    return 0


def _forget_output() -> None:
    """Let what is not printed yet go nowhere: Python would try once more at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
