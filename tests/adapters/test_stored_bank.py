"""Banks of given numbers: everything that a drawn bank does, and the file makes the model alone."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn

from pemn_surgery import PemnConfig, cache_salt, from_masks, pemnify, plan, to_trainable
from pemn_surgery.errors import (
    AdapterFileError,
    BankMismatchError,
    ConfigError,
    FingerprintError,
)
from tests.adapters import models

pytestmark = models.ignore_peft_on_transformers

LARGEST = 8 * 8 * 3 * 3
LENGTHS = {"mp": LARGEST, "rp": 77, "one_layer": 8 * 3 * 3 * 3 + LARGEST + 4 * 8}
KEY = "base_model.model.pemn_bank"


def values(bank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LENGTHS[bank], generator=generator)


def made(bank, seed=0, **options):
    return pemnify(models.net(), bank=bank, bank_values=values(bank, seed), **options)


def fill_by_hand(bank, shape, numbers):
    """The fill of a weight: the numbers from their beginning, again and again where they end."""
    count = math.prod(shape)
    if bank == "one_layer":
        start = {(8, 3, 3, 3): 0, (8, 8, 3, 3): 216, (4, 8): 216 + LARGEST}[tuple(shape)]
        return numbers[start : start + count].view(shape)
    return numbers.repeat(-(-count // len(numbers)))[:count].view(shape)


@pytest.mark.parametrize("bank", LENGTHS)
def test_fills_are_the_given_numbers(bank):
    model = made(bank)
    assert set(models.mask_layers(model)) == set(models.NET_TARGETS)
    for name, layer in models.mask_layers(model).items():
        models.assert_equal(layer.fill(), fill_by_hand(bank, layer.shape, values(bank)), name)
    config = model.peft_config["default"]
    assert (config.bank_init, config.rest) == ("stored", "train")


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4),
    st.integers(1, 30),
)
def test_vectors_of_any_length_on_any_shapes(shapes, length):
    net = nn.Sequential(*(nn.Linear(width, height) for width, height in shapes))
    largest = max(width * height for width, height in shapes)
    numbers = torch.arange(1.0, min(length, largest) + 1)
    model = pemnify(net, bank="rp", bank_values=numbers, modules_to_save=[])
    for name, layer in models.mask_layers(model).items():
        models.assert_equal(layer.fill(), fill_by_hand("rp", layer.shape, numbers), name)


@pytest.mark.parametrize("bank", LENGTHS)
def test_numbers_that_a_seed_would_draw_make_the_same_model(bank):
    options = {"length": 77} if bank == "rp" else {}
    drawn = pemnify(models.net(), bank=bank, **options)
    numbers = next(iter(models.mask_layers(drawn).values())).bank.values
    stored = pemnify(models.net(), bank=bank, bank_values=numbers)
    models.assert_equal(models.logits(stored), models.logits(drawn))
    assert cache_salt(stored) == cache_salt(drawn)
    drawn, stored = models.train(drawn, steps=3), models.train(stored, steps=3)
    models.assert_equal(models.logits(stored), models.logits(drawn))


@pytest.mark.parametrize("coding", ["bits", "entropy", "context", "base"])
@pytest.mark.parametrize("bank", LENGTHS)
def test_the_file_alone_makes_the_model(bank, coding, tmp_path):
    model = models.train(made(bank, coding=coding, density=0.8))
    expected = models.logits(model)
    model.save_pretrained(tmp_path)
    models.assert_equal(load_file(tmp_path / models.WEIGHTS_FILE)[KEY], values(bank))
    other = models.net(seed=1)  # of which nothing is left
    loaded = PeftModel.from_pretrained(other, tmp_path)
    models.assert_equal(models.logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    for name in (models.WEIGHTS_FILE, "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    models.assert_equal(models.logits(loaded.merge_and_unload()), expected)


@pytest.mark.parametrize("bank", LENGTHS)
def test_a_plan_counts_the_bank(bank, tmp_path):
    options = {"bank": bank, "bank_init": "stored"}
    options |= {"length": LENGTHS[bank]} if bank == "rp" else {}
    planned = plan(models.net(), **options)
    assert planned.bank_floats == LENGTHS[bank]
    made(bank).save_pretrained(tmp_path)
    names = (models.WEIGHTS_FILE, "adapter_config.json")
    assert planned.file_bytes == sum((tmp_path / name).stat().st_size for name in names)


def test_several_adapters_share_the_bank(tmp_path):
    model = made("mp")
    model.add_adapter("b", PemnConfig(bank="mp", bank_init="stored", seed=1))
    model.set_adapter("b")
    models.train(model)
    outputs = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        outputs[name] = models.logits(model)
    models.assert_differs(outputs["b"], outputs["default"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.net(1), tmp_path)
    loaded.load_adapter(tmp_path / "b", "b")
    banks = {id(layer.bank) for layer in models.mask_layers(loaded).values()}
    assert len(banks) == 1
    for name, expected in outputs.items():
        loaded.set_adapter(name)
        models.assert_equal(models.logits(loaded), expected, name)
    loaded.add_weighted_adapter(["default", "b"], None, "both", "intersection")
    kept = [models.masks(loaded, name)["conv2.weight"] for name in ("default", "b", "both")]
    models.assert_equal(kept[0] & kept[1], kept[2])
    to_trainable(loaded, "b")
    models.train(loaded, steps=1)
    hotswap_adapter(loaded, str(tmp_path), "default")
    loaded.set_adapter("default")
    models.assert_equal(models.logits(loaded), outputs["default"])


def test_an_adapter_of_another_bank_is_refused(tmp_path):
    made("rp", seed=1).save_pretrained(tmp_path / "other")
    pemnify(models.net(), bank="rp", length=77).save_pretrained(tmp_path / "drawn")
    shorter = pemnify(models.net(), bank="rp", bank_values=values("rp")[:50])
    shorter.save_pretrained(tmp_path / "shorter")
    model = made("rp")
    before = models.Snapshot(model)
    with pytest.raises(FingerprintError, match="its frozen weights differ"):
        model.load_adapter(tmp_path / "other", "b")
    with pytest.raises(FingerprintError):
        model.load_adapter(tmp_path / "other", "default")
    with pytest.raises(FingerprintError):
        hotswap_adapter(model, str(tmp_path / "other"), "default")
    with pytest.raises(BankMismatchError, match="length=50 instead of 77"):
        model.load_adapter(tmp_path / "shorter", "b")
    with pytest.raises(BankMismatchError, match="bank_init='kaiming_normal' instead of 'stored'"):
        model.load_adapter(tmp_path / "drawn", "b")
    before.assert_unchanged()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bank_that_was_rounded_is_saved_as_it_is(dtype, tmp_path):
    model = made("mp").to(dtype)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / models.WEIGHTS_FILE)[KEY].dtype == dtype
    wide = PeftModel.from_pretrained(models.net(1), tmp_path)
    narrow = PeftModel.from_pretrained(models.net(1).to(dtype), tmp_path)
    for name, layer in models.mask_layers(model).items():
        models.assert_equal(models.mask_layers(wide)[name].fill(), layer.fill().float(), name)
        models.assert_equal(models.mask_layers(narrow)[name].fill(), layer.fill(), name)
    narrow.save_pretrained(tmp_path / "again")  # of masks that were loaded as bits
    again = PeftModel.from_pretrained(models.net(2), tmp_path / "again")
    models.assert_equal(models.logits(again), models.logits(wide))


def test_a_model_without_memory(tmp_path):
    model = models.train(made("rp"))
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = models.Net()
    loaded = PeftModel.from_pretrained(empty, tmp_path)
    models.assert_equal(models.logits(loaded), models.logits(model))


def test_transformers_own_loader(tmp_path):
    base = models.bert()
    largest = max(p.numel() for n, p in base.named_parameters() if "embeddings" not in n)
    numbers = torch.randn(largest, generator=torch.Generator().manual_seed(0))
    model = pemnify(base, bank="mp", bank_values=numbers).eval()
    expected = model(input_ids=models.tokens()).logits
    model.save_pretrained(tmp_path)
    loaded = models.bert()
    loaded.load_adapter(str(tmp_path))
    models.assert_equal(loaded.eval()(input_ids=models.tokens()).logits, expected)


def test_state_dicts_of_adapters_hold_the_bank():
    model, other = models.train(made("rp")), made("rp")
    state = get_peft_model_state_dict(model)
    models.assert_equal(state[KEY], values("rp"))
    with pytest.warns(UserWarning, match="bits, not scores"):
        set_peft_model_state_dict(other, state)
    models.assert_equal(models.logits(other), models.logits(model))


def test_the_card_says_where_the_numbers_are(tmp_path):
    made("rp").save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    models.says(card, "bank rp, length 77, bank_init stored: in this adapter's file")


# -------------------------------------------------------------------------------------- from_masks


def pemn_masks(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = models.NET_TARGETS.items()
    return {name: torch.rand(shape, generator=generator) > 0.4 for name, shape in shapes}


@pytest.mark.parametrize("bank", LENGTHS)
def test_masks_of_others_on_a_bank_of_others(bank, tmp_path):
    masks, base = pemn_masks(), models.net()
    dense = models.clone(base)
    with torch.no_grad():
        for name, mask in masks.items():
            fill = fill_by_hand(bank, mask.shape, values(bank))
            dense.get_parameter(name).copy_(fill * mask)
    model = from_masks(base, masks, bank=bank, bank_values=values(bank))
    models.assert_equal(models.logits(model), models.logits(dense))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.net(seed=1), tmp_path)
    models.assert_equal(models.logits(loaded), models.logits(dense))
    models.assert_same_tensors(models.masks(loaded), masks)


def test_the_bank_of_masks_is_mp_by_default():
    model = from_masks(models.net(), pemn_masks(), bank_values=values("mp").view(8, 8, 3, 3))
    assert model.peft_config["default"].bank == "mp"
    with pytest.raises(ConfigError, match=r"bank='rp'.*from bank_values="):
        from_masks(models.net(), pemn_masks(), bank="rp")


# ------------------------------------------------------------------------------------------ errors

REFUSED = {
    "none": ({"bank": "mp", "bank_init": "stored"}, None, ["576 numbers", "bank_values=tensor"]),
    "too few": ({"bank": "mp"}, torch.ones(575), ["575 numbers", "576 of 'conv2.weight'"]),
    "too many": ({"bank": "rp", "length": 5}, torch.ones(6), ["6 numbers", "has 5 numbers"]),
    "layers": (
        {"bank": "one_layer"}, torch.ones(9),
        ["9 numbers", "824 numbers", "216 of 'conv1.weight' for shape (8, 3, 3, 3)"],
    ),
    "whole numbers": ({"bank": "mp"}, torch.ones(576, dtype=torch.int64), ["torch.int64"]),
    "not finite": ({"bank": "rp"}, torch.tensor([1.0, math.nan]), ["finite numbers"]),
    "no tensor": ({"bank": "rp"}, [1.0], ["list", "a float tensor"]),
    "drawn": ({"bank": "rp", "bank_init": "kaiming_normal"}, torch.ones(5), ["kaiming_normal"]),
    "own": ({"bank": "own"}, torch.ones(5), ["'stored'", 'bank="mp", "rp" or "one_layer"']),
    "permuted": (
        {"bank": "rp", "permute": True}, torch.ones(5), ["permute=True", "as it is given"],
    ),
    "seeded": ({"bank": "rp", "scale_fan": True}, torch.ones(5), ["scale_fan", "stored ones"]),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_bank_is_refused(what):
    options, numbers, said = REFUSED[what]
    model = models.net()
    before = models.Snapshot(model)
    with pytest.raises(ConfigError) as error:
        pemnify(model, bank_values=numbers, **options)
    models.says(error, *said)
    before.assert_unchanged()


def test_a_configuration_beside_numbers_says_stored():
    model = models.net()
    with pytest.raises(ConfigError, match="'kaiming_normal'"):
        pemnify(model, PemnConfig(bank="mp"), bank_values=values("mp"))
    stored = PemnConfig(bank="mp", bank_init="stored")
    with pytest.raises(ConfigError, match="none were given"):
        get_peft_model(model, stored)
    layer = models.mask_layers(pemnify(model, stored, bank_values=values("mp")))["conv2.weight"]
    models.assert_equal(layer.fill().flatten(), values("mp"))


def test_a_file_without_its_bank_is_refused(tmp_path):
    made("rp").save_pretrained(tmp_path)
    path = tmp_path / models.WEIGHTS_FILE
    tensors = load_file(path)
    models.forget_digest(tmp_path)
    for numbers, held in ((None, "no numbers"), (torch.ones(5), "5 numbers")):
        altered = {key: value for key, value in tensors.items() if key != KEY}
        save_file(altered if numbers is None else {**altered, KEY: numbers}, path)
        with pytest.raises(AdapterFileError) as error:
            PeftModel.from_pretrained(models.net(), tmp_path)
        models.says(error, held, "has 77 numbers", "was altered")
    save_file({**tensors, KEY: tensors[KEY] + 1}, path)
    with pytest.raises(FingerprintError):
        PeftModel.from_pretrained(models.net(), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["bank_init"] == "stored"
