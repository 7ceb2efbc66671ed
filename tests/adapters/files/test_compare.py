"""Two tasks side by side, against counting bit by bit."""

import json

import numpy as np
import pytest
import timm
import torch

from pemn_surgery import compare_adapters, pemnify
from pemn_surgery.adapters.files.compare import Comparison, Overlap
from pemn_surgery.commands import cli
from pemn_surgery.errors import AdapterFileError, ArchitectureError
from tests.adapters import models

pytestmark = models.ignore_peft_on_transformers


def save(folder, seed=7, train=0, **options):
    """Save an adapter of random scores; return its masks."""
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=4)
    model = pemnify(net, **{"bank": "rp", "seed": seed, **options})
    generator = torch.Generator().manual_seed(train)
    for name, parameter in model.named_parameters():
        if name.endswith(".scores"):
            parameter.data = torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(folder))
    return {name: mask.numpy() for name, mask in models.masks(model).items()}


def by_hand(name, first, second):
    pairs = list(zip(first.reshape(-1).tolist(), second.reshape(-1).tolist(), strict=True))
    both = sum(a and b for a, b in pairs)
    either = sum(a or b for a, b in pairs)
    return {
        "name": name,
        "weights": len(pairs),
        "first": sum(a for a, _ in pairs),
        "second": sum(b for _, b in pairs),
        "both": both,
        "jaccard": both / either,
        "agreement": sum(a == b for a, b in pairs) / len(pairs),
    }


@pytest.mark.parametrize("coding", ["bits", "entropy"])
def test_every_count_is_that_of_the_masks(coding, tmp_path, capsys):
    first = save(tmp_path / "a", train=1, density=0.8, coding=coding)
    second = save(tmp_path / "b", train=2, density=0.3)
    assert cli.main(["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["masks"]] == sorted(first)
    assert len(first) > 10
    for row in found["masks"]:
        chance = row.pop("chance")
        assert row == pytest.approx(by_hand(row["name"], first[row["name"]], second[row["name"]]))
        p, q = row["first"] / row["weights"], row["second"] / row["weights"]
        assert chance == pytest.approx(p * q / (p + q - p * q))
    joined = [np.concatenate([m.reshape(-1) for m in masks.values()]) for masks in (first, second)]
    found["total"].pop("chance")
    assert found["total"] == pytest.approx(by_hand("all", *joined))
    assert (found["only_first"], found["only_second"], found["same_base"]) == ([], [], True)


def test_what_one_of_them_masks_alone(tmp_path):
    first = save(tmp_path / "a", target_modules=["conv1.3", "layer1.0.conv1"])
    save(tmp_path / "b", target_modules=["layer1.0.conv1", "fc"], seed=8)
    found = compare_adapters(tmp_path / "a", tmp_path / "b")
    assert [overlap.name for overlap in found.overlaps] == ["layer1.0.conv1.weight"]
    assert (found.only_first, found.only_second) == (("conv1.3.weight",), ("fc.weight",))
    assert found.same_base is False
    assert found.total.weights == first["layer1.0.conv1.weight"].size


def test_masks_of_nothing_are_alike():
    none = Overlap("x", 10, 0, 0, 0)
    assert (none.jaccard, none.chance, none.agreement) == (1, 1, 1)
    empty = Comparison((), (), (), same_base=True).total
    assert (empty.weights, empty.jaccard, empty.agreement) == (0, 1, 1)


def test_other_architectures_are_refused(tmp_path):
    save(tmp_path / "a", target_modules=["fc"])
    save(tmp_path / "b", target_modules=["conv1.3"])
    with pytest.raises(ArchitectureError, match=r"No parameter is masked by both .*\(1 masks\)"):
        compare_adapters(tmp_path / "a", tmp_path / "b")
    wide = pemnify(
        timm.create_model("test_resnet", num_classes=5), bank="rp", target_modules=["fc"]
    )
    wide.save_pretrained(str(tmp_path / "c"))
    with pytest.raises(ArchitectureError, match=r"'fc.weight' has 384 weights in .* and 480 in"):
        compare_adapters(tmp_path / "a", tmp_path / "c")


def test_scores_are_refused(tmp_path):
    model = pemnify(timm.create_model("test_resnet", num_classes=4), bank="rp")
    model.peft_config["default"].keep_scores = True
    model.save_pretrained(str(tmp_path))
    with pytest.raises(AdapterFileError, match=r"holds no masks as bits.*checkpoint holds scores"):
        compare_adapters(tmp_path, tmp_path)


def test_the_table_and_the_plots(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    masks = save(tmp_path / "a", train=1)
    save(tmp_path / "b", train=2)
    one, two = str(tmp_path / "a"), str(tmp_path / "b")
    assert cli.main(["diff", one, two, "--plot", str(tmp_path / "d.png")]) == 0
    text = capsys.readouterr().out
    assert f"{compare_adapters(one, two).total.jaccard:.4f}" in text
    assert all(name in text for name in [*masks, "all", "the same base"])
    assert cli.main(["inspect", one, "--plot", str(tmp_path / "i.svg")]) == 0
    assert (tmp_path / "d.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "<svg" in (tmp_path / "i.svg").read_text()
