"""The table of the zoo as a page of the documentation."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pemn_surgery.report.tables import as_markdown
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

_HEADS = """## Every head of transformers

A head is a class that one of transformers' Auto mappings names for a model type; a class may be for
several things. Each is built tiny in a process of its own, `example_inputs` makes its inputs from
its configuration, its forward runs on them in eval mode, and `plan` sees every use of its weights.
What does not build asks for packages that are not there, has no forward, or is named for a type
whose configuration it cannot read. No inputs are made for the trackers of objects in videos, whose
forward takes a session that keeps what earlier calls found (`inference_session`), and runs under
`torch.inference_mode`, where nothing can be trained. Repeat it with
`python -m tests.zoo heads --results docs/results/zoo_heads.jsonl --again all`.
"""


def write(results: Path, heads: Path, out: Path) -> int:
    """Write ``zoo.md`` and the results behind it; return 0."""
    rows, head_rows = _sorted(results), _sorted(heads)
    if not rows:
        message = f"{results} has no results; run `python -m tests.zoo run` first"
        raise SystemExit(message)
    text = page(rows, head_rows, run.environment_of(results), run.environment_of(heads))
    (out / "results").mkdir(parents=True, exist_ok=True)
    _keep(results, rows, out / "results" / "zoo.jsonl")
    if head_rows:
        _keep(heads, head_rows, out / "results" / "zoo_heads.jsonl")
    (out / "zoo.md").write_text(text, encoding="utf-8")
    return 0


def _sorted(results: Path) -> list[Row]:
    return [row for _, row in sorted(run.read(results).items())]


def _keep(results: Path, rows: Sequence[Row], kept: Path) -> None:
    lines = [{"environment": run.environment_of(results)}, *(_kept(row) for row in rows)]
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def page(rows: Sequence[Row], head_rows: Sequence[Row], made: Row, heads_made: Row) -> str:
    """Return the page."""
    parts = [
        _INTRO,
        _stamp(made),
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
        *_of_heads(head_rows, heads_made),
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


def _stamp(made: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return f"{made['date']}; {versions}.\n"


def _of_heads(rows: Sequence[Row], made: Row) -> list[str]:
    if not rows:
        return []
    return [
        _HEADS,
        _stamp(made),
        as_markdown(
            ("for", "heads", "do not build", "pass", "of those that build"), _heads_by_task(rows)
        ),
        "### Heads that fail, and why\n",
        as_markdown(
            ("head", "step", "error"),
            ([row["name"], row["failed"], _short(row["error"])] for row in _bad(rows)),
        ),
    ]


def _heads_by_task(rows: Sequence[Row]) -> Iterable[list[Any]]:
    by_task: dict[str, list[Row]] = {}
    for row in rows:
        for task in row["tasks"]:
            by_task.setdefault(task.replace("_", " ").lower(), []).append(row)
    for task, ours in [("all", rows), *sorted(by_task.items())]:
        yield [task, *_counts(ours)]


def _counts(rows: Sequence[Row]) -> list[Any]:
    """Return the numbers of models, of those that do not build, that pass, and their share."""
    built = [row for row in rows if did_build(row)]
    passed = sum(not row["failed"] for row in built)
    share = f"{passed / len(built):.1%}" if built else ""
    return [len(rows), len(rows) - len(built), passed, share]


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
        yield [library, len(run.names(library)), *_counts(ours)]


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
