"""The pytest plugin that runs PEFT's own test files, unedited, with our configurations.

It changes nothing but what the tests are given: the rows of their tables, the model hub (a cache of
tiny random models), a photograph, and who says at which scores an adapter starts.
"""

import copy
import importlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from pemn_surgery import PemnConfig
from pemn_surgery.adapters import layer
from tests.peft_suite import cases, expected

PACKAGE = "peft_tests"  # PEFT's folder `tests` by another name: ours is `tests` too

# They let pass only PEFT's own classes that serve several tasks in a batch.
_MIXED = ("test_mixed_adapter_batches", "test_generate_with_mixed_adapter_batches")
_MIXED_MODULES = ("decoder_models", "encoder_decoder_models")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pemn-file", choices=expected.FILES, default="bits")
    parser.addoption("--pemn-outcomes", type=Path, help="write the outcome of every test here")


def pytest_configure(config: pytest.Config) -> None:
    _stay_offline()
    _draw_seeds_from_torch()
    if config.getoption("--pemn-file") == "scores":
        _keep_scores()
    if not hasattr(config, "workerinput"):  # with pytest-xdist, only where reports come together
        config.pluginmanager.register(Outcomes(config.getoption("--pemn-outcomes")))


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Put our rows in place of a table's, before pytest reads the marks."""
    module = cast("ModuleType", metafunc.module)
    tables = cases.TABLES.get(suite_of(module.__name__), {})
    marks = metafunc.definition.own_markers
    for place, mark in enumerate(marks):
        name = next((name for name in tables if _is_table(mark, module, name)), None)
        if name is not None:
            marks[place] = pytest.mark.parametrize(mark.args[0], tables[name]()).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of other methods, and mark what is expected to fail."""
    file = cast("str", config.getoption("--pemn-file"))
    ours = [item for item in items if _is_ours(item)]
    config.hook.pytest_deselected(items=[item for item in items if not _is_ours(item)])
    items[:] = ours
    for item in ours:
        row = expected.find(*place_of(item.nodeid), file)
        if row is not None:
            reason = expected.PREFIX + row.reason
            mark = pytest.mark.xfail(raises=row.error, reason=reason, strict=True)
            item.add_marker(mark, append=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    suite, test, _ = place_of(item.nodeid)
    with ExitStack() as stack:
        if test in _MIXED and suite in _MIXED_MODULES:
            common = importlib.import_module(f"{PACKAGE}.testing_common")
            for module in (common, cast("pytest.Module", item.getparent(pytest.Module)).obj):
                stack.enter_context(mock.patch.object(module, "LoraConfig", PemnConfig))
        return (yield)


class Outcomes:
    """Keeps one outcome a test, and writes them when the session ends."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome, message = outcome_of(report)
        if report.when != "call" and outcome == "passed":
            return
        suite, test, case = place_of(report.nodeid)
        self.rows[report.nodeid] = {
            "suite": suite, "test": test, "case": case, "outcome": outcome, "message": message,
        }  # fmt: skip

    def pytest_sessionfinish(self) -> None:
        if self.path is not None:
            self.path.write_text(json.dumps(list(self.rows.values())), encoding="utf-8")


def outcome_of(report: pytest.TestReport) -> tuple[str, str]:
    """Return passed, failed, skipped, expected or xfailed (by PEFT itself), and why."""
    why = getattr(report, "wasxfail", None)
    if report.skipped and why is not None:
        ours = why.removeprefix("reason: ").startswith(expected.PREFIX)
        return ("expected" if ours else "xfailed"), why
    if report.skipped:
        return "skipped", cast("tuple[str, int, str]", report.longrepr)[-1]
    if report.failed:
        return "failed", _last_line(report)
    return "passed", ""


def place_of(nodeid: str) -> tuple[str, str, str]:
    """Return suite, test function and case of a test."""
    path, *_, name = nodeid.split("::")
    test, _, case = name.partition("[")
    return suite_of(Path(path).stem), test, case.removesuffix("]")


def suite_of(module: str) -> str:
    return module.rpartition(".")[2].removeprefix("test_")


def _is_table(mark: pytest.Mark, module: ModuleType, name: str) -> bool:
    if mark.name != "parametrize" or len(mark.args) < 2:
        return False
    table = getattr(module, name)
    rows = table.values() if isinstance(table, dict) else table
    return list(mark.args[1]) == list(rows)


def _is_ours(item: pytest.Item) -> bool:
    spec = getattr(item, "callspec", None)
    return spec is not None and any(_is_configuration(value) for value in spec.params.values())


def _is_configuration(value: Any) -> bool:
    is_class = isinstance(value, type) and issubclass(value, PemnConfig)
    return is_class or isinstance(value, PemnConfig)


def _stay_offline() -> None:
    """Look-ups go to the cache (the runner sets HF_HUB_OFFLINE); nothing is tried online first."""
    utilities: Any = importlib.import_module(f"{PACKAGE}.testing_utils")
    utilities.hub_online_once = nullcontext
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    utilities.load_cat_image = lambda: Image.fromarray(pixels)
    utilities.set_init_weights_false = lambda _, options: cases.changed_at_start(options)


def _draw_seeds_from_torch() -> None:
    """Let random scores follow torch's generator, as PEFT's tests expect of two equal adapters."""
    from_seed = layer.initial_scores

    def draw(config: PemnConfig, *arguments: Any) -> torch.Tensor:
        drawn = copy.copy(config)
        drawn.seed = int(torch.randint(2**31, (), device="cpu"))
        return from_seed(drawn, *arguments)

    layer.initial_scores = draw


def _keep_scores() -> None:
    """Let every adapter keep its scores, in files and in the model."""
    check = PemnConfig.__post_init__

    def check_and_keep(self: PemnConfig) -> None:
        check(self)
        self.keep_scores = True

    PemnConfig.__post_init__ = check_and_keep


def _last_line(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    return " ".join(text.split())[:300]
