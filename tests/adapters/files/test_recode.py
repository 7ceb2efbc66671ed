"""Adapters in another coding, from their files alone: the same masks, nothing else changed."""

import json

import pytest
import timm
import torch
from peft import PeftModel

from pemn_surgery import pemnify, recode
from pemn_surgery.commands import cli
from pemn_surgery.errors import AdapterFileError, ConfigError, NonFiniteScoresError
from tests import reader
from tests.adapters import models

pytestmark = models.ignore_peft_on_transformers

OPTIONS = {"bank": "rp", "ratio": 0.1, "seed": 7, "density": 0.9}


def make(folder, *, scores=False, **options):
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=4)
    model = models.train(pemnify(net, **{**OPTIONS, **options}))
    model.peft_config["default"].keep_scores = scores
    model.save_pretrained(str(folder))
    return model


def content(folder):
    """Every tensor of a file by the independent reader; masks as bools."""
    return {k: v.tolist() for k, v in reader.read(folder / models.WEIGHTS_FILE).items()}


def configuration(folder):
    given = json.loads((folder / "adapter_config.json").read_text())
    return {k: v for k, v in given.items() if k not in ("coding", "digest")}


def test_pack_and_unpack_keep_everything(tmp_path):
    make(tmp_path / "bits")
    before = content(tmp_path / "bits")
    assert len(before) > 20
    packed = recode(tmp_path / "bits", "entropy", tmp_path / "small")
    assert {mask.coding for mask in packed.headers.values()} == {"entropy"}
    assert packed.nbytes == (tmp_path / "small" / models.WEIGHTS_FILE).stat().st_size
    assert packed.nbytes < (tmp_path / "bits" / models.WEIGHTS_FILE).stat().st_size * 0.75
    assert content(tmp_path / "small") == before
    assert configuration(tmp_path / "small") == configuration(tmp_path / "bits")
    recode(tmp_path / "small", "bits", tmp_path / "again")
    name = models.WEIGHTS_FILE
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "bits" / name).read_bytes()


def test_in_place_and_the_card(tmp_path):
    model = make(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    size = recode(tmp_path, "entropy").nbytes
    assert "My own words." in card.read_text()
    assert f"{size:,}" in card.read_text()
    net = timm.create_model("test_resnet", num_classes=4)
    loaded = PeftModel.from_pretrained(net, str(tmp_path))
    assert loaded.peft_config["default"].coding == "entropy"
    x = models.images(4, size=32)
    models.assert_equal(models.logits(loaded, x), models.logits(model, x))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "adapter_config.json", models.WEIGHTS_FILE,
    ]  # fmt: skip


@pytest.mark.parametrize("coding", ["bits", "entropy"])
def test_scores_become_the_masks_that_they_choose(coding, tmp_path):
    model = make(tmp_path / "scores", scores=True)
    chosen = models.masks(model)
    with pytest.raises(ConfigError, match=r"holds float scores of 16 masks.*another folder"):
        recode(tmp_path / "scores", coding)
    file = recode(tmp_path / "scores", coding, tmp_path / "masks")
    assert file.ones == {name: int(mask.sum()) for name, mask in chosen.items()}
    found = content(tmp_path / "masks")
    masks = {key: value for key, value in found.items() if key.endswith(".bits")}
    assert len(masks) == len(chosen) == 16
    make(tmp_path / "direct")
    assert content(tmp_path / "direct") == found


def test_scores_of_nothing_are_refused(tmp_path):
    model = make(tmp_path, scores=True)
    dict(model.named_parameters())[
        "base_model.model.fc.masked_weight.pemn_masks.default.scores"
    ].data[0, 0] = torch.nan
    model.save_pretrained(str(tmp_path))
    with pytest.raises(NonFiniteScoresError, match=r"fc\.weight"):
        recode(tmp_path, "bits", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_signs_and_scales(tmp_path):
    from pemn_surgery import from_finetuned

    torch.manual_seed(0)
    base, tuned = (timm.create_model("test_resnet", num_classes=4) for _ in range(2))
    from_finetuned(base, tuned, "sign_delta").save_pretrained(str(tmp_path / "a"))
    recode(tmp_path / "a", "entropy", tmp_path / "b")
    assert any(key.endswith("row_scale") for key in content(tmp_path / "a"))
    assert content(tmp_path / "b") == content(tmp_path / "a")


def test_what_is_refused(tmp_path):
    make(tmp_path / "a")
    for coding in ("context", "base"):
        said = (
            f'coding={coding!r}; files alone give "bits" or "entropy".*from_pretrained.*'
            f'coding = "{coding}"; model.save_pretrained'
        )
        with pytest.raises(ConfigError, match=said):
            recode(tmp_path / "a", coding)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/adapter_config.json").write_bytes(
        (tmp_path / "a/adapter_config.json").read_bytes()
    )
    with pytest.raises(AdapterFileError, match=r"has no adapter_model\.safetensors"):
        recode(tmp_path / "b", "bits")


def test_the_commands(tmp_path, capsys):
    make(tmp_path / "a")
    before = content(tmp_path / "a")
    old = (tmp_path / "a" / models.WEIGHTS_FILE).stat().st_size
    folder, small = str(tmp_path / "a"), str(tmp_path / "small")
    assert cli.main(["pack", folder, "--out", small, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    new = (tmp_path / "small" / models.WEIGHTS_FILE).stat().st_size
    weights = 370_992
    assert said == {"adapter": small, "coding": "entropy", "bytes": new, "bytes_before": old,
                    "weights": weights}  # fmt: skip
    assert cli.main(["unpack", small]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"{new:,} bytes became {old:,} (370,992 masked weights)" in text
    assert content(tmp_path / "small") == before
