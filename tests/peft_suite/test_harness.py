"""The harness around PEFT's tests: its tables, the plugin, the cache, the page."""

import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModel

from pemn_surgery import PemnConfig
from tests.adapters import models
from tests.peft_suite import __main__ as command
from tests.peft_suite import cache, cases, expected, report, run

ROWS = {
    (suite, name): make() for suite, names in cases.TABLES.items() for name, make in names.items()
}

UTILITIES = """
def set_init_weights_false(config_cls, kwargs):
    raise RuntimeError
def load_cat_image():
    raise RuntimeError
hub_online_once = None
"""
SUITE = """
import pytest
from peft import LoraConfig
from .testing_utils import hub_online_once, load_cat_image, set_init_weights_false

ALL_CONFIG_CLASSES = ((LoraConfig, {}),)
LAYER_INDEXING_CONFIG_CLASSES = [(LoraConfig, {"r": 2})]

@pytest.mark.parametrize("config_class, kwargs", ALL_CONFIG_CLASSES)
def test_passes(config_class, kwargs):
    assert config_class(**kwargs).bank == kwargs["bank"]

@pytest.mark.parametrize("config_class, kwargs", LAYER_INDEXING_CONFIG_CLASSES)
def test_fails(config_class, kwargs):
    config = config_class(**kwargs)
    assert config.keep_scores, "bits are saved"

@pytest.mark.parametrize("config_class, kwargs", ALL_CONFIG_CLASSES)
def test_from_pretrained_cache_dir(config_class, kwargs):
    if kwargs["bank"] == "own":
        raise ValueError("as the table of expected failures says")

@pytest.mark.parametrize("config_class, kwargs", ALL_CONFIG_CLASSES)
def test_skips(config_class, kwargs):
    with hub_online_once("a model"):
        assert load_cat_image().size == (64, 48)
    if kwargs["selector"] == "threshold":
        assert set_init_weights_false(config_class, kwargs)["score_init"] == "kaiming_uniform"
    pytest.skip("not for this method")

@pytest.mark.parametrize("config_class, kwargs", [(LoraConfig, {"r": 4})])
def test_of_another_method(config_class, kwargs):
    raise RuntimeError

def test_without_configuration():
    raise RuntimeError
"""


def options_of(row):
    """Every configuration that a row of a table gives to a test."""
    values = row.values
    made = [value for value in values if isinstance(value, PemnConfig)]
    classes = [value for value in values if isinstance(value, type)]
    for options in values:
        if isinstance(options, dict):
            made += [config_class(**options) for config_class in classes]
    return made or [config_class(target_modules=["x"]) for config_class in classes]


@pytest.mark.parametrize("table", ROWS, ids=str)
def test_every_table_has_rows_with_names_of_their_own(table):
    rows = ROWS[table]
    assert rows
    assert len({row.id for row in rows}) == len(rows)
    for row in rows:
        configs = options_of(row)
        assert configs
        assert all(isinstance(config, PemnConfig) for config in configs)


def test_every_bank_and_selector_is_run():
    rows = ROWS["custom_models", "TEST_CASES"]
    pairs = {(config.bank, config.selector) for row in rows for config in options_of(row)}
    banks, selectors = ("mp", "rp", "one_layer", "own"), ("topk", "threshold")
    assert pairs == {(bank, selector) for bank in banks for selector in selectors}


def test_starting_masks_that_change_something_differ_from_the_first_ones():
    options = cases.VARIANTS[cases.MAIN]
    assert cases.changed_at_start(options) == {**options, "score_init": "kaiming_uniform"}
    assert options["score_init"] != "kaiming_uniform"


def test_the_table_of_expected_failures_is_well_formed():
    assert expected.TABLE
    assert len(set(expected.TABLE)) == len(expected.TABLE)
    for row in expected.TABLE:
        assert row.suites
        assert set(row.suites) <= set(cases.SUITES)
        assert row.test.startswith("test_")
        assert row.file in ("", *expected.FILES)
        assert issubclass(row.error, BaseException)
        assert len(row.reason) > 20
        assert not row.reason.endswith(".")


def test_with_bits_nothing_else_fails_than_what_compares_float_scores():
    assert {row.reason for row in expected.TABLE if row.file} == {expected.FLOAT_SCORES}
    assert {row.file for row in expected.TABLE if row.file} == {"bits"}


def test_rows_are_found_by_suite_test_case_and_file(monkeypatch):
    first = expected.Expected(("config",), "test_a*", "the first", case="own-*", file="bits")
    second = expected.Expected(("config", "decoder_models"), "test_ab", "the second")
    monkeypatch.setattr(expected, "TABLE", (first, second))
    assert expected.find("config", "test_ab", "own-topk", "bits") is first
    assert expected.find("config", "test_ab", "own-topk", "scores") is second
    assert expected.find("config", "test_ab", "mp-topk", "bits") is second
    assert expected.find("decoder_models", "test_ab", "own-topk", "bits") is second
    assert expected.find("decoder_models", "test_a", "own-topk", "bits") is None
    ran = [{"test": "test_ab", "case": "mp-topk"}]
    assert expected.unused("config", "bits", ran) == [first]
    assert expected.unused("config", "scores", ran) == []
    assert expected.unused("decoder_models", "bits", []) == [second]


@pytest.fixture
def small_suite(tmp_path):
    """A folder with a package of tests made as PEFT's is."""
    package = tmp_path / "peft_tests"
    package.mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (package / "__init__.py").write_text("")
    (package / "testing_utils.py").write_text(UTILITIES)
    (package / "test_config.py").write_text(SUITE)
    return tmp_path


@pytest.mark.slow
def test_the_plugin_saving_bits(small_suite):
    """The table's row fits every case; those that do not fail as it says are failures."""
    done = run.run_suite(small_suite, small_suite, "config", "bits", 1)
    own = sum(options["bank"] == "own" for options in cases.VARIANTS.values())
    count = len(cases.VARIANTS)
    assert 0 < own < count
    assert {name: done[name] for name in run.COUNTS} == {
        "passed": count,
        "failed": count + count - own,
        "expected": own,
        "skipped": count,
        "xfailed": 0,
    }
    assert done["skips"] == {"Skipped: not for this method": count}
    of_suite = {row.test for row in expected.TABLE if "config" in row.suites}
    missing = of_suite - {"test_from_pretrained_cache_dir"}  # which the small suite does not have
    assert {row.partition(":")[0] for row in done["stale"]} == missing
    messages = {one["test"]: one["message"] for one in done["failures"]}
    assert "bits are saved" in messages["test_fails"]
    assert messages["test_from_pretrained_cache_dir"].startswith("[XPASS(strict)] expected: ")
    assert not run.is_clean(done)


@pytest.mark.slow
def test_the_plugin_keeping_scores_in_two_processes(small_suite):
    done = run.run_suite(small_suite, small_suite, "config", "scores", 2)
    assert done["passed"] == 2 * len(cases.VARIANTS)
    assert {one["test"] for one in done["failures"]} == {"test_from_pretrained_cache_dir"}


def outcome(test, kind, case="own-topk", message=""):
    return {"suite": "config", "test": test, "case": case, "outcome": kind, "message": message}


def test_a_summary_names_what_is_unexpected(monkeypatch):
    row = expected.Expected(("config",), "test_known", "a reason")
    stale = expected.Expected(("config",), "test_gone", "no such test")
    monkeypatch.setattr(expected, "TABLE", (row, stale))
    made = [
        outcome("test_known", "expected"),
        outcome("test_other", "passed"),
        outcome("test_bad", "failed", message="ValueError: a | b"),
        outcome("test_no", "skipped", message="Skipped: never"),
    ]
    result = run.summary("config", "bits", made)
    assert result["reasons"] == [["test_known", "a reason", 1]]
    assert result["failures"] == [
        {"test": "test_bad", "case": "own-topk", "message": "ValueError: a | b"}
    ]
    assert result["stale"] == ["test_gone: no such test"]
    assert not run.is_clean(result)
    monkeypatch.setattr(expected, "TABLE", (row,))
    assert run.is_clean(run.summary("config", "bits", made[:2]))
    assert not run.is_clean(run.summary("config", "bits", made[:3]))
    assert run.is_clean(run.summary("config", "bits", made[:1])), "all is expected to fail"
    monkeypatch.setattr(expected, "TABLE", ())
    assert not run.is_clean(run.summary("config", "bits", [])), "nothing ran"


def result(suite, file, passed=1, **changes):
    made = [outcome("test_x", "passed", str(number)) for number in range(passed)]
    return run.summary(suite, file, made) | {"stale": [], **changes}


def test_the_page_says_what_passed_and_what_did_not(tmp_path):
    failure = {"test": "test_bad", "case": "own-topk", "message": "ValueError: a | b"}
    first = result(
        "config", "bits", 3, failed=1, expected=2, failures=[failure],
        reasons=[["test_known", "a reason", 2]], skips={"Skipped: never": 4},
    )  # fmt: skip
    report.write([first], tmp_path)
    report.write([result("custom_models", "bits", 5, stale=["gone"])], tmp_path)
    page = (tmp_path / "peft_suite.md").read_text()
    assert "| test_config.py | bits | 3 | 2 | 1 | 0 | 0 |" in page
    assert "| all | bits | 8 | 2 | 1 | 0 | 0 |" in page
    assert page.index("test_custom_models.py") < page.index("test_config.py")
    assert "| config | bits | test_known | 2 | a reason |" in page
    assert "| config | bits | test_bad | own-topk | ValueError: a \\| b |" in page
    assert "| custom_models | bits | gone |" in page
    assert "| Skipped: never | 4 |" in page
    assert all(f"| {name} |" in page for name in cases.VARIANTS)
    stored = json.loads((tmp_path / "results" / "peft_suite.json").read_text())
    assert [one["suite"] for one in stored["results"]] == ["custom_models", "config"]
    assert {"date", "machine", "versions"} <= set(stored["environment"])
    assert stored["environment"]["versions"]["peft"]
    for one in stored["results"]:
        assert one["command"].startswith("python -m tests.peft_suite")
        assert one["date"] == stored["environment"]["date"]


def test_the_committed_page_is_that_of_the_committed_results():
    stored = json.loads((models.ROOT / "docs/results/peft_suite.json").read_text())
    assert (models.ROOT / "docs/peft_suite.md").read_text() == report.page(stored)
    ran = {(one["suite"], one["file"]) for one in stored["results"]}
    assert ran == {(suite, file) for suite in cases.SUITES for file in expected.FILES}
    assert [one["suite"] for one in stored["results"] if not run.is_clean(one)] == []
    told = " ".join((models.ROOT / "docs/guarantees.md").read_text().split())
    *_, scores, bits = report.counts(stored["results"])
    assert f"today {scores[2]:,} tests pass with scores kept and {bits[2]:,} with bits" in told
    assert f"{scores[3]} and {bits[3]} are expected to fail" in told
    assert f"these, {bits[3] - scores[3]} look for float scores" in told


def test_results_of_other_versions_are_not_kept(tmp_path):
    report.write([result("config", "bits")], tmp_path)
    path = tmp_path / "results" / "peft_suite.json"
    stored = json.loads(path.read_text())
    stored["environment"]["versions"]["peft"] = "0.1"
    path.write_text(json.dumps(stored))
    report.write([result("custom_models", "bits")], tmp_path)
    stored = json.loads(path.read_text())
    assert [one["suite"] for one in stored["results"]] == ["custom_models"]


def test_a_fabricated_model_is_found_as_a_downloaded_one_is(tmp_path, monkeypatch):
    names = [model.name for model in cache.MODELS]
    assert len(set(names)) == len(names) > 10
    bert = next(model for model in cache.MODELS if model.name.endswith("BertModel"))
    monkeypatch.setattr(cache, "MODELS", (bert,))
    cache.build(tmp_path)
    found = try_to_load_from_cache(bert.name, "model.safetensors", cache_dir=tmp_path / "hub")
    made = AutoModel.from_pretrained(Path(str(found)).parent)
    again = cache._make(bert)
    models.assert_same_tensors(dict(made.named_parameters()), dict(again.named_parameters()))


def test_suites_are_named_by_how_they_begin():
    assert command._wanted([]) == list(cases.SUITES)
    assert command._wanted(["custom", "enc"]) == ["custom_models", "encoder_decoder_models"]
    assert command._wanted(["none"]) == []


def test_the_command_shows_an_example(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["python -m tests.peft_suite", "run", "--help"])
    with pytest.raises(SystemExit):
        command.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "example: python -m tests.peft_suite run --only custom" in shown


def test_what_is_missing_is_said_before_anything_is_fetched(monkeypatch):
    monkeypatch.setattr(run, "NEEDED", ("no_such_package",))
    with pytest.raises(SystemExit, match=r"import no_such_package: pip install"):
        run.check_packages()
