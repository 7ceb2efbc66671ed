"""Renaming adapters, and training on from bits."""

import pytest
import torch
from peft import PeftModel

from pemn_surgery import (
    PemnConfig,
    errors,
    from_finetuned,
    pemnify,
    rename_adapter,
    to_trainable,
)
from tests.adapters import models
from tests.adapters.models import says

pytestmark = models.ignore_peft_on_transformers


def pair(**options):
    changes = {"bank": "own", "selector": "topk", "rest": "train", **options}
    model = pemnify(models.net(), adapter_name="a", **changes)
    model.add_adapter("b", PemnConfig(**{**changes, "seed": 7}))
    return model


def by_name(model, old, new):
    """The state dict, with one adapter's name changed in the keys."""
    return {key.replace(f".{old}.", f".{new}."): v for key, v in model.state_dict().items()}


@pytest.mark.parametrize("active", ["a", "b"])
def test_rename(active, tmp_path):
    model = pair()
    model.set_adapter(active)
    expected, state = models.logits(model), by_name(model, "a", "cats")
    names = {"a": "cats", "b": "b"}
    rename_adapter(model, "a", "cats")
    assert list(model.peft_config) == ["cats", "b"]
    assert model.active_adapter == names[active]
    assert model.active_adapters == [names[active]]
    assert list(model.state_dict()) == list(state)
    models.assert_same_tensors(model.state_dict(), state)
    models.assert_equal(models.logits(model), expected)
    status = model.get_model_status()
    assert status.available_adapters == ["b", "cats"]
    assert status.active_adapters == [names[active]]
    model.set_adapter("b")
    model.set_adapter("cats")
    models.train(model, steps=1)
    after = models.logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.net(), tmp_path / "cats")
    models.assert_equal(models.logits(loaded), after)
    model.set_adapter("b")
    model.delete_adapter("cats")
    assert list(model.peft_config) == ["b"]


def test_rename_of_merged_and_several_active_adapters():
    model = pair(selector="threshold", score_init="kaiming_uniform")
    model.base_model.set_adapter(["a", "b"])
    expected = models.logits(model)
    rename_adapter(model, "b", "dogs")
    assert model.active_adapters == ["a", "dogs"]
    models.assert_equal(models.logits(model), expected)
    model.merge_adapter()
    rename_adapter(model, "a", "cats")
    layer = next(iter(models.mask_layers(model).values()))
    assert layer.merged_adapters == ["cats", "dogs"]
    model.unmerge_adapter()
    models.assert_equal(models.logits(model), expected)


def test_rename_with_a_module_saved_whole():
    model = pemnify(models.bert(), bank="own", selector="topk", modules_to_save=["classifier"])
    ids = models.tokens()
    expected = _bert(model, ids)
    rename_adapter(model, "default", "new")
    whole = model.base_model.model.classifier
    assert list(whole.modules_to_save) == ["new"]
    assert whole.active_adapters == ["new"]
    models.assert_equal(_bert(model, ids), expected)


def _bert(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_rename_on_a_transformers_model():
    model = models.bert()
    model.add_adapter(PemnConfig(bank="own", selector="topk"), adapter_name="a")
    expected = _bert(model, models.tokens())
    rename_adapter(model, "a", "b")
    assert model.active_adapters() == ["b"]
    models.assert_equal(_bert(model, models.tokens()), expected)


def test_rename_to_itself_changes_nothing():
    model = pair()
    before = models.Snapshot(model)
    rename_adapter(model, "a", "a")
    before.assert_unchanged()


@pytest.mark.parametrize(
    ("old", "new", "error", "parts"),
    [
        ("x", "y", errors.AdapterError, ["'x'", "a, b"]),
        ("a", "b", errors.AlreadyPemnifiedError, ["'b'"]),
        ("a", "", errors.AdapterError, ["''", "empty"]),
        ("a", "a.b", errors.AdapterError, ["'a.b'", "dot"]),
    ],
)
def test_rename_refusals(old, new, error, parts):
    model = pair()
    before = models.Snapshot(model)
    with pytest.raises(error) as raised:
        rename_adapter(model, old, new)
    says(raised, *parts)
    before.assert_unchanged()


@pytest.mark.parametrize("bank", models.BANKS)
@pytest.mark.parametrize("selector", ["topk", "threshold"])
def test_to_trainable(bank, selector, tmp_path):
    options = {**models.BANKS[bank], "selector": selector}
    trained = models.train(pemnify(models.net(), **options))
    trained.save_pretrained(tmp_path)
    expected = models.masks(trained)
    model = PeftModel.from_pretrained(models.net(), tmp_path)
    before = models.logits(model)
    assert not any(p.requires_grad for p in model.parameters())
    to_trainable(model)
    models.assert_same_tensors(models.masks(model), expected)
    models.assert_equal(models.logits(model), before)
    layers = models.mask_layers(model).values()
    assert all(layer.mask_of("default").scores.requires_grad for layer in layers)
    assert not model.peft_config["default"].inference_mode
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    wanted = {name for name, p in trained.named_parameters() if p.requires_grad}
    assert names == wanted
    models.train(model, steps=3)
    assert models.flips(expected, models.masks(model)) > 0
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(models.net(), tmp_path / "again")
    models.assert_equal(models.logits(again), models.logits(model))


def test_to_trainable_of_an_adapter_that_is_not_active(tmp_path):
    model = pair()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.net(), tmp_path / "a", adapter_name="a")
    loaded.load_adapter(tmp_path / "b", "b")
    to_trainable(loaded, "b")
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded.set_adapter("b")
    assert any(p.requires_grad for p in loaded.parameters())


def test_to_trainable_lets_scales_beside_signs_train():
    model = from_finetuned(models.net(), models.net(seed=1), "sign_delta")
    expected = models.logits(model)
    to_trainable(model)
    models.assert_equal(models.logits(model), expected)
    for layer in models.mask_layers(model).values():
        mask = layer.mask_of("default")
        assert mask.scores is None
        assert mask.row_scale.requires_grad
    before = models.masks(model)
    models.train(model)
    models.assert_same_tensors(models.masks(model), before)
    models.assert_differs(models.logits(model), expected)


def test_to_trainable_keeps_scores_that_are_there():
    model = models.train(pair())
    before = models.Snapshot(model)
    to_trainable(model, "a")
    before.assert_unchanged()


def test_to_trainable_refusals(tmp_path):
    pair().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(models.net(), tmp_path / "a", adapter_name="a")
    with pytest.raises(errors.AdapterError) as error:
        to_trainable(model)
    says(error, "'default'", "a")
    model.merge_adapter()
    with pytest.raises(errors.AdapterError) as error:
        to_trainable(model, "a")
    says(error, "'a'", "unmerge_adapter()")
    with pytest.raises(errors.AdapterError) as error:
        to_trainable(models.net())
    says(error, "none")
