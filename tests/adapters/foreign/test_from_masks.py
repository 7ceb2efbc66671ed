"""An adapter of masks that were given: what it computes, holds and refuses."""

import copy
import json
import math
from operator import attrgetter

import pytest
import timm
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from pemn_surgery import PemnConfig, from_masks, pemnify
from pemn_surgery.errors import (
    AlreadyPemnifiedError,
    ConfigError,
    FingerprintError,
    ForeignMaskError,
    MetaTensorError,
    UnsupportedModelError,
)
from tests.adapters import models

NAMES = ["conv2.weight", "conv3.weight", "head.weight"]  # conv1 has no mask


def random_masks(shapes, seed=0, density=0.6):
    generator = torch.Generator().manual_seed(5000 + seed)
    return {n: torch.rand(s, generator=generator) < density for n, s in shapes.items()}


def net_masks(seed=0):
    return random_masks({name: models.NET_TARGETS[name] for name in NAMES}, seed)


def product_oracle(weight, mask):
    """W * M number by number."""
    pairs = zip(weight.flatten(), mask.flatten().tolist(), strict=True)
    return torch.stack([value * float(one) for value, one in pairs]).view(weight.shape)


def masked_by_hand(model, masks):
    """A plain copy of a model whose weights are W * M."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            parameter = twin.get_parameter(name)
            parameter.copy_(product_oracle(parameter, mask))
    return twin


def test_the_masks_are_the_given_ones_and_nothing_else_is_masked():
    base, masks = models.net(), net_masks()
    made = from_masks(copy.deepcopy(base), masks)
    assert set(models.mask_layers(made)) == set(NAMES)
    assert models.flips(models.masks(made), masks) == 0
    for name, layer in models.mask_layers(made).items():
        models.assert_equal(layer(), product_oracle(base.state_dict()[name], masks[name]), name)
    models.assert_equal(models.logits(made), models.logits(masked_by_hand(base, masks)))
    with made.disable_adapter():
        models.assert_equal(models.logits(made), models.logits(base))
    assert not [name for name, p in made.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_zeros_and_ones_of_any_type(dtype):
    masks = net_masks()
    made = from_masks(models.net(), {name: mask.to(dtype) for name, mask in masks.items()})
    assert models.flips(models.masks(made), masks) == 0


def test_the_given_masks_stay_the_callers():
    masks = net_masks()
    before = {name: mask.clone() for name, mask in masks.items()}
    made = from_masks(models.net(), masks)
    masks["conv2.weight"].fill_(True)
    assert models.flips(models.masks(made), before) == 0


@pytest.mark.parametrize("coding", ["bits", "entropy", "base"])
def test_saved_loaded_and_merged(coding, tmp_path):
    base, masks = models.net(), net_masks()
    made = from_masks(copy.deepcopy(base), masks, coding=coding)
    expected = models.logits(masked_by_hand(base, masks))
    made.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert models.flips(models.masks(again), masks) == 0
    models.assert_equal(models.logits(again), expected)
    merged = again.merge_and_unload()
    for name, mask in masks.items():
        models.assert_equal(
            merged.state_dict()[name], product_oracle(base.state_dict()[name], mask), name
        )
    models.assert_same_tensors(
        {n: v for n, v in merged.state_dict().items() if n not in masks},
        {n: v for n, v in base.state_dict().items() if n not in masks},
    )
    with pytest.raises(FingerprintError):
        PeftModel.from_pretrained(models.net(1), tmp_path)


def test_the_file_has_a_bit_a_weight_and_the_running_statistics(tmp_path):
    made = from_masks(models.net(), net_masks())
    made.save_pretrained(tmp_path)
    held = load_file(tmp_path / models.WEIGHTS_FILE)
    kinds = sorted({key.rpartition(".")[2] for key in held})
    assert kinds == ["bits", "running_mean", "running_var"]
    bits = [value.numel() for key, value in held.items() if key.endswith(".bits")]
    assert sorted(bits) == [32 + 4, 32 + 72, 32 + 72]
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    assert options["selector"] == "threshold"


class Nested(nn.Module):
    """``conv1`` is the end of another layer's name."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3)
        self.block = nn.Sequential()
        self.block.add_module("conv1", nn.Conv2d(3, 3, 3))
        self.block.add_module("conv10", nn.Conv2d(3, 4, 3))

    def forward(self, x):
        return self.block(self.conv1(x))


@pytest.mark.parametrize("name", ["conv1.weight", "block.conv1.weight", "block.conv10.weight"])
def test_a_name_is_that_weight_alone(name, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = Nested()
    masks = random_masks({name: tuple(base.get_parameter(name).shape)})
    made = from_masks(copy.deepcopy(base), masks)
    assert set(models.mask_layers(made)) == {name}
    made.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert models.flips(models.masks(again), masks) == 0


class Odd(nn.Module):
    """Weights of many kinds."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4, 4))
        self.table = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.recurrent = nn.GRU(4, 4, batch_first=True)
        self.experts = nn.ParameterList([nn.Parameter(torch.randn(2, 4, 4))])

    def forward(self, x):
        x = self.norm(self.table(x) @ self.gain)
        x = self.recurrent(self.attention(x, x, x)[0])[0]
        return torch.einsum("bti,eio->bteo", x, self.experts[0])


ODD = [
    ["gain"],
    ["table.weight"],
    ["experts.0"],
    ["norm.weight", "norm.bias"],
    ["attention.in_proj_weight"],
    ["attention.out_proj.weight", "attention.out_proj.bias"],
    ["recurrent.weight_ih_l0", "recurrent.weight_hh_l0"],
]


@pytest.mark.parametrize("names", ODD, ids=[names[0] for names in ODD])
def test_every_kind_of_parameter(names, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = Odd().eval()
    masks = random_masks({name: tuple(base.get_parameter(name).shape) for name in names})
    made = from_masks(copy.deepcopy(base), masks)
    assert set(models.mask_layers(made)) == set(names)
    by_hand = masked_by_hand(base, masks)
    weights = {name: by_hand.get_parameter(name).detach() for name in names}
    x = torch.tensor([[0, 1, 2], [3, 4, 0]])
    made.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    for model in (made, again, again.merge_and_unload()):
        inner = model.base_model.model if isinstance(model, PeftModel) else model
        models.assert_same_tensors({n: attrgetter(n)(inner).detach() for n in names}, weights)
        actual, expected = models.logits(model, x), models.logits(by_hand, x)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_classifier_that_has_a_mask_is_masked_and_one_that_has_none_is_not(tmp_path):
    """timm's classifier of another number of classes is else trained and saved whole."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = timm.create_model("resnet18", num_classes=5)
    masks = random_masks({"fc.weight": (5, 512), "layer1.0.conv1.weight": (64, 64, 3, 3)})
    made = from_masks(copy.deepcopy(base), masks)
    assert models.flips(models.masks(made), masks) == 0
    made.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert models.flips(models.masks(again), masks) == 0
    del masks["fc.weight"]
    made = from_masks(copy.deepcopy(base), masks)
    assert set(models.mask_layers(made)) == set(masks)
    assert made.peft_config["default"].modules_to_save == ["fc"]


def test_scores_to_train_on_choose_the_same_masks():
    masks = net_masks()
    made = from_masks(models.net(), masks, is_trainable=True)
    held = {
        name: layer.mask_of("default").scores for name, layer in models.mask_layers(made).items()
    }
    assert all(scores.requires_grad for scores in held.values())
    assert models.flips(models.masks(made), masks) == 0
    models.train(made, steps=3)
    assert models.flips(models.masks(made), masks) > 10


def test_the_scale_of_self_masking_networks():
    base, masks = models.net(), net_masks()
    made = from_masks(copy.deepcopy(base), masks, scale="sqrt_density")
    for name, layer in models.mask_layers(made).items():
        kept = product_oracle(base.state_dict()[name], masks[name])
        expected = kept / masks[name].double().mean().sqrt()
        torch.testing.assert_close(layer(), expected, rtol=1e-6, atol=0, check_dtype=False)


def test_weights_that_are_not_finite_are_multiplied_too():
    base, masks = models.net(), net_masks()
    with torch.no_grad():
        base.conv2.weight.view(-1)[:4] = torch.tensor([float("inf"), float("nan"), -0.0, -1.0])
    made = from_masks(copy.deepcopy(base), masks)
    expected = base.conv2.weight.detach() * masks["conv2.weight"].float()
    models.assert_equal(models.mask_layers(made)["conv2.weight"](), expected)


def test_a_second_task_on_the_same_base(tmp_path):
    base = models.net()
    for seed in (0, 1):
        made = from_masks(copy.deepcopy(base), net_masks(seed), adapter_name=f"task{seed}")
        made.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "task0", "task0")
    model.load_adapter(tmp_path / "task1", "task1")
    for seed in (0, 1):
        model.set_adapter(f"task{seed}")
        expected = models.logits(masked_by_hand(base, net_masks(seed)))
        models.assert_equal(models.logits(model), expected)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def test_tied_weights_have_one_mask():
    base, masks = Tied(), random_masks({"first.weight": (4, 4)})
    masks["second.weight"] = masks["first.weight"]
    made = from_masks(copy.deepcopy(base), masks)
    x = torch.randn(3, 4)
    weight = base.first.weight * masks["first.weight"]
    expected = nn.functional.linear(nn.functional.linear(x, weight, base.first.bias), weight)
    expected = expected + base.second.bias
    torch.testing.assert_close(models.logits(made, x), expected.detach(), rtol=1e-5, atol=1e-6)
    masks["second.weight"] = ~masks["first.weight"]
    with pytest.raises(ForeignMaskError, match=r"'first\.weight' and 'second\.weight' are one"):
        from_masks(Tied(), masks)
    with pytest.raises(ForeignMaskError, match=r"'first\.weight'.*tied to second\.weight"):
        from_masks(Tied(), {"first.weight": masks["first.weight"]})


# --------------------------------------------------------------------------------------- errors

ONES = torch.ones(4, 8)
REFUSED = {
    "empty": ({}, ("Got {} as masks", "at least one")),
    "no dict": ([ONES], ("as masks", "a dict")),
    "unknown": (
        {"heads.weight": ONES, "head.weight": ONES},
        ("1 of the 2 masks", "'heads.weight'", "Near it: head.weight", "named_parameters"),
    ),
    "buffer": ({"bn1.running_mean": torch.ones(8)}, ("no parameter", "'bn1.running_mean'")),
    "shape": ({"head.weight": ONES.T}, ("'head.weight'", "(8, 4)", "the weight (4, 8)")),
    "scores": ({"head.weight": ONES * 0.5}, ("'head.weight'", "32 of 32", "first: 0.5")),
    "nan": ({"head.weight": ONES * float("nan")}, ("32 of 32", "first: nan")),
    "no tensor": ({"head.weight": "text"}, ("'head.weight' is 'text'", "a tensor")),
    "meta": ({"head.weight": ONES.to("meta")}, ("without values (meta)",)),
    "half a layer": (
        {"conv1.bias": torch.ones(8)},
        ("'conv1'", "'conv1.weight' is masked with them", "torch.ones((8, 3, 3, 3))"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", list(REFUSED))
def test_refused_masks(what):
    masks, said = REFUSED[what]
    base = models.net()
    before = models.Snapshot(base)
    with pytest.raises(ForeignMaskError) as error:
        from_masks(base, masks)
    models.says(error, *said, "Nothing was changed")
    before.assert_unchanged()


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.filter = nn.Parameter(torch.randn(2, 4, dtype=torch.complex64))

    def forward(self, x):
        return (self.linear(x).to(torch.complex64) * self.filter.sum(0)).real


def test_weights_that_cannot_be_masked_are_refused_with_the_plans_reason():
    base, masks = Complex(), {"linear.weight": torch.ones(4, 4), "filter": torch.ones(2, 4)}
    before = models.Snapshot(base, run=lambda model: model(torch.ones(1, 4)).detach())
    with pytest.raises(ForeignMaskError) as error:
        from_masks(base, masks)
    models.says(error, "1 of the 2 weights", "'filter': is complex", "Nothing was changed")
    before.assert_unchanged()
    with pytest.raises(ForeignMaskError, match=r"saved whole \(modules_to_save\)"):
        from_masks(models.net(), {"head.weight": ONES}, modules_to_save=["head"])
    with pytest.raises(ForeignMaskError, match=r"is the model itself; put it into"):
        from_masks(nn.Linear(8, 4), {"weight": ONES})


def test_masks_of_flipped_signs(tmp_path):
    base, masks = models.net(), net_masks()
    flipped = copy.deepcopy(base)
    with torch.no_grad():
        flipped.conv2.weight.view(-1)[:4] = torch.tensor([0.0, -0.0, math.inf, math.nan])
        base.load_state_dict(flipped.state_dict())
        for name, mask in masks.items():
            weight = flipped.get_parameter(name)
            weight.copy_(torch.where(mask, weight, -weight))
    made = from_masks(copy.deepcopy(base), masks, form="flip")
    for name, layer in models.mask_layers(made).items():
        models.assert_equal(layer(), flipped.state_dict()[name], name)
    made.save_pretrained(tmp_path)
    merged = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).merge_and_unload()
    models.assert_same_tensors(merged.state_dict(), flipped.state_dict())
    again = from_masks(merged, masks, form="flip").merge_and_unload()
    for name, value in base.state_dict().items():
        assert value.numpy().tobytes() == again.state_dict()[name].numpy().tobytes(), name


DECIDED = [
    {"bank": "rp"},
    {"form": "sign_delta"},
    {"target_modules": ["head"]},
    {"selector": "topk", "density": 0.5},
]


@pytest.mark.parametrize("options", DECIDED, ids=str)
def test_options_that_follow_from_the_masks_are_refused(options):
    base = models.net()
    before = models.Snapshot(base)
    with pytest.raises(ConfigError) as error:
        from_masks(base, net_masks(), **options)
    models.says(error, *options, "follows from the masks")
    before.assert_unchanged()


def test_models_that_cannot_be_rewritten_are_refused():
    masks = net_masks()
    with pytest.raises(UnsupportedModelError, match="Got int"):
        from_masks(3, masks)
    with pytest.raises(AlreadyPemnifiedError):
        from_masks(
            pemnify(models.net(), PemnConfig(bank="own", selector="topk", modules_to_save=[])),
            masks,
        )
    with torch.device("meta"):
        empty = models.Net()
    with pytest.raises(MetaTensorError, match=r"conv2\.weight"):
        from_masks(empty, masks)
