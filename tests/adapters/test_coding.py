"""Adapters with coding="entropy": every way to save, load, show and refuse them."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from pemn_surgery import PemnConfig, from_finetuned, pemnify
from pemn_surgery.coding import codec
from pemn_surgery.coding.header import inspect
from pemn_surgery.commands import cli
from pemn_surgery.errors import ConfigError, MaskFormatError
from tests import reader
from tests.adapters import models
from tests.adapters.coded import base_words, codings, keys, stored_masks
from tests.golden import test_golden
from tests.golden.make import FOLDER

pytestmark = models.ignore_peft_on_transformers


def save(folder, coding="entropy", density=0.95, **options):
    model = models.train(
        pemnify(models.net(), bank="rp", density=density, coding=coding, **options)
    )
    model.save_pretrained(str(folder))
    return model


def load(folder, **options):
    return PeftModel.from_pretrained(models.net(), str(folder), **options)


def test_the_default_is_bits(tmp_path):
    save(tmp_path, coding="bits")
    assert PemnConfig().coding == "bits"
    assert codings(tmp_path) == {"bits"}


def test_an_unknown_coding_is_refused():
    with pytest.raises(ConfigError, match=r"coding='zip'.*'bits', 'entropy'"):
        PemnConfig(coding="zip")


def test_low_densities_are_coded_too(tmp_path):
    model = save(tmp_path, density=0.1)
    assert "entropy" in codings(tmp_path)
    models.assert_equal(models.logits(load(tmp_path)), models.logits(model))


def test_it_is_smaller_than_bits(tmp_path):
    save(tmp_path / "entropy", density=0.99)
    save(tmp_path / "bits", density=0.99, coding="bits")
    sizes = {
        coding: sum(value.numel() for value in stored_masks(tmp_path / coding).values())
        for coding in ("entropy", "bits")
    }
    assert sizes["entropy"] < sizes["bits"]
    for key, value in stored_masks(tmp_path / "bits").items():
        coded = stored_masks(tmp_path / "entropy")[key]
        assert torch.equal(codec.decode(coded, key), value)


def test_signs_and_scales(tmp_path):
    base, tuned = models.net(), models.net()
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.add_(0.01)  # every sign is plus
    model = from_finetuned(base, tuned, method="sign_delta", coding="entropy")
    model.save_pretrained(str(tmp_path))
    signs = {k: v for k, v in load_file(tmp_path / models.WEIGHTS_FILE).items() if "bits" in k}
    assert "entropy" in {inspect(value, key).coding for key, value in signs.items()}
    models.assert_equal(models.logits(load(tmp_path)), models.logits(model))
    found = reader.read(tmp_path / models.WEIGHTS_FILE)
    scales = [key for key in found if key.endswith(".row_scale")]
    assert len(scales) == len(signs) >= 4
    assert all(found[key].all() for key in signs)


def test_transformers_may_add_and_save_one(tmp_path):
    model = models.bert(kind="BertModel")
    model.add_adapter(PemnConfig(bank="rp", density=0.95, coding="entropy"))
    model.save_pretrained(str(tmp_path))
    assert "entropy" in codings(tmp_path)
    again = PeftModel.from_pretrained(models.bert(kind="BertModel"), str(tmp_path))
    with torch.no_grad():
        found = again.eval()(input_ids=models.tokens()).last_hidden_state
        expected = model.eval()(input_ids=models.tokens()).last_hidden_state
    models.assert_equal(found, expected)


def test_a_damaged_one_leaves_the_base_alone(tmp_path):
    save(tmp_path)
    path = tmp_path / models.WEIGHTS_FILE
    tensors = load_file(path)
    masks = stored_masks(tmp_path)
    key = next(k for k, value in masks.items() if inspect(value, k).coding == "entropy")
    tensors[key][-1] ^= 1
    save_file(tensors, path)
    base = models.net()
    before = models.Snapshot(base)
    with pytest.raises(MaskFormatError, match="pemn_masks"):
        PeftModel.from_pretrained(base, str(tmp_path))
    before.assert_unchanged()


def test_inspect_and_card(tmp_path, capsys):
    model = save(tmp_path)
    found = models.masks(model)
    assert cli.main(["inspect", str(tmp_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {mask["name"]: mask["density"] for mask in shown["masks"]} == {
        name: int(mask.sum()) / mask.numel() for name, mask in found.items()
    }
    assert "entropy" in {mask["coding"] for mask in shown["masks"]}
    assert shown["config"]["coding"] == "entropy"
    ones = sum(int(mask.sum()) for mask in found.values())
    weights = sum(mask.numel() for mask in found.values())
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"| density | {ones / weights:.4f} ({ones:,} ones) |" in card
    assert f"| file | {(tmp_path / models.WEIGHTS_FILE).stat().st_size:,} bytes" in card


@pytest.mark.parametrize("folder", sorted(FOLDER.glob("0.1/*")), ids=lambda folder: folder.name)
def test_the_independent_reader_reads_every_stored_adapter(folder):
    """From docs/format.md alone: masks, the task's tensors, scales."""
    path = folder / models.WEIGHTS_FILE
    model, _ = test_golden.load(folder)
    found, tensors = reader.read(path, base_words(model)), load_file(path)
    masks = {key: models.masks(model)[name].flatten() for name, key in keys(model).items()}
    assert found.keys() == tensors.keys()
    assert len(found) >= 1
    for key, value in tensors.items():
        expected = masks[key] if key.endswith(".pemn_masks.bits") else value
        assert torch.equal(torch.from_numpy(found[key].copy()), expected)


def test_stored_adapters_have_both_codings():
    found = {
        inspect(value, key).coding
        for path in FOLDER.glob(f"0.1/entropy*/{models.WEIGHTS_FILE}")
        for key, value in load_file(path).items()
        if key.endswith(".bits")
    }
    assert found == {"bits", "entropy"}


def test_get_peft_model(tmp_path):
    model = get_peft_model(models.net(), PemnConfig(bank="rp", density=0.95, coding="entropy"))
    model.save_pretrained(str(tmp_path))
    assert "entropy" in codings(tmp_path)
