"""``pemn inspect``."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from pemn_surgery.commands.common import (
    add_adapter,
    add_command,
    add_json,
    print_json,
    read_adapter,
)
from pemn_surgery.report import plots, tables


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "inspect",
        _run,
        "Show an adapter: its configuration, the density of every mask, its bytes.",
        "pemn inspect quickstart/masks/digit --plot densities.png",
    )
    add_adapter(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the densities by layer")
    add_json(parser)


def _run(parsed: argparse.Namespace) -> int:
    config, file = read_adapter(parsed.adapter)
    from pemn_surgery.adapters.identity import holds_bits, identity_of_file

    ones = file.ones
    identity = identity_of_file(config, file) if holds_bits(file) else None
    masks = [
        {
            "name": name,
            "weights": mask.weights,
            # None where the file alone does not tell it.
            "density": ones[name] / max(mask.weights, 1) if name in ones else None,
            "coding": mask.header.coding if mask.header else "scores",
        }
        for name, mask in file.masks.items()
    ]
    if parsed.plot is not None:
        series = {str(parsed.adapter): [mask["density"] for mask in masks]}
        plots.profile(parsed.plot, [*file.masks], series, "share of ones", "densities by layer")
    if parsed.json:
        settings = config.to_dict()
        found = {"config": settings, "identity": identity, "bytes": file.nbytes, "masks": masks}
        print_json(found, default=sorted)
        return 0
    columns = ("weight", "weights", "density", "coding")
    rows = [
        (mask["name"], f"{mask['weights']:,}", _shown_density(mask), mask["coding"])
        for mask in masks
    ]
    shown = tables.table(escape(str(parsed.adapter)), columns, rows)
    total = sum(file.sizes.values())
    shown.caption = (
        f"bank {config.bank}, {config.bank_init}, seed {config.seed}; {len(masks)} masks of "
        f"{total:,} weights, {len(file.others)} other tensors, {file.nbytes:,} bytes; "
        f"fingerprint {_shown_fingerprint(config.fingerprint)}\n"
        f"identity {identity or 'unknown: its file alone does not tell the masks'}"
        f"{_shown_lineage(config.lineage)}"
    )
    Console().print(shown)
    return 0


def _shown_density(mask: dict[str, Any]) -> str:
    if mask["density"] is None:
        return "scores" if mask["coding"] == "scores" else "with its base"
    return f"{mask['density']:.4f}"


def _shown_fingerprint(fingerprint: dict[str, str] | None) -> str:
    return next(iter(fingerprint.values())) if fingerprint else "unknown"


def _shown_lineage(lineage: dict[str, Any] | None) -> str:
    return f"; made by {lineage['by']} from {', '.join(lineage['of'])}" if lineage else ""
