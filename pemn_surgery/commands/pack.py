"""``pemn pack``."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from pemn_surgery.commands.common import add_command, add_json, print_json, read_adapter


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "pack",
        recode_adapter,
        "Code an adapter's masks near their entropy; a checkpoint's scores become masks.",
        "pemn pack tasks/cifar10 --out small",
    )
    add_recoding(parser)
    parser.set_defaults(coding="entropy")


def add_recoding(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `recode_adapter`."""
    parser.add_argument("adapter", type=Path, help="folder that save_pretrained made")
    parser.add_argument("--out", type=Path, help="folder for the new one; default: in its place")
    add_json(parser)


def recode_adapter(parsed: argparse.Namespace) -> int:
    """Write an adapter in ``parsed.coding`` and say what became of its bytes."""
    from pemn_surgery.adapters import recode

    _, before = read_adapter(parsed.adapter)
    after = recode(parsed.adapter, parsed.coding, parsed.out)
    out = parsed.out or parsed.adapter
    weights = sum(after.masks.values())
    if parsed.json:
        sizes = {"bytes": after.nbytes, "bytes_before": before.nbytes, "weights": weights}
        print_json({"adapter": str(out), "coding": parsed.coding, **sizes})
        return 0
    Console().print(
        f"{escape(str(out))}: {before.nbytes:,} bytes became {after.nbytes:,} "
        f"({weights:,} masked weights)."
    )
    return 0
