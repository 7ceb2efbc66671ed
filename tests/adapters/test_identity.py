"""What an adapter is: equal identities for equal adapters, others for all others."""

import itertools

import pytest
import torch
from peft import PeftModel

from pemn_surgery import PemnConfig, adapter_identity, from_finetuned, pemnify, recode
from pemn_surgery.errors import (
    AdapterError,
    AdapterFileError,
    MaskNotLoadedError,
)
from tests.adapters import models

pytestmark = models.ignore_peft_on_transformers

KINDS = {
    **models.BANKS,
    "norms": {"bank": "own", "selector": "topk", "rest": "norms"},
    "flips": {"bank": "own", "form": "flip", "selector": "threshold", "support": 0.2},
    "rows": {"bank": "own", "selector": "topk", "scale": "row"},
}


def trained(**options):
    return models.train(pemnify(models.net(), adapter_name="a", **options))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_one_in_a_model_in_a_file_and_loaded(kind, tmp_path):
    model = trained(**KINDS[kind])
    expected = adapter_identity("a", model)
    assert len(expected) == 16
    int(expected, 16)
    for coding in ("bits", "entropy", "context"):
        model.peft_config["a"].coding = coding
        model.save_pretrained(tmp_path)
        assert adapter_identity(tmp_path / "a") == expected, coding
    loaded = PeftModel.from_pretrained(models.net(), tmp_path / "a", "other")
    assert adapter_identity("other", loaded) == expected
    recode(tmp_path / "a", "entropy", tmp_path / "again")
    assert adapter_identity(tmp_path / "again") == expected
    before = models.masks(model, "a")
    models.train(model, steps=1)
    assert models.flips(before, models.masks(model, "a")) > 0
    assert adapter_identity("a", model) != expected


def test_a_base_is_no_part_of_it(tmp_path):
    identities = set()
    for seed in (0, 1):
        made = pemnify(
            models.net(seed), bank="own", selector="topk", modules_to_save=[], rest="freeze"
        )
        identities.add(adapter_identity("default", made))
    assert len(identities) == 1


def test_a_wide_copy_of_a_narrow_base(tmp_path):
    """Norms train in float32 beside bfloat16, and are saved so."""
    made = pemnify(models.bert().to(torch.bfloat16), bank="own", rest="norms", selector="threshold")
    loss = made(input_ids=models.tokens()).logits.float().square().sum()
    loss.backward()
    models.trainer_of(made).step()
    made.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.bert().to(torch.bfloat16), tmp_path, "other")
    expected = adapter_identity("default", made)
    assert adapter_identity("other", loaded) == adapter_identity(tmp_path) == expected


def test_modules_that_are_saved_whole_count(tmp_path):
    made = pemnify(models.bert(), bank="own", selector="topk", modules_to_save=["classifier"])
    made.save_pretrained(tmp_path)
    expected = adapter_identity("default", made)
    assert adapter_identity(tmp_path) == expected
    with torch.no_grad():
        made.base_model.model.classifier.modules_to_save["default"].bias[0] += 1e-3
    assert adapter_identity("default", made) != expected


def bits_of(**options):
    """An adapter whose initial masks are those of every other such one, if they have one shape."""
    options = {"bank": "own", "selector": "threshold", "rest": "freeze", **options}
    return pemnify(models.net(), modules_to_save=[], **options)


def test_settings_that_say_what_a_bit_means_count_and_no_others():
    apart = [
        {}, {"form": "flip"}, {"scale": "sqrt_density"}, {"scale": "row"}, {"support": 0.2},
        {"support": 0.2, "seed": 1}, {"support": 0.2, "support_by": "largest"},
        {"support": 0.2, "support_by": "smallest"}, {"support": 0.2, "form": "flip"},
    ]  # fmt: skip
    found = [adapter_identity("default", bits_of(**options)) for options in apart]
    for (one, first), (other, second) in itertools.combinations(zip(apart, found, strict=True), 2):
        assert first != second, (one, other)
    same = [{"coding": "entropy"}, {"threshold": 0.5, "score_init": 0.6}, {"rest": "freeze"}]
    for options in same:
        assert adapter_identity("default", bits_of(**options)) == found[0], options


def test_signs_and_their_scales_count(tmp_path):
    made = from_finetuned(models.net(), models.net(seed=1), "sign_delta")
    expected = adapter_identity("default", made)
    made.save_pretrained(tmp_path)
    assert adapter_identity(tmp_path) == expected
    layer = models.mask_layers(made)["head.weight"]
    with torch.no_grad():
        layer.mask_of("default").row_scale[0] += 1e-6
    assert adapter_identity("default", made) != expected


def test_what_has_no_identity_is_refused(tmp_path):
    model = trained(bank="own", selector="topk")
    with pytest.raises(AdapterError, match="no adapter 'x'; the model has a"):
        adapter_identity("x", model)
    model.peft_config["a"].keep_scores = True
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"holds float scores, .* checkpoint holds scores"):
        adapter_identity(tmp_path / "a")
    model.peft_config["a"].keep_scores = False
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="does not exist"):
        adapter_identity(tmp_path / "nothing")
    model.add_adapter("empty", PemnConfig.from_pretrained(str(tmp_path / "a")))
    with pytest.raises(MaskNotLoadedError):
        adapter_identity("empty", model)
