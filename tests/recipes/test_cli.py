"""The command line that recipes share: what is written, what is shown, how it ends."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from rich.table import Table

from pemn_surgery.commands.cli import main as pemn
from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import load
from pemn_surgery.recipe.cli import RecipeCommand, Verb
from pemn_surgery.recipe.options import option
from pemn_surgery.recipe.stopping import TimeIsUp

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*/__main__.py"))
RECIPE = load(FOLDER / "pemn")
HEAD = {"schema", "recipe", "claim", "paper", "command", "date", "machine", "versions"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fast:
    fast: bool = option("quick", default=False)
    threads: int | None = option("torch's", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resumed:
    resume: bool = option("go on", default=False)


def command(folder, run, options=Fast):
    def tabulate(result):
        table = Table("figure")
        table.add_row(f"<{result['figure']}>")
        return table

    recipe = dataclasses.replace(RECIPE, folder=folder)
    return RecipeCommand(recipe, "runs", {"run": Verb("runs", options, run)}, tabulate)


def test_run_writes_what_show_tabulates(tmp_path, capsys):
    given = []

    def run(recipe, options, _):
        given.append((recipe.folder, options, torch.get_num_threads()))
        yield "case-1", {"figure": 42}
        assert json.loads((tmp_path / "results/case-1.json").read_text())["figure"] == 42
        yield "case-2", {"figure": 43}

    recipe = command(tmp_path, run)
    assert recipe.main(["run", "--fast", "--threads", "2"]) == 0
    assert given == [(tmp_path, Fast(fast=True, threads=2), 2)]
    shown = capsys.readouterr().out
    assert "<42>" in shown
    assert "<43>" in shown
    found = json.loads((tmp_path / "results/case-2.json").read_text())
    assert set(found) == HEAD | {"figure"}
    assert found["command"] == f"pemn run recipes/{tmp_path.name} run --fast --threads 2"
    assert recipe.main(["show"]) == 0
    shown = capsys.readouterr().out
    assert "<42>" in shown
    assert "<43>" in shown


def test_a_result_that_comes_again_replaces_the_earlier(tmp_path, capsys):
    def run(*_):
        yield from (("one", {"figure": 1}), ("one", {"figure": 2}), ("two", {"figure": 3}))

    assert command(tmp_path, run).main(["run"]) == 0
    files = {file.name: json.loads(file.read_text()) for file in (tmp_path / "results").iterdir()}
    assert {name: found["figure"] for name, found in files.items()} == {
        "one.json": 2,
        "two.json": 3,
    }
    shown = capsys.readouterr().out
    assert "<1>" not in shown
    assert shown.index("<2>") < shown.index("<3>")
    file = tmp_path / "both.json"
    assert command(tmp_path, run).main(["run", "--json", str(file)]) == 0
    assert [one["figure"] for one in json.loads(file.read_text())] == [2, 3]


def test_results_are_there_after_a_stop(tmp_path, capsys):
    def run(*_):
        yield "one", {"figure": 1}
        raise KeyboardInterrupt

    assert command(tmp_path, run).main(["run"]) == 130
    assert json.loads((tmp_path / "results/one.json").read_text())["figure"] == 1
    assert "<1>" in capsys.readouterr().out


@pytest.mark.parametrize("figures", [[1], [1, 2]])
def test_results_go_where_json_says(figures, tmp_path):
    def run(*_):
        return [(f"case-{n}", {"figure": n}) for n in figures]

    file = tmp_path / "a" / "one.json"
    assert command(tmp_path, run).main(["run", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [one["figure"] for one in (found if len(figures) > 1 else [found])] == figures
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("options", "stop", "status", "text"),
    [
        (Fast, RecipeError("tasks: [0]"), 2, "RecipeError: tasks: [0]"),
        (Fast, KeyboardInterrupt(), 130, "stopped\n"),
        (Resumed, TimeIsUp("late"), 0, "late; add --resume to the same command"),
        (Resumed, KeyboardInterrupt("saved"), 130, "saved; add --resume to the same command"),
    ],
)
def test_a_run_that_ends_early_writes_nothing(options, stop, status, text, tmp_path, capsys):
    def run(*_):
        raise stop

    assert command(tmp_path, run, options).main(["run"]) == status
    assert text in "".join(capsys.readouterr())
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("folder", RECIPES, ids=lambda f: f.parent.name)
def test_every_recipe_shows_its_results_and_an_example(folder, tmp_path, capsys):
    name = folder.parent.name
    main = load(folder.parent).module("__main__").COMMAND.main
    assert main(["--results", str(tmp_path), "show"]) == 0
    assert "the verb run writes one" in " ".join(capsys.readouterr().out.split())
    assert main(["show"]) == 0
    for line in (["--help"], ["run", "--help"]):
        with pytest.raises(SystemExit) as done:
            main(line)
        assert done.value.code == 0
        assert f"pemn run recipes/{name} " in capsys.readouterr().out
    case = next(iter(load(folder.parent).cases))
    needed = {"mask_compression": ["--weights", "w"], "below_one_bit": ["--lr", "1"]}
    line = ["run", "--case", case, "--work", str(tmp_path), *needed.get(name, [])]
    assert main([*line, "--epochs", "0"]) == 2
    assert "epochs=0; give 1 or more" in capsys.readouterr().err


TRIALS = {
    "below_one_bit": ["--case", "digits", "--lr", "1e-2"],
    "mask_compression": ["--case", "resnet20"],
    "pemn": ["--case", "resnet32", "--arms", "dense", "rp_1e-2", "random_90"],
    "small_adapters": ["--arms", "probe", "flip_2"],
    "supsup_permuted_digits": [],
}


@pytest.mark.parametrize("folder", RECIPES, ids=lambda f: f.parent.name)
def test_every_recipe_has_a_trial_of_seconds(folder, tmp_path, capsys):
    """By the command: it needs no data and leaves the recipe's own results alone."""
    assert set(TRIALS) == {file.parent.name for file in RECIPES}
    before = sorted(folder.parent.rglob("*.json"))
    words = [*TRIALS[folder.parent.name], "--smoke", "--work", str(tmp_path)]
    assert pemn(["run", str(folder.parent), *words]) == 0
    assert sorted(folder.parent.rglob("*.json")) == before
    assert list(tmp_path.rglob("*.json"))
    if folder.parent.name == "pemn":
        (file,) = tmp_path.glob("*.json")
        found = json.loads(file.read_text())
        assert list(found["arms"]) == ["dense", "rp_1e-2", "random_90"]
        assert found["note"] == "epochs: 1 of the paper's 100; a trial on random images"
        assert "random images" in capsys.readouterr().out


def test_the_command_names_what_it_cannot_run(tmp_path, capsys):
    assert pemn(["run", str(tmp_path)]) == 2
    assert "recipe.toml cannot be read" in " ".join(capsys.readouterr().err.split())
    assert pemn(["run", str(FOLDER / "pemn"), "show"]) == 0
    for words in (["--help"], ["run", "--help"]):
        with pytest.raises(SystemExit) as done:
            pemn(["run", str(FOLDER / "pemn"), *words])
        assert done.value.code == 0
    assert "--minutes" in capsys.readouterr().out
