"""A gradient is overwritten where nobody else holds it, and never where somebody does."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pemn_surgery.kernels import library
from pemn_surgery.masks import product, unshared
from pemn_surgery.masks.read_only import read_only
from pemn_surgery.masks.selector import Selector
from tests import oracles

SIDE = 8
TOPK = Selector("topk", 0.5, 0.0)


class Seen:
    """What one backward pass left behind: gradients, and whatever else somebody holds."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x, frozen, scores, other = torch.randn(4, SIDE, SIDE, generator=generator)
        self.scores, self.other = nn.Parameter(scores), nn.Parameter(other)
        self.before = self.other.exp()  # what was made first gets its gradient last
        self.stack_before = self.other.exp().unsqueeze(0)
        made = product.masked_straight_through(frozen, self.scores, TOPK, scaled=False)
        self.weight = read_only(made, "weight")
        self.held = []

    def loss(self, weight):
        return (F.linear(self.x, weight) ** 2).sum()

    def gradients(self):
        grads = [self.scores.grad, self.other.grad]
        return [g for g in [*grads, *self.held] if g is not None]


def keep(seen):
    return lambda grad, *_: seen.held.append(grad)


def by_hook(seen):
    seen.weight.register_hook(keep(seen))
    seen.loss(seen.weight).backward()


def by_hook_as_view(seen):
    seen.weight.register_hook(lambda grad: seen.held.append(grad.detach()))
    seen.loss(seen.weight).backward()


def by_hook_before_the_node(seen):
    node: Any = seen.weight.grad_fn.next_functions[0][0]
    node.register_prehook(lambda grads: seen.held.extend(grads))
    seen.loss(seen.weight).backward()


def by_hook_of_the_product(seen):
    out: Any = F.linear(seen.x, seen.weight)
    out.grad_fn.register_hook(lambda into, _: seen.held.extend(g for g in into if g is not None))
    (out**2).sum().backward()


def by_retained_gradient(seen):
    seen.weight.retain_grad()
    seen.loss(seen.weight).backward()
    seen.held.append(seen.weight.grad)


def by_asking_for_both(seen):
    seen.held.extend(torch.autograd.grad(seen.loss(seen.weight), [seen.weight, seen.scores]))


def by_accumulating_into_both(seen):
    seen.loss(seen.weight).backward(inputs=[seen.scores, seen.weight])
    seen.held.append(seen.weight.grad)


def by_giving_it(seen):
    seen.held.append(torch.ones(SIDE, SIDE))
    seen.weight.backward(seen.held[0])


def by_a_sum(seen):
    seen.loss(seen.weight + seen.other).backward()


def by_a_sum_the_other_way(seen):
    seen.loss(seen.other + seen.weight).backward()


def by_a_sum_with_what_was_made_before(seen):
    seen.loss(seen.before + seen.weight).backward()


def by_a_sum_with_what_was_made_after(seen):
    seen.loss(seen.weight + (seen.other * 1)).backward()


def by_a_sum_of_views(seen):
    seen.loss((seen.weight.t() + seen.other).t()).backward()


def by_a_sum_of_views_with_what_was_made_before(seen):
    seen.loss((seen.weight.t() + seen.before).t()).backward()


def by_a_view_of_what_goes_elsewhere(seen):
    stack = torch.bmm(seen.x.unsqueeze(0), seen.weight.unsqueeze(0) + seen.stack_before)
    (stack**2).sum().backward()


def by_a_sum_with_a_view(seen):
    seen.loss(seen.weight.view(-1).view(SIDE, SIDE) + seen.other.t()).backward()


def by_a_row_of_both(seen):
    joined = torch.cat([seen.weight, seen.other])
    (F.linear(seen.x, joined) ** 2).sum().backward()


def by_a_stack_of_itself(seen):
    joined = torch.stack([seen.weight, seen.weight, seen.other])
    (joined @ seen.x).square().sum().backward()


def by_an_expanded_sum(seen):
    (seen.weight + seen.other).sum().backward()


def by_reading_twice(seen):
    (seen.loss(seen.weight) + F.linear(seen.x, seen.weight).sum()).backward()


def by_going_twice(seen):
    loss = seen.loss(seen.weight + seen.other)
    loss.backward(retain_graph=True)
    loss.backward()


HOLDERS = [value for name, value in list(globals().items()) if name.startswith("by_")]


def through(way, monkeypatch, *, may_overwrite):
    with monkeypatch.context() as patch:
        if not may_overwrite:
            patch.setattr(product, "is_unshared", lambda grads: False)
        seen = Seen()
        way(seen)
    return seen.gradients()


@pytest.mark.parametrize("way", HOLDERS)
def test_what_others_hold_stays_what_it_was(way, monkeypatch):
    expected = through(way, monkeypatch, may_overwrite=False)
    found = through(way, monkeypatch, may_overwrite=True)
    assert len(expected) >= 1
    assert len(expected) == len(found)
    for one, other in zip(expected, found, strict=True):
        oracles.assert_same(one, other)


def watched(monkeypatch):
    """Where gradients lie that reach the scores, and whether they may be overwritten."""
    seen = []

    def pull(grad, *args, in_place, **kwargs):
        seen.append((grad.data_ptr(), in_place))
        return original(grad, *args, in_place=in_place, **kwargs)

    original = product.product.pull
    monkeypatch.setattr(product.product, "pull", pull)
    return seen


@pytest.mark.skipif(library.kernels() is None, reason="compiled code alone writes in place")
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(SIDE, SIDE), (4, SIDE)),
        (nn.Linear(SIDE, SIDE), (2, 3, SIDE)),
        (nn.Conv2d(2, 4, 3), (2, 2, 5, 5)),
        (nn.Conv1d(4, 4, 1), (2, 4, 5)),
    ],
)
def test_an_unshared_gradient_is_overwritten(layer, shape, monkeypatch):
    frozen = layer.weight.detach().clone()
    scores: Any = nn.Parameter(torch.randn(frozen.shape))
    weight = product.masked_straight_through(frozen, scores, TOPK, scaled=False)
    seen = watched(monkeypatch)
    del layer.weight
    layer.weight = read_only(weight, "w")
    layer(torch.randn(shape)).square().sum().backward()
    ((place, in_place),) = seen
    assert in_place
    assert scores.grad.data_ptr() == place


def test_a_gradient_of_another_type_is_not_overwritten(monkeypatch):
    scores: Any = nn.Parameter(torch.randn(SIDE, SIDE))
    weight = product.masked_straight_through(
        torch.randn(SIDE, SIDE), scores, TOPK, scaled=False, dtype=torch.bfloat16
    )
    seen = watched(monkeypatch)
    F.linear(torch.randn(2, SIDE).bfloat16(), weight).sum().backward()
    ((place, _),) = seen
    assert scores.grad.dtype == torch.float32
    assert scores.grad.data_ptr() != place


def test_what_is_known_of_fresh_gradients_is_of_two_kinds():
    fresh = unshared._fresh()
    assert sorted(one.base_tensors > 0 for one in fresh) == [False, True]
