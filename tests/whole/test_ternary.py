"""Ternary masks, {-1, 0, 1}, are two adapters at once: one keeps or drops, one changes signs."""

import torch
from peft import PeftModel

from pemn_surgery import PemnConfig, pemnify
from tests.adapters import models
from tests.oracles import assert_near, assert_same

OWN = {"bank": "own", "selector": "threshold", "score_init": "normal", "score_mean": 0.0}


def ternary():
    """A network with both adapters in force."""
    model = pemnify(models.net(), adapter_name="kept", seed=1, **OWN)
    model.add_adapter("signs", PemnConfig(form="flip", seed=2, **OWN))
    model.base_model.set_adapter(["kept", "signs"])
    return model


def parts(layer):
    weight = layer.fill().detach()
    kept = layer.mask_of("kept").mask().float()
    return weight, kept, torch.where(layer.mask_of("signs").mask(), 1.0, -1.0)


def test_weights_are_kept_dropped_or_negated_and_both_masks_learn():
    model = ternary()
    layer = models.mask_layers(model)["conv2.weight"]
    weight, kept, signs = parts(layer)
    made = layer()
    assert_same(made.detach(), weight * kept * signs)
    found = {round(float(v), 3) for v in (made.detach() / weight).unique()}
    assert found == {-1.0, 0.0, 1.0}
    pull = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    made.backward(pull)
    assert_near(layer.mask_of("signs").scores.grad, pull * weight * kept, 1e-6)
    assert_near(layer.mask_of("kept").scores.grad, pull * weight * signs, 1e-6)
    before = [parts(one)[1:] for one in models.mask_layers(model).values()]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    model(torch.randn(4, 3, 12, 12)).square().sum().backward()
    optimizer.step()
    after = [parts(one)[1:] for one in models.mask_layers(model).values()]
    assert len(after) == 4
    for one, other in zip(before, after, strict=True):
        assert all((a != b).any() for a, b in zip(one, other, strict=True))


def test_both_are_saved_loaded_and_merged(tmp_path):
    model = ternary().eval()
    expected = models.logits(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(models.net(), str(tmp_path / "kept"), adapter_name="kept")
    loaded.load_adapter(str(tmp_path / "signs"), "signs")
    loaded.base_model.set_adapter(["kept", "signs"])
    models.assert_equal(models.logits(loaded.eval()), expected)
    models.assert_equal(models.logits(loaded.merge_and_unload()), expected)
