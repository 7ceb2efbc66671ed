"""Masks that training draws (selector "sample"): each kept with the chance sigmoid(S - mu)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.errors import PemnWarning
from pemn_surgery.masks.flip import flipped
from pemn_surgery.masks.product import masked_straight_through
from pemn_surgery.masks.selector import Selector
from pemn_surgery.masks.sign_delta import _straight_through
from pemn_surgery.masks.straight_through import straight_through
from tests.adapters import models
from tests.oracles import assert_near, assert_same

LIKELIEST = Selector("sample", 0.5, 0.25)
SAMPLED = LIKELIEST.drawing()
FORMS = ["product", "scaled", "flip", "sign_delta"]


def numbers(shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def made(form, weight, scores, seed):
    """The effective weight of a drawn mask, and the mask, drawn once more from the same seed."""
    torch.manual_seed(seed)
    mask = SAMPLED.mask(scores)
    torch.manual_seed(seed)
    if form == "flip":
        return straight_through(weight, scores, SAMPLED, flipped), mask
    if form == "sign_delta":
        steps = torch.tensor(0.5, dtype=weight.dtype)
        return _straight_through(weight, scores, mask, steps, SAMPLED), mask
    return masked_straight_through(weight, scores, SAMPLED, scaled=form == "scaled"), mask


def by_hand(form, weight, scores, mask):
    """The same of plain operations: the mask's gradient is that of the chance."""
    chance = 1 / (1 + torch.exp(-(scores - 0.25)))
    soft = mask.to(chance.dtype) + chance - chance.detach()
    if form == "flip":
        return weight * (2 * soft - 1 - (chance - chance.detach()))
    if form == "sign_delta":
        return weight + 0.5 * (2 * soft - 1 - (chance - chance.detach()))
    return weight * soft / (soft.mean().sqrt() if form == "scaled" else 1.0)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.sampled_from([(1,), (7,), (3, 5), (4, 2, 3, 3)]),
    st.integers(0, 99),
)
def test_values_and_gradients(form, shape, seed):
    weight = numbers(shape, seed, torch.float64).requires_grad_()
    scores, pull = numbers(shape, seed + 1, torch.float64), numbers(shape, seed + 2, torch.float64)
    scores.requires_grad_()
    found, mask = made(form, weight, scores, seed)
    wanted = by_hand(form, weight, scores, mask)
    if mask.any() or form != "scaled":
        assert_near(found.detach(), wanted.detach(), 1e-7)
        grads = torch.autograd.grad(found, (weight, scores), pull)
        oracle = torch.autograd.grad(wanted, (weight, scores), pull)
        for one, other in zip(grads, oracle, strict=True):
            assert_near(one, other, 1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_can_be_differentiated_again(form):
    weight, scores = numbers((4, 5), 0, torch.float64), numbers((4, 5), 1, torch.float64)
    weight.requires_grad_()
    scores.requires_grad_()
    seconds = []
    for of in (made(form, weight, scores, 3)[0], None):
        one = by_hand(form, weight, scores, made(form, weight, scores, 3)[1]) if of is None else of
        (first,) = torch.autograd.grad((one**2).sum(), scores, create_graph=True)
        seconds.append(torch.autograd.grad(first.sum(), weight)[0])
    assert_near(seconds[0], seconds[1], 1e-6)


def test_chances_are_those_of_the_scores():
    scores = torch.tensor([-3.0, -1.0, 0.25, 1.0, 3.0, 30.0, -30.0])
    torch.manual_seed(0)
    draws = torch.stack([SAMPLED.mask(scores) for _ in range(20_000)]).float().mean(0)
    assert_near(draws, torch.sigmoid(scores - 0.25), 0.015)
    assert LIKELIEST.mask(scores).tolist() == [False] * 3 + [True] * 3 + [False]
    for name in ("topk", "threshold", "topk_signed"):
        other = Selector(name, 0.5, 0.0)
        assert other.drawing() is other


def test_training_draws_and_evaluation_does_not(tmp_path):
    model = pemnify(
        models.net(), bank="own", selector="sample", score_init="normal", score_mean=0.0
    )
    layer = models.mask_layers(model)["conv2.weight"]
    likeliest = layer.mask_of("default").scores > 0
    assert 0.3 < likeliest.float().mean() < 0.7
    model.train()
    torch.manual_seed(1)
    drawn = [(layer() != 0).clone() for _ in range(4)]
    assert len({tuple(one.flatten().tolist()) for one in drawn}) == 4
    torch.manual_seed(1)
    assert_same(layer() != 0, drawn[0])
    assert_same(layer.mask_of("default").mask(), likeliest)
    model.eval()
    before = torch.get_rng_state()
    assert_same(layer() != 0, likeliest)
    assert_same(torch.get_rng_state(), before)
    expected = models.logits(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(models.net(), str(tmp_path))
    models.assert_equal(models.logits(loaded.eval()), expected)
    assert loaded.peft_config["default"].selector == "sample"
    with pytest.warns(PemnWarning, match="holds bits, not scores"):
        again = PeftModel.from_pretrained(models.net(), str(tmp_path), is_trainable=True)
    scores = models.mask_layers(again)["conv2.weight"].mask_of("default").scores
    assert_same(scores > 0, likeliest)


def test_a_new_mask_on_a_model_in_eval_mode_draws_nothing():
    model = pemnify(models.net().eval(), bank="own", selector="sample")
    layer = models.mask_layers(model)["conv2.weight"]
    assert_same(layer().detach(), layer.fill())


def test_first_scores():
    own = PemnConfig(bank="own", selector="sample", threshold=0.5)
    assert own.score_init == 4.5  # chances of .98
    assert PemnConfig(selector="sample").score_init == "kaiming_uniform"
    assert PemnConfig(selector="sample", seed=3).seed == 3


def test_scores_learn_what_is_needed():
    """Two of four inputs count: their weights stay, the others' go."""
    torch.manual_seed(0)
    net = nn.Linear(4, 1, bias=False)
    nn.init.ones_(net.weight)
    model = pemnify(nn.Sequential(net), bank="own", selector="sample", score_init=0.0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(150):
        x = torch.randn(64, 4)
        loss = (model(x).squeeze(1) - x[:, 0] - x[:, 2]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert net.weight.tolist() == [[1.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_what_runs_again_for_the_gradient_draws_the_same(reentrant):
    """Checkpoints put torch's generator back, as they do for dropout."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 2)
            self.again = False

        def forward(self, x):
            if self.again:
                return self.last(checkpoint(self.first, x, use_reentrant=reentrant))
            return self.last(self.first(x))

    torch.manual_seed(0)
    model = pemnify(Two(), bank="own", selector="sample", score_init=0.0).train()
    net = model.base_model.model
    found = []
    for net.again in (False, True):
        model.zero_grad()
        torch.manual_seed(5)
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
        model(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert len(found[0]) >= 2
    for one, other in zip(*found, strict=True):
        assert_same(one, other)
