"""Checkpoints of rows that are still being trained: any machine can go on with them."""

import pytest
import torch

from pemn_surgery.recipe.arms import Arm
from pemn_surgery.recipe.file import load
from pemn_surgery.recipe.runner import network_of_arm
from tests.adapters.models import ROOT

FOLDER = ROOT / "recipes/pemn/unfinished"
FILES = sorted(FOLDER.rglob("*.pt"))


@pytest.mark.skipif(not FILES, reason="every row that was begun is done")
@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_an_unfinished_row_can_be_resumed(file):
    """It is of this recipe as it is now, and not done."""
    recipe = load(ROOT / "recipes/pemn")
    settings = torch.load(file, weights_only=True)["settings"]
    case, seed = settings["case"], settings["seed"]
    (name,) = [n for n in recipe.arms_of(case) if n.replace("-", "_") == file.stem]
    model = network_of_arm(recipe, case, recipe.arms[name], seed)
    rule = recipe.case(case).rule_of(name)
    sizes = {"train": 50_000, "test": 10_000}
    now = {"case": case, "epochs": recipe.paper_epochs, "seed": seed, "precision": "bf16"}
    now |= sizes | {"pemnify": recipe.arms[name], "rule": rule.settings()}
    arm = Arm(name, model, rule, file, now)
    arm.restore()
    assert 0 < arm.epoch < recipe.paper_epochs
    assert [row["epoch"] for row in arm.history] == list(range(1, arm.epoch + 1))
    assert file.parent.name == f"{case}-e{recipe.paper_epochs}-s{seed}"
