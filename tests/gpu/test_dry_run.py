"""The command for a GPU, on a CPU: every door opens, and one that does not is said to be wrong."""

import functools
import json

import pytest
import torch

from tests.bench import training
from tests.gpu import __main__ as command
from tests.gpu import arms, doors

CPU = torch.device("cpu")
MISSING = {doors.recorded, doors.bitsandbytes, doors.torchao}


@pytest.mark.slow
@pytest.mark.parametrize("door", doors.DOORS, ids=lambda door: door.__name__)
@pytest.mark.filterwarnings("ignore")
def test_every_door_opens(door):
    assert len(doors.DOORS) > 15
    found = command._try(door, CPU)
    may_be_missing = door in MISSING and found["outcome"] == "missing"
    assert may_be_missing or found["outcome"] == "right", found
    json.dumps(found)


def test_what_breaks_is_reported_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    def broken(device):
        doors.same(torch.zeros(2), torch.ones(2), "zeros")

    monkeypatch.setattr(doors, "DOORS", [broken, doors.selection, doors.recorded])
    monkeypatch.setattr(doors, "quiet", lambda: None)
    path = tmp_path / "gpu.json"
    arguments = ["gpu", "--device", "cpu", "--without-ratios", "--json", str(path)]
    monkeypatch.setattr("sys.argv", arguments)
    assert command.main() == 1
    result = json.loads(path.read_text())
    assert {name: door["outcome"] for name, door in result["doors"].items()} == {
        "broken": "wrong",
        "selection": "right",
        "recorded": "missing",
    }
    assert "zeros: largest gap 1.0" in result["doors"]["broken"]["error"]
    assert result["doors"]["selection"]["masks"] == 60
    assert "1 of 3 doors are wrong: broken" in capsys.readouterr().out


def test_ratios_are_measured_until_the_time_is_up(monkeypatch, tmp_path):
    row = "Linear 768x3072, 64 tokens"
    monkeypatch.setattr(training, "ROWS", {row: training.ROWS[row]})
    monkeypatch.setattr(arms, "ROWS", [("resnet32", 2)])
    monkeypatch.setattr(arms, "measure", functools.partial(arms.measure, batch=2))
    monkeypatch.setattr(doors, "DOORS", [])
    monkeypatch.setattr(doors, "quiet", lambda: None)
    path = tmp_path / "gpu.json"
    arguments = ["gpu", "--device", "cpu", "--rounds", "2", "--json", str(path)]
    for minutes, expected in (("5", [row]), ("0", [])):
        monkeypatch.setattr("sys.argv", [*arguments, "--minutes", minutes])
        assert command.main() == 0
        found = json.loads(path.read_text())
        assert [row["arms"] for row in found["arms"]] == [["dense", "mask"]] * len(expected)
        assert all(row["ratio"]["together"]["of_medians"] > 0 for row in found["arms"])
        ratios = found["ratios"]
        assert [found["row"] for found in ratios] == expected
        assert all(found["ratio"]["dense"]["of_medians"] == 1.0 for found in ratios)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu"])
    assert command.main() == 2
    assert "--device cpu is a dry run" in capsys.readouterr().out
