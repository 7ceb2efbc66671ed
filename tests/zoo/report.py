"""The table of the zoo as a page of the documentation."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pemn_surgery.report import as_markdown, environment
from tests.zoo import run

Row = dict[str, Any]

_INTRO = """# The zoo

<!-- Made by `python -m tests.zoo report`; not written by hand. -->

Every architecture of timm and every model type of transformers' Auto mappings, with random weights,
each in a process of its own. Per model: plan it; pemnify it with all-ones masks on its own weights,
which must give the original's outputs bit for bit; one training step, which must move the scores
of every target that the model's own forward reaches; save; unload, which must give the original's
outputs; load, which must give the trained outputs bit for bit; merge, which must give them too, as
a model of the original's classes, attributes and state-dict keys.

The original's outputs are those of its weights without gradients: where weights require them, torch
folds batched products otherwise, and the same model differs from itself in the last bits.

Coverage is the share of masked weights among all weights that the forward multiplies or convolves
its input with. transformers' models are tiny; timm's are as published, but those above 12 million
parameters have fewer of their repeated blocks where their constructor allows it (column *made
smaller*), and images of more than 256 pixels a side are made smaller likewise. What is not walked
yet is walked by `python -m tests.zoo run --results docs/results/zoo.jsonl`.
"""


def write(results: Path, out: Path) -> int:
    """Write ``zoo.md`` and the results behind it; return 0."""
    rows = [row for _, row in sorted(run.read(results).items())]
    if not rows:
        message = f"{results} has no results; run `python -m tests.zoo run` first"
        raise SystemExit(message)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results").mkdir(exist_ok=True)
    lines = [json.dumps({"environment": environment()}), *(json.dumps(_kept(row)) for row in rows)]
    (out / "results" / "zoo.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "zoo.md").write_text(page(rows), encoding="utf-8")
    return 0


def page(rows: Sequence[Row]) -> str:
    """Return the page."""
    made = environment()
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    parts = [
        _INTRO,
        f"{made['date']}; {versions}.\n",
        "## In short\n",
        as_markdown(
            ("", "models", "walked", "do not build", "pass", "of those that build"), _totals(rows)
        ),
        "## What fails, and why\n",
        as_markdown(
            ("library", "model", "step", "error"),
            (
                [row["library"], row["name"], row["failed"], _short(row["error"])]
                for row in _bad(rows)
            ),
        ),
        "## Maskable weights that stay\n",
        as_markdown(("reason", "models", "weights", "for example"), _left(rows)),
        "## What was masked\n",
        as_markdown(("class and parameter", "models", "tensors"), _kinds(rows)),
        "## Targets that the model's own forward gives no gradient\n",
        as_markdown(
            ("library", "model", "targets", "for example"),
            (
                [row["library"], row["name"], len(row["unreached"]), row["unreached"][0]]
                for row in rows
                if row.get("unreached")
            ),
        ),
        "## Forwards that could not be followed on shapes\n",
        as_markdown(
            ("library", "model", "why"),
            (
                [row["library"], row["name"], _short(row["untraced"])]
                for row in rows
                if row.get("untraced")
            ),
        ),
        "## Every model\n",
        as_markdown(
            (
                "library",
                "model",
                "class",
                "made smaller",
                "weights",
                "targets",
                "coverage",
                "result",
            ),
            (_line(row) for row in rows),
        ),
    ]
    return "\n".join(parts)


def coverage(row: Row) -> float:
    """Return the share of masked weights among the maskable."""
    return row["masked"] / row["maskable"] if row.get("maskable") else 0.0


def did_build(row: Row) -> bool:
    """Tell whether a model could be built at all."""
    return row["failed"] != "build"


def _kept(row: Row) -> Row:
    return {key: value for key, value in row.items() if value not in ("", [], {})}


def _bad(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["failed"]]


def _totals(rows: Sequence[Row]) -> Iterable[list[Any]]:
    for library in run.LIBRARIES:
        ours = [row for row in rows if row["library"] == library]
        built = [row for row in ours if did_build(row)]
        passed = sum(not row["failed"] for row in built)
        share = f"{passed / len(built):.1%}" if built else ""
        yield [
            library,
            len(run.names(library)),
            len(ours),
            len(ours) - len(built),
            passed,
            share,
        ]


def _left(rows: Sequence[Row]) -> list[list[Any]]:
    models: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    example: dict[str, str] = {}
    for row in rows:
        for reason, count in row.get("left", {}).items():
            models[reason] += 1
            weights[reason] += count
            example.setdefault(reason, row["name"])
    return [[reason, n, weights[reason], example[reason]] for reason, n in models.most_common()]


def _kinds(rows: Sequence[Row]) -> list[list[Any]]:
    models: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    for row in rows:
        for kind, count in row.get("kinds", {}).items():
            models[kind] += 1
            tensors[kind] += count
    return [[kind, n, tensors[kind]] for kind, n in models.most_common()]


def _line(row: Row) -> list[Any]:
    shown = f"{coverage(row):.1%}" if row.get("maskable") else ""
    return [
        row["library"],
        row["name"],
        row.get("class", ""),
        row.get("smaller", ""),
        f"{row.get('maskable', 0):,}",
        row.get("targets", 0),
        shown,
        f"fails at {row['failed']}" if row["failed"] else "passes",
    ]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else f"{line[:157]}..."
