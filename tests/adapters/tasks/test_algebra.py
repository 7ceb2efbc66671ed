"""Adapters made from adapters: the masks are what set algebra says, bit by bit."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from pemn_surgery import PemnConfig, errors, from_finetuned, pemnify, to_trainable
from pemn_surgery.adapters.tasks.manage import combined_mask
from tests.adapters import models
from tests.adapters.models import says

pytestmark = models.ignore_peft_on_transformers

NAMES = ["a", "b", "c"]

# What a list of 0s and 1s, one an adapter, becomes.
RULES = {
    "intersection": lambda kept, weights: all(kept),
    "union": lambda kept, weights: any(kept),
    "majority": lambda kept, weights: (
        sum(w for k, w in zip(kept, weights, strict=True) if k) > sum(weights) / 2
    ),
    "difference": lambda kept, weights: bool(kept[0] and not any(kept[1:])),
    "xor": lambda kept, weights: kept.count(0) % 2 == 0,
}


def trio(**options):
    """Three tasks with different masks and different other tensors."""
    changes = {"bank": "own", "rest": "train", "selector": "topk", "density": 0.6, **options}
    model = pemnify(models.net(), adapter_name="a", **changes)
    for name in NAMES[1:]:
        model.add_adapter(name, PemnConfig(**changes))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in models.mask_layers(model).values():
            for name in NAMES:
                scores = layer.mask_of(name).scores
                scores += scores.abs().mean() * torch.randn(scores.shape, generator=generator)
        for layer in models.task_layers(model).values():
            for tensors in layer.pemn_tensors.values():
                for tensor in [*tensors.parameters(), *tensors.buffers()]:
                    if tensor.is_floating_point():
                        tensor += torch.rand(tensor.shape, generator=generator)
    return model.eval()


def expected_masks(model, combination, weights, names=NAMES):
    given = [models.masks(model, name) for name in names]
    found = {}
    for target in given[0]:
        columns = zip(*(masks[target].flatten().tolist() for masks in given), strict=True)
        flat = [RULES[combination](column, weights) for column in columns]
        found[target] = torch.tensor(flat).view(given[0][target].shape)
    return found


@pytest.mark.parametrize("bank", ["own", "mp", "rp"])
@pytest.mark.parametrize("combination", RULES)
def test_masks(combination, bank):
    model, weights = trio(bank=bank), [1.0, 2.5, 1.0]
    expected = expected_masks(model, combination, weights)
    model.add_weighted_adapter(NAMES, weights, "new", combination)
    models.assert_same_tensors(models.masks(model, "new"), expected)
    model.set_adapter("new")
    for name, layer in models.mask_layers(model).items():
        models.assert_equal(layer(), layer.fill() * expected[name], name)


@given(
    st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=5),
    st.lists(st.floats(0.1, 9), min_size=5, max_size=5),
    st.sampled_from(sorted(RULES)),
    st.sampled_from([(6,), (2, 3), (1, 6, 1)]),
)
def test_combined_mask(rows, weights, combination, shape):
    masks = [torch.tensor(row).view(shape) for row in rows]
    made = combined_mask(masks, weights[: len(rows)], combination)
    columns = zip(*rows, strict=True)
    flat = [RULES[combination](column, weights[: len(rows)]) for column in columns]
    models.assert_equal(made, torch.tensor(flat).view(shape), combination)


def test_half_of_the_weight_is_no_majority():
    one, none = torch.tensor([True]), torch.tensor([False])
    assert not combined_mask([one, none], [1.0, 1.0], "majority")
    assert combined_mask([one, none], [1.1, 1.0], "majority")


@pytest.mark.parametrize("combination", RULES)
def test_other_tensors_are_the_mean(combination):
    model, weights = trio(), [1.0, 2.0, 5.0]
    model.add_weighted_adapter(NAMES, weights, "new", combination)
    checked = 0
    for layer in models.task_layers(model).values():
        given = [dict(layer.pemn_tensors[name].state_dict()) for name in NAMES]
        for key, made in layer.pemn_tensors["new"].state_dict().items():
            assert not made.requires_grad
            if combination == "difference" or not made.is_floating_point():
                models.assert_equal(made, given[0][key], key)
            else:
                values = zip(given, weights, strict=True)
                mean = sum(tensors[key].double() * weight for tensors, weight in values) / 8
                torch.testing.assert_close(made.double(), mean, rtol=1e-6, atol=1e-6)
            checked += 1
    assert checked > 8


def test_new_adapter_is_like_any_other(tmp_path):
    model = trio(bank="mp")
    model.add_weighted_adapter(NAMES, None, "new", "union")
    model.set_adapter("new")
    expected = models.logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = PeftModel.from_pretrained(models.net(), tmp_path / "new")
    models.assert_equal(models.logits(loaded), expected)
    with pytest.warns(UserWarning, match="bits, not scores"):
        trainable = PeftModel.from_pretrained(models.net(), tmp_path / "new", is_trainable=True)
    models.assert_equal(models.logits(trainable), expected)
    to_trainable(model, "new")
    models.assert_equal(models.logits(model), expected)
    before = models.masks(model, "new")
    models.train(model, steps=3)
    assert models.flips(before, models.masks(model, "new")) > 0
    model.set_adapter("b")
    model.delete_adapter("new")
    alone = trio(bank="mp")
    alone.set_adapter("b")
    models.assert_equal(models.logits(model), models.logits(alone))


def test_weights_that_one_adapter_leaves_alone(tmp_path):
    """An adapter without a mask of a weight keeps all of it."""
    options = {"bank": "own", "rest": "freeze", "selector": "topk"}
    model = pemnify(models.net(), adapter_name="a", target_modules=["conv2", "head"], **options)
    model.add_adapter("b", PemnConfig(target_modules=["conv2", "conv3"], seed=1, **options))
    masks_a, masks_b = (
        {
            target: layer.mask_of(name).mask()
            for target, layer in models.mask_layers(model).items()
            if name in layer.pemn_masks
        }
        for name in "ab"
    )
    assert set(masks_a) == {"conv2.weight", "head.weight"}
    model.add_weighted_adapter(["a", "b"], None, "both", "intersection")
    model.set_adapter("both")
    found = models.masks(model, "both")
    models.assert_equal(found["conv2.weight"], masks_a["conv2.weight"] & masks_b["conv2.weight"])
    models.assert_equal(found["head.weight"], masks_a["head.weight"])
    models.assert_equal(found["conv3.weight"], masks_b["conv3.weight"])
    expected = models.logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(models.net(), tmp_path / "both")
    models.assert_equal(models.logits(loaded), expected)
    assert set(models.mask_layers(loaded)) == {"conv2.weight", "conv3.weight", "head.weight"}


def test_a_module_that_one_adapter_saves_whole():
    options = {"bank": "own", "selector": "threshold"}
    model = pemnify(models.bert(), adapter_name="a", modules_to_save=["classifier"], **options)
    model.add_adapter("b", PemnConfig(**options, exclude_modules=["classifier"]))
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["a"].bias += 1
    model.add_weighted_adapter(["b", "a"], None, "new", "union")
    whole = model.base_model.model.classifier.modules_to_save
    models.assert_equal(whole["new"].bias, whole["a"].bias.detach())
    assert whole["new"].bias is not whole["a"].bias
    assert model.peft_config["new"].modules_to_save == ["classifier"]


@pytest.mark.parametrize(
    ("adapters", "weights", "name", "combination", "error", "parts"),
    [
        (["a", "x"], None, "new", "union", errors.AdapterError, ["'x'", "a, b, c"]),
        (["a", "b"], None, "c", "union", errors.AlreadyPemnifiedError, ["'c'"]),
        (["a", "b"], None, "new", "svd", errors.AdapterError, ["'svd'", "intersection, union"]),
        (["a", "a"], None, "new", "union", errors.AdapterError, ["['a', 'a']"]),
        ([], None, "new", "union", errors.AdapterError, ["Different adapters", "[]"]),
        (["a", "b"], [1.0], "new", "majority", errors.AdapterError, ["2 weights", "[1.0]"]),
        (["a", "b"], [1.0, -2.0], "new", "majority", errors.AdapterError, ["above 0", "-2.0"]),
    ],
)
def test_refusals(adapters, weights, name, combination, error, parts):
    model = trio()
    before = models.Snapshot(model)
    with pytest.raises(error) as raised:
        model.add_weighted_adapter(adapters, weights, name, combination)
    says(raised, *parts)
    assert set(model.peft_config) == set(NAMES)
    before.assert_unchanged()


def test_two_whole_modules_are_refused():
    options = {"bank": "own", "selector": "threshold", "modules_to_save": ["classifier"]}
    model = pemnify(models.bert(), adapter_name="a", **options)
    model.add_adapter("b", PemnConfig(**options))
    with pytest.raises(errors.AdapterError) as error:
        model.add_weighted_adapter(["a", "b"], None, "new", "union")
    says(error, "a, b", "Linear", "modules_to_save")


def test_different_scales_are_refused():
    options = {"bank": "own", "selector": "threshold"}
    model = pemnify(models.net(), adapter_name="a", **options)
    model.add_adapter("b", PemnConfig(**options, scale="sqrt_density"))
    with pytest.raises(errors.AdapterError) as error:
        model.add_weighted_adapter(["a", "b"], None, "new", "union")
    says(error, "scale", "sqrt_density")


def test_signs_are_refused(tmp_path):
    model = from_finetuned(models.net(), models.net(seed=1), "sign_delta", adapter_name="a")
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "a", "b")
    with pytest.raises(errors.AdapterError) as error:
        model.add_weighted_adapter(["a", "b"], None, "new", "union")
    says(error, "a, b", "sign_delta", "apply in turn")


def test_deep_copies_are_independent():
    model = trio()
    model.add_weighted_adapter(NAMES, None, "new", "union")
    twin = copy.deepcopy(model)
    expected = models.masks(model, "new")
    with torch.no_grad():
        next(iter(models.mask_layers(twin).values())).mask_of("new").bits[-1] ^= 255
    models.assert_same_tensors(models.masks(model, "new"), expected)
