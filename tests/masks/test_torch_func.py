"""Every derivative that torch can take of a masked model, against the same model in the open.

The oracle is a plain network whose weights are W x m(S) x c(m), where m is a number that equals the
mask at the present scores S0 and moves with slope one: m = M + |S| - |S0| for "topk", M + S - S0
for "threshold". Its derivatives of every order are what "straight through" means, and it is made of
nothing but sums and products, so torch's transforms of it need no trust in ours.
"""

import copy
from operator import attrgetter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)

from pemn_surgery import PemnConfig, from_finetuned, pemnify
from pemn_surgery.coding import bits
from pemn_surgery.errors import MaskedWeightError, MaskNotLoadedError
from pemn_surgery.masks.mixture import Mixture
from pemn_surgery.masks.selector import Selector
from tests import oracles
from tests.adapters import models

# torch's own, when forward-mode gradients are first used, and in `linearize` of any module
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]

CASES = {
    "own": {"bank": "own", "selector": "topk"},
    "own_threshold": {"bank": "own", "selector": "threshold", "score_init": "kaiming_uniform"},
    "own_threshold_scaled": {
        "bank": "own", "selector": "threshold", "score_init": "kaiming_uniform",
        "scale": "sqrt_density",
    },
    "mp_scaled": {"bank": "mp", "scale": "sqrt_density", "density": 0.3},
    "rp_tiled": {"bank": "rp", "ratio": 0.1},
    "two": {"bank": "own", "selector": "topk", "scale": "sqrt_density"},
    "sign_delta": {},
}  # fmt: skip
WIDE = {"dtype": torch.float64}


def plain(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **WIDE)


def masked(case):
    """The network with masks, in double precision; scores far from their initial values."""
    if case == "sign_delta":
        model = from_finetuned(plain(0), plain(1), "sign_delta", is_trainable=True)
    else:
        model = pemnify(plain(), PemnConfig(**CASES[case]), adapter_name="a")
        if case == "two":
            model.add_adapter("b", PemnConfig(**CASES[case]))
            model.base_model.set_adapter(["a", "b"])
    model = model.base_model.model.double()
    for place, (name, value) in enumerate(model.named_parameters()):
        if name.endswith("scores"):
            value.data.copy_(randn(*value.shape, seed=place))
    return model


def trained(model):
    """The tensors that adapters train, as plain ones; never empty."""
    found = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert sum("scores" in name or "row_scale" in name for name in found) >= 2
    return found


def chosen(mask):
    if mask.selector.name == "topk":
        return oracles.topk(mask.scores, mask.selector.density)
    return oracles.threshold(mask.scores, mask.selector.threshold)


def in_the_open(model):
    """Return params, x -> output of a plain network with weights made as the module says."""
    fixed = {}
    for target, layer in models.mask_layers(model).items():
        masks = [(name, layer.pemn_masks[name]) for name in layer.names_in_use()]
        assert masks
        start = {n: (None if m.scores is None else m.scores.detach().clone()) for n, m in masks}
        ones = {n: (m.mask() if m.scores is None else chosen(m)).double() for n, m in masks}
        fixed[target] = (layer.fill().detach().clone(), masks, start, ones)

    def weights(params):
        made = {}
        for target, (weight, masks, start, ones) in fixed.items():
            path, _, parameter = target.rpartition(".")
            weight = params.get(target, weight)
            for name, mask in masks:
                prefix = f"{path}.masked_{parameter}.pemn_masks.{name}"
                if mask.adds:
                    scale = params[f"{prefix}.row_scale"]
                    weight = weight + scale[:, None] * (2 * ones[name] - 1)
                    continue
                size = torch.abs if mask.selector.uses_magnitude else torch.clone
                number = ones[name] + size(params[f"{prefix}.scores"]) - size(start[name])
                weight = weight * number
                if mask.scaled:
                    weight = weight / number.mean().sqrt()
            made[target] = weight
        return made

    def call(params, x):
        owned = {}
        for name, value in params.items():
            if "task_tensors" in name:  # path.task_tensors.pemn_tensors.adapter.tensor
                path, _, rest = name.partition(".task_tensors.")
                owned[f"{path}.{rest.rpartition('.')[2]}"] = value
        return functional_call(body, {**in_force, **owned, **weights(params)}, (x,))

    body = plain()
    in_force = {n: attrgetter(n)(model).detach().clone() for n, _ in body.named_parameters()}
    return call


def loss_of(call):
    def loss(params, x, y):
        return F.mse_loss(call(params, x), y, reduction="sum")

    return loss


def setting(case):
    """Return both models as functions of trained tensors, these tensors, a batch and labels."""
    model = masked(case)
    oracle = in_the_open(model)
    return (
        lambda params, x: functional_call(model, params, (x,)),
        oracle,
        trained(model),
        (randn(4, 5, seed=50), randn(4, 3, seed=51)),
    )


def assert_trees_near(actual, expected, tolerance=2e-6):  # c is a float32
    left, spec = torch.utils._pytree.tree_flatten(actual)
    right, other = torch.utils._pytree.tree_flatten(expected)
    assert spec == other
    assert left
    assert max(float(value.detach().abs().max()) for value in right) > 0
    for one, two in zip(left, right, strict=True):
        oracles.assert_near(one, two, tolerance)


def directions(params, seed=70):
    return {n: randn(*p.shape, seed=seed + place) for place, (n, p) in enumerate(params.items())}


def per_sample(call, params, x, y):
    loss = loss_of(call)
    return vmap(grad(lambda p, a, b: loss(p, a[None], b[None])), (None, 0, 0))(params, x, y)


def dual(call, params, x, y):
    tangents = directions(params)
    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(p, tangents[n]) for n, p in params.items()}
        value = forward_ad.unpack_dual(loss_of(call)(duals, x, y))
        return value.primal, value.tangent


def twice(call, params, x, y):
    """The gradient of a gradient by ordinary backward passes: no transform of torch.func."""
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    first = torch.autograd.grad(
        loss_of(call)(leaves, x, y), list(leaves.values()), create_graph=True
    )
    pulls = directions(params).values()
    inner = sum((g * pull).sum() for g, pull in zip(first, pulls, strict=True))
    return first, torch.autograd.grad(inner, list(leaves.values()), materialize_grads=True)


def scores_alone(params):
    return {n: p for n, p in params.items() if "scores" in n or "row_scale" in n}


DERIVATIVES = {
    "grad": lambda call, p, x, y: grad(loss_of(call))(p, x, y),
    "per_sample": per_sample,
    "jvp": lambda call, p, x, y: jvp(lambda q: call(q, x), (p,), (directions(p),)),
    "vjp": lambda call, p, x, y: vjp(lambda q: call(q, x), p)[1](y),
    "jacrev": lambda call, p, x, y: jacrev(call)(p, x),
    "jacfwd": lambda call, p, x, y: jacfwd(call)(p, x),
    "linearize": lambda call, p, x, y: linearize(lambda q: call(q, x), p)[1](directions(p)),
    "forward_over_reverse": lambda call, p, x, y: jvp(
        lambda q: grad(loss_of(call))(q, x, y), (p,), (directions(p),)
    ),
    "reverse_over_reverse": lambda call, p, x, y: vjp(
        lambda q: grad(loss_of(call))(q, x, y), p
    )[1](directions(p)),
    "hessian": lambda call, p, x, y: hessian(
        lambda q: loss_of(call)({**p, **q}, x, y)
    )(scores_alone(p)),
    "dual_numbers": dual,
    "autograd_twice": twice,
}  # fmt: skip


@pytest.mark.parametrize("derivative", list(DERIVATIVES))
@pytest.mark.parametrize("case", list(CASES))
def test_derivatives(case, derivative):
    ours, oracle, params, (x, y) = setting(case)
    take = DERIVATIVES[derivative]
    assert_trees_near(take(ours, params, x, y), take(oracle, params, x, y))


@pytest.mark.parametrize("case", list(CASES))
def test_per_sample_gradients_are_those_of_single_samples(case):
    """No transform at all on the other side: one ordinary backward pass a sample."""
    model = masked(case)
    params, x, y = trained(model), randn(4, 5, seed=50), randn(4, 3, seed=51)
    found = per_sample(lambda p, a: functional_call(model, p, (a,)), params, x, y)
    for place in range(len(x)):
        model.zero_grad()
        F.mse_loss(model(x[place : place + 1]), y[place : place + 1], reduction="sum").backward()
        expected = {n: model.get_parameter(n).grad for n in params}
        assert_trees_near({n: g[place] for n, g in found.items()}, expected)


@pytest.mark.parametrize("derivative", ["grad", "jvp", "autograd_twice", "hessian"])
@pytest.mark.parametrize("case", ["own", "own_threshold_scaled", "two", "sign_delta"])
def test_derivatives_for_the_frozen_weight(case, derivative):
    """Nothing trains a frozen weight, but functional_call may ask for its gradient."""
    ours, oracle, params, (x, y) = setting(case)
    params = {**scores_alone(params), "0.weight": plain()[0].weight.detach().clone()}
    take = DERIVATIVES[derivative]
    if derivative == "hessian":
        both = [
            hessian(lambda q, call=call: loss_of(call)(q, x, y))(params) for call in (ours, oracle)
        ]
    else:
        both = [take(call, params, x, y) for call in (ours, oracle)]
    assert_trees_near(*both)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["own", "mp_scaled", "two"])
def test_compiled_per_sample_gradients(case):
    """Dynamo reads into an autograd function, and within transforms takes it for another."""
    ours, oracle, params, batch = setting(case)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *given: per_sample(ours, *given), fullgraph=True, backend="aot_eager"
    )
    assert_trees_near(compiled(params, *batch), per_sample(oracle, params, *batch))


@pytest.mark.parametrize("case", list(CASES))
def test_transforms_leave_nothing_behind(case):
    model = masked(case)
    x = randn(4, 5, seed=50)
    before = model(x)
    grads = torch.autograd.grad(before.sum(), [p for p in model.parameters() if p.requires_grad])
    params = trained(model)
    vmap(grad(lambda p, a: functional_call(model, p, (a[None],)).sum()), (None, 0))(params, x)
    jvp(lambda p: functional_call(model, p, (x,)), (params,), (directions(params),))
    after = model(x)
    oracles.assert_same(after, before)
    again = torch.autograd.grad(after.sum(), [p for p in model.parameters() if p.requires_grad])
    for one, two in zip(again, grads, strict=True):
        oracles.assert_same(one, two)


@pytest.mark.parametrize("density", [0.5, 0.3, 1.0])
def test_a_mask_of_each_of_many_scores(density):
    """Every element of a batch of scores has its own count of ones, ties broken by place."""
    scores = torch.randint(-3, 4, (7, 4, 5), generator=torch.Generator().manual_seed(1)).double()
    found = vmap(Selector("topk", density, 0.0).mask)(scores)
    assert len(found) == 7
    for one, mask in zip(scores, found, strict=True):
        oracles.assert_same(mask, oracles.topk(one, density))
    found = vmap(Selector("threshold", 0.5, 1.0).mask)(scores)
    oracles.assert_same(found, scores > 1.0)


@pytest.mark.parametrize("case", list(CASES))
def test_many_models_at_once(case):
    members = [masked(case) for _ in range(3)]
    for seed, member in enumerate(members):
        for name, value in scores_alone(dict(member.named_parameters())).items():
            value.data.copy_(randn(*value.shape, seed=seed + len(name)))
    params, buffers = stack_module_state(members)
    x = randn(4, 5, seed=50)

    def outputs(params):
        return vmap(lambda p, b: functional_call(members[0], (p, b), (x,)))(params, buffers)

    found = outputs(params)
    found.square().sum().backward()
    for place, member in enumerate(members):
        expected = member(x)
        oracles.assert_near(found[place], expected, 2e-7)
        member.zero_grad()
        expected.square().sum().backward()
        for name in trained(member):
            grad_here = params[name].grad[place]
            oracles.assert_near(grad_here, member.get_parameter(name).grad, 1e-6)


def with_bits(tmp_path, seed):
    from peft import PeftModel

    model = pemnify(plain(), bank="own", selector="topk", seed=seed)
    model.save_pretrained(str(tmp_path / str(seed)))
    return PeftModel.from_pretrained(plain(), str(tmp_path / str(seed))).base_model.model.double()


def test_many_models_of_bits(tmp_path):
    members = [with_bits(tmp_path, seed) for seed in (3, 4)]
    x = randn(4, 5, seed=50)
    params, buffers = stack_module_state(members)
    assert sum(name.endswith(".bits") for name in buffers) == 2
    with torch.no_grad():
        found = vmap(lambda p, b: functional_call(members[0], (p, b), (x,)))(params, buffers)
        expected = [member(x) for member in members]
    assert not torch.equal(*expected)
    oracles.assert_near(found, torch.stack(expected), 1e-12)


def test_a_mask_that_was_never_loaded_is_refused_in_transforms(tmp_path):
    model = with_bits(tmp_path, 3)
    x = randn(2, 5)
    for layer in models.mask_layers(model).values():
        mask = next(iter(layer.pemn_masks.values()))
        mask.bits = bits.empty(mask.scores.numel() if mask.scores is not None else 30)
    with pytest.raises(MaskNotLoadedError, match="never loaded"):
        vmap(lambda a: model(a[None]))(x)
    with pytest.raises(MaskNotLoadedError, match="never loaded"):
        torch.jit.trace(model, (x,))


def test_large_masks_of_bits_keep_tangents(monkeypatch):
    """What is done a piece at a time without gradients would drop a tangent."""
    monkeypatch.setattr("pemn_surgery.masks.product._PIECE", 8)
    monkeypatch.setattr("pemn_surgery.masks.sign_delta._PIECE", 8)
    model = pemnify(plain(), bank="own", selector="topk")
    model = model.base_model.model.double()
    layer = models.mask_layers(model)["0.weight"]
    mask = layer.pemn_masks["default"].mask()
    for one in models.mask_layers(model).values():
        held = one.pemn_masks["default"]
        held.bits, held.scores = bits.pack(held.mask()), None
    weight, tangent = plain()[0].weight.detach(), randn(6, 5, seed=5)

    def call(value):
        return functional_call(model[0], {"weight": value}, (torch.eye(5, **WIDE),))

    with torch.no_grad():
        out, moved = jvp(call, (weight,), (tangent,))
    oracles.assert_same(out - model[0].bias, (weight * mask).T + model[0].bias - model[0].bias)
    oracles.assert_same(moved, (tangent * mask).T)


def test_mixtures():
    model = pemnify(
        models.net(),
        PemnConfig(bank="own", selector="topk", scale="sqrt_density"),
        adapter_name="a",
    )
    model.add_adapter("b", PemnConfig(bank="own", selector="topk", scale="sqrt_density", seed=2))
    layer = models.mask_layers(model)["conv2.weight"]
    fill = layer.fill().detach().double()
    shares = torch.stack([fill * _mask_and_scale(layer, name) for name in ("a", "b")])
    assert not torch.equal(shares[0], shares[1])
    upstream = randn(*fill.shape, seed=3)

    def score(alphas):
        layer.mixture = Mixture(("a", "b"), alphas)
        try:
            return (layer.read() * upstream).square().sum()
        finally:
            layer.mixture = None

    def oracle(alphas):
        return (torch.einsum("i,i...->...", alphas, shares) * upstream).square().sum()

    alphas, direction = torch.tensor([0.3, 0.7], **WIDE), torch.tensor([1.0, -2.0], **WIDE)
    for take in (grad, hessian, jacfwd):
        oracles.assert_near(take(score)(alphas), take(oracle)(alphas), 1e-6)
    for call in (jvp,):
        for one, two in zip(
            call(score, (alphas,), (direction,)), call(oracle, (alphas,), (direction,)), strict=True
        ):
            oracles.assert_near(one, two, 1e-6)
    batch = torch.stack([alphas, direction])
    oracles.assert_near(vmap(grad(score))(batch), vmap(grad(oracle))(batch), 1e-6)
    leaf = alphas.clone().requires_grad_()
    (first,) = torch.autograd.grad(score(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), leaf)
    oracles.assert_near(second, hessian(oracle)(alphas) @ direction, 1e-6)
    (first,) = torch.autograd.grad(score(leaf), leaf, create_graph=True)
    held = [layer.mask_of(name).scores.requires_grad_() for name in ("a", "b")]
    assert torch.autograd.grad(first.sum(), held, allow_unused=True) == (None, None)


def _mask_and_scale(layer, name):
    mask = models.mask_of_layer(layer, name).double()
    return mask / mask.mean().sqrt()


def test_a_weight_given_to_a_bank_is_refused():
    model = masked("mp_scaled")
    with pytest.raises(MaskedWeightError, match=r"'0\.weight'.*Leave that name out"):
        functional_call(model, {"0.weight": torch.ones(6, 5, **WIDE)}, (randn(2, 5),))
    assert model[0]._parameters["weight"] is None
    assert model(randn(2, 5)).shape == (2, 3)


def test_the_ordinary_weight_saves_no_tensor():
    """Gradient checkpointing counts saved tensors, and memory is what training is short of."""
    model = masked("own_threshold_scaled")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        weight = model[0].weight
    assert weight.requires_grad
    assert saved == []


def test_scores_that_are_not_finite_choose_as_ever():
    model = masked("own")
    name = next(n for n in trained(model) if "scores" in n)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[:4] = torch.tensor([torch.inf, -torch.inf, 0.0, 1e30])
    x = randn(2, 5)
    expected = model(x)
    params = {n: p.detach() for n, p in model.named_parameters()}
    found = vmap(lambda a: functional_call(copy.copy(model), params, (a[None],)))(x)[:, 0]
    assert expected.isfinite().all()
    oracles.assert_near(found, expected, 1e-12)
