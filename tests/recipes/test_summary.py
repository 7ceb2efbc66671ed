"""Results beside the published: gathered over seeds, full length and reduced apart."""

import json
from pathlib import Path

import pytest

from pemn_surgery.commands.cli import main as pemn
from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import load, summary

RECIPE = load(Path(__file__).resolve().parents[2] / "recipes" / "pemn")
MASKS = {
    "with the prototype": 300, "from the seed, bits": 200, "from the seed, entropy": 190,
    "from the seed, context": 100,
}  # fmt: skip


def arm(best, last, unique, ways, published=None):
    return {
        "best": {"epoch": 1, "test_accuracy": best},
        "last": {"epoch": 2, "test_accuracy": last},
        "unique": unique,
        "bytes": {"total": 1, "ways": ways},
        "published": published,
    }


def result(seed, epochs=100, limit=None, lift=0.0, **more):
    arms = {
        "rp_1e-2": arm(86 + lift, 85 + lift, 369, MASKS, {"accuracy": 86.39}),
        "mp": arm(87, 86, 36_864, MASKS | {"with the prototype": 900}, {"accuracy": 86.33}),
        "dense": arm(92, 91, 461_872, {"stored": 1000}, {"accuracy": 92.26, "figure": True}),
        "random_90": arm(84, 83, 461_872, {"stored": 400}, {"accuracy": 84.21}),
    }
    length = {"run": epochs, "paper": 100}
    found = {"case": "resnet32", "seed": seed, "epochs": length, "limit": limit, "arms": arms}
    return found | more


@pytest.fixture
def folder(tmp_path):
    for name, one in {
        "a": result(0), "b": result(1, lift=1.0), "c": result(0, epochs=3),
        "d": result(0, epochs=3, limit=500),
    }.items():  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(one))
    return tmp_path


def test_full_and_reduced_runs_are_apart(folder):
    found = summary.gather(RECIPE, folder)
    assert [(b.epochs, b.limit, b.is_full) for b in found] == [
        (100, None, True), (3, None, False), (3, 500, False),
    ]  # fmt: skip
    assert [budget.title for budget in found] == [
        "resnet32: 100 epochs, as published",
        "resnet32: reduced to 3 of 100 epochs",
        "resnet32: reduced to 3 of 100 epochs, 500 images a split",
    ]
    assert [row.arm for row in next(iter(found.values()))] == [
        "dense",
        "mp",
        "rp_1e-2",
        "random_90",
    ]


def test_a_table_has_means_deviations_differences_and_bytes(folder):
    found = summary.gather(RECIPE, folder)
    full, reduced, _ = found
    rows = {row[0]: row for row in summary.cells(full, found[full])}
    assert rows["rp_1e-2"] == [
        "rp_1e-2", "369", "86.39", "86.50 (0.71)", "85.50 (0.71)", "+0.11", "2", "100", "10.0",
    ]  # fmt: skip
    assert rows["dense"][2:6] == ["92.26 (figure)", "92.00 (0.00)", "91.00 (0.00)", "-0.26"]
    assert rows["dense"][6:] == ["2", "1,000", "1.0"]
    assert rows["random_90"][1] == ""
    assert rows["random_90"][-1] == "2.5"
    less = {row[0]: row for row in summary.cells(reduced, found[reduced])}
    assert less["rp_1e-2"][3:7] == ["86.00", "85.00", "", "1"]


def test_points_of_the_figures(folder):
    rows = next(iter(summary.gather(RECIPE, folder).values()))
    assert summary.by_unique(rows) == {
        "ours": [(36_864, 87.0), (369, 86.5)],
        "published": [(36_864, 86.33), (369, 86.39)],
    }
    sizes = summary.by_size(rows)
    assert sizes["with the prototype"] == [(1000 / 900, 87.0), (1000 / 300, 86.5)]
    assert sizes["from the seed, context"] == [(10.0, 87.0), (10.0, 86.5)]
    assert sizes["random"] == [(2.5, 84.0)]
    assert sizes["dense"] == [(1.0, 92.0)]


def test_what_is_measured_twice_or_not_at_all_is_refused(folder, tmp_path_factory):
    (folder / "e.json").write_text(json.dumps(result(1)))
    with pytest.raises(RecipeError, match=r"e\.json: .* with seed 1 is in another result, too"):
        summary.gather(RECIPE, folder)
    with pytest.raises(RecipeError, match="has no result; pemn run writes one"):
        summary.gather(RECIPE, tmp_path_factory.mktemp("empty"))


def test_the_command_writes_a_page_and_pictures(folder, tmp_path_factory, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path_factory.mktemp("out")
    line = ["report", str(RECIPE.folder), "--results", str(folder), "--out", str(out)]
    assert pemn(line) == 0
    shown = capsys.readouterr().out
    assert "as published" in shown
    assert "86.50 (0.71)" in shown
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.index("as published") < page.index("reduced to 3 of 100")
    assert "<td>86.50 (0.71)</td>" in page
    pictures = sorted(file.name for file in out.glob("*.svg"))
    assert "resnet32-e100-size.svg" in pictures
    assert all(f'src="{name}"' in page for name in pictures)
    assert len(list(out.glob("*.png"))) == len(pictures) > 2
    first = (out / pictures[0]).read_bytes()
    assert pemn(line) == 0
    assert (out / pictures[0]).read_bytes() == first
    capsys.readouterr()
    assert pemn([*line[:4], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["epochs"] for one in found] == [100, 3, 3]
    assert found[0]["rows"][2]["best"] == [86.0, 87.0]


def test_a_page_escapes_what_it_shows(tmp_path):
    from pemn_surgery.report.page import Section, render

    text = render("<b>", "a & b", [Section("t", "x", ["<i>"], [["<script>"]])])
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "a &amp; b" in text
