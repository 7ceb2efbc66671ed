"""What an adapter was made from: in its configuration and file, shown, and never another's."""

import json

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter

from pemn_surgery import (
    PemnConfig,
    adapter_identity,
    from_finetuned,
    from_masks,
    pemnify,
    recode,
    to_trainable,
)
from pemn_surgery.adapters.identity import identity_of_tensors
from pemn_surgery.commands import cli
from pemn_surgery.errors import AdapterFileError
from tests.adapters import models

pytestmark = models.ignore_peft_on_transformers

OPTIONS = {"bank": "own", "selector": "threshold", "form": "flip", "modules_to_save": []}


def pair():
    """A model with two different adapters of flips."""
    model = pemnify(models.net(), adapter_name="a", **OPTIONS)
    model.add_adapter("b", PemnConfig(**OPTIONS))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(".scores"):
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("combination", ["intersection", "union", "majority", "difference", "xor"])
def test_a_combination_names_the_adapters_that_it_was_made_from(combination, tmp_path, capsys):
    model = pair()
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter(["b", "a"], None, "new", combination)
    identities = [adapter_identity(tmp_path / name) for name in "ba"]
    expected = {"by": combination, "of": identities}
    assert model.peft_config["new"].lineage == expected
    assert (model.peft_config["a"].lineage, model.peft_config["b"].lineage) == (None, None)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.net(), tmp_path / "new", "other")
    assert loaded.peft_config["other"].lineage == expected
    recode(tmp_path / "new", "entropy")
    assert cli.main(["inspect", str(tmp_path / "new"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["lineage"] == expected
    assert found["identity"] == adapter_identity("new", model)
    assert cli.main(["inspect", str(tmp_path / "new")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"identity {found['identity']}; made by {combination} from" in shown
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    models.says(card, f"| made from | `{identities[0]}`, `{identities[1]}` by `{combination}` |")
    assert f"| identity | `{found['identity']}` |" in card


def test_a_chain_of_xors_can_be_followed_back(tmp_path):
    model = pair()
    first, second = adapter_identity("a", model), adapter_identity("b", model)
    model.add_weighted_adapter(["a", "b"], None, "both", "xor")
    model.add_weighted_adapter(["both", "b"], None, "again", "xor")
    models.assert_same_tensors(models.masks(model, "again"), models.masks(model, "a"))
    assert model.peft_config["again"].lineage == {
        "by": "xor", "of": [adapter_identity("both", model), second],
    }  # fmt: skip
    assert model.peft_config["both"].lineage == {"by": "xor", "of": [first, second]}


def test_undone_without_other_tensors_it_is_the_same_adapter():
    options = {**OPTIONS, "rest": "freeze"}
    model = pemnify(models.net(), adapter_name="a", **options)
    model.add_adapter("b", PemnConfig(**options))
    for name, parameter in model.named_parameters():
        if name.endswith(".scores"):
            parameter.data = torch.randn(parameter.shape)
    model.add_weighted_adapter(["a", "b"], None, "both", "xor")
    model.add_weighted_adapter(["b", "both"], None, "again", "xor")
    assert adapter_identity("again", model) == adapter_identity("a", model)


def test_masks_and_checkpoints_are_named_too(tmp_path):
    masks = {"conv2.weight": models.net(1).conv2.weight.detach() > 0}
    made = from_masks(models.net(), masks)
    expected = {"by": "from_masks", "of": [identity_of_tensors(masks)]}
    assert made.peft_config["default"].lineage == expected
    made.save_pretrained(tmp_path)
    assert PemnConfig.from_pretrained(str(tmp_path)).lineage == expected
    masks["conv2.weight"][0, 0, 0, 0] ^= True
    other = from_masks(models.net(), masks).peft_config["default"].lineage
    assert other != expected
    for method in ("mask", "sign_delta"):
        made = from_finetuned(models.net(), models.net(seed=1), method)
        state = models.net(seed=1).state_dict()
        expected = {"by": "from_finetuned", "of": [identity_of_tensors(state)]}
        assert made.peft_config["default"].lineage == expected


def test_what_is_trained_on_keeps_it():
    model = pair()
    model.add_weighted_adapter(["a", "b"], None, "new", "union")
    lineage, identity = model.peft_config["new"].lineage, adapter_identity("new", model)
    to_trainable(model, "new")
    model.set_adapter("new")
    models.train(model, steps=2)
    assert adapter_identity("new", model) != identity
    assert model.peft_config["new"].lineage == lineage


def test_an_adapter_by_the_settings_of_a_made_one_is_not_made_from_the_same():
    model = pair()
    model.add_weighted_adapter(["a", "b"], None, "new", "xor")
    config = model.peft_config["new"]
    model.add_adapter("fresh", config)
    assert model.peft_config["fresh"].lineage is None
    assert config.lineage is not None
    assert pemnify(models.net(), config).peft_config["default"].lineage is None


def test_what_takes_the_place_of_an_adapter_brings_its_own(tmp_path):
    model = pair()
    model.add_weighted_adapter(["a", "b"], None, "c", "xor")
    model.add_weighted_adapter(["a", "b"], None, "d", "union")
    lineages = {name: model.peft_config[name].lineage for name in "acd"}
    model.save_pretrained(tmp_path)
    for name in "adc":
        model.load_adapter(tmp_path / name, "c")
        assert model.peft_config["c"].lineage == lineages[name]
        hotswap_adapter(model, str(tmp_path / name), "d")
        assert model.peft_config["d"].lineage == lineages[name]
        models.assert_same_tensors(models.masks(model, "c"), models.masks(model, "d"))


@pytest.mark.parametrize(
    "lineage",
    [{"by": "xor"}, {"by": 3, "of": []}, {"by": "xor", "of": ["x"]}, {"by": "xor", "of": "0" * 16},
     {"by": "xor", "of": [], "more": 1}],
    ids=str,
)  # fmt: skip
def test_a_file_of_another_lineage_is_refused(lineage, tmp_path):
    pair().save_pretrained(tmp_path)
    path = tmp_path / "a" / "adapter_config.json"
    models.forget_digest(tmp_path / "a")
    (tmp_path / "a" / models.WEIGHTS_FILE).unlink()
    written = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**written, "lineage": lineage}), encoding="utf-8")
    with pytest.raises(AdapterFileError) as error:
        PemnConfig.from_pretrained(str(tmp_path / "a"))
    models.says(error, "lineage", '"by" with a string', "16 hexadecimal digits each")
