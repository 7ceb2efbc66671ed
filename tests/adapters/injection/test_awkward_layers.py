"""Layers with names of ours, and classes that watch their subclasses."""

import copy
import pickle
from abc import ABC
from typing import Generic, TypeVar

import pytest
import torch
from peft import PeftModel
from torch import nn

from pemn_surgery import pemnify
from pemn_surgery.errors import UnsupportedModelError
from pemn_surgery.masks.attached import find_masked
from tests.adapters import models

T = TypeVar("T")
told = []


class Watching(nn.Linear):
    def __init_subclass__(cls, *, kind, **kwargs):
        super().__init_subclass__(**kwargs)
        told.append((cls, kind))


class Watched(Watching, kind="a"):
    """Heard of once: when it was written."""


class Register(type):
    def __init__(cls, name, bases, namespace):
        super().__init__(name, bases, namespace)
        told.append((cls, name))


class Registered(nn.Linear, metaclass=Register):
    """Heard of once, by its metaclass."""


class Guard(type):
    def __new__(mcs, name, bases, namespace):
        if any(isinstance(base, Guard) for base in bases):
            raise TypeError("is final")
        return super().__new__(mcs, name, bases, namespace)


class Final(nn.Linear, metaclass=Guard):
    """May not be subclassed."""


class Abstract(ABC, nn.Linear):
    """With python's own metaclass."""


class AbstractWatched(Watched, ABC, kind="b"):
    """Both."""


class Typed(Generic[T], nn.Linear):
    """Generic has an ``__init_subclass__`` of its own."""


class Slotted(nn.Linear):
    __slots__ = ("note",)


class Closed(nn.Linear):
    """Takes no attribute that it does not know."""

    def __setattr__(self, name, value):
        if name == "__class__":
            raise AttributeError("is closed")
        super().__setattr__(name, value)


KINDS = [Watched, Registered, Final, Abstract, AbstractWatched, Typed, Slotted, Closed]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bank", ["mp", "own"])
def test_a_class_does_not_hear_of_the_swap(kind, bank, tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(kind(4, 6), nn.BatchNorm1d(6), kind(6, 3)).eval()

    before = list(told)
    model = pemnify(make(), bank=bank, rest="train")
    layer = model.base_model.model[0]
    x = torch.linspace(-1, 1, 20).view(5, 4)
    mask = find_masked(layer, "weight").pemn_masks["default"].mask()
    models.assert_equal(layer.weight.detach(), find_masked(layer, "weight").fill() * mask)
    expected = model.eval()(x).detach()
    assert isinstance(layer, kind)
    assert not isinstance(kind(2, 2), type(layer))
    models.assert_equal(copy.deepcopy(model)(x).detach(), expected)
    models.assert_equal(pickle.loads(pickle.dumps(model))(x).detach(), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), str(tmp_path)).merge_and_unload()
    models.assert_equal(loaded(x).detach(), expected)
    assert [type(module) for module in loaded] == [kind, nn.BatchNorm1d, kind]
    assert told == before
    assert {cls for cls, _ in told} == {Watched, AbstractWatched, Registered}


class Unswappable(ABC, Watched, kind="c"):
    """Its memory begins with a class that has no room for attributes."""


told.pop()


class HasProperty(nn.Linear):
    @property
    def masked_weight(self):
        raise RuntimeError("is not to be computed")

    def forward(self, x):
        return nn.functional.linear(x, self.weight * 2, self.bias)


class HasBuffer(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("masked_weight", torch.ones(()))


class HasAttribute(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.masked_weight = 5


class HasChild(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.masked_weight = nn.Linear(4, 4)


class HasTensors(nn.Linear):
    def task_tensors(self):
        return 3


REFUSED = {
    HasProperty: "masked_weight",
    HasBuffer: "masked_weight",
    HasAttribute: "masked_weight",
    HasChild: "masked_weight",
    HasTensors: "task_tensors",
    Unswappable: "watches its subclasses",
}


def holding(kind):
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4), "odd": kind(4, 4)})
    model.forward = lambda x: model["odd"](model["norm"](model["first"](x)))
    return model


@pytest.mark.parametrize("bank", ["mp", "own"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_layer_that_cannot_carry_masks_is_refused_by_name(kind, bank):
    model = holding(kind)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(UnsupportedModelError) as error:
        pemnify(model, bank=bank, rest="train")
    models.says(error, "odd", kind.__name__, REFUSED[kind], "Nothing was changed")
    assert [type(module) for module in model.modules()] == classes
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    models.assert_same_tensors(model.state_dict(), before)


def test_a_refused_layer_can_be_left_out():
    with pytest.raises(UnsupportedModelError, match=r"exclude_modules=\['odd'\]"):
        pemnify(holding(HasProperty), bank="own", selector="topk")
    model = pemnify(holding(HasProperty), bank="own", selector="topk", exclude_modules=["odd"])
    names = [name for name, _ in model.named_parameters() if name.endswith(".scores")]
    assert names == ["base_model.model.first.masked_weight.pemn_masks.default.scores"]


class Named(nn.Module):
    """Its first part is called like something of ours."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.add_module(name, nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self._modules[self.name](x))


NAMES = [
    "pemn_masks", "pemn_tensors", "masked_weight", "task_tensors", "bank", "default", "scores",
    "bits", "pemn_x", "x_pemn_y", "base_layer", "modules_to_save", "original_module",
]  # fmt: skip


@pytest.mark.parametrize("bank", ["mp", "own"])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_model_may_be_called_like_ours(name, deep, bank, tmp_path):
    def make():
        torch.manual_seed(0)
        return (nn.Sequential(Named(name)) if deep else Named(name)).eval()

    model = pemnify(make(), bank=bank, rest="train").eval()
    x = torch.linspace(-1, 1, 20).view(5, 4)
    with torch.no_grad():
        for layer in models.mask_layers(model).values():
            layer.pemn_masks["default"].scores.neg_().sub_(0.1)
        expected = model(x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), str(tmp_path)).eval()
    models.assert_equal(loaded(x), expected)
    loaded.load_adapter(str(tmp_path), "b")
    loaded.set_adapter("b")
    loaded.delete_adapter("default")
    models.assert_equal(loaded(x), expected)
    merged = loaded.merge_and_unload()
    models.assert_equal(merged(x), expected)
    assert [type(module) for module in merged.modules()] == [type(m) for m in make().modules()]
