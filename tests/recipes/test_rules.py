"""Optimizers and schedules by name, against the papers' interpolation and torch's schedulers."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from pemn_surgery import pemnify
from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import rules

RULE = rules.Rule("sgd", 0.5, "cosine", 4, momentum=0.9)


def oracle_triangle(lr, step, steps, epochs):
    """ConvMixer's CIFAR-10 code: interpolate the epoch, the step under way counted as done."""
    epoch, within = divmod(step, steps)
    now = epoch + (within + 1) / steps
    return np.interp(now, [0, 0.4 * epochs, 0.8 * epochs, epochs], [0, lr, lr / 20, 0])


@pytest.mark.parametrize(("epochs", "steps"), [(100, 98), (10, 98), (1, 7), (3, 1)])
def test_triangle_is_the_papers_interpolation(epochs, steps):
    total = epochs * steps
    ours = [rules.triangle(0.05, i, total) for i in range(total)]
    oracle = [oracle_triangle(0.05, i, steps, epochs) for i in range(total)]
    np.testing.assert_allclose(ours, oracle, rtol=0, atol=1e-12)
    assert ours[-1] == 0


@pytest.mark.parametrize("steps", [1, 5, 196])
def test_cosine_is_torchs_cosine_annealing(steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    oracle = []
    for _ in range(steps):
        oracle.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    ours = [rules.cosine(0.1, i, steps) for i in range(steps)]
    np.testing.assert_allclose(ours, oracle, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 150, 500])
def test_warm_cosine_is_a_line_before_a_cosine(steps):
    warm = max(round(steps * 40 / 150), 1)
    line = [50 * (i + 1) / warm for i in range(warm)]
    fall = [25 * (1 + np.cos(np.pi * i / (steps - warm))) for i in range(steps - warm)]
    ours = [rules.warm_cosine(50.0, i, steps) for i in range(steps)]
    np.testing.assert_allclose(ours, line + fall, rtol=0, atol=1e-12)
    assert max(ours) == 50
    assert min(ours) > 0


@pytest.mark.parametrize("steps", [9, 50, 500])
def test_warm_linear_is_transformers(steps):
    """Theirs takes the rate of a step's beginning, 0 at first, ours rises a step sooner."""
    from transformers import get_linear_schedule_with_warmup

    warm = max(round(0.06 * steps), 1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = get_linear_schedule_with_warmup(optimizer, warm, steps)
    oracle = []
    for _ in range(steps):
        oracle.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    ours = [rules.warm_linear(0.1, i, steps) for i in range(steps)]
    np.testing.assert_allclose(ours[:warm], oracle[1 : warm + 1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours[warm:], oracle[warm:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [2, 4, 5, 21, 500])
def test_one_cycle_is_torchs(steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps, cycle_momentum=False)
    oracle = []
    for step in range(steps):
        oracle.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step + 1 < steps:
            schedule.step()
    ours = [rules.one_cycle(0.1, i, steps) for i in range(steps)]
    np.testing.assert_allclose(ours, oracle, rtol=0, atol=1e-12)


def test_scores_are_trained_by_what_is_otherwise_for_them():
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.LazyLinear(3)]
    model = nn.Sequential(*layers)
    model(torch.zeros(1, 1, 4, 4))
    model = pemnify(model, seed=0, bank="rp", ratio=1.0)
    (together,) = RULE.optimizers(model).values()
    assert len(together[0].param_groups[0]["params"]) == 2 + 2 + 2
    apart = dataclasses.replace(RULE, scores={"optimizer": "adamw", "lr": 2.0}).optimizers(model)
    (rest, rule), (scores, own) = apart["optimizer"], apart["scores"]
    assert [tuple(p.shape) for p in scores.param_groups[0]["params"]] == [(2, 1, 3, 3), (3, 8)]
    assert all(p.dim() == 1 for p in rest.param_groups[0]["params"])
    assert (type(scores), type(rest)) == (torch.optim.AdamW, torch.optim.SGD)
    assert (rule.rate(0, 9), own.rate(0, 9)) == (0.5, 2.0)


def test_a_head_is_trained_by_what_is_otherwise_for_it():
    model = nn.ModuleDict(
        {"body": nn.Linear(2, 3), "head": nn.Linear(3, 4), "ahead": nn.Linear(1, 1)}
    )
    own = dataclasses.replace(RULE, head={"lr": 2.0}).optimizers(model)
    (rest, rule), (head, otherwise) = own["optimizer"], own["head"]
    assert [tuple(p.shape) for p in head.param_groups[0]["params"]] == [(4, 3), (4,)]
    assert [tuple(p.shape) for p in rest.param_groups[0]["params"]] == [(3, 2), (3,), (1, 1), (1,)]
    assert (rule.rate(0, 9), otherwise.rate(0, 9), otherwise.head) == (0.5, 2.0, None)
    (together,) = dataclasses.replace(RULE, head={}).optimizers(model).values()
    assert len(together[0].param_groups[0]["params"]) == 6


def test_fields_that_a_rule_does_not_use_are_not_in_its_settings():
    assert set(RULE.settings()) == {
        "optimizer", "lr", "schedule", "batch", "weight_decay", "momentum", "augmentation",
    }  # fmt: skip
    apart = dataclasses.replace(RULE, scores={"lr": 2.0})
    assert apart.settings() == RULE.settings() | {"scores": {"lr": 2.0}}


@pytest.mark.parametrize("wrong", [{"optimizer": "lamb"}, {"schedule": "steps"}])
def test_unknown_names_are_refused(wrong):
    name = next(iter(wrong.values()))
    with pytest.raises(RecipeError, match=rf"'{name}' in a rule is unknown; give one of \['"):
        dataclasses.replace(RULE, **wrong)
