"""The class swap: a layer stays what it was, computes with masks, and can be restored."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from timm import layers as timm_layers
from torch import nn
from transformers.pytorch_utils import Conv1D

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.masks.attached import find_masked, find_task
from pemn_surgery.masks.kept import one_forward
from pemn_surgery.surgery.subclasses import swapped_class
from pemn_surgery.surgery.swapped import original_class
from tests import oracles

OWN = {"bank": "own", "bank_init": "kaiming_normal"}
BANKS = {
    "own, pretrained": {"bank": "own", "selector": "topk"},
    "own, drawn": OWN,
    "mp": {"bank": "mp"},
    "rp": {"bank": "rp", "ratio": 0.05},
    "one_layer": {"bank": "one_layer"},
    "threshold, scaled": {"bank": "own", "selector": "threshold", "scale": "sqrt_density"},
}


class Scaled(nn.Linear):
    """A user's layer with a forward of its own and two reads of the weight."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias) * 3


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "subclassed linear": (lambda: Scaled(6, 5), (4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 5, groups=6, padding="same"), (2, 6, 7, 7)),
    "reflecting": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2), (2, 4, 8, 8)),
    "StdConv2d": (lambda: timm_layers.StdConv2d(4, 6, 3), (2, 4, 8, 8)),
    "StdConv2dSame": (lambda: timm_layers.StdConv2dSame(4, 6, 3, stride=2), (2, 4, 7, 7)),
    "ScaledStdConv2d": (lambda: timm_layers.ScaledStdConv2d(4, 6, 3), (2, 4, 8, 8)),
    "ScaledStdConv2dSame": (
        lambda: timm_layers.ScaledStdConv2dSame(4, 6, 3, stride=2),
        (2, 4, 7, 7),
    ),
    "Conv2dSame": (lambda: timm_layers.Conv2dSame(4, 6, 3, stride=2), (2, 4, 7, 7)),
    "HF Conv1D": (lambda: Conv1D(6, 5), (2, 3, 5)),
}


def rewrite(layer, **options):
    """The layer inside a pemnified model, and the model."""
    torch.manual_seed(1)
    model = pemnify(nn.Sequential(layer), **options)
    return model.base_model.model[0], model


def mask_of(child):
    chosen = child.pemn_masks["default"]
    if chosen.selector.name == "topk":
        return oracles.topk(chosen.scores, chosen.selector.density)
    return oracles.threshold(chosen.scores, chosen.selector.threshold)


def effective(child):
    """fill x mask (/ sqrt(density)), from the oracle."""
    mask = mask_of(child)
    factor = (float(mask.sum()) / mask.numel()) ** -0.5 if child.pemn_masks["default"].scaled else 1
    return child.fill().detach() * mask * factor


def shake(child, seed=0):
    """Scores that drop something under every selector."""
    generator = torch.Generator().manual_seed(seed)
    scores = child.pemn_masks["default"].scores
    with torch.no_grad():
        scores.copy_(torch.randn(scores.shape, generator=generator))


def own_keys(module):
    return {k for k in module.state_dict() if "masked_" not in k and "task_tensors" not in k}


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_with_the_masked_weight(name, bank):
    """Equal, with its gradient for the input, to a plain copy whose weight was set."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    original = make()
    layer, model = rewrite(copy.deepcopy(original), **BANKS[bank])
    child = find_masked(layer, "weight")
    shake(child)
    plain = copy.deepcopy(original)
    plain.weight.data = effective(child)
    assert 0 < int((plain.weight == 0).sum()) < plain.weight.numel()
    x = torch.randn(shape)
    left, right = (x.clone().requires_grad_() for _ in range(2))
    expected, actual = plain(right), model(left)
    oracles.assert_near(actual, expected.detach(), 2e-6 if "scaled" in bank else 1e-30)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    actual.backward(upstream)
    oracles.assert_near(left.grad, right.grad, 2e-6 if "scaled" in bank else 1e-30)
    by_hand = plain.weight.grad * child.fill().detach()
    if not child.pemn_masks["default"].scaled:
        by_hand = by_hand * child.pemn_masks["default"].scores.sign()
        oracles.assert_near(child.pemn_masks["default"].scores.grad, by_hand, 1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_stays_what_it_was(name):
    make, _ = LAYERS[name]
    original = make()
    before = {key: value.clone() for key, value in original.state_dict().items()}
    held_class, weight = type(original), original.weight
    layer, _ = rewrite(original, bank="own", selector="topk")
    assert layer is original
    assert type(layer) is not held_class
    assert isinstance(layer, held_class)
    assert type(layer).__name__ == held_class.__name__
    assert type(layer).__qualname__ == held_class.__qualname__
    assert type(layer).__module__ == held_class.__module__
    assert original_class(layer) is held_class
    assert layer._parameters["weight"] is weight
    assert own_keys(layer) == set(before)
    for key, value in before.items():
        oracles.assert_same(layer.state_dict()[key], value)


def test_layers_of_one_class_share_one_swapped_class():
    model = pemnify(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), **OWN).base_model.model
    assert type(model[0]) is type(model[1])
    assert type(model[0]) is not nn.Linear


def test_a_bank_frees_the_layers_weight():
    layer, _ = rewrite(nn.Linear(6, 5), bank="mp")
    assert layer._parameters["weight"] is None
    assert "weight" not in own_keys(layer)
    assert layer.weight.shape == (5, 6)


# ---- copies -----------------------------------------------------------------------------------

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((5, 2, 4, 4), generator=generator)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("bank", BANKS)
def test_a_copy_is_a_model_of_its_own(how, bank):
    model = pemnify(net(), **BANKS[bank])
    model.train()
    model(batch(1)).sum().backward()
    model.eval()
    twin = COPIES[how](model)
    before = model(batch()).detach()
    oracles.assert_same(twin(batch()).detach(), before)
    inner, other = model.base_model.model, twin.base_model.model
    for place in (0, 1, 4):
        assert type(other[place]) is type(inner[place])
        assert other[place] is not inner[place]
    for place in (0, 4):
        child = find_masked(other[place], "weight")
        assert child.owner is other[place]
        shake(child, 5)
        oracles.assert_near(other[place].weight, effective(child), 2e-7)
    assert not torch.equal(twin(batch()), before)
    oracles.assert_same(model(batch()).detach(), before)
    twin.train()
    twin(batch(2))
    model.eval()
    oracles.assert_same(model(batch()).detach(), before)


# ---- restoring --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_unload_gives_back_the_same_parameter_and_class(name):
    make, shape = LAYERS[name]
    original = make()
    held_class, weight, values = type(original), original.weight, original.weight.detach().clone()
    x = torch.randn(shape)
    before = original(x).detach()
    layer, model = rewrite(original, bank="own", selector="topk")
    restored = model.unload()
    assert restored[0] is layer
    assert type(layer) is held_class
    assert layer.weight is weight
    oracles.assert_same(layer.weight.detach(), values)
    oracles.assert_same(layer(x).detach(), before)
    assert not any("masked" in key or "task" in key for key in layer.state_dict())
    assert "_pemn_shared_tensors" not in layer.__dict__


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("name", LAYERS)
def test_merge_leaves_a_plain_layer(name, bank):
    make, shape = LAYERS[name]
    held = make()
    keys = set(held.state_dict())
    layer, model = rewrite(held, **BANKS[bank])
    child = find_masked(layer, "weight")
    shake(child)
    x, wanted = torch.randn(shape), effective(child)
    expected = model(x).detach()
    merged = model.merge_and_unload()
    assert type(merged[0]) is original_class(held) is type(make())
    assert isinstance(merged[0].weight, nn.Parameter)
    assert set(merged[0].state_dict()) == keys
    oracles.assert_near(merged[0].weight, wanted, 2e-7)
    oracles.assert_same(merged(x).detach(), expected)


def test_merge_into_own_keeps_the_parameter_object():
    held = nn.Linear(6, 5)
    weight = held.weight
    layer, model = rewrite(held, bank="own", selector="topk")
    wanted = effective(find_masked(layer, "weight"))
    model.merge_and_unload()
    assert held.weight is weight
    oracles.assert_same(held.weight.detach(), wanted + 0.0)


def test_unload_of_a_bank_leaves_the_fill():
    layer, model = rewrite(nn.Linear(6, 5), bank="mp")
    fill = find_masked(layer, "weight").fill().clone()
    model.unload()
    assert type(layer) is nn.Linear
    oracles.assert_same(layer.weight.detach(), fill)


def test_norms_come_back_too():
    model = net()
    classes = [type(module) for module in model]
    own = {key: value.clone() for key, value in model.state_dict().items()}
    rewritten = pemnify(model, **OWN)
    rewritten.train()
    rewritten(batch())
    restored = rewritten.unload()
    assert [type(module) for module in restored] == classes
    assert set(restored.state_dict()) == set(own)
    for key in ("1.running_mean", "1.running_var", "1.weight", "1.bias"):
        oracles.assert_same(restored.state_dict()[key], own[key])


# ---- ties -------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two Linear layers that are one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("bank", BANKS)
def test_tied_layers_share_one_mask(bank):
    torch.manual_seed(0)
    plain = Tied()
    model = pemnify(copy.deepcopy(plain), **BANKS[bank])
    inner = model.base_model.model
    names = [name for name, _ in model.named_parameters() if name.endswith(".scores")]
    assert len(names) == 1
    child = find_masked(inner.first, "weight")
    assert find_masked(inner.second, "weight") is child
    shake(child)
    with one_forward():
        assert inner.first.weight is inner.second.weight
    plain.first.weight.data = effective(child)
    x = torch.randn(3, 4)
    expected = plain(x)
    expected.square().sum().backward()
    actual = model(x)
    actual.square().sum().backward()
    oracles.assert_near(actual, expected.detach(), 1e-6)
    if not child.pemn_masks["default"].scaled:
        by_hand = plain.first.weight.grad * child.fill().detach()
        by_hand = by_hand * child.pemn_masks["default"].scores.sign()
        oracles.assert_near(child.pemn_masks["default"].scores.grad, by_hand, 1e-5)


@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
@pytest.mark.parametrize("bank", BANKS)
def test_ties_come_back(bank, how):
    torch.manual_seed(0)
    model = pemnify(Tied(), **BANKS[bank])
    child = find_masked(model.base_model.model.first, "weight")
    shake(child)
    wanted = effective(child) if how == "merge_and_unload" else child.fill().detach().clone()
    restored = getattr(model, how)()
    assert type(restored.first) is type(restored.second) is nn.Linear
    assert restored.first.weight is restored.second.weight
    oracles.assert_near(restored.first.weight, wanted, 2e-7)
    assert "_pemn_shared_masks" not in restored.second.__dict__


def test_ties_survive_copies():
    for copied in COPIES.values():
        inner = copied(pemnify(Tied(), **OWN)).base_model.model
        child = find_masked(inner.first, "weight")
        assert find_masked(inner.second, "weight") is child
        assert child.shared_with == [(inner.second, "weight")]
        oracles.assert_same(inner.second.weight.detach(), effective(child))


# ---- what tasks own ---------------------------------------------------------------------------


def expected_statistics(layer_output, mean, variance, momentum=0.1):
    """Ioffe and Szegedy 2015, with torch's unbiased variance."""
    flat = layer_output.transpose(0, 1).reshape(layer_output.shape[1], -1)
    return (
        (1 - momentum) * mean + momentum * flat.mean(1),
        (1 - momentum) * variance + momentum * flat.var(1, unbiased=True),
    )


@pytest.mark.parametrize("bank", ["own, pretrained", "mp"])
def test_running_statistics_belong_to_the_task(bank):
    config = dict(BANKS[bank])
    model = get_peft_model(net(), PemnConfig(**config), adapter_name="one")
    model.add_adapter("two", PemnConfig(**config))
    inner = model.base_model.model
    norm = inner[1]
    tables = {name: find_task(norm).pemn_tensors[name] for name in ("one", "two")}
    zero, one = torch.zeros(4), torch.ones(4)
    for name, seed in (("two", 1), ("one", 2)):
        model.set_adapter(name)
        model.train()
        model(batch(seed))
        with torch.no_grad():
            mean, variance = expected_statistics(inner[0](batch(seed)), zero, one)
        oracles.assert_near(tables[name].running_mean, mean, 1e-6)
        oracles.assert_near(tables[name].running_var, variance, 1e-6)
        assert norm.running_mean is tables[name].running_mean
    assert not torch.equal(tables["one"].running_mean, tables["two"].running_mean)
    oracles.assert_same(norm._buffers["running_mean"], zero)
    oracles.assert_same(norm._buffers["running_var"], one)
    with model.disable_adapter():
        assert norm.running_mean is norm._buffers["running_mean"]


def test_trained_tensors_belong_to_the_task():
    model = pemnify(net(), bank="mp", rest="train")
    norm = model.base_model.model[1]
    copy_of = find_task(norm).pemn_tensors["default"]
    assert norm.weight is copy_of.weight
    assert copy_of.weight.requires_grad
    copy_of.weight.data.fill_(3.0)
    assert norm.weight.tolist() == [3.0] * 4
    oracles.assert_same(norm._parameters["weight"].detach(), torch.ones(4))
    merged = model.merge_and_unload()
    assert type(merged[1]) is nn.BatchNorm2d
    assert merged[1].weight.tolist() == [3.0] * 4


def test_freeze_keeps_norms_in_eval_mode():
    torch.manual_seed(0)
    plain = net()
    plain[1].running_mean.normal_()
    plain[1].running_var.uniform_(0.5, 2)
    model = pemnify(copy.deepcopy(plain), bank="own", selector="topk", rest="freeze")
    inner = model.base_model.model
    model.train()
    assert inner[0].training
    assert not inner[1].training
    plain.eval()
    for place in (0, 4):
        plain[place].weight.data = effective(find_masked(inner[place], "weight"))
    oracles.assert_same(model(batch()).detach(), plain(batch()).detach())
    oracles.assert_same(inner[1].running_mean, plain[1].running_mean)
    oracles.assert_same(inner[1].running_var, plain[1].running_var)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2
    assert all(name.endswith(".scores") for name in trainable)
    restored = model.unload()
    assert type(restored[1]) is nn.BatchNorm2d
    assert restored[1].train().training


def test_freeze_holds_before_anyone_calls_train():
    """A new module is in training mode; so is a loop that never says ``model.train()``."""
    plain = net()
    assert plain[1].training
    model = pemnify(plain, bank="own", selector="topk", rest="freeze")
    norm = model.base_model.model[1]
    assert not norm.training
    model(batch())
    oracles.assert_same(norm.running_mean, torch.zeros(4))
    oracles.assert_same(norm.running_var, torch.ones(4))


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ("train", {"0.bias", "1.weight", "1.bias", "4.bias"}),
        ("norms", {"1.weight", "1.bias"}),
        ("stats", set()),
        ("freeze", set()),
    ],
)
def test_what_trains(rest, expected):
    model = pemnify(net(), bank="own", selector="topk", rest=rest)
    named = [name for name, p in model.named_parameters() if p.requires_grad]
    scores = [name for name in named if name.endswith(".scores")]
    others = {
        name.removeprefix("base_model.model.").replace("task_tensors.pemn_tensors.default.", "")
        for name in named
        if name not in scores
    }
    assert len(scores) == 2
    assert others == expected


class TiedBias(nn.Module):
    """Two layers that are one bias, as tied heads of language models are."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.bias = self.first.bias

    def forward(self, x):
        return self.second(self.first(x))


def test_tied_owned_tensors_stay_one():
    model = pemnify(TiedBias(), bank="mp", rest="train")
    inner = model.base_model.model
    assert inner.first.bias is inner.second.bias
    assert inner.first.bias is not inner.first._parameters["bias"]
    inner.first.bias.data.fill_(2.0)
    merged = model.merge_and_unload()
    assert merged.first.bias is merged.second.bias
    assert merged.second.bias.tolist() == [2.0] * 4
    assert type(merged.first) is type(merged.second) is nn.Linear


# ---- the property's corners -------------------------------------------------------------------


def test_swapped_class_is_cached_and_documented():
    swapped = swapped_class(Scaled, ("weight",), ())
    assert swapped is swapped_class(Scaled, ("weight",), ())
    assert swapped.__doc__ == Scaled.__doc__
    assert issubclass(swapped, Scaled)
    assert isinstance(swapped.weight, property)


def test_fsdp_reads_the_raw_parameter():
    """FSDP re-reads parameters with getattr, from its own modules."""
    layer, _ = rewrite(nn.Linear(6, 5), bank="own", selector="topk")
    scope = {"__name__": "torch.distributed.fsdp._fully_shard", "layer": layer}
    exec("raw = layer.weight", scope)
    assert scope["raw"] is layer._parameters["weight"]
    scope = {"__name__": "torch.distributed.other", "layer": layer}
    exec("raw = layer.weight", scope)
    assert scope["raw"] is not layer._parameters["weight"]


def test_fsdp_may_set_a_plain_tensor():
    layer, _ = rewrite(nn.Linear(6, 5), bank="own", selector="topk")
    child = find_masked(layer, "weight")
    mask = mask_of(child)
    flat = torch.randn(5, 6)
    del layer._parameters["weight"]
    type(layer).weight.fset(layer, flat)
    assert child.own_weight() is flat
    oracles.assert_same(layer.weight.detach(), flat * mask)
    type(layer).weight.fdel(layer)
    assert not hasattr(layer, "weight")


def test_find_on_a_plain_layer():
    plain = nn.Linear(2, 2)
    assert find_masked(plain, "weight") is None
    assert find_task(plain) is None
    assert original_class(plain) is nn.Linear
    layer, _ = rewrite(nn.Linear(2, 2), bank="own", selector="topk")
    assert type(layer) is not nn.Linear
    assert original_class(layer) is nn.Linear
