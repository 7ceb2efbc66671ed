"""Adapters with coding="context": what guides a mask, every way to save, load and refuse them."""

import numpy as np
import pytest
import torch

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.adapters.base import drawn_guides
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.coding import bits, codec
from pemn_surgery.coding.header import inspect
from pemn_surgery.numbers import rng
from tests import oracles, reader
from tests.adapters import coded, models
from tests.adapters.coded import codings, load, net, size, stored_masks
from tests.stored import drawn

pytestmark = models.ignore_peft_on_transformers


def save(folder, **options):
    return coded.save(folder, "context", **options)


def layer(model, name="conv2.weight"):
    return next(m for m in model.modules() if isinstance(m, PemnLayer) and m.target == name)


def sizes(words):
    signed = words.astype(np.int64) - 2**31
    return np.where(signed < 0, -1 - signed, signed)


@pytest.mark.parametrize("bank", ["mp", "rp", "one_layer", "own"])
@pytest.mark.parametrize("init", ["kaiming_normal", "kaiming_uniform"])
def test_guides_are_in_the_order_of_scores_and_frozen_numbers(bank, init):
    """The model's own tensors as the oracle, whatever made them."""
    model = pemnify(net(), bank=bank, bank_init=init, seed=7)
    for name in ("conv2.weight", "conv3.weight", "head.weight"):
        one = layer(model, name)
        scores, weights = drawn_guides(one, model.peft_config["default"], None)
        tensors = (one.mask_of("default").scores, one.fill())
        for guide, tensor in zip((scores, weights), tensors, strict=True):
            values = tensor.detach().abs().flatten().numpy()
            key, period = guide.seed
            numbers = np.concatenate(list(rng.pieces(key, period)))
            found = sizes(numbers)[np.arange(values.size) % period]
            assert (found >> 23).tolist() == guide.sizes.tolist()
            order = np.argsort(values, kind="stable")
            apart = np.diff(values[order]) > 0
            assert apart.any()
            assert (np.diff(found[order] >> 8)[apart] >= 0).all()
        assert (scores.log2, weights.log2) == (8, 3)


def test_what_is_no_guide():
    def guides(**options):
        model = pemnify(net(), **options)
        config = model.peft_config["default"]
        return [guide.log2 for guide in drawn_guides(layer(model), config, None)]

    assert guides(bank="rp") == [8, 3]
    assert guides(bank="rp", permute=True) == [8]  # in another order
    assert guides(bank="mp", bank_init="signed_constant") == [8]  # all of one size
    assert guides(bank="own", selector="topk") == [8]  # the model's own numbers
    assert guides(bank="own", selector="threshold", score_init="kaiming_uniform") == []
    assert guides(bank="own", selector="threshold") == []


def test_guides_make_it_shorter(tmp_path):
    save(tmp_path / "context")
    coded.save(tmp_path / "bits", "bits", **coded.OPTIONS["context"])
    assert size(tmp_path / "context") < 0.8 * size(tmp_path / "bits")
    for key, value in stored_masks(tmp_path / "bits").items():
        assert torch.equal(codec.decode(stored_masks(tmp_path / "context")[key], key), value)


def test_the_independent_reader_reads_it(tmp_path):
    model = save(tmp_path)
    found = reader.read(tmp_path / models.WEIGHTS_FILE)
    masks = models.masks(model)
    keys = [key for key in found if key.endswith(".pemn_masks.bits")]
    assert len(keys) == len(masks) == 4
    for name, mask in masks.items():
        (key,) = [key for key in keys if f".{name.split('.')[0]}." in key]
        oracles.assert_same(torch.from_numpy(found[key]), mask.flatten())


def test_a_mask_of_another_seed_is_still_kept(tmp_path):
    """The guides only guess: an adapter that claims another seed gets longer, not wrong."""
    save(tmp_path / "first")
    loaded = load(tmp_path / "first")
    loaded.peft_config["default"].__dict__["seed"] = 12  # which may not be assigned
    loaded.save_pretrained(str(tmp_path / "second"))
    assert size(tmp_path / "second") > size(tmp_path / "first")
    first, second = stored_masks(tmp_path / "first"), stored_masks(tmp_path / "second")
    for key, value in first.items():
        assert torch.equal(codec.decode(second[key], key), codec.decode(value, key))


def test_renamed_and_combined(tmp_path):
    model = save(tmp_path / "one")
    model.add_adapter("two", PemnConfig(bank="rp", ratio=0.1, seed=3, coding="context"))
    model.add_weighted_adapter(["default", "two"], [1.0, 1.0], "both", combination_type="union")
    model.save_pretrained(str(tmp_path / "all"), selected_adapters=["both"])
    again = load(tmp_path / "all" / "both")
    model.set_adapter("both")
    models.assert_equal(models.logits(again), models.logits(model))


def test_masks_without_guides_are_coded_by_their_density(tmp_path):
    model = save(tmp_path, bank="own", selector="threshold", score_init=0.01, ratio=None, seed=0)
    assert "entropy" in codings(tmp_path) <= {"bits", "entropy"}
    models.assert_equal(models.logits(load(tmp_path)), models.logits(model))


def test_masks_without_guides_are_coded_beside_their_neighbours(tmp_path):
    """Whole kernels off, as fine-tuning of pretrained weights leaves them."""
    options = {"bank": "own", "selector": "threshold", "score_init": 0.01}
    model = pemnify(net(), coding="context", **options)
    off = torch.rand(32, 32, 1, 1, generator=torch.Generator().manual_seed(0)) < 0.2
    with torch.no_grad():
        layer(model).mask_of("default").scores.masked_fill_(off, -1.0)
    model.save_pretrained(str(tmp_path))
    (key,) = [key for key in stored_masks(tmp_path) if ".conv2." in key]
    assert inspect(stored_masks(tmp_path)[key], key).coding == "context"
    as_entropy = codec.encode(codec.decode(stored_masks(tmp_path)[key], key))
    assert stored_masks(tmp_path)[key].numel() < 0.6 * as_entropy.numel()
    models.assert_equal(models.logits(load(tmp_path)), models.logits(model))
    found = reader.read(tmp_path / models.WEIGHTS_FILE)[key]
    oracles.assert_same(torch.from_numpy(found), models.masks(model)["conv2.weight"].flatten())


def test_an_empty_weight_has_guides():
    stored = bits.pack(torch.ones(0, dtype=torch.bool))
    assert torch.equal(codec.encode(stored, [drawn(b"k" * 16, 1, 0)]), stored)
