"""The tables of a result: what tools save, how much smaller adapters are, what contexts tell."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from pemn_surgery.report import tables

Row = Mapping[str, Any]
Cells = list[list[str]]
TOOLS = ("gzip", "bz2", "lzma", "lz4", "snappy", "zstd", "brotli")
OURS = ("ours", "payload", "bound", "contexts")
SAVED = ("network", "task", "what", "accuracy", "ones, layers", *TOOLS, *OURS)
SMALLER = (
    *("network", "task", "masks", "adapter, bits", "adapter, coded", "checkpoint"),
    *("x, 32 bit", "x, 16 bit", "weights x, 32 bit", "weights x, 16 bit"),
)


def tabulate(result: Mapping[str, Any], published: Mapping[str, Row]) -> Table:
    """Return the three tables of a result, one below the other.

    Args:
        result: What a run wrote.
        published: The paper's numbers by row, percent saved by tool.
    """
    masks = f"{result['case']}, {result['network']['weights']:,} masks"
    whole = Table.grid(padding=(1, 0))
    rows = saved(result) + published_saved(published)
    whole.add_row(tables.table(f"{masks}: percent saved", SAVED, rows))
    rows = smaller(result) + published_smaller(published)
    whole.add_row(tables.table(f"{masks}: bytes, and times smaller", SMALLER, rows))
    title = f"{masks}: bits relative to sum of n H(layer's density), adaptive / ideal"
    whole.add_row(tables.table(title, *structure(result)))
    return whole


def groups(rows: Iterable[Row]) -> dict[tuple[str, str, float], list[Row]]:
    """Return rows by (task, arm, rate): those that differ in their seed alone."""
    found: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        found.setdefault((row["task"], row["arm"], row["rate"]), []).append(row)
    return found


def spread(rows: Iterable[Row], value: Callable[[Row], float], digits: int = 2) -> str:
    """Return the mean over rows and, if there are several, their standard deviation."""
    values = [value(row) for row in rows]
    deviation = f" ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def saved(result: Mapping[str, Any]) -> Cells:
    """Percent saved: of one bit a mask, or of the float32 weights."""
    rows = []
    for (task, arm, rate), same in groups(result["rows"]).items():
        start, accuracy = [result["case"], task], spread(same, lambda row: row["accuracy"], 1)
        if arm == "masks":
            rows.append([*start, f"masks, lr {rate:g}", accuracy, *_mask_cells(same)])
            continue
        for what, shown in (("finetuned", accuracy), ("change", "")):
            cells = _cells(same, lambda row, what=what: row[what]["reduction"], TOOLS)
            rows.append([*start, what, shown, "", *cells, *[""] * len(OURS)])
    return rows


def _mask_cells(same: Sequence[Row]) -> list[str]:
    low = min(100 * row["density"]["min"] for row in same)
    high = max(100 * row["density"]["max"] for row in same)
    packed = _cells(same, lambda row: row["reduction"]["packed"], TOOLS)
    ours = _cells(same, lambda row: row["reduction"], OURS)
    return [f"{low:.0f}-{high:.0f} %", *packed, *ours]


def _cells(same: Sequence[Row], table: Callable[[Row], Row], names: Sequence[str]) -> list[str]:
    return [spread(same, lambda row, name=name: table(row)[name], 1) for name in names]


def published_saved(published: Mapping[str, Row]) -> Cells:
    """The paper's rows of `saved`."""
    rows = []
    for name, numbers in published.items():
        cells = [f"{numbers[tool]:.2f}" if tool in numbers else "" for tool in (*TOOLS, *OURS)]
        if any(cells):
            rows.append(["ResNet-50", "", f"{name} (published)", "", "", *cells])
    return rows


def smaller(result: Mapping[str, Any]) -> Cells:
    """How many times smaller than a fine-tuned checkpoint: whole files, and weights alone."""
    found, rows = groups(result["rows"]), []
    files = {task: rows[0]["files"] for (task, arm, _), rows in found.items() if arm != "masks"}
    for (task, arm, rate), same in found.items():
        if arm != "masks":
            continue
        start = [result["case"], task, f"lr {rate:g}"]
        sizes = [f"{same[0]['files'][key]:,}" for key in ("adapter", "adapter_coded")]
        sizes.append(f"{files[task]['float32']:,}")
        rows.append([*start, *sizes, *_times(same, files[task]), *_times_of_weights(same)])
    return rows


def _times(same: Sequence[Row], files: Mapping[str, int]) -> list[str]:
    return [
        spread(same, lambda row, kind=kind: files[kind] / row["files"]["adapter_coded"], 1)
        for kind in ("float32", "float16")
    ]


def _times_of_weights(same: Sequence[Row]) -> list[str]:
    return [
        spread(same, lambda row, size=size: size * row["weights"] / row["bytes"]["ours"], 1)
        for size in (4, 2)
    ]


def published_smaller(published: Mapping[str, Row]) -> Cells:
    """The paper's rows of `smaller`."""
    return [
        ["ResNet-50", "", f"{name} (published)", *[""] * 5, *(f"{times:g}" for times in both)]
        for name, numbers in published.items()
        if (both := [numbers[key] for key in ("times_32", "times_16") if key in numbers])
    ]


def structure(result: Mapping[str, Any]) -> tuple[tuple[str, ...], Cells]:
    """Headings and rows: length of masks given a context, relative to the independent bound."""
    masks = {key: same for key, same in groups(result["rows"]).items() if key[1] == "masks"}
    columns = ("the decoder knows", *(f"{task}, lr {rate:g}" for task, _, rate in masks))
    names = next(iter(masks.values()))[0]["structure"]
    return columns, [[name, *(_lengths(same, name) for same in masks.values())] for name in names]


def _lengths(same: Sequence[Row], name: str) -> str:
    def relative(row: Row, length: str) -> float:
        return row["structure"][name][length] / row["bytes"]["bound"]

    kinds = ("adaptive", "ideal")
    known = [kind for kind in kinds if kind in same[0]["structure"][name]]
    return " / ".join(spread(same, lambda row, kind=kind: relative(row, kind), 3) for kind in known)
