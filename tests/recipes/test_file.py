"""A recipe's file and the options of its runs: what is read, what is refused and how."""

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from pemn_surgery import recipe as recipes
from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import options
from pemn_surgery.recipe.options import option

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
RECIPE = recipes.load(FOLDER / "pemn")


def test_rules_are_the_papers():
    conv, res = (RECIPE.cases[name].rule for name in ("convmixer_d6_h256", "resnet32"))
    assert conv == {
        "optimizer": "adamw", "lr": 0.05, "weight_decay": 0.005, "schedule": "triangle",
        "batch": 512, "augmentation": "convmixer",
    }  # fmt: skip
    assert res == {
        "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4,
        "schedule": "cosine", "batch": 256, "augmentation": "resnet",
    }  # fmt: skip
    vit = RECIPE.cases["vit_d6_h256"]
    assert vit.rule == {
        "optimizer": "adam", "lr": 1e-4, "schedule": "cosine", "batch": 256, "augmentation": "vit",
    }  # fmt: skip
    assert (RECIPE.paper_epochs, vit.epochs) == (100, 200)


def test_arms_are_the_papers_columns():
    found = {name: RECIPE.arms[name] for name in ("dense", "mp", "rp_1e-2", "random_94")}
    assert found == {
        "dense": {},
        "mp": {"bank": "mp"},
        "rp_1e-2": {"bank": "rp", "ratio": 0.01},
        "random_94": {"prune": "random", "sparsity": 0.94},
    }
    published = [case.published for case in RECIPE.cases.values() if case.published]
    assert len(published) == 12
    assert sum(map(len, published)) == 8 * 9 + 4 * 12
    for name, case in RECIPE.cases.items():
        assert set(case.published) <= set(RECIPE.arms_of(name))
        assert set(case.published.get("mp", {"accuracy"})) >= {"accuracy"}
    convmixer, resnet = (RECIPE.cases[n].published for n in ("convmixer_d6_h256", "resnet32"))
    assert convmixer["rp_1e-2"] == {"accuracy": 88.89, "std": 0.13}
    assert resnet["rp_1e-2"] == {"accuracy": 86.39}
    assert resnet["magnitude_96"] == {"accuracy": 79.12}
    assert resnet["dense"] == {"accuracy": 92.26, "figure": True}


def test_arms_are_chosen_by_name():
    assert list(RECIPE.arms_of("resnet32", ("mp", "dense"))) == ["mp", "dense"]
    with pytest.raises(
        RecipeError, match=r"arms \['rp_1e-5'\] are unknown; 'resnet32' of pemn has"
    ):
        RECIPE.arms_of("resnet32", ("rp_1e-5",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "TOMLDecodeError"),
        ("name = 'x'", "KeyError"),
        ("[cases.a]\nfactory = 'f'", r"missing .* 'arguments', 'data', and 'rule'"),
    ],
)
def test_a_broken_recipe_is_refused_with_its_reason(text, message, tmp_path):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        recipes.load(tmp_path)


def test_missing_pieces_are_named(tmp_path):
    with pytest.raises(RecipeError, match=r"recipe\.toml cannot be read"):
        recipes.load(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="'other' is unknown; pemn has"):
        RECIPE.case("other")
    with pytest.raises(RecipeError, match="the recipe pemn needs it"):
        RECIPE.module("absent")
    with pytest.raises(RecipeError, match="the data set 'cifar10' of pemn cannot be read"):
        dataclasses.replace(RECIPE, data={}).images("resnet32")
    given = RECIPE.cases["resnet32"]
    with pytest.raises(RecipeError, match=r"rule of the arm 'dense' cannot be read: .*'speed'"):
        dataclasses.replace(given, rules={"dense": {"speed": 1}}).rule_of("dense")


@pytest.mark.parametrize("factory", ["torch.nn.Lunar", "no_such_library.net", "absent"])
def test_a_factory_that_is_not_there_is_named(factory, tmp_path):
    (tmp_path / "networks.py").write_text("")
    case = dataclasses.replace(RECIPE.cases["resnet32"], factory=factory)
    recipe = dataclasses.replace(RECIPE, folder=tmp_path, cases={"a": case})
    with pytest.raises(RecipeError, match=f"the factory '{factory}' of a case of pemn"):
        recipe.network("a")


def test_a_factory_is_a_dotted_name_or_the_recipes_own(tmp_path):
    (tmp_path / "networks.py").write_text("def own(n):\n    return n")
    given = dataclasses.replace(RECIPE.cases["resnet32"], factory="own", arguments={"n": 3})
    other = dataclasses.replace(given, factory="torch.nn.Linear")
    other = dataclasses.replace(other, arguments={"in_features": 2, "out_features": 1})
    recipe = dataclasses.replace(RECIPE, folder=tmp_path, cases={"a": given, "b": other})
    assert recipe.network("a") == 3
    assert isinstance(recipe.network("b"), nn.Linear)


def test_a_module_is_imported_once():
    recipe = recipes.load(FOLDER / "supsup_permuted_digits")
    again = recipes.load(FOLDER / "supsup_permuted_digits")
    assert recipe.module("run") is again.module("run")


def test_an_arms_rule_is_the_cases_and_what_is_otherwise():
    case = recipes.load(FOLDER / "mask_compression").cases["resnet20"]
    masks, tuned = case.rule_of("masks"), case.rule_of("finetuned")
    assert (masks.lr, tuned.lr) == (50, 0.05)
    assert dataclasses.replace(tuned, lr=50.0) == masks
    assert case.rule_of("masks", lr=1.0).lr == 1


@pytest.mark.parametrize(
    "folder", sorted(FOLDER.glob("*/recipe.toml")), ids=lambda f: f.parent.name
)
def test_every_committed_recipe_can_be_made(folder):
    recipe = recipes.load(folder.parent)
    assert recipe.cases
    for name, case in recipe.cases.items():
        assert case.data in recipe.data
        assert all(case.rule_of(arm) for arm in recipe.arms)
        assert set(case.rules) <= set(recipe.arms)
        torch.manual_seed(0)
        assert isinstance(recipe.network(name), nn.Module)


# -- options ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(options.CaseOptions):
    rates: tuple[float, ...] = option("some", ())
    fast_way: bool = option("quick", default=False)


def read(line):
    parser = argparse.ArgumentParser()
    options.add_options(parser, Given, {"case": ["a", "b"]})
    return options.from_words(Given, vars(parser.parse_args(line.split())))


def test_fields_are_the_command_lines_options(tmp_path):
    plain = read("--case a --work w")
    assert plain == Given(case="a", work=Path("w"))
    line = f"--case b --work w --epochs 3 --device cuda --limit 9 --data {tmp_path} --seeds 1 2"
    full = read(f"{line} --rates 0.5 1e-2 --fast-way --resume")
    assert (full.epochs, full.limit, full.seeds, full.rates) == (3, 9, (1, 2), (0.5, 0.01))
    assert full.fast_way
    assert full.resume
    assert options.command("name", "run", full) == (
        "pemn run recipes/name run --case b --work WORK --epochs 3 --device cuda "
        f"--layout channels_last --limit 9 --data .../{tmp_path.name} --seeds 1 2 --rates 0.5 0.01 "
        "--fast-way"
    )
    assert (plain.changes, full.changes, full.cut) == ("", "-e3-limit9", "-limit9")
    assert read("--case a --work w --seed 4").seeds == (4,)  # argparse takes beginnings


@pytest.mark.parametrize("line", ["--case c --work w", "--work w", "--case a --work w --epochs x"])
def test_other_words_are_refused(line, capsys):
    with pytest.raises(SystemExit):
        read(line)
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"threads": 0}, {"limit": -1}, {"precision": "fp16"}]
)
def test_options_refuse_what_cannot_run(wrong, tmp_path):
    (name,) = wrong
    with pytest.raises(RecipeError, match=f"{name}=.*; give "):
        Given(case="a", work=tmp_path, **wrong)
