"""Plots, drawn to files by matplotlib; a file's ending decides the format."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pemn_surgery.errors import ConfigError


def check_plotting() -> None:
    """Refuse early where plots cannot be drawn: an ImportError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        message = "Plots need matplotlib: pip install matplotlib."
        raise ImportError(message)


def scatter(
    path: Path,
    points: Mapping[str, Sequence[tuple[float, float]]],
    labels: tuple[str, str],
    title: str,
) -> None:
    """Save a scatter plot of (x, y) pairs by series, its x axis logarithmic (or ImportError)."""
    axes = _axes(4.2, title)
    for (name, series), marker in zip(points.items(), "osD^vP*X" * len(points), strict=False):
        axes.plot(*zip(*series, strict=True), marker, label=name, markersize=9, alpha=0.85)
    axes.set_xscale("log")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    _save(axes.figure, path)


def tradeoff(
    path: Path,
    points: Mapping[str, tuple[float, float, float]],
    front: Sequence[str],
    labels: tuple[str, str],
    title: str,
) -> None:
    """Save a plot of named points (x, y, deviation of y), its x axis logarithmic.

    Args:
        path: Where; the ending decides the format.
        points: By name; each has a marker of its own.
        front: Those that no other beats in both, by x: a line of steps joins them.
        labels: Of both axes.
        title: Above the plot.

    Raises:
        ConfigError: If no plot can have this ending.
        ImportError: If matplotlib is missing.
    """
    axes = _axes(5.0, title)
    best = [points[name] for name in front]
    axes.step([x for x, _, _ in best], [y for _, y, _ in best], "0.6", where="post", zorder=0)
    for (name, (x, y, spread)), marker in zip(
        points.items(), "osD^vP*X" * len(points), strict=False
    ):
        axes.errorbar(x, y, spread, fmt=marker, label=name, capsize=2, alpha=0.85)
    axes.set_xscale("log")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(visible=True, which="major", alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(axes.figure, path)


def profile(
    path: Path,
    names: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    label: str,
    title: str,
) -> None:
    """Save a plot of values from 0 to 1 by layer, the first at the top; None is left out.

    Raises:
        ConfigError: If no plot can have this ending.
        ImportError: If matplotlib is missing.
    """
    axes = _axes(1.6 + 0.2 * len(names), title)
    rows = range(len(names))
    for (name, values), marker in zip(series.items(), "o|sD^v", strict=False):
        numbers = [math.nan if value is None else value for value in values]
        axes.plot(numbers, rows, marker, label=name)
    axes.set_yticks(rows, names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel(label)
    axes.grid(visible=True, axis="x", alpha=0.25)
    axes.legend(frameon=False, fontsize=7)
    _save(axes.figure, path)


def _axes(height: float, title: str) -> Any:
    check_plotting()
    from matplotlib.figure import Figure  # draws to a file, needs no screen

    axes: Any = Figure(figsize=(7.0, height)).add_subplot()
    axes.set_title(title, loc="left")
    return axes


def _save(figure: Any, path: Path) -> None:
    known = figure.canvas.get_supported_filetypes()
    ending = path.suffix.removeprefix(".").lower()
    if ending and ending not in known:
        message = f"{str(path)!r} ends in {path.suffix!r}; a plot is one of {', '.join(known)}."
        raise ConfigError(message)
    figure.tight_layout()
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "pemn"}):  # the same picture is the same file
        figure.savefig(path, dpi=150, metadata={"Date": None} if ending == "svg" else None)
