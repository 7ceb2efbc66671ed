"""What users import: from `pemn_surgery` itself, whatever room a name lives in."""

import ast
import importlib
import re

import pytest

import pemn_surgery
from tests.adapters import models

# A name may join; one that goes breaks somebody's program.
NAMES = {
    "Block", "Comparison", "ErrorReport", "Flips", "GroupValues", "Left", "MaskedState", "Overlap",
    "Owned", "PemnCallback", "PemnConfig", "PemnModel", "Plan", "SelectionSchedule", "Target",
    "TaskGuess", "Trace", "Training", "Use", "WeightError", "adapter_identity", "cache_salt",
    "compare_adapters", "complete_card", "errors", "example_inputs", "for_trainer",
    "freeze", "from_finetuned", "from_masks", "infer_task", "keep_weights", "masks_between",
    "masks_of_hidden_networks", "masks_of_piggyback", "masks_of_piggyback_pack", "masks_of_pruned",
    "masks_of_self_masking", "masks_without_gradient", "measure_errors", "nearest_mask",
    "nearest_signs", "param_groups", "pemnify", "plan", "pull_back", "recode", "rename_adapter",
    "repeated_blocks", "set_selection", "start_from", "take_back_flips", "to_trainable", "trace",
    "unprune",
}  # fmt: skip
PAGES = [models.ROOT / "README.md", *sorted((models.ROOT / "docs").glob("*.md"))]
PAGES += sorted((models.ROOT / "recipes").glob("*/README.md"))


def test_the_public_names():
    assert len(pemn_surgery.__all__) == len(set(pemn_surgery.__all__))
    assert set(pemn_surgery.__all__) == NAMES | {"__version__"}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_public_names(name):
    assert name in dir(pemn_surgery)
    assert getattr(pemn_surgery, name).__doc__


def test_type_checkers_are_told_the_same_homes():
    tree = ast.parse((models.ROOT / "pemn_surgery/__init__.py").read_text())
    told = {
        name.name: node.module
        for block in ast.walk(tree)
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert told == pemn_surgery._HOMES
    assert set(told) == NAMES - {"errors"}


def test_the_api_page_has_every_public_name_and_no_other():
    page = (models.ROOT / "docs/api.md").read_text(encoding="utf-8")
    found = re.findall(r"^::: (\S+)$", page, re.M)
    assert sorted(found) == sorted(f"pemn_surgery.{name}" for name in NAMES)


def imports(page):
    """(module, name) of every import of this package in a page; name is None of ``import x``."""
    for line in page.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"\s*from (pemn_surgery\S*) import ([\w, ]+)", line):
            yield from ((found[1], name.strip()) for name in found[2].split(","))
        elif found := re.match(r"\s*import (?:.*, )?(pemn_surgery[\w.]*)", line):
            yield found[1], None


def test_documents_import_public_names_alone():
    found = {(page.name, *one) for page in PAGES for one in imports(page)}
    assert len(found) >= 15
    wrong = {
        one for one in found
        if one[1] != "pemn_surgery" or one[2] not in {None, *NAMES}
    }  # fmt: skip
    assert wrong == set()


def test_every_home_is_a_module_that_defines_the_name():
    for name, home in pemn_surgery._HOMES.items():
        assert getattr(importlib.import_module(home), name).__module__ == home, name
