"""Tasks that begin where earlier ones ended, number by number."""

import pytest
import torch
from peft import PeftModel

from pemn_surgery import PemnConfig, pemnify, start_from, to_trainable
from pemn_surgery.errors import AdapterError
from tests.adapters import models

OWN = {"bank": "own", "selector": "threshold"}
KINDS = {
    "threshold": OWN,
    "flips on a fifth": OWN | {"form": "flip", "support": 0.2},
    "largest sizes": {"bank": "own", "selector": "topk"},
    "signs": {"bank": "own", "form": "sign_delta"},
    "rows scaled": OWN | {"scale": "row"},
}


def three(kind, **changes):
    """Two trained adapters, and a third that is about to be."""
    model = pemnify(models.net(), adapter_name="a", **KINDS[kind])
    models.train(model, 1, steps=3)
    for name in ("b", "new"):
        model.add_adapter(name, PemnConfig(**{**KINDS[kind], **(changes if name == "new" else {})}))
    model.set_adapter("b")
    models.train(model, 2, steps=4)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_of_two(kind):
    model = three(kind)
    start_from(model, "new", ["a", "b"])
    for layer in models.mask_layers(model).values():
        a, b, new = (layer.mask_of(name) for name in ("a", "b", "new"))
        pairs = zip(
            a.scores.flatten().tolist(), b.scores.flatten().tolist(),
            new.scores.flatten().tolist(), strict=True,
        )  # fmt: skip
        for first, second, found in pairs:
            wanted = (first + second) / 2
            if kind == "largest sizes":
                wanted = (abs(first) + abs(second)) / 2 * (-1 if first < 0 else 1)
            assert found == pytest.approx(wanted, rel=1e-5, abs=1e-8)
        if a.row_scale is not None:
            wanted = (a.row_scale + b.row_scale).detach() / 2
            torch.testing.assert_close(new.row_scale.detach(), wanted)
    assert models.flips(models.masks(model, "a"), models.masks(model, "b")) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_of_one_that_holds_bits(kind, tmp_path):
    model = three(kind)
    model.save_pretrained(str(tmp_path), selected_adapters=["a"])
    loaded = PeftModel.from_pretrained(models.net(), str(tmp_path / "a"), adapter_name="a")
    loaded.add_adapter("new", PemnConfig(**KINDS[kind]))
    start_from(loaded, "new", ["a"])
    models.assert_same_tensors(models.masks(loaded, "new"), models.masks(model, "a"))
    for layer in models.mask_layers(loaded).values():
        weights = []
        for name in ("a", "new"):
            loaded.set_adapter(name)
            weights.append(layer.owner.weight.detach().clone())
        models.assert_equal(weights[1], weights[0])


@pytest.mark.parametrize(
    ("changes", "others", "said"),
    [
        ({}, [], "name one or more other"),
        ({}, ["new"], "name one or more other"),
        ({}, ["c"], "There is no adapter 'c'"),
        ({"threshold": -1.0}, ["a"], "threshold is -1.0, that of 'a' 0.0"),
        ({"form": "flip"}, ["a", "b"], "form is 'flip', that of 'a' 'product'"),
        ({"selector": "topk"}, ["a"], "selector is 'topk'"),
        ({"support": 0.5}, ["b"], "support is Support"),
        ({"inference_mode": True}, ["a"], "holds bits: call to_trainable(model, 'new')"),
    ],
)
def test_what_is_no_beginning(changes, others, said):
    model = three("threshold", **changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AdapterError) as error:
        start_from(model, "new", others)
    models.says(error, said)
    models.assert_same_tensors(model.state_dict(), before)


def test_a_weight_that_the_other_does_not_mask():
    model = pemnify(models.net(), adapter_name="a", target_modules=["conv1"], **OWN)
    model.add_adapter("new", PemnConfig(**OWN))
    with pytest.raises(AdapterError, match=r"'a' has no mask of 'conv2\.weight'"):
        start_from(model, "new", ["a"])


def test_an_adapter_of_bits_begins_once_it_can_be_trained():
    model = three("threshold", inference_mode=True)
    to_trainable(model, "new")
    start_from(model, "new", ["b"])
    models.assert_same_tensors(models.masks(model, "new"), models.masks(model, "b"))
