"""Adapters with coding="base": saved and loaded with their base, refused without it."""

import pytest
import torch
from peft.utils.save_and_load import set_peft_model_state_dict
from safetensors.torch import load_file

from pemn_surgery import adapter_identity, compare_adapters, from_finetuned, pemnify, recode
from pemn_surgery.adapters import state
from pemn_surgery.adapters.base import base_sizes
from pemn_surgery.adapters.files.adapter_file import read_adapter_file
from pemn_surgery.adapters.files.card import complete_card
from pemn_surgery.coding.header import inspect
from pemn_surgery.commands.cli import main
from pemn_surgery.errors import FingerprintError, MaskFormatError
from tests import oracles, reader
from tests.adapters import models
from tests.adapters.coded import (
    base_words,
    codings,
    drop_large_weights,
    keys,
    load,
    net,
    stored_masks,
)

pytestmark = models.ignore_peft_on_transformers


def save(folder, base=None, noise=0.3, **options):
    options = {"bank": "own", "selector": "threshold", **options}
    model = pemnify(net() if base is None else base, coding="base", **options)
    drop_large_weights(model, noise)
    model.save_pretrained(str(folder))
    return model


def test_a_base_in_bfloat16_reads_what_one_in_float32_wrote(tmp_path):
    model = save(tmp_path)
    again = load(tmp_path, net().to(torch.bfloat16))
    models.assert_same_tensors(models.masks(again), models.masks(model))


def test_a_base_in_float16_reads_it_if_it_has_the_same_sizes(tmp_path):
    base = net().half().float()  # a checkpoint that was saved in float16
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = save(tmp_path, base=base)
    half = net().half()
    half.load_state_dict(state)
    models.assert_same_tensors(models.masks(load(tmp_path, half)), models.masks(model))


def test_a_base_in_float16_that_rounds_otherwise_says_so(tmp_path):
    """1 + 2^-8 + 2^-13 is 1 + 2^-7 in bfloat16, but 1 after float16, which has 1 + 2^-8."""
    base = net()
    values = torch.tensor([1.0, 1 + 2**-7, 1 + 2**-8 + 2**-13])
    with torch.no_grad():
        base.conv2.weight.copy_(values.repeat(32 * 32 * 3).view(32, 32, 3, 3))
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = save(tmp_path, base=base)
    assert "base" in codings(tmp_path)
    same, half = net(), net().half()
    same.load_state_dict(state)
    half.load_state_dict(state)
    models.assert_same_tensors(models.masks(load(tmp_path, same)), models.masks(model))
    with pytest.raises(MaskFormatError, match="other than float32 and bfloat16"):
        load(tmp_path, half)


def test_another_base_is_refused_by_its_fingerprint(tmp_path):
    save(tmp_path)
    other = net(1)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(FingerprintError):
        load(tmp_path, other)
    models.assert_same_tensors(other.state_dict(), before)


def test_the_independent_reader_reads_it(tmp_path):
    model = save(tmp_path)
    found = reader.read(tmp_path / models.WEIGHTS_FILE, base_words(model))
    masks, stored_keys = models.masks(model), keys(model)
    assert set(stored_keys.values()) == set(stored_masks(tmp_path))
    for name, key in stored_keys.items():
        oracles.assert_same(torch.from_numpy(found[key]), masks[name].flatten())


def test_tensors_are_decoded_where_they_are_set(tmp_path):
    model = save(tmp_path)
    again = pemnify(net(), bank="own", selector="threshold", inference_mode=True)
    set_peft_model_state_dict(again, load_file(tmp_path / models.WEIGHTS_FILE))
    models.assert_same_tensors(models.masks(again), models.masks(model))


@pytest.mark.parametrize("bank", ["mp", "rp"])
def test_drawn_numbers_need_no_base(bank, tmp_path):
    """Their seed tells their sizes: it is "context"."""
    model = pemnify(net(), bank=bank, coding="base")
    model.save_pretrained(str(tmp_path))
    assert "context" in codings(tmp_path) <= {"bits", "context"}
    models.assert_equal(models.logits(load(tmp_path)), models.logits(model))


def test_a_bank_of_the_models_own_numbers(tmp_path):
    model = save(tmp_path, bank="mp", bank_init="model")
    assert "base" in codings(tmp_path)
    models.assert_equal(models.logits(load(tmp_path)), models.logits(model))


def test_signs_are_coded_beside_the_base(tmp_path):
    base, tuned = net(), net()
    with torch.no_grad():  # large weights grow, the others shrink
        for weight in tuned.parameters():
            weight.add_(0.01 * (weight.abs() > weight.abs().mean()) - 0.003)
    model = from_finetuned(base, tuned, "sign_delta", coding="base")
    model.save_pretrained(str(tmp_path))
    stored = load_file(tmp_path / models.WEIGHTS_FILE)
    signs = {key: value for key, value in stored.items() if key.endswith(".pemn_masks.bits")}
    assert "base" in {inspect(value, key).coding for key, value in signs.items()}
    models.assert_equal(models.logits(load(tmp_path)), models.logits(model))


def test_a_base_that_is_not_here_is_asked_for(tmp_path):
    save(tmp_path)
    model = pemnify(net(), bank="own", selector="threshold", inference_mode=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "base_sizes", lambda *_: None)
        with pytest.raises(MaskFormatError, match="they are not at hand"):
            set_peft_model_state_dict(model, load_file(tmp_path / models.WEIGHTS_FILE))


def test_sizes_are_those_of_frozen_numbers_that_no_seed_draws():
    def sizes(**options):
        layer = models.mask_layers(pemnify(net(), **options))["conv2.weight"]
        return layer, base_sizes(layer, None)

    layer, found = sizes(bank="own", selector="topk")
    order = layer.fill().abs().flatten().argsort(stable=True)
    assert found.shape == (32 * 32 * 9,)
    assert (found[order][1:].astype(int) - found[order][:-1] >= 0).sum() > 0.99 * len(found)
    assert sizes(bank="own", bank_init="kaiming_normal")[1] is None
    assert sizes(bank="rp")[1] is None


@pytest.mark.parametrize(
    "act", [lambda a, b: recode(a, "bits"), compare_adapters, lambda a, b: adapter_identity(b)]
)
def test_files_alone_are_refused_by_name(act, tmp_path):
    save(tmp_path / "a")
    save(tmp_path / "b")
    before = (tmp_path / "a" / models.WEIGHTS_FILE).read_bytes()
    with pytest.raises(MaskFormatError, match=r'of the 4 masks .*coding="base".*"context"'):
        act(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / models.WEIGHTS_FILE).read_bytes() == before


def test_inspect_and_card_count_no_ones_of_them(tmp_path, capsys):
    save(tmp_path)
    file = read_adapter_file(tmp_path / models.WEIGHTS_FILE)
    beside = {name for name, header in file.headers.items() if header.coding == "base"}
    assert len(beside) >= 2
    assert set(file.ones) == set(file.masks) - beside
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "with its base" in shown
    complete_card(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "4 of" in card
    assert " ones)" not in card
