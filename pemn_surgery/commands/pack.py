"""``pemn pack`` and ``pemn unpack``: the same masks in another coding."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from pemn_surgery.commands.common import (
    adapter_folder,
    add_adapter,
    add_command,
    add_json,
    add_overwrite,
    check_free,
    print_json,
    read_adapter,
)
from pemn_surgery.errors import ConfigError


def add(commands: Any) -> None:
    """Add the commands."""
    text = "Code an adapter's masks near their entropy; a checkpoint's scores become masks."
    _add_one(commands, "pack", "entropy", text, "pemn pack tasks/cifar10 --out small")
    text = "Write an adapter's masks as one bit a weight, which transformers' own loaders read too."
    _add_one(commands, "unpack", "bits", text, "pemn unpack small --out tasks/cifar10")


def _add_one(commands: Any, name: str, coding: str, help_text: str, example: str) -> None:
    parser = add_command(commands, name, _run, help_text, example)
    add_adapter(parser)
    parser.add_argument("--out", type=Path, help="folder for the new one; default: in its place")
    add_overwrite(parser)
    add_json(parser)
    parser.set_defaults(coding=coding)


def _run(parsed: argparse.Namespace) -> int:
    from pemn_surgery.adapters import recode

    _, before = read_adapter(parsed.adapter)
    folder = adapter_folder(parsed.adapter)
    out = _place(parsed, folder)
    after = recode(folder, parsed.coding, out)
    weights = sum(after.sizes.values())
    if parsed.json:
        sizes = {"bytes": after.nbytes, "bytes_before": before.nbytes, "weights": weights}
        print_json({"adapter": str(out), "coding": parsed.coding, **sizes})
        return 0
    Console().print(
        f"{escape(str(out))}: {before.nbytes:,} bytes became {after.nbytes:,} "
        f"({weights:,} masked weights)."
    )
    return 0


def _place(parsed: argparse.Namespace, folder: Path) -> Path:
    """Return where the new adapter goes; in place of another one only if that is asked for."""
    if parsed.out is None and folder != Path(parsed.adapter):
        message = f"{parsed.adapter!r} is on the hub, not to be written in its place; give --out."
        raise ConfigError(message)
    out = parsed.out or folder
    if out.resolve() != folder.resolve():
        names = ("adapter_config.json", "adapter_model.safetensors")
        check_free(out, names, overwrite=parsed.overwrite)
    return out
