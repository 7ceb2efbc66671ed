"""Accuracy against bits a weight, a panel for each case."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pemn_surgery.report import plots

Summary = dict[str, Any]

_PANEL = (7.2, 5.6)  # inches
_MARKERS = "osD^vP*Xh<>"


def save(path: Path, summary: list[Summary]) -> None:
    """Draw all settings: a line joins those that differ in the share of flips taken back.

    Args:
        path: Where; the ending decides the format.
        summary: What `measure.summary` returned.

    Raises:
        ImportError: If matplotlib is missing.
    """
    plots.check_plotting()
    from matplotlib.figure import Figure  # draws to a file, needs no screen

    cases = sorted({one["case"] for one in summary})
    figure = Figure(figsize=(_PANEL[0] * len(cases), _PANEL[1]), layout="constrained")
    panels: Any = figure.subplots(1, len(cases), squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        _draw(axes, [one for one in summary if one["case"] == case])
        axes.set_title(case, loc="left")
    figure.savefig(path, dpi=130)


def _draw(axes: Any, summary: list[Summary]) -> None:
    lines: dict[str, list[Summary]] = {}
    for one in summary:
        for name in _lines_of(one):
            lines.setdefault(name, []).append(one)
    for place, (name, found) in enumerate(sorted(lines.items())):
        found.sort(key=lambda one: one["context"]["mean"])
        axes.errorbar(
            [one["context"]["mean"] for one in found],
            [one["accuracy"]["mean"] for one in found],
            [one["accuracy"]["std"] for one in found],
            marker=_MARKERS[place % len(_MARKERS)],
            linestyle="-" if "taken back" in name else "",
            label=name,
            alpha=0.8,
            capsize=2,
        )
    axes.set_xlabel("bits a weight in the file")
    axes.set_ylabel("test accuracy, %; bars: deviation over seeds")
    axes.grid(visible=True, alpha=0.25)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.08), fontsize=8, ncols=2)


def _lines_of(one: Summary) -> Iterator[str]:
    """Yield the lines that a setting is on; one that only settled begins all of its kind."""
    scores = f"{one['optimizer']} {one['lr']:g}, {one['epochs']} epochs"
    if one["pull"]:
        yield "scores pulled back while they are trained"
    elif one["held"]:
        yield "bits of the smallest numbers held"
    elif one["by"] != "none":
        for by in ("loss", "size") if not one["share"] else (one["by"],):
            yield f"{scores}, taken back by {by}"
    elif one["case"] == "digits":
        yield f"{one['task']}, {scores}"
    else:
        yield f"{one['optimizer']}, as trained"
