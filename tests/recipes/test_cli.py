"""The command line that recipes share: what is written, what is shown, how it ends."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from rich.table import Table

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import load
from pemn_surgery.recipe.cli import RecipeCommand, Verb
from pemn_surgery.recipe.options import option

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*/__main__.py"))
RECIPE = load(FOLDER / "cifar10_rp")
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
    assert found["command"] == f"python recipes/{tmp_path.name} run --threads 2"
    assert recipe.main(["show"]) == 0
    shown = capsys.readouterr().out
    assert "<42>" in shown
    assert "<43>" in shown


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
        (Fast, RecipeError("tasks: 0"), 1, "tasks: 0"),
        (Fast, KeyboardInterrupt(), 130, "stopped\n"),
        (Resumed, KeyboardInterrupt("saved"), 130, "saved; add --resume to the same command"),
    ],
)
def test_a_run_that_ends_early_writes_nothing(options, stop, status, text, tmp_path, capsys):
    def run(*_):
        raise stop

    assert command(tmp_path, run, options).main(["run"]) == status
    assert text in capsys.readouterr().out
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
        assert f"python recipes/{name} run " in capsys.readouterr().out
    case = next(iter(load(folder.parent).cases))
    needed = {"mask_compression": ["--weights", "w"], "below_one_bit": ["--lr", "1"]}
    line = ["run", "--case", case, "--work", str(tmp_path), *needed.get(name, [])]
    assert main([*line, "--epochs", "0"]) == 1
    assert "epochs=0; give 1 or more" in capsys.readouterr().out
