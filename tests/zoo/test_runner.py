"""The runner: a process for each model, limits, going on where it stopped, the page."""

import json

import pytest

from tests.zoo import __main__ as command
from tests.zoo import heads, report, run, transformers_models

PASSED = {
    "library": "timm",
    "name": "good",
    "class": "Net",
    "smaller": "depth=1",
    "parameters": 120,
    "masked": 90,
    "maskable": 100,
    "targets": 3,
    "unreached": ["head.weight"],
    "kinds": {"Linear.weight": 3},
    "left": {"a router": 10},
    "untraced": "",
    "failed": "",
    "error": "",
}
FAILED = {"library": "timm", "name": "bad", "failed": "train", "error": "ValueError: a | b"}
UNBUILT = {"library": "transformers", "name": "none", "failed": "build", "error": "ImportError: x"}

HEADS = [
    {"library": "transformers", "name": "a/AForMaskedLM", "tasks": ["MASKED_LM"], "failed": ""},
    {
        "library": "transformers",
        "name": "b/BForCTC",
        "tasks": ["CTC"],
        "failed": "forward",
        "error": "IndexError: x",
    },
    {
        "library": "transformers",
        "name": "c/CForMaskedLM",
        "tasks": ["MASKED_LM"],
        "failed": "build",
        "error": "ImportError: y",
    },
]

HEADS_TO_CHECK = [
    ("transformers", "bert/BertForMultipleChoice"),
    ("transformers", "bark/BarkModel"),
]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_page_says_what_passed_and_what_did_not(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "names", lambda library: ["good", "bad", "none", "new"])
    results = written(tmp_path / "z.jsonl", [FAILED, PASSED, UNBUILT])
    environment = {"environment": {"date": "2026-01-02", "versions": {"torch": "9.9"}}}
    heads_results = written(tmp_path / "h.jsonl", [environment, *HEADS])
    assert report.write(results, heads_results, tmp_path / "docs") == 0
    page = (tmp_path / "docs" / "zoo.md").read_text()
    assert "| timm | 4 | 2 | 0 | 1 | 50.0% |" in page
    assert "| transformers | 4 | 1 | 1 | 0 |  |" in page
    assert "| timm | bad | train | ValueError: a \\| b |" in page
    assert "| a router | 1 | 10 | good |" in page
    assert "| timm | good | Net | depth=1 | 100 | 3 | 90.0% | passes |" in page
    assert "| timm | good | 1 | head.weight |" in page
    assert "| all | 3 | 1 | 1 | 50.0% |" in page
    assert "| masked lm | 2 | 1 | 1 | 100.0% |" in page
    assert "| ctc | 1 | 0 | 0 | 0.0% |" in page
    assert "| b/BForCTC | forward | IndexError: x |" in page
    assert "2026-01-02; torch 9.9." in page
    kept = (tmp_path / "docs" / "results" / "zoo.jsonl").read_text().splitlines()
    assert [json.loads(line).get("name") for line in kept] == [None, "bad", "good", "none"]
    kept = (tmp_path / "docs" / "results" / "zoo_heads.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept[:2]] == [
        environment,
        {key: value for key, value in HEADS[0].items() if value},
    ]


def test_a_page_of_nothing_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"no results; run `python -m tests\.zoo run` first"):
        report.write(tmp_path / "none.jsonl", tmp_path / "none.jsonl", tmp_path)


def test_the_last_result_of_a_model_counts(tmp_path):
    results = written(tmp_path / "z.jsonl", [{**FAILED, "name": "good"}, PASSED])
    assert run.read(results) == {("timm", "good"): PASSED}


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    results = written(tmp_path / "z.jsonl", [PASSED, FAILED])
    monkeypatch.setattr(run, "names", lambda library: ["good", "bad", "new"])
    asked = []
    monkeypatch.setattr(run, "walk_many", lambda models, *limits: asked.extend(models) or iter(()))
    words = ["zoo", "run", "--library", "timm", "--results", str(results)]
    for again, expected in (("", ["new"]), ("failed", ["bad", "new"])):
        monkeypatch.setattr("sys.argv", [*words, "--again", again])
        assert command.main() == 0
        assert asked == [("timm", name) for name in expected]
        asked.clear()
    assert "3 models, 2 of them done already" in capsys.readouterr().out


def test_heads_go_on_where_they_were_stopped(tmp_path, monkeypatch, capsys):
    results = written(tmp_path / "h.jsonl", HEADS)
    tasks = {"d/DForCTC": ["CTC"], **{row["name"]: row["tasks"] for row in HEADS}}
    monkeypatch.setattr(heads, "tasks", lambda: tasks)
    monkeypatch.setattr(
        run,
        "walk_many",
        lambda models, *limits, check_one: iter(
            {"library": library, "name": name, "failed": "", "check": check_one.__name__}
            for library, name in models
        ),
    )
    words = ["zoo", "heads", "--task", "CTC", "--results", str(results), "--again", "failed"]
    monkeypatch.setattr("sys.argv", words)
    assert command.main() == 0
    assert "2 models, 0 of them done already" in capsys.readouterr().out
    first, *rows = [json.loads(line) for line in results.read_text().splitlines()[len(HEADS) :]]
    assert list(first) == ["environment"]
    assert [row["name"] for row in rows] == ["d/DForCTC", "b/BForCTC"]
    assert {row["check"] for row in rows} == {"check_one"}
    assert all(row["tasks"] == ["CTC"] for row in rows)


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_runs_and_one_that_does_not_build():
    rows = {row["name"]: row for row in heads.check_many(HEADS_TO_CHECK, 2, 300, 6)}
    good = rows["bert/BertForMultipleChoice"]
    assert (good["failed"], good["tasks"], good["coverage"]) == ("", ["MULTIPLE_CHOICE"], 1.0)
    assert good["inputs"] == {"input_ids": [2, 2, 12], "attention_mask": [2, 2, 12]}
    assert rows["bark/BarkModel"]["failed"] == "build"
    assert "BarkModel has no forward" in rows["bark/BarkModel"]["error"]


@pytest.mark.filterwarnings("ignore")
def test_each_model_has_a_process_and_limits():
    models = [("timm", "test_vit"), ("timm", "no such model")]
    rows = {row["name"]: row for row in run.walk_many(models, jobs=2, timeout=300, memory=6)}
    assert rows["test_vit"]["failed"] == ""
    assert rows["test_vit"]["masked"] == rows["test_vit"]["maskable"] > 0
    assert rows["no such model"]["failed"] == "build"
    assert "RuntimeError" in rows["no such model"]["error"]
    (late,) = run.walk_many([("timm", "test_vit")], jobs=1, timeout=0.01, memory=6)
    assert late["failed"] == "limits"
    assert "more time than the limit" in late["error"]
    (large,) = run.walk_many([("timm", "test_vit")], jobs=1, timeout=300, memory=0.05)
    assert large["failed"] not in ("", "limits") or "memory" in large["error"]


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("bark", "BarkModel has no forward"),
        ("voxtral_realtime_text", "exports no VoxtralRealtimeTextModel"),
        ("no_such_type", "no Auto class knows 'no_such_type'"),
    ],
)
def test_type_without_a_class_that_runs_says_why(model_type, why):
    with pytest.raises(LookupError, match=why):
        transformers_models.find_class(model_type)
