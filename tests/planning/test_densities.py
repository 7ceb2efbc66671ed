"""A density for every weight: by name, by shape, in plans, files and every way to load."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from peft.utils.other import get_pattern_key

import tests.adapters.models as models
from pemn_surgery import PemnConfig, pemnify, plan
from pemn_surgery.adapters import recode, to_trainable
from pemn_surgery.adapters.tasks.flips import take_back_flips
from pemn_surgery.errors import AdapterError, ConfigError, PemnWarning
from pemn_surgery.planning.densities import densities_by_name, erdos_renyi_kernel

SHAPES = models.NET_TARGETS  # conv1 (8, 3, 3, 3), conv2 and conv3 (8, 8, 3, 3), head (4, 8)
WEIGHTS = {name: math.prod(shape) for name, shape in SHAPES.items()}


def rigl(shapes, sparsity):
    """RigL's published procedure (google-research/rigl, `get_sparsities_erdos_renyi`), slowly.

    One layer at a time becomes dense, the one of the largest probability; numbers of zeros and
    ones are whole there, here not.
    """
    dense = set()
    while True:
        divisor, rhs, raw = 0.0, 0.0, {}
        for name, shape in shapes.items():
            size = math.prod(shape)
            if name in dense:
                rhs -= size * sparsity
            else:
                rhs += size * (1 - sparsity)
                raw[name] = np.sum(shape) / np.prod(shape)
                divisor += raw[name] * size
        if not raw:
            return dict.fromkeys(shapes, 0.0)
        eps = rhs / divisor
        largest = max(raw.values())
        if largest * eps <= 1:
            return {name: 1 - eps * raw[name] if name in raw else 0.0 for name in shapes}
        dense.add(next(name for name in raw if raw[name] == largest))


# Values that another implementation's tests publish (jaxpruner, sparsity_distributions_test.py).
PUBLISHED = [
    ({"a": (2, 4)}, 0.5, {"a": 0.5}),
    ({"a": (2, 4), "b": (3, 6), "c": (2, 4, 6)}, 0.5, {"a": 0.0, "b": 0.31, "c": 0.655}),
]


@pytest.mark.parametrize(("shapes", "sparsity", "expected"), PUBLISHED)
def test_erk_is_what_others_publish(shapes, sparsity, expected):
    found = erdos_renyi_kernel(shapes, 1 - sparsity)
    assert {name: 1 - share for name, share in found.items()} == pytest.approx(expected, abs=0.01)


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=8),
    st.floats(0.001, 1.0),
)
def test_erk_equals_rigl_and_keeps_the_overall_density(shapes, overall):
    named = {str(place): tuple(shape) for place, shape in enumerate(shapes)}
    found = erdos_renyi_kernel(named, overall)
    slow = rigl(named, 1 - overall)
    assert found == pytest.approx({name: 1 - slow[name] for name in named}, abs=1e-9)
    assert all(0 < share <= 1 for share in found.values())
    weights = {name: math.prod(shape) for name, shape in named.items()}
    ones = sum(found[name] * weights[name] for name in named)
    assert ones == pytest.approx(overall * sum(weights.values()), rel=1e-9)


def test_erk_of_two_layers_by_hand():
    # e = .1 (100 + 1000) / (20 + 110); densities e 20 / 100 and e 110 / 1000.
    found = erdos_renyi_kernel({"small": (10, 10), "large": (10, 100)}, 0.1)
    e = 0.1 * 1100 / 130
    assert found == pytest.approx({"small": e * 20 / 100, "large": e * 110 / 1000})


# ---- by name ----------------------------------------------------------------------------------

PATTERNS = [
    ({"conv2": 0.1}, {"conv2.weight": 0.1}),
    ({"conv[23]": 0.1}, {"conv2.weight": 0.1, "conv3.weight": 0.1}),
    ({"conv2": 0.1, "conv.": 0.2}, {"conv1.weight": 0.2, "conv2.weight": 0.1, "conv3.weight": 0.2}),
    ({"conv.": 0.2, "conv2": 0.1}, dict.fromkeys(list(SHAPES)[:3], 0.2)),
    ({"head.weight": 0.3}, {"head.weight": 0.3}),
    ({".*": 0.3}, dict.fromkeys(SHAPES, 0.3)),
    ({"layers.0.attn": 0.3}, {"layers.0.attn.in_proj_weight": 0.3}),
    ({"attn.in_proj_weight": 0.3}, {"layers.0.attn.in_proj_weight": 0.3}),
]


@pytest.mark.parametrize(("patterns", "expected"), PATTERNS, ids=str)
def test_patterns(patterns, expected):
    shapes = {**SHAPES, "layers.0.attn.in_proj_weight": (12, 4)}
    if "layers.0.attn.in_proj_weight" not in expected and ".*" not in patterns:
        assert densities_by_name(shapes, patterns) == expected
    found = densities_by_name(shapes, patterns)
    assert {name: found[name] for name in expected} == expected


def test_patterns_of_modules_match_as_pefts_rank_pattern_does():
    paths = ["conv1", "a.conv1", "a.xconv1", "conv1.b", "layers.1.up", "layers.11.up"]
    for pattern in ("conv1", "a.conv1", r"layers\.1\.up", "layers.*up", ".*conv1", "x?conv1"):
        theirs = [path for path in paths if get_pattern_key([pattern], path) == pattern]
        shapes = {f"{path}.weight": (2, 2) for path in paths}
        assert [name[: -len(".weight")] for name in densities_by_name(shapes, {pattern: 0.1})] == (
            theirs
        ), pattern


# ---- in a model -------------------------------------------------------------------------------

OPTIONS = {
    "pattern": {"density": 0.4, "density_pattern": {"conv2": 0.1, "head": 1.0}},
    "erk": {"density": "erk"},
    "erk_overall": {"density": "erk", "overall_density": 0.2},
    "both": {"density": "erk", "overall_density": 0.2, "density_pattern": {"conv1": 0.75}},
}
EXPECTED = {
    "pattern": {"conv1.weight": 0.4, "conv2.weight": 0.1, "conv3.weight": 0.4, "head.weight": 1.0},
    "erk": erdos_renyi_kernel(SHAPES, 0.5),
    "erk_overall": erdos_renyi_kernel(SHAPES, 0.2),
    "both": {
        "conv1.weight": 0.75,
        **erdos_renyi_kernel({n: s for n, s in SHAPES.items() if n != "conv1.weight"}, 0.2),
    },
}


def ones_of(densities):
    return {name: n - int((1 - densities[name]) * n) for name, n in WEIGHTS.items()}


def counted(model, adapter="default"):
    return {name: int(mask.sum()) for name, mask in models.masks(model, adapter).items()}


@pytest.mark.parametrize("bank", ["mp", "rp", "own"])
@pytest.mark.parametrize("case", OPTIONS)
def test_every_mask_has_its_density_in_plan_model_and_files(case, bank, tmp_path):
    options = {"bank": bank, **OPTIONS[case]}
    expected = EXPECTED[case]
    made = plan(models.net(), **options)
    assert {target.name: target.density for target in made.targets} == expected
    model = models.train(pemnify(models.net(), **options))
    assert counted(model) == ones_of(expected)
    model.save_pretrained(tmp_path)
    read = PemnConfig.from_pretrained(str(tmp_path))
    for name, value in OPTIONS[case].items():
        assert getattr(read, name) == value
    loaded = PeftModel.from_pretrained(models.net(), tmp_path)
    models.assert_same_tensors(models.masks(loaded), models.masks(model))
    models.assert_equal(models.logits(loaded), models.logits(model))
    with pytest.warns(PemnWarning, match="bits, not scores"):
        again = PeftModel.from_pretrained(models.net(), tmp_path, is_trainable=True)
    models.assert_same_tensors(models.masks(again), models.masks(model))
    models.train(again, task=1)
    assert counted(again) == ones_of(expected)
    to_trainable(loaded)
    models.train(loaded, task=1)
    assert counted(loaded) == ones_of(expected)


@pytest.mark.parametrize("case", ["pattern", "both"])
def test_scores_of_a_checkpoint_choose_the_same_masks(case, tmp_path):
    model = models.train(pemnify(models.net(), bank="own", **OPTIONS[case]))
    model.peft_config["default"].keep_scores = True
    model.save_pretrained(tmp_path)
    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(models.net(), tmp_path, is_trainable=trainable)
        models.assert_same_tensors(models.masks(loaded), models.masks(model))
    recode(tmp_path, "entropy", tmp_path / "packed")
    packed = PeftModel.from_pretrained(models.net(), tmp_path / "packed")
    models.assert_same_tensors(models.masks(packed), models.masks(model))


def test_codings_and_flips_know_the_density(tmp_path):
    model = models.train(pemnify(models.net(), bank="own", coding="context", **OPTIONS["pattern"]))
    take_back_flips(model, [model(models.images()).sum()], share=1.0)
    assert counted(model) == ones_of(EXPECTED["pattern"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.net(), tmp_path)
    models.assert_same_tensors(models.masks(loaded), models.masks(model))


def test_a_uniform_density_is_the_same_mask_however_it_is_said():
    plain = pemnify(models.net(), bank="own", density=0.3)
    said = pemnify(models.net(), bank="own", density_pattern={".*": 0.3})
    models.assert_same_tensors(models.masks(said), models.masks(plain))


def test_the_scale_is_that_of_each_density():
    model = pemnify(models.net(), bank="own", scale="sqrt_density", **OPTIONS["pattern"])
    base = dict(models.net().named_parameters())
    for name, layer in models.mask_layers(model).items():
        mask = models.masks(model)[name]
        expected = base[name] * mask / mask.float().mean().sqrt()
        torch.testing.assert_close(layer.owner.weight, expected)


def test_scale_fan_divides_by_the_overall_density():
    options = {"bank": "mp", "scale_fan": True}
    for given_so, overall in ((OPTIONS["erk_overall"], 0.2), (OPTIONS["pattern"], 0.4)):
        spec = PemnConfig(**options, **given_so).bank_spec
        assert spec == PemnConfig(**options, density=overall).bank_spec


def test_plans_show_densities_where_they_differ():
    plain = plan(models.net(), bank="own", density=0.3)
    assert "density" not in str(plain)
    assert {row["density"] for row in plain.groups()} == {"0.3"}
    made = plan(models.net(), bank="own", **OPTIONS["pattern"])
    rows = {row["tensor"]: row["density"] for row in made.groups()}
    assert rows == {
        "conv1.weight": "0.4", "conv2.weight": "0.1", "conv3.weight": "0.4", "head.weight": "1"
    }  # fmt: skip
    table = str(made)
    assert "density" in table
    line = next(line for line in table.splitlines() if "conv2.weight" in line)
    assert " 0.1 " in line
    found = json.loads(json.dumps(made.as_dict()))
    assert [item["density"] for item in found["targets"]] == [0.4, 0.1, 0.4, 1.0]
    threshold = plan(models.net(), bank="own", selector="threshold")
    assert {target.density for target in threshold.targets} == {None}


def test_repeated_blocks_of_one_shape_are_one_row():
    made = plan(models.bert(), bank="own", density="erk")
    rows = [row for row in made.groups() if "query" in row["tensor"]]
    assert [row["count"] for row in rows] == [2]


def test_a_pattern_that_fits_nothing_is_refused():
    model = models.net()
    before = models.Snapshot(model)
    for verb in (pemnify, plan):
        with pytest.raises(ConfigError) as error:
            verb(model, bank="own", density_pattern={"conv1": 0.2, "conv9": 0.1})
        models.says(error, "'conv9'", "none of the 4 weights", "conv1.weight", "Nothing was")
        assert "'conv1'" not in str(error.value)
    before.assert_unchanged()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"density": "ERK"}, "or 'erk'"),
        ({"density_pattern": {"a": 20}}, "0 < number <= 1"),
        ({"density_pattern": {"(": 0.2}}, "a regular expression"),
        ({"density_pattern": ["a"]}, "a dict"),
        ({"density": "erk", "overall_density": 0}, "0 < value <= 1"),
    ],
)
def test_values_that_cannot_be(options, said):
    with pytest.raises(ConfigError) as error:
        PemnConfig(**options)
    models.says(error, f"PemnConfig got {list(options)[-1]}=", said)


def test_adapters_of_other_densities_do_not_take_a_places(tmp_path):
    pemnify(models.net(), bank="own", **OPTIONS["pattern"]).save_pretrained(tmp_path)
    model = pemnify(models.net(), bank="own", density=0.4)
    with pytest.raises(AdapterError, match="density_pattern"):
        model.load_adapter(str(tmp_path), "default")
    model.load_adapter(str(tmp_path), "other")
    assert counted(model, "other") == ones_of(EXPECTED["pattern"])


def test_algebra_of_such_adapters(tmp_path):
    model = pemnify(models.net(), bank="own", adapter_name="a", **OPTIONS["both"])
    model.add_adapter("b", PemnConfig(bank="own", seed=1, **OPTIONS["pattern"]))
    model.add_weighted_adapter(["a", "b"], None, "both", "union")
    expected = {n: m | models.masks(model, "b")[n] for n, m in models.masks(model, "a").items()}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.net(), tmp_path / "both")
    models.assert_same_tensors(models.masks(loaded), expected)


def test_target_names_of_parameters():
    """Raw parameters have densities, too, by their own names."""
    options = {"target_parameters": ["bn1.weight"], "density_pattern": {"bn1.weight": 0.25}}
    model = pemnify(models.net(), bank="own", **options)
    assert counted(model)["bn1.weight"] == 2


def test_the_card_says_it(tmp_path):
    model = pemnify(models.net(), bank="own", **OPTIONS["both"])
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "density erk (by shape, overall 0.2), conv1 0.75" in text
