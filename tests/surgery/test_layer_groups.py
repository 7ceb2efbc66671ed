"""timm's layer decay and weight decay give scores and task tensors what they give dense weights."""

import pytest
import timm
from timm.optim import create_optimizer_v2

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.surgery.layer_groups import base_name

MODELS = {
    "vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=2, num_classes=5
    ),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=8, depths=(1, 1, 2, 1),
        num_heads=(1, 2, 2, 2), num_classes=5,
    ),
    "resnet": lambda: timm.create_model("resnet18", num_classes=5),
}  # fmt: skip
OPTIONS = {
    "mp": {"bank": "mp"},
    "own": {"bank": "own", "selector": "topk"},
    "own, all trained": {"bank": "own", "selector": "topk", "rest": "train"},
}
DECAYS = {
    "by layer": {"layer_decay": 0.75, "weight_decay": 0.05},
    "by layer, no weight decay": {"layer_decay": 0.5},
    "weight decay alone": {"weight_decay": 0.05},
}
PARTS = {
    "PEFT's model": (lambda model: model, "base_model.model."),
    "its tuner": (lambda model: model.base_model, "model."),
    "timm's model": (lambda model: model.get_base_model(), ""),
}


def settings(model, **decays):
    """Learning rate's scale and weight decay of every parameter that timm's optimizer got."""
    groups = create_optimizer_v2(model, "adamw", lr=1e-3, **decays).param_groups
    of = {id(p): (g.get("lr_scale"), g["weight_decay"]) for g in groups for p in g["params"]}
    return {name: of[id(p)] for name, p in model.named_parameters() if id(p) in of}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_every_score_is_treated_as_its_weight(name, options, decays, part):
    dense = settings(MODELS[name](), **DECAYS[decays])
    model = pemnify(MODELS[name](), **OPTIONS[options])
    choose, prefix = PARTS[part]
    actual = settings(choose(model), **DECAYS[decays])
    scores = [key for key in actual if key.endswith(".scores")]
    assert len(scores) > 10
    assert len(actual) == sum(p.requires_grad for p in model.parameters())
    if "layer_decay" in DECAYS[decays]:
        assert len({scale for scale, _ in actual.values()}) >= 4
    for key, value in actual.items():
        assert key.startswith(prefix)
        assert value == dense[base_name(key.removeprefix(prefix))], key


def test_a_second_adapter_is_treated_alike():
    dense = settings(MODELS["vit"](), **DECAYS["by layer"])
    model = pemnify(MODELS["vit"](), bank="mp")
    model.add_adapter("other", PemnConfig(bank="mp"))
    model.set_adapter("other")
    actual = settings(model, **DECAYS["by layer"])
    assert sum(".pemn_masks.other.scores" in key for key in actual) > 10
    for key, value in actual.items():
        assert value == dense[base_name(key.removeprefix("base_model.model."))], key


def test_models_that_timm_asks_nothing_have_no_answer():
    from tests.adapters import models

    model = pemnify(models.net(), bank="mp")
    assert not hasattr(model, "group_matcher")
    assert not hasattr(model, "no_weight_decay")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.0.qkv.masked_weight.pemn_masks.default.scores", "blocks.0.qkv.weight"),
        ("masked_in_proj_weight.pemn_masks.a.scores", "in_proj_weight"),
        ("fc.masked_weight.pemn_masks.a.row_scale", "fc.weight"),
        ("norm.task_tensors.pemn_tensors.default.bias", "norm.bias"),
        ("task_tensors.pemn_tensors.default.pos_embed", "pos_embed"),
        ("head.modules_to_save.default.weight", "head.weight"),
        ("head.original_module.weight", "head.weight"),
        ("blocks.0.qkv.weight", "blocks.0.qkv.weight"),
    ],
)
def test_names_of_the_base(name, expected):
    assert base_name(name) == expected
