"""Activation checkpointing: what runs again for the gradient reads what it read the first time."""

import copy
import random
import weakref

import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.errors import AdapterError
from pemn_surgery.masks import masked_weight
from pemn_surgery.masks.read_only import read_only
from tests.adapters import models

REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return torch.relu(self.norm(self.body(x))) + x


class Blocks(nn.Module):
    """Two blocks, each of which may run under a checkpoint."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(Block(6) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def two_tasks(bank="rp", **options):
    """A model with masks of two tasks that differ, and a head that is saved whole."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Blocks()
    options = {"bank": bank, "modules_to_save": ["head"], **options}
    model = pemnify(model, adapter_name="a", seed=0, **options)
    model.add_adapter("b", PemnConfig(seed=0, **options))
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n))
            parameter.add_(noise, alpha=0.2)
    return model.train()


def batch(seed):
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def train_both(model):
    """Let both tasks train on: PEFT freezes the one that another takes the place of."""
    for name, parameter in model.named_parameters():
        if ".a." in name or ".b." in name:
            parameter.requires_grad_(True)


def gradients(model, program, reentrant, both=True):
    """Run a program of switches and forwards, then one backward pass over all outputs."""
    model.base_model.model.reentrant = reentrant
    total = torch.zeros(())
    for number, (verb, *given) in enumerate(program):
        if verb == "forward":
            total = total + model(batch(number)).square().mean()
        elif verb == "forward_disabled":
            with model.disable_adapter():
                total = total + model(batch(number)).square().mean()
        elif verb == "merged":
            model.merge_adapter()
            total = total + model(batch(number)).square().mean()
            model.unmerge_adapter()
        else:
            getattr(model, verb)(*given)
        if both:
            train_both(model)
    total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def random_program(seed):
    verbs = [
        ("set_adapter", "a"), ("set_adapter", "b"), ("forward",), ("forward",),
        ("forward_disabled",), ("merged",),
    ]  # fmt: skip
    drawn = random.Random(seed)
    program = [drawn.choice(verbs) for _ in range(7)]
    return [("set_adapter", "a"), ("forward",), *program, ("set_adapter", "b"), ("forward",)]


@REENTRANT
@pytest.mark.parametrize("both", [True, False], ids=["both", "last"])
@pytest.mark.parametrize("bank", ["rp", "own"])
@pytest.mark.parametrize("seed", range(6))
def test_gradients_are_those_without_checkpoints(bank, seed, both, reentrant):
    program = random_program(seed)
    expected = gradients(two_tasks(bank), program, None, both)
    actual = gradients(two_tasks(bank), program, reentrant, both)
    assert any(".a." in name for name in expected) == both
    assert any(".b." in name for name in expected)
    if not reentrant:
        models.assert_same_tensors(actual, expected)
    for name, value in expected.items():  # reentrant runs add up their gradients in another order
        torch.testing.assert_close(actual.pop(name), value, rtol=1e-5, atol=1e-6)
    assert actual == {}


def vit(checkpointing):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_vit", num_classes=4)
    model = pemnify(model, adapter_name="a", bank="rp", ratio=0.1, seed=0)
    model.add_adapter("b", PemnConfig(bank="rp", ratio=0.1, seed=0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".b." in name:
                parameter.neg_()
    model.get_base_model().set_grad_checkpointing(checkpointing)
    return model.train()


def test_timm_with_a_switch_between_two_forwards():
    found = []
    for checkpointing in (False, True):
        model = vit(checkpointing)
        images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
        total = 0
        for name in "ab":
            model.set_adapter(name)
            train_both(model)
            total = total + model(images).square().mean()
        total.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) > 60
    models.assert_same_tensors(found[1], found[0])


@REENTRANT
def test_transformers_with_a_switch_between_two_forwards(reentrant):
    found = []
    for checkpointing in (False, True):
        model = pemnify(models.bert(), adapter_name="a", bank="rp", ratio=0.1, task_type="SEQ_CLS")
        model.add_adapter("b", PemnConfig(bank="rp", ratio=0.1, task_type="SEQ_CLS"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".b." in name:
                    parameter.neg_()
        if checkpointing:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        model.train()
        total = 0
        for name in "ab":
            model.set_adapter(name)
            train_both(model)
            total = total + model(input_ids=models.tokens()).logits.square().mean()
        total.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any(".a." in name for name in found[0])
    models.assert_same_tensors(found[1], found[0])


@REENTRANT
def test_what_trains_is_as_it_was_after_the_backward_pass(reentrant):
    model = two_tasks()
    program = [("set_adapter", "a"), ("forward",), ("set_adapter", "b"), ("forward",)]
    gradients(model, program, reentrant, both=False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".b." in name for name in trained)


@REENTRANT
def test_a_deleted_adapter_is_missed_by_name(reentrant):
    model = two_tasks()
    model.base_model.model.reentrant = reentrant
    total = model(batch(0)).sum()
    model.set_adapter("b")
    model.delete_adapter("a")
    with pytest.raises(AdapterError, match="of adapter 'a' went while a call that reads it"):
        total.backward()


def test_an_error_in_the_first_run_leaves_nothing_behind():
    model = two_tasks()
    model.base_model.model.reentrant = False
    model.base_model.model.blocks[1].norm.register_forward_hook(lambda *_: 1 / 0)
    try:
        model(batch(0))
    except ZeroDivisionError:  # its traceback still holds the frames of the forward
        model.base_model.model.blocks[1].norm._forward_hooks.clear()
        model.set_adapter("b")
        actual = model.eval()(batch(1))
    twin = two_tasks()
    twin.set_adapter("b")
    models.assert_equal(actual, twin.eval()(batch(1)))


@REENTRANT
def test_other_methods_are_left_alone(reentrant):
    found = []
    for mode in (None, reentrant):
        torch.manual_seed(0)
        model = get_peft_model(Blocks(mode), LoraConfig(target_modules=["body"]))
        model(batch(0)).sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0]
    models.assert_same_tensors(found[1], found[0])


def test_copies_of_a_model_are_their_own():
    model = two_tasks()
    twin = copy.deepcopy(model)
    program = [("set_adapter", "a"), ("forward",), ("set_adapter", "b"), ("forward",)]
    expected = gradients(model, program, None)
    models.assert_same_tensors(gradients(twin, program, False), expected)


class Watched:
    """Blocks' effective weights that still live when the last block ends."""

    def __init__(self, model, monkeypatch):
        self.made, self.alive = [], []
        monkeypatch.setattr(masked_weight, "read_only", self._read_only)
        for number, block in enumerate(model.base_model.model.blocks):
            block.register_forward_hook(lambda *_, number=number: self._count(number))

    def _read_only(self, weight, target):
        made = read_only(weight, target)
        if "blocks" in target:
            self.made.append(weakref.ref(made))
        return made

    def _count(self, number):
        if number == 1:
            self.alive.append(sum(one() is not None for one in self.made))


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["none", "plain", "reentrant"])
def test_weights_of_a_checkpointed_part_end_with_it(reentrant, monkeypatch):
    model = two_tasks()
    watched = Watched(model, monkeypatch)
    model.base_model.model.reentrant = reentrant
    model(batch(0))
    assert len(watched.made) == 2
    assert watched.alive == [2 if reentrant is None else 1]
