"""Every benchmark can be imported, and shows how it is called."""

import importlib

import pytest

from tests.adapters.models import ROOT

BENCHMARKS = sorted(path.stem for path in (ROOT / "tests" / "bench").glob("[a-z]*.py"))
NEEDS = {"atheris_adapter": "atheris"}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_shows_help_with_an_example(name, monkeypatch, capsys):
    assert len(BENCHMARKS) > 5
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    benchmark = importlib.import_module(f"tests.bench.{name}")
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as left:
        benchmark.main()
    assert left.value.code == 0
    assert name in capsys.readouterr().out.partition("example")[2]
