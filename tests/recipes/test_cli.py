"""The command line that recipes share: what is written, what is shown, how it ends."""

import json

import pytest
from rich.table import Table

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe_cli import RecipeCommand


def command(folder, run, *options):
    def add(parser):
        for option in options:
            parser.add_argument(option, action="store_true")

    def tabulate(result):
        table = Table("figure")
        table.add_row(f"<{result['figure']}>")
        return table

    return RecipeCommand(folder, "runs", add, run, tabulate)


def test_run_writes_what_show_tabulates(tmp_path, capsys):
    given = []

    def run(options, _):
        given.append(options)
        return "case-1", {"figure": 42}

    recipe = command(tmp_path, run, "--fast")
    assert recipe.main(["run", "--fast"]) == 0
    assert given == [{"fast": True}]
    assert "<42>" in capsys.readouterr().out
    assert json.loads((tmp_path / "results/case-1.json").read_text()) == {"figure": 42}
    assert recipe.main(["show"]) == 0
    assert "<42>" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "stop", "status", "text"),
    [
        ([], RecipeError("tasks: 0"), 1, "tasks: 0"),
        ([], KeyboardInterrupt(), 130, "stopped\n"),
        (["--resume"], KeyboardInterrupt("saved"), 130, "saved; add --resume to the same command"),
    ],
)
def test_a_run_that_ends_early_writes_nothing(options, stop, status, text, tmp_path, capsys):
    def run(*_):
        raise stop

    assert command(tmp_path, run, *options).main(["run"]) == status
    assert text in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
