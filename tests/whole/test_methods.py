"""The papers' claims and whole training runs, through the public verbs, against slow loops."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.masks.attached import find_masked
from tests import oracles

# ---- Self-Masking Networks, theorems 1 and 2 --------------------------------------------------
# Weights, inputs and targets are small whole numbers, learning rates powers of two: every product
# and sum is exact in float32, so "identical" means identical.


def whole(seed, *shape):
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def linear_net(seed):
    net = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False))
    for place, layer in enumerate(net):
        layer.weight.data = whole(seed + place, *layer.weight.shape)
    return net


def masks_and_scores(model):
    children = [find_masked(layer, "weight") for layer in model.base_model.model]
    chosen = [child.pemn_masks["default"] for child in children]
    assert len(chosen) == 2
    return [m.mask() for m in chosen], [m.scores for m in chosen]


def run(seed, lr, start, mu, steps=5, momentum=0.0, decay=0.0):
    """The masks before every step and after the last."""
    config = {"bank": "own", "selector": "threshold", "score_init": start, "threshold": mu}
    model = pemnify(linear_net(seed), **config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr, momentum=momentum, weight_decay=decay)
    history = []
    for step in range(steps):
        history.append(masks_and_scores(model)[0])
        optimizer.zero_grad()
        x, y = whole(seed + 10 + step, 4, 5), whole(seed + 50 + step, 4, 3)
        ((model(x) - y).square().sum() / 2).backward()
        optimizer.step()
    masks, scores = masks_and_scores(model)
    assert all((score * 2**14 == (score * 2**14).round()).all() for score in scores)
    assert all(
        score.abs().max() < 2**9 for score in scores
    )  # 14 + 9 < 24 bits: nothing was rounded
    return [*history, masks]


def same(one, two):
    assert len(one) == len(two) > 1
    return all(
        torch.equal(a, b) for m, n in zip(one, two, strict=True) for a, b in zip(m, n, strict=True)
    )


def flips(history):
    """How often a weight was dropped and how often it came back."""
    down = up = 0
    for before, after in itertools.pairwise(history):
        for one, two in zip(before, after, strict=True):
            down += int((one & ~two).sum())
            up += int((~one & two).sum())
    return down, up


SEEDS = st.integers(0, 10_000)
RATES = st.sampled_from([2.0**-7, 2.0**-6, 2.0**-5])
DYADIC = st.integers(-64, 64).map(lambda number: number / 16)


@settings(max_examples=25)
@given(SEEDS, RATES, DYADIC, DYADIC, st.sampled_from([0.0, 0.5]))
def test_theorem_1(seed, lr, shift, margin, momentum):
    """Shifting S0 and mu by the same amount changes nothing under SGD without weight decay."""
    if momentum:
        lr = lr / 4
    reference = run(seed, lr, margin, 0.0, momentum=momentum)
    assert same(run(seed, lr, margin + shift, shift, momentum=momentum), reference)


@settings(max_examples=25)
@given(SEEDS, RATES, DYADIC.filter(lambda s: s != 0), st.sampled_from([0.25, 0.5, 2.0, 4.0]))
def test_theorem_2(seed, lr, start, factor):
    """With mu = 0, a S0 at learning rate a lr is S0 at lr."""
    lr = lr / 4
    assert same(run(seed, lr * factor, start * factor, 0.0), run(seed, lr, start, 0.0))


@settings(max_examples=25)
@given(SEEDS, RATES)
def test_both_theorems_as_in_the_paper(seed, lr):
    """(lr 50, S0 1.0, mu 0) and (lr 100, S0 2.5, mu .5) train identically; here lr 50 is ``lr``."""
    assert same(run(seed, 2 * lr, 2.5, 0.5), run(seed, lr, 1.0, 0.0))


@pytest.mark.parametrize("seed", [2, 6, 8, 10])
def test_one_change_alone_is_not_the_same(seed):
    lr = 2.0**-5
    reference = run(seed, lr, 1.0, 0.0)
    down, up = flips(reference)
    assert down > 0, "nothing was learned, so nothing is shown"
    assert up > 0
    assert same(run(seed, 2 * lr, 2.5, 0.5), reference)
    assert not same(run(seed, 2 * lr, 1.0, 0.0), reference)
    assert not same(run(seed, lr, 2.5, 0.0), reference)
    assert not same(run(seed, lr, 1.0, 0.5), reference)


def test_weight_decay_breaks_theorem_1():
    reference = run(0, 2.0**-5, 1.0, 0.0, steps=3)
    assert same(run(0, 2.0**-5, 3.0, 2.0, steps=3), reference)
    assert not same(run(0, 2.0**-5, 3.0, 2.0, steps=3, decay=2.0**3), reference)


@pytest.mark.parametrize("seed", [1, 3, 4])
def test_theorems_with_the_scale(seed):
    """With 1 / sqrt(mean(M)) numbers are rounded, so this runs in float64."""

    def masks(lr, start, mu):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(5, 8, bias=False), nn.Linear(8, 3, bias=False)).double()
        config = PemnConfig(
            bank="own", selector="threshold", score_init=start, threshold=mu, scale="sqrt_density"
        )
        model = get_peft_model(net, config, autocast_adapter_dtype=False)
        scores = masks_and_scores(model)[1]
        assert all(score.dtype == torch.float64 for score in scores)
        optimizer = torch.optim.SGD(scores, lr=lr, momentum=0.9)
        history = []
        for _ in range(12):
            history.append(masks_and_scores(model)[0])
            x, y = torch.randn(16, 5).double(), torch.randn(16, 3).double()
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        return [*history, masks_and_scores(model)[0]]

    reference = masks(4.0, 1.0, 0.0)
    assert min(flips(reference)) > 0
    assert same(masks(8.0, 2.5, 0.5), reference)
    assert same(masks(4.0, 1.25, 0.25), reference)
    assert not same(masks(8.0, 1.0, 0.0), reference)
    assert not same(masks(4.0, 2.5, 0.0), reference)
    assert not same(masks(4.0, 1.0, 0.5), reference)


# ---- whole runs of the presets ----------------------------------------------------------------

STEPS = 6


class Net(nn.Module):
    """Convolution, BatchNorm, convolution, head: what every preset treats differently."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.mix = nn.Conv2d(6, 6, 1, bias=False)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.fc(self.mix(x).relu().mean((2, 3)))


SHAPE_OF = {"conv": (6, 3, 3, 3), "mix": (6, 6, 1, 1), "fc": (4, 6)}


def pretrained():
    torch.manual_seed(11)
    net = Net()
    net.norm.running_mean.normal_(std=0.1)
    net.norm.running_var.uniform_(0.5, 1.5)
    net.norm.weight.data.uniform_(0.5, 1.5)
    net.norm.bias.data.normal_(std=0.1)
    return net


def data(step):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn((8, 3, 6, 6), generator=generator)
    return x, torch.randint(4, (8,), generator=generator)


def rng_values(kind, stream, shape, size):
    """Numbers of our own generator (tests/numbers/test_rng.py checks it)."""
    from pemn_surgery.numbers import rng

    count = torch.Size(shape).numel()
    return torch.from_numpy(getattr(rng, kind)(0, stream, count, size)).view(shape)


def fan(shape):
    return torch.Size(shape[1:]).numel()


class Slow:
    """A training run in plain tensors: no modules, no autograd functions, no optimizer."""

    def __init__(self, net, fills, scores, rule, *, magnitude, scaled, trained, evaluating):
        self.fills, self.scores, self.rule = fills, scores, rule
        self.magnitude, self.scaled, self.evaluating = magnitude, scaled, evaluating
        self.rest = {
            name: net.get_parameter(name).detach().clone()
            for name in ("norm.weight", "norm.bias", "fc.weight", "fc.bias")
        }
        self.trained = trained
        self.mean, self.variance = net.norm.running_mean.clone(), net.norm.running_var.clone()

    def weight_of(self, name, leaf):
        weight = self.fills[name] * leaf
        return weight / leaf.mean().sqrt() if self.scaled else weight

    def norm(self, x, weight, bias):
        """Ioffe and Szegedy 2015."""
        if self.evaluating:
            mean, variance = self.mean, self.variance
        else:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            n = x.numel() // x.shape[1]
            self.mean = 0.9 * self.mean + 0.1 * mean.detach()
            self.variance = 0.9 * self.variance + 0.1 * variance.detach() * n / (n - 1)
        shape = (1, -1, 1, 1)
        x = (x - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()
        return x * weight.view(shape) + bias.view(shape)

    def step(self, x, y, update):
        leaves = {n: self.rule(s).float().requires_grad_() for n, s in self.scores.items()}
        rest = {name: value.clone().requires_grad_() for name, value in self.rest.items()}
        weights = {name: self.weight_of(name, leaf) for name, leaf in leaves.items()}
        head = weights.get("fc", rest["fc.weight"])
        x = self.norm(F.conv2d(x, weights["conv"]), rest["norm.weight"], rest["norm.bias"]).relu()
        out = F.linear(F.conv2d(x, weights["mix"]).relu().mean((2, 3)), head, rest["fc.bias"])
        loss = (out.logsumexp(1) - out[torch.arange(len(y)), y]).mean()
        loss.backward()
        grads = []
        for name, score in self.scores.items():
            grad = leaves[name].grad
            grads.append(grad * score.sign() if self.magnitude else grad)
        values = [*self.scores.values(), *(self.rest[name] for name in self.trained)]
        grads += [rest[name].grad for name in self.trained]
        update(values, grads)
        return float(loss.detach())


def normal_std(shape):
    return (2 / fan(shape)) ** 0.5


def kaiming_scores():
    """kaiming_uniform(a=sqrt(5)): U(-b, b) with b = 1 / sqrt(fan_in)."""
    return {
        name: rng_values("uniform", f"scores/{name}.weight", shape, fan(shape) ** -0.5)
        for name, shape in SHAPE_OF.items()
    }


def constant_scores(value, names):
    return {name: torch.full(SHAPE_OF[name], value) for name in names}


def largest_first_fills():
    vector = rng_values("normal", "bank", (6 * 27,), normal_std((6, 3, 3, 3)))
    return {n: vector[: torch.Size(s).numel()].view(s).clone() for n, s in SHAPE_OF.items()}


def signed_constant_fills():
    return {
        name: rng_values("signs", f"weight/{name}.weight", shape, normal_std(shape))
        for name, shape in SHAPE_OF.items()
    }


def own_fills(names):
    net = pretrained()
    return {name: net.get_parameter(f"{name}.weight").detach().clone() for name in names}


def half(scores):
    return oracles.topk(scores, 0.5)


ALL, CONVS = ("conv", "mix", "fc"), ("conv", "mix")
# preset: (changes, optimizer, its oracle, fills, scores, rule, flags of Slow)
PRESETS = {
    "pemn": (
        {},
        lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.005),
        lambda v, g, s: oracles.adamw(v, g, s, 0.05, 0.005),
        largest_first_fills,
        kaiming_scores,
        half,
        {"magnitude": True, "trained": ("norm.weight", "norm.bias", "fc.bias")},
    ),
    "edge_popup": (
        {},
        lambda p: torch.optim.SGD(p, lr=2.0, momentum=0.9, weight_decay=1e-4),
        lambda v, g, s: oracles.sgd(v, g, s, 2.0, 0.9, 1e-4),
        signed_constant_fills,
        kaiming_scores,
        half,
        {"magnitude": True},
    ),
    "piggyback": (
        {"modules_to_save": ["fc"]},
        lambda p: torch.optim.Adam(p, lr=2e-3),
        lambda v, g, s: oracles.adamw(v, g, s, 2e-3, 0.0),
        lambda: own_fills(CONVS),
        lambda: constant_scores(1e-2, CONVS),
        lambda scores: oracles.threshold(scores, 5e-3),
        {"evaluating": True, "trained": ("fc.weight", "fc.bias")},
    ),
    "self_masking": (
        {},
        lambda p: torch.optim.SGD(p, lr=50.0, momentum=0.9),
        lambda v, g, s: oracles.sgd(v, g, s, 50.0, 0.9, 0.0),
        lambda: own_fills(ALL),
        lambda: constant_scores(1.0, ALL),
        lambda scores: oracles.threshold(scores, 0.0),
        {"scaled": True},
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_whole_runs(name):
    """Equal fills, masks equal to the last bit after every step, scores equal but for rounding."""
    changes, make_optimizer, update, fills, scores, rule, flags = PRESETS[name]
    model = pemnify(pretrained(), PemnConfig.preset(name, **changes))
    inner = model.base_model.model
    flags = {"magnitude": False, "scaled": False, "trained": (), "evaluating": False, **flags}
    slow = Slow(pretrained(), fills(), scores(), rule, **flags)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == len(slow.scores) + len(slow.trained)
    optimizer, state = make_optimizer(trainable), {}
    children = {n: find_masked(inner.get_submodule(n), "weight") for n in slow.scores}
    model.train()
    first = {n: rule(s) for n, s in slow.scores.items()}
    for step in range(STEPS):
        x, y = data(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        expected = slow.step(x, y, lambda values, grads: update(values, grads, state))
        assert abs(loss.item() - expected) < 2e-5 * max(1.0, abs(expected))
        for place, child in children.items():
            oracles.assert_same(child.fill().detach(), slow.fills[place])
            mask = child.pemn_masks["default"]
            oracles.assert_same(mask.mask(), rule(slow.scores[place]))
            oracles.assert_near(mask.scores, slow.scores[place], 2e-3)
    assert any(not torch.equal(first[n], rule(slow.scores[n])) for n in first), "no mask moved"
    oracles.assert_near(inner.norm.running_mean, slow.mean, 1e-4)
    oracles.assert_near(inner.norm.running_var, slow.variance, 1e-4)
    for rest, value in slow.rest.items():
        if rest != "fc.weight" or "fc" not in slow.scores:
            owner, parameter = rest.split(".")
            oracles.assert_near(getattr(inner.get_submodule(owner), parameter), value, 2e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_start_as_the_papers_say(name):
    changes, _, _, fills, scores, rule, _ = PRESETS[name]
    inner = pemnify(pretrained(), PemnConfig.preset(name, **changes)).base_model.model
    expected_fills, expected_scores = fills(), scores()
    assert len(expected_scores) >= 2
    for place, start in expected_scores.items():
        child = find_masked(inner.get_submodule(place), "weight")
        mask = child.pemn_masks["default"]
        oracles.assert_same(mask.scores.detach(), start)
        oracles.assert_same(child.fill().detach(), expected_fills[place])
        wanted = expected_fills[place] * rule(start)
        oracles.assert_near(inner.get_submodule(place).weight, wanted, 1e-7)


def test_the_pretrained_base_never_moves():
    """Piggyback and Self-Masking: training changes masks, never the weights under them."""
    for name in ("piggyback", "self_masking"):
        changes, make_optimizer, *_ = PRESETS[name]
        net = pretrained()
        before = copy.deepcopy(net.state_dict())
        model = pemnify(net, PemnConfig.preset(name, **changes))
        optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
        model.train()
        for step in range(3):
            x, y = data(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        restored = model.unload().state_dict()
        assert set(restored) == set(before)
        saved_whole = {"fc.weight", "fc.bias"} if "modules_to_save" in changes else set()
        for key in set(before) - saved_whole:  # PEFT leaves a module that was saved whole trained
            oracles.assert_same(restored[key], before[key])
