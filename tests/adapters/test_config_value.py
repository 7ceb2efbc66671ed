"""A configuration is a value: the caller's stays, and a model's says what is in force."""

import copy
import pickle
from contextlib import nullcontext
from dataclasses import fields

import pytest
import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

import tests.adapters.models as models
from pemn_surgery import PemnConfig, pemnify, plan
from pemn_surgery.errors import AdapterError, ConfigError, NothingToMaskError, PemnWarning


def settings(config):
    return {item.name: copy.deepcopy(getattr(config, item.name)) for item in fields(config)}


def by_transformers(model, config):
    model.add_adapter(config)
    return model


pytestmark = models.ignore_peft_on_transformers

DOORS = {
    "pemnify": pemnify,
    "plan": plan,
    "get_peft_model": get_peft_model,
    "PeftModel": PeftModel,
    "inject": lambda model, config: inject_adapter_in_model(config, model),
    "add_adapter": by_transformers,
}


@pytest.mark.parametrize("door", DOORS)
def test_the_callers_configuration_stays_as_it_was(door):
    config = PemnConfig(
        bank="own", selector="topk", task_type="SEQ_CLS", modules_to_save=["pooler"]
    )
    before = settings(config)
    DOORS[door](models.bert(), config)
    assert settings(config) == before
    assert not config.is_in_force


@pytest.mark.parametrize("door", [name for name in DOORS if name != "plan"])
def test_one_configuration_serves_two_models(door):
    config = PemnConfig(bank="own", selector="topk", task_type="SEQ_CLS")
    DOORS[door](models.bert(), config)
    second = DOORS[door](models.bert(), config)
    alone = DOORS[door](models.bert(), PemnConfig(bank="own", selector="topk", task_type="SEQ_CLS"))
    for found in (second, alone):
        assert "classifier.weight" not in models.mask_layers(found)
    assert set(models.mask_layers(second)) == set(models.mask_layers(alone))


def test_one_configuration_serves_models_of_other_architectures():
    """What planning found in the first model (its head, raw weights) is not asked of another."""
    config = PemnConfig(bank="own", selector="topk")
    first = pemnify(timm.create_model("resnet10t", num_classes=3), config)
    assert first.peft_config["default"].modules_to_save == ["fc"]
    second = pemnify(models.net(), config)
    assert set(models.mask_layers(second)) == set(models.NET_TARGETS)
    assert config.modules_to_save is None
    assert config.functional_weights is None


def test_two_adapters_of_one_configuration_have_their_own():
    config = PemnConfig(bank="own", selector="topk", exclude_modules=["head"])
    model = pemnify(models.net(), config, adapter_name="a")
    model.add_adapter("b", config)
    first, second = model.peft_config["a"], model.peft_config["b"]
    assert first is not second is not config
    assert first.exclude_modules is not second.exclude_modules


def test_the_model_has_no_part_of_the_callers_lists():
    config = PemnConfig(bank="own", selector="topk", modules_to_save=["head"])
    model = pemnify(models.net(), config)
    config.modules_to_save.append("conv1")
    assert model.peft_config["default"].modules_to_save == ["head"]


CHANGES = {
    "bank": "mp", "selector": "threshold", "density": 0.3, "threshold": 0.1, "seed": 1,
    "scale": "sqrt_density", "rest": "train", "target_modules": ["conv1"], "tied": "untie",
    "score_init": 0.5, "functional_weights": ["x"],
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_an_adapter_was_made_by_cannot_be_assigned(name):
    model = pemnify(models.net(), bank="own", selector="topk")
    config = model.peft_config["default"]
    before = settings(config)
    with pytest.raises(ConfigError) as error:
        setattr(config, name, CHANGES[name])
    models.says(error, f"made with {name}={before[name]!r}", "none of its masks", "Nothing was")
    assert settings(config) == before
    setattr(config, name, before[name])  # the same value is no change


@pytest.mark.parametrize("is_trainable", [False, True])
def test_what_is_saved_is_what_was_trained(tmp_path, is_trainable):
    model = models.train(pemnify(models.net(), bank="own", selector="topk"))
    with pytest.raises(ConfigError, match=r"made with density=0\.5"):
        model.peft_config["default"].density = 0.3
    model.save_pretrained(tmp_path)
    lossy = pytest.warns(PemnWarning, match="bits, not scores") if is_trainable else nullcontext()
    with lossy:
        loaded = PeftModel.from_pretrained(models.net(), tmp_path, is_trainable=is_trainable)
    assert loaded.peft_config["default"].density == 0.5
    for name, mask in models.masks(model).items():
        models.assert_equal(models.masks(loaded)[name], mask)


def test_settings_that_are_read_at_each_save_may_be_assigned(tmp_path):
    model = pemnify(models.net(), bank="own", selector="topk")
    model.peft_config["default"].coding = "entropy"
    model.save_pretrained(tmp_path)
    assert PemnConfig.from_pretrained(str(tmp_path)).coding == "entropy"


def test_a_copied_or_pickled_model_holds_its_settings_and_a_copied_configuration_does_not():
    model = pemnify(models.net(), bank="own", selector="topk")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ConfigError, match="made with density"):
            again.peft_config["default"].density = 0.3
    free = copy.copy(model.peft_config["default"])
    free.density = 0.3
    assert (free.density, model.peft_config["default"].density) == (0.3, 0.5)


def test_algebra_makes_a_configuration_of_its_own():
    model = pemnify(models.net(), bank="own", selector="topk", adapter_name="a")
    model.add_adapter("b", PemnConfig(bank="own", selector="topk"))
    model.add_weighted_adapter(["a", "b"], None, "both", "union")
    assert model.peft_config["both"].selector == "threshold"
    assert model.peft_config["a"].selector == "topk"
    with pytest.raises(ConfigError, match="made with threshold"):
        model.peft_config["both"].threshold = 1.0


# ---- modules that adapters save whole ---------------------------------------------------------

CONFLICTS = [(["head"], []), ([], ["head"]), (["head"], ["conv3"]), (["head", "conv3"], ["head"])]


@pytest.mark.parametrize(("first", "second"), CONFLICTS)
def test_adapters_that_disagree_on_what_is_saved_whole_are_refused(first, second, tmp_path):
    """As PEFT refuses them for LoRA, but before anything changes; the first can still be saved."""
    model = models.train(
        pemnify(models.net(), bank="own", selector="topk", modules_to_save=first, adapter_name="a")
    )
    expected = models.logits(model)
    before = models.Snapshot(model)
    with pytest.raises(AdapterError) as error:
        model.add_adapter("b", PemnConfig(bank="own", selector="topk", modules_to_save=second))
    models.says(error, "agree", f"modules_to_save={second}", "Nothing was changed")
    before.assert_unchanged()
    assert list(model.peft_config) == ["a"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.net(), tmp_path / "a")
    models.assert_equal(models.logits(loaded), expected)


def test_lora_refuses_them_too():
    model = get_peft_model(
        models.bert(), LoraConfig(target_modules=["query"], modules_to_save=["classifier"]), "a"
    )
    with pytest.raises(ValueError, match="ModulesToSaveWrapper"):
        model.add_adapter("b", LoraConfig(target_modules=["query", "classifier"]))


@pytest.mark.parametrize("rest", ["stats", "freeze"])
def test_an_adapter_may_leave_alone_what_another_saves_whole(tmp_path, rest):
    model = pemnify(
        models.net(),
        bank="own",
        selector="topk",
        modules_to_save=["head"],
        adapter_name="a",
        rest=rest,
    )
    model.add_adapter(
        "b", PemnConfig(bank="own", selector="topk", exclude_modules=["head"], rest=rest)
    )
    outputs = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        models.train(model)
        outputs[name] = models.logits(model)
    model.save_pretrained(tmp_path)
    for name, expected in outputs.items():
        loaded = PeftModel.from_pretrained(models.net(), tmp_path / name)
        models.assert_equal(models.logits(loaded), expected)
        model.set_adapter(name)
        models.assert_equal(models.logits(model), expected)
    assert ("head.weight" in models.mask_layers(model)) is False


# ---- further parameters -----------------------------------------------------------------------


def test_target_parameters_come_beside_every_maskable_weight():
    every = set(models.NET_TARGETS)
    model = pemnify(models.net(), bank="own", selector="topk", target_parameters=["bn1.weight"])
    assert set(models.mask_layers(model)) == every | {"bn1.weight"}
    alone = pemnify(
        models.net(),
        bank="own",
        selector="topk",
        target_modules=[],
        target_parameters=["head.weight"],
    )
    assert set(models.mask_layers(alone)) == {"head.weight"}


@pytest.mark.parametrize("others", [None, []])
def test_they_are_saved_and_loaded(tmp_path, others):
    options = {"target_modules": others, "target_parameters": ["bn1.weight", "conv1.weight"]}
    model = models.train(pemnify(models.net(), bank="own", **options))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.net(), tmp_path)
    models.assert_equal(models.logits(loaded), models.logits(model))
    assert set(models.mask_layers(loaded)) == set(models.mask_layers(model))


def test_a_parameter_that_there_is_not_is_refused():
    model = models.net()
    before = models.Snapshot(model)
    with pytest.raises(NothingToMaskError, match=r"\['conv9.weight'\] not found.*conv1.weight"):
        pemnify(
            model, bank="own", selector="topk", target_parameters=["conv1.weight", "conv9.weight"]
        )
    before.assert_unchanged()


def test_plans_see_it():
    model = models.net()
    torch.manual_seed(0)
    found = plan(model, bank="own", selector="topk", target_parameters=["bn1.weight"])
    assert found.masked_weights == plan(model, bank="own", selector="topk").masked_weights + 8
