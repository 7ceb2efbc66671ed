"""Two tasks side by side, against counting bit by bit."""

import json

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from pemn_surgery import PemnConfig, compare_adapters, from_finetuned, from_masks, pemnify
from pemn_surgery.adapters.files.compare import Comparison, Overlap
from pemn_surgery.coding import bits
from pemn_surgery.commands import cli
from pemn_surgery.errors import (
    AdapterError,
    AdapterFileError,
    ArchitectureError,
    MaskNotLoadedError,
)
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
        "changed_by_both": sum(not a and not b for a, b in pairs),
        "disagreeing": sum(a != b for a, b in pairs),
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
    assert found["form"] == "product"


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


FORMS = {"product": {}, "flip": {"form": "flip", "selector": "threshold"}}


def pair(options_b=None, **options):
    """A model with adapters "a" and "b" of random scores; "b" may differ by options_b."""
    second = {**options, **(options_b or {})}
    model = pemnify(models.net(), adapter_name="a", bank="own", modules_to_save=[], **options)
    model.add_adapter("b", PemnConfig(bank="own", modules_to_save=[], **second))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(".scores"):
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def counts(overlap):
    kinds = ("weights", "first", "second", "both", "changed_by_both", "disagreeing")
    return {kind: getattr(overlap, kind) for kind in kinds}


def assert_counts(found, first, second):
    """Every overlap and the sum, against the masks bit by bit."""
    assert len(found.overlaps) == len(first) > 1
    expected = {name: by_hand(name, first[name], second[name]) for name in first}
    for overlap in found.overlaps:
        assert counts(overlap) == {k: expected[overlap.name][k] for k in counts(overlap)}
    sums = {k: sum(row[k] for row in expected.values()) for k in counts(found.total)}
    assert counts(found.total) == sums
    assert sums["changed_by_both"] > 10
    assert sums["disagreeing"] > 10


@pytest.mark.parametrize("form", FORMS)
def test_conflicts_of_two_adapters_of_a_model_and_of_their_files(form, tmp_path):
    model = pair(**FORMS[form])
    found = compare_adapters("a", "b", model)
    assert_counts(found, models.masks(model, "a"), models.masks(model, "b"))
    assert (found.form, found.same_base, found.only_first) == (form, True, ())
    model.save_pretrained(tmp_path)
    assert compare_adapters(tmp_path / "a", tmp_path / "b") == found
    loaded = PeftModel.from_pretrained(models.net(), tmp_path / "a", "x")
    loaded.load_adapter(tmp_path / "b", "y")
    assert compare_adapters("x", "y", loaded) == found
    itself = compare_adapters("x", "x", loaded).total
    assert (itself.disagreeing, itself.changed_by_both) == (0, itself.weights - itself.first)


def test_flips_that_both_make_undo_each_other():
    """What conflicts say of the effective weight: both change it, so together they do not."""
    model = pair(**FORMS["flip"])
    model.base_model.set_adapter(["a", "b"])
    layers = models.mask_layers(model)
    opposite = sum(int((layer() == -layer.fill()).sum()) for layer in layers.values())
    alike = sum(int((layer() == layer.fill()).sum()) for layer in layers.values())
    total = compare_adapters("a", "b", model).total
    assert total.disagreeing == opposite
    assert total.changed_by_both + total.both == alike


def test_signs_change_every_weight(tmp_path):
    for seed in (1, 2):
        made = from_finetuned(models.net(), models.net(seed=seed), "sign_delta")
        made.save_pretrained(tmp_path / str(seed))
    found = compare_adapters(tmp_path / "1", tmp_path / "2")
    total = found.total
    assert found.form == "sign_delta"
    assert total.changed_by_both == total.weights > 1000
    assert 0 < total.disagreeing == total.first + total.second - 2 * total.both < total.weights
    made.load_adapter(tmp_path / "1", "other")
    assert compare_adapters("other", "default", made) == found


@pytest.mark.parametrize("options", [{}, {"support_others": "drawn", "selector": "topk"}], ids=str)
def test_supports_of_two_seeds_are_compared_over_whole_weights(options, tmp_path):
    support = {"support": 0.25, "selector": "threshold", **options}
    model = pair(**support, options_b={"seed": 1})
    dropped = {}
    for name in "ab":
        model.set_adapter(name)
        layers = models.mask_layers(model)
        dropped[name] = {target: (layer() != 0) for target, layer in layers.items()}
    found = compare_adapters("a", "b", model)
    assert found.total.weights == sum(layer.fill().numel() for layer in layers.values())
    expected = {n: by_hand(n, dropped["a"][n], dropped["b"][n]) for n in dropped["a"]}
    assert len(expected) == 4
    for overlap in found.overlaps:
        assert counts(overlap) == {k: expected[overlap.name][k] for k in counts(overlap)}
    model.save_pretrained(tmp_path)
    with pytest.raises(ArchitectureError) as error:
        compare_adapters(tmp_path / "a", tmp_path / "b")
    models.says(error, "seed 0", "seed 1", "compare_adapters(first, second, model)")


@pytest.mark.parametrize("by", ["seed", "largest"])
def test_one_support_is_compared_bit_by_bit(by, tmp_path):
    model = pair(support=0.25, support_by=by, selector="threshold")
    found = compare_adapters("a", "b", model)
    assert_counts(found, models.masks(model, "a"), models.masks(model, "b"))
    model.save_pretrained(tmp_path)
    assert compare_adapters(tmp_path / "a", tmp_path / "b") == found
    other = pemnify(
        models.net(seed=5), bank="own", support=0.25, support_by=by, selector="threshold",
        modules_to_save=[],
    )  # fmt: skip
    other.save_pretrained(tmp_path / "c")
    if by == "seed":
        assert compare_adapters(tmp_path / "a", tmp_path / "c").same_base is False
    else:
        with pytest.raises(ArchitectureError, match="of two bases"):
            compare_adapters(tmp_path / "a", tmp_path / "c")


def test_adapters_of_a_model_that_mask_nothing_in_common_have_no_conflict():
    options = {"selector": "threshold", "target_modules": ["conv1"]}
    found = compare_adapters("a", "b", pair(**options, options_b={"target_modules": ["conv2"]}))
    assert found.overlaps == ()
    assert (found.only_first, found.only_second) == (("conv1.weight",), ("conv2.weight",))
    assert (found.total.changed_by_both, found.total.disagreeing) == (0, 0)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_counts_of_any_two_masks(columns):
    net = torch.nn.Sequential(torch.nn.Linear(len(columns), 1, bias=False))
    given_bits = [torch.tensor([list(each)]) for each in zip(*columns, strict=True)]
    model = from_masks(net, {"0.weight": given_bits[0]}, adapter_name="a")
    model.add_adapter("b", PemnConfig(bank="own", selector="threshold", score_init=-1.0,
                                      inference_mode=True))  # fmt: skip
    model.base_model.model[0].masked_weight.mask_of("b").bits = bits.pack(given_bits[1])
    (overlap,) = compare_adapters("a", "b", model).overlaps
    kept = [a.flatten().tolist() for a in given_bits]
    pairs = list(zip(*kept, strict=True))
    assert overlap.changed_by_both == pairs.count((False, False))
    assert overlap.disagreeing == pairs.count((True, False)) + pairs.count((False, True))
    assert overlap.weights == len(columns)


def test_what_cannot_be_compared_is_refused(tmp_path):
    model = pair(selector="threshold", options_b={"form": "flip"})
    with pytest.raises(AdapterError) as error:
        compare_adapters("a", "b", model)
    models.says(error, "'a'", "'product'", "'b'", "'flip'")
    with pytest.raises(AdapterError, match=r"no adapter 'x'; the model has a, b"):
        compare_adapters("a", "x", model)
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="one form"):
        compare_adapters(tmp_path / "a", tmp_path / "b")
    config = PemnConfig.from_pretrained(str(tmp_path / "a"))
    model.add_adapter("empty", config)
    with pytest.raises(MaskNotLoadedError):
        compare_adapters("a", "empty", model)


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
