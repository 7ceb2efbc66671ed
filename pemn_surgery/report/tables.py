"""Tables and plots."""

import importlib.metadata
import importlib.util
import io
import math
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pemn_surgery.errors import ConfigError

_TEXT_WIDTH = 140


def environment(*more: str) -> dict[str, Any]:
    """Return what measured figures depend on: date, machine, versions; for result files.

    Args:
        *more: Packages whose versions count beside the usual ones.
    """
    libraries = ("torch", "torchvision", "timm", "transformers", "peft", "datasets", "scikit-learn")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "cpu": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in ("pemn-surgery", *libraries, *more)},
    }


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table for people; columns of numbers are aligned to the right.

    Args:
        title: What it shows.
        columns: Headings.
        rows: Cells, one for each heading.
    """
    cells = [list(row) for row in rows]
    result = Table(title=title, title_justify="left", caption_justify="left")
    for place, heading in enumerate(columns):
        numeric = bool(cells) and all(_is_number(row[place]) for row in cells)
        result.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        result.add_row(*row)
    return result


def as_text(renderable: Table) -> str:
    """Return a table as plain text.

    Args:
        renderable: The table.
    """
    buffer = io.StringIO()
    Console(file=buffer, width=_TEXT_WIDTH, color_system=None, force_terminal=False).print(
        renderable
    )
    return buffer.getvalue()


def as_markdown(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table, or "None." where it has no rows.

    Args:
        heads: Headings.
        rows: Cells, one for each heading.
    """
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    if not cells:
        return "None.\n"
    lines = [list(heads), ["---"] * len(heads), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def check_plotting() -> None:
    """Refuse early where plots cannot be drawn.

    Raises:
        ImportError: If matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        message = "Plots need matplotlib: pip install matplotlib."
        raise ImportError(message)


def scatter(
    path: Path,
    points: Mapping[str, Sequence[tuple[float, float]]],
    labels: tuple[str, str],
    title: str,
) -> None:
    """Save a scatter plot with a logarithmic x axis.

    Args:
        path: Where; the ending decides the format.
        points: (x, y) pairs by series.
        labels: Names of the x and y axes.
        title: What it shows.

    Raises:
        ImportError: If matplotlib is missing.
    """
    check_plotting()
    from matplotlib.figure import Figure  # draws to a file, needs no screen

    figure = Figure(figsize=(7.0, 4.2))
    axes: Any = figure.add_subplot()
    for (name, series), marker in zip(points.items(), "osD^vP*X" * len(points), strict=False):
        axes.plot(*zip(*series, strict=True), marker, label=name, markersize=9, alpha=0.85)
    axes.set_xscale("log")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_title(title, loc="left")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    _save(figure, path)


def profile(
    path: Path,
    names: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    label: str,
    title: str,
) -> None:
    """Save a plot of values from 0 to 1 by layer, the first at the top.

    Args:
        path: Where; the ending decides the format.
        names: The layers.
        series: Values by what they are of, one for each layer; None is left out.
        label: What a value is.
        title: What it shows.

    Raises:
        ConfigError: If no plot can have this ending.
        ImportError: If matplotlib is missing.
    """
    check_plotting()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 1.6 + 0.2 * len(names)))
    axes: Any = figure.add_subplot()
    rows = range(len(names))
    for (name, values), marker in zip(series.items(), "o|sD^v", strict=False):
        numbers = [math.nan if value is None else value for value in values]
        axes.plot(numbers, rows, marker, label=name)
    axes.set_yticks(rows, names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel(label)
    axes.set_title(title, loc="left")
    axes.grid(visible=True, axis="x", alpha=0.25)
    axes.legend(frameon=False, fontsize=7)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    known = figure.canvas.get_supported_filetypes()
    ending = path.suffix.removeprefix(".").lower()
    if ending and ending not in known:
        message = f"{str(path)!r} ends in {path.suffix!r}; a plot is one of {', '.join(known)}."
        raise ConfigError(message)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def _is_number(text: str) -> bool:
    return (
        bool(text)
        and text.replace(",", "").replace(".", "").replace("%", "").strip(" x+-").isdigit()
    )


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
