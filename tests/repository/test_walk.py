"""docs/walk.md is the folder listing, and its code runs."""

import re

import pytest

from tests.adapters import models

PAGE = (models.ROOT / "docs/walk.md").read_text(encoding="utf-8")


def rows(head):
    """The cells of the table whose first line begins with ``head``."""
    lines = PAGE.partition(f"\n| {head} |")[2].partition("\n\n")[0].splitlines()[2:]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(found) >= 5
    return found


def in_the_tree():
    """Every module but ``__init__.py``; pemn_surgery/adapters is a link to the other room."""
    found = {
        str(path.relative_to(models.ROOT))
        for room in ("pemn_surgery", "adapters")
        for path in (models.ROOT / room).rglob("*.py")
        if path.name != "__init__.py"
    }
    found = {path for path in found if not path.startswith("pemn_surgery/adapters/")}
    assert len(found) > 50
    return found


def test_the_table_names_every_room_and_module_once_and_nothing_else():
    named = [
        room.strip("`") + module
        for room, _, modules in rows("room")
        for module in re.findall(r"`(\S+?)`", modules)
    ]
    tree = in_the_tree()
    assert sorted(tree - set(named)) == [], "in the tree, not in docs/walk.md"
    assert sorted(set(named) - tree) == [], "in docs/walk.md, not in the tree"
    assert len(named) == len(set(named))


def test_rooms_stand_in_the_order_of_the_contract():
    text = (models.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.findall(r'^    "(pemn_surgery\..*)",$', text.partition("\nlayers = [")[2], re.M)
    floors = [set(re.findall(r"pemn_surgery\.(\w+)", layer)) for layer in reversed(layers)]
    rooms = [row[0].strip("`").removeprefix("pemn_surgery/").split("/")[0] for row in rows("room")]
    order = [floor for room in rooms if room for floor, names in enumerate(floors) if room in names]
    assert len(order) == sum(map(bool, rooms)) >= 10
    assert order == sorted(order)


def test_each_question_is_answered_by_at_most_three_files():
    found = rows("question")
    assert len(found) == 5
    for question, files in found:
        named = re.findall(r"`(\S+\.py)`", files)
        assert 1 <= len(named) <= 3, question
        assert [file for file in named if not (models.ROOT / file).is_file()] == [], question


@pytest.mark.slow
def test_the_code_runs(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    for block in blocks:  # each in a namespace of its own, as in another process
        seen = {}
        exec(compile(block, "docs/walk.md", "exec"), seen)
    saved = sorted(path.parent.name for path in tmp_path.glob("tasks/*/adapter_model.safetensors"))
    assert saved == ["cifar10", "svhn"]
    assert type(seen["dense"]).__name__ == "ResNet"
    assert "masked" in capsys.readouterr().out
