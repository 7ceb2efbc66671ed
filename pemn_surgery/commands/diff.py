"""``pemn diff``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pemn_surgery.commands.common import (
    adapter_folder,
    add_adapter,
    add_command,
    add_json,
    print_json,
)
from pemn_surgery.report import plots, tables

if TYPE_CHECKING:
    from pemn_surgery.adapters.files.compare import Comparison, Overlap

_COLUMNS = (
    *("weight", "weights", "first", "second", "Jaccard", "chance", "alike"),
    *("both change", "disagree"),
)


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "diff",
        _run,
        "Compare two tasks: which weights both keep, which both change, by layer.",
        "pemn diff quickstart/masks/digit quickstart/masks/parity --plot overlap.png",
    )
    for word in ("first", "second"):
        add_adapter(parser, word)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the overlap by layer")
    add_json(parser)


def _run(parsed: argparse.Namespace) -> int:
    from pemn_surgery.adapters.files.compare import compare_adapters

    found = compare_adapters(adapter_folder(parsed.first), adapter_folder(parsed.second))
    if parsed.plot is not None:
        _plot(parsed.plot, found)
    if parsed.json:
        print_json(_as_dict(found))
    else:
        Console().print(_table(found, f"{parsed.first} and {parsed.second}"))
    return 0


def _table(found: "Comparison", title: str) -> Table:
    rows = [_cells(overlap) for overlap in (*found.overlaps, found.total)]
    shown = tables.table(escape(title), _COLUMNS, rows)
    alone = f"{len(found.only_first)} masks in the first alone, {len(found.only_second)} in the "
    bases = "the same base" if found.same_base else "DIFFERENT bases"
    shown.caption = (
        "first, second: densities; Jaccard: share of the weights kept by either that both keep; "
        "chance: that of independent masks; alike: share of equal bits; both change: weights that "
        "neither leaves as it is; disagree: different bits\n"
        f"{alone}second; trained on {bases}"
    )
    return shown


def _cells(overlap: "Overlap") -> tuple[str, ...]:
    densities = (ones / max(overlap.weights, 1) for ones in (overlap.first, overlap.second))
    shares = (*densities, overlap.jaccard, overlap.chance, overlap.agreement)
    counts = (f"{count:,}" for count in (overlap.changed_by_both, overlap.disagreeing))
    return (overlap.name, f"{overlap.weights:,}", *(f"{share:.4f}" for share in shares), *counts)


def _as_dict(found: "Comparison") -> dict[str, Any]:
    return {
        "masks": [_row(overlap) for overlap in found.overlaps],
        "total": _row(found.total),
        "only_first": found.only_first,
        "only_second": found.only_second,
        "same_base": found.same_base,
        "form": found.form,
    }


def _row(overlap: "Overlap") -> dict[str, Any]:
    counts = ("weights", "first", "second", "both", "changed_by_both", "disagreeing")
    kinds = ("name", *counts, "jaccard", "chance", "agreement")
    return {kind: getattr(overlap, kind) for kind in kinds}


def _plot(path: Path, found: "Comparison") -> None:
    names = [overlap.name for overlap in found.overlaps]
    series = {
        "Jaccard index": [overlap.jaccard for overlap in found.overlaps],
        "by chance": [overlap.chance for overlap in found.overlaps],
    }
    plots.profile(path, names, series, "Jaccard index", "overlap by layer")
