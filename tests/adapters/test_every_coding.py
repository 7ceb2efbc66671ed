"""What holds for adapters of every coding: save, load, train on, swap; and who refuses them."""

import pytest
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from transformers import AutoModel

from pemn_surgery import pemnify
from pemn_surgery.coding import bits
from pemn_surgery.coding.header import inspect
from pemn_surgery.errors import MaskFormatError
from tests.adapters import models
from tests.adapters.coded import (
    OPTIONS,
    codings,
    drop_large_weights,
    load,
    net,
    save,
    stored_masks,
)

pytestmark = models.ignore_peft_on_transformers

every_coding = pytest.mark.parametrize("coding", sorted(OPTIONS))
every_code = pytest.mark.parametrize("coding", sorted(set(OPTIONS) - {"bits"}))


@every_coding
def test_saved_and_loaded(coding, tmp_path):
    model = save(tmp_path, coding)
    assert coding in codings(tmp_path)
    again = load(tmp_path)
    models.assert_same_tensors(models.masks(again), models.masks(model))
    models.assert_equal(models.logits(again), models.logits(model))
    held = [value for key, value in again.state_dict().items() if key.endswith(".bits")]
    assert len(held) == 4
    assert {bits.verify(value, "held").coding for value in held} == {"bits"}


@every_coding
def test_saving_again_keeps_the_coding_and_recoding_changes_it(coding, tmp_path):
    model = save(tmp_path / "first", coding)
    loaded = load(tmp_path / "first")
    loaded.save_pretrained(str(tmp_path / "second"))
    models.assert_same_tensors(stored_masks(tmp_path / "first"), stored_masks(tmp_path / "second"))
    loaded.peft_config["default"].coding = "bits"
    loaded.save_pretrained(str(tmp_path / "bits"))
    assert codings(tmp_path / "bits") == {"bits"}
    models.assert_equal(models.logits(load(tmp_path / "bits")), models.logits(model))


@every_coding
def test_training_goes_on(coding, tmp_path):
    model = save(tmp_path, coding)
    with pytest.warns(UserWarning, match="bits, not scores"):
        again = load(tmp_path, is_trainable=True)
    models.assert_same_tensors(models.masks(again), models.masks(model))


@every_coding
def test_checkpoints_keep_scores(coding, tmp_path):
    model = pemnify(net(), coding=coding, **OPTIONS[coding])
    model.peft_config["default"].keep_scores = True
    model.save_pretrained(str(tmp_path))
    kinds = [key.rpartition(".")[2] for key in stored_masks(tmp_path)]
    assert set(kinds) == {"scores", "fingerprint"}
    assert kinds.count("scores") == kinds.count("fingerprint")


@every_coding
def test_hotswap(coding, tmp_path):
    one, two = save(tmp_path / "one", coding), save(tmp_path / "two", coding, noise=1.0)
    models.train(two, steps=3)  # another mask of the same bank
    two.save_pretrained(str(tmp_path / "two"))
    assert models.flips(models.masks(one), models.masks(two)) > 0
    again = load(tmp_path / "one")
    models.assert_equal(models.logits(again), models.logits(one))
    hotswap_adapter(again, str(tmp_path / "two"), adapter_name="default")
    models.assert_equal(models.logits(again), models.logits(two))


@every_coding
def test_a_second_adapter_beside_it(coding, tmp_path):
    one, two = save(tmp_path / "one", coding), save(tmp_path / "two", coding, noise=1.0)
    again = load(tmp_path / "one")
    again.load_adapter(str(tmp_path / "two"), "two")
    models.assert_equal(models.logits(again), models.logits(one))
    again.set_adapter("two")
    models.assert_equal(models.logits(again), models.logits(two))


@every_code
def test_a_damaged_mask_leaves_the_base_alone(coding, tmp_path):
    save(tmp_path, coding)
    key = next(
        key for key, value in stored_masks(tmp_path).items() if inspect(value, key).coding == coding
    )
    content = (tmp_path / models.WEIGHTS_FILE).read_bytes()
    payload = load_file(tmp_path / models.WEIGHTS_FILE)[key].numpy().tobytes()
    place = content.index(payload) + len(payload) - 3
    (tmp_path / models.WEIGHTS_FILE).write_bytes(
        content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]
    )
    base = net()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(MaskFormatError, match="checksum"):
        load(tmp_path, base)
    models.assert_same_tensors(base.state_dict(), before)


@every_code
def test_transformers_own_loaders_say_what_to_do(coding, tmp_path):
    models.bert(kind="BertModel").save_pretrained(str(tmp_path / "base"))
    base = AutoModel.from_pretrained(str(tmp_path / "base"))
    options = {**OPTIONS[coding], "task_type": "FEATURE_EXTRACTION"}
    model = pemnify(base, coding=coding, **options)
    if coding == "base":
        drop_large_weights(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    for load_it in (
        lambda: AutoModel.from_pretrained(str(tmp_path / "adapter")),
        lambda: AutoModel.from_pretrained(str(tmp_path / "base")).load_adapter(
            str(tmp_path / "adapter")
        ),
    ):
        with pytest.raises(MaskFormatError, match=r'PeftModel\.from_pretrained.*coding = "bits"'):
            load_it()


def test_codings_are_in_the_order_of_what_they_know(tmp_path):
    """The same masks: each coding knows more of them and takes no more bytes."""
    found = []
    for coding in ("bits", "entropy", "context", "base"):
        model = pemnify(net(), coding=coding, **OPTIONS["base"])
        drop_large_weights(model)
        model.save_pretrained(str(tmp_path / coding))
        found.append(sum(value.numel() for value in stored_masks(tmp_path / coding).values()))
    assert found == sorted(found, reverse=True)
    assert found[3] < 0.8 * found[1] < 0.8 * found[0]
