"""``pemn run``: a recipe's command line."""

import argparse
from typing import Any

from pemn_surgery.commands.common import add_command


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "run",
        _run,
        "Train a recipe's networks and write its result, or tabulate those that are there.",
        "pemn run recipes/pemn --case resnet32 --arms rp_1e-2 dense --epochs 10 --work WORK",
    )
    parser.add_argument("recipe", help="its folder")
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="of the recipe: a verb (run if there is none) and its options; --help lists them",
    )


def _run(parsed: argparse.Namespace) -> int:
    from pemn_surgery.recipe import load  # with it comes torch, which only this needs

    command = load(parsed.recipe).module("__main__").COMMAND
    words, named = parsed.words, (*command.verbs, "show", "-h", "--help")
    return command.main(words if words and words[0] in named else ["run", *words])
