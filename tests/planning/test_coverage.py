"""What counts as a weight: whatever a forward multiplies its input with, under any name."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from pemn_surgery import pemnify, plan
from pemn_surgery.errors import LowCoverageWarning
from pemn_surgery.models.forward import trace
from tests.adapters.models import assert_same_tensors

SIDE = 8


class Raw(nn.Module):
    """One raw parameter (or two), and a forward that decides what it is."""

    def __init__(self, forward, **shapes):
        super().__init__()
        self.first = nn.Linear(SIDE, SIDE)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.rand(shape) + 0.1))
        self.register_buffer("kept", (torch.arange(SIDE * SIDE) % 3 > 0).view(SIDE, SIDE).float())
        self.compute = forward

    def forward(self, x):
        return self.compute(self, self.first(x))


@torch.jit.script
def scripted_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight * 2.0).relu()


class DoublingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return 2 * x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return 2 * grad @ weight.t(), 2 * x.t() @ grad


def attend(self, x):
    scores = (self.latents @ self.first.weight) @ x.t()  # made of parameters, yet queries
    return scores.softmax(-1) @ x


def experts(self, x):
    chosen = (x @ self.route).softmax(-1).topk(1).indices[:, 0]
    return torch.bmm(x[:, None], self.experts[chosen])[:, 0]


def codebook(self, x):
    codes = torch.cdist(x, self.book).argmin(-1)
    nearest = (x @ self.book.t()).argmax(-1)
    return F.embedding(codes, self.book) + F.embedding(nearest, self.book)


square = (SIDE, SIDE)

# name: (forward, shapes, the raw parameters that are weights)
WEIGHTS = {
    "times a buffer": (lambda s, x: F.linear(x, s.w * s.kept), {"w": square}, ["w"]),
    "times a gain": (
        lambda s, x: x @ (s.w * s.gain),
        {"w": square, "gain": (SIDE, 1)},
        ["w"],
    ),
    "softmax of a masked adjacency": (
        lambda s, x: (s.adj.masked_fill(s.kept == 0, -1e9).softmax(-1) @ x.t()).t(),
        {"adj": square},
        ["adj"],
    ),
    "low-rank update": (
        lambda s, x: F.linear(x, s.w + s.b @ s.a),
        {"w": square, "b": (SIDE, 2), "a": (2, SIDE)},
        ["w", "b", "a"],
    ),
    "low-rank update of a layer": (
        lambda s, x: F.linear(x, torch.addmm(s.first.weight, s.b, s.a)),
        {"b": (SIDE, 2), "a": (2, SIDE)},
        ["b", "a"],
    ),
    "times constants, then an input": (
        lambda s, x: x @ (torch.eye(SIDE) @ s.w).t(),
        {"w": square},
        ["w"],
    ),
    "vmap": (
        lambda s, x: torch.vmap(lambda row, w: w @ row, in_dims=(0, None))(x, s.w),
        {"w": square},
        ["w"],
    ),
    "vmap over weights": (
        lambda s, x: torch.vmap(lambda w: x @ (w * s.kept), out_dims=2)(s.w).sum(2),
        {"w": (3, *square)},
        ["w"],
    ),
    "torch.jit.script": (lambda s, x: scripted_linear(x, s.w), {"w": square}, ["w"]),
    "autograd function": (lambda s, x: DoublingFunction.apply(x, s.w), {"w": square}, ["w"]),
    "cast": (lambda s, x: x.double() @ s.w.to(x.double()), {"w": square}, ["w"]),
    "written into a buffer": (
        lambda s, x: x @ torch.zeros(SIDE, SIDE).index_add_(0, torch.arange(SIDE), s.w),
        {"w": square},
        ["w"],
    ),
    "experts": (
        experts,
        {"experts": (3, SIDE, SIDE), "route": (SIDE, 3)},
        ["experts"],
    ),
    **{
        f"called {name}": (lambda s, x, name=name: x @ getattr(s, name), {name: square}, [name])
        for name in ("w_query", "compose", "token_mixer", "latent_proj", "position", "embed_table")
    },
    "attention's own": (
        lambda s, x: F.multi_head_attention_forward(
            *(x[:, None], x[:, None], x[:, None], SIDE, 2, s.qkv, None, None, None, False, 0.0),
            *(s.out, None),
        )[0][:, 0],
        {"qkv": (3 * SIDE, SIDE), "out": square},
        ["qkv", "out"],
    ),
}

# name: (forward, shapes): nothing raw is a weight
TABLES = {
    "added": (lambda s, x: x + s.w_proj, {"w_proj": (1, SIDE)}),
    "looked up": (
        lambda s, x: x + F.embedding(torch.arange(len(x)), s.weights),
        {"weights": (9, SIDE)},
    ),
    "rows taken by a product": (
        lambda s, x: x + F.one_hot(torch.arange(len(x)), 9).float() @ s.weights,
        {"weights": (9, SIDE)},
    ),
    "rows taken": (lambda s, x: x + s.weights[torch.arange(len(x))], {"weights": (9, SIDE)}),
    "queries through a layer": (
        lambda s, x: s.first(s.kernel).softmax(-1) @ x.t(),
        {"kernel": (2, SIDE)},
    ),
    "scales": (lambda s, x: x * s.w, {"w": (1, SIDE)}),
    "codebook": (codebook, {"book": (5, SIDE)}),
    "router": (lambda s, x: x * (x @ s.w).softmax(-1).topk(2)[0][:, :1], {"w": (SIDE, 4)}),
}

x = torch.randn(6, SIDE, generator=torch.Generator().manual_seed(0))


def build(table, case):
    torch.manual_seed(0)
    return Raw(table[case][0], **table[case][1])


@pytest.mark.parametrize("case", WEIGHTS)
def test_what_meets_an_input_in_a_product_is_masked(case):
    model, weights = build(WEIGHTS, case), WEIGHTS[case][2]
    made = plan(model, bank="own", inputs={"x": x})
    assert made.untraced == ""
    raw = [target.name for target in made.targets if target.name != "first.weight"]
    assert sorted(raw) == sorted(weights)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert made.masked_weights == SIDE * SIDE + sum(sizes[name] for name in weights)
    unmasked = sizes.get("route", 0)
    assert made.maskable_weights == made.masked_weights + unmasked
    assert made.coverage == made.masked_weights / made.maskable_weights
    expected = model(x)
    warned = pytest.warns(LowCoverageWarning) if made.warning else nullcontext()
    with warned:
        masked = pemnify(model, bank="own", selector="threshold", inputs={"x": x})
    assert torch.equal(masked(x), expected)  # all scores start above the threshold
    masked(x).sum().backward()
    grads = {name: p.grad for name, p in masked.named_parameters() if p.requires_grad}
    assert all(any(name in key for key in grads) for name in weights)


@pytest.mark.parametrize("case", TABLES)
def test_what_is_added_looked_up_or_chosen_by_stays(case):
    made = plan(build(TABLES, case), bank="own", inputs={"x": x})
    assert made.untraced == ""
    assert [target.name for target in made.targets] == ["first.weight"]
    (left,) = made.left
    assert left.use
    assert left.maskable == (case == "router")
    assert ("a router, masked only if" in left.reason) == (case == "router")
    assert made.coverage == pytest.approx(64 / 96 if case == "router" else 1.0)


def test_learned_queries_that_meet_raw_parameters_count_with_them():
    """Nothing but the order of the factors tells them from a low-rank product."""
    model = Raw(attend, latents=(2, SIDE))
    made = plan(model, bank="own", inputs={"x": x})
    assert [target.name for target in made.targets] == ["latents", "first.weight"]


def pruned():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIDE, SIDE), nn.ReLU(), nn.Linear(SIDE, SIDE))
    prune.random_unstructured(model[0], "weight", amount=0.5)
    return model


def test_pruned_weights_are_masked_under_their_pruning(tmp_path):
    model = pruned()
    expected, zeros = model(x), model[0].weight_mask == 0
    made = plan(model, bank="own", inputs={"input": x})
    assert [target.name for target in made.targets] == ["0.weight_orig", "2.weight"]
    assert made.coverage == 1.0
    masked = pemnify(model, bank="own", selector="threshold", inputs={"input": x})
    assert torch.equal(masked(x), expected)
    optimizer = torch.optim.SGD([p for p in masked.parameters() if p.requires_grad], lr=1.0)
    masked(x).square().sum().backward()
    optimizer.step()
    after = masked(x)
    assert not torch.equal(after, expected)
    assert int(torch.count_nonzero(model[0].weight[zeros])) == 0
    masked.save_pretrained(tmp_path)
    from peft import PeftModel

    again = PeftModel.from_pretrained(pruned(), tmp_path)
    torch.testing.assert_close(again(x), after, rtol=0, atol=0)


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.w = nn.Linear(SIDE, SIDE), nn.Parameter(torch.randn(SIDE, SIDE))

    def forward(self, x):
        return torch.ops.pemn_tests.gemm(self.first(x), self.w)


@torch.library.custom_op("pemn_tests::gemm", mutates_args=())
def gemm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w


@gemm.register_fake
def _(x, w):
    return x.new_empty(x.shape[0], w.shape[1])


def test_what_goes_into_an_operator_that_is_not_torchs_counts_as_unmasked():
    with pytest.warns(LowCoverageWarning, match=r"64 of 128.*w: goes into gemm, which can do any"):
        pemnify(Opaque(), bank="own", inputs={"x": x})
    made = plan(Opaque(), bank="own", inputs={"x": x}, target_parameters=["w"])
    assert "w" in [target.name for target in made.targets]


def test_raw_parameters_of_a_model_whose_forward_was_not_followed_count_as_unmasked():
    made = plan(build(WEIGHTS, "times a buffer"), bank="own")
    assert made.untraced
    assert made.coverage == 0.5
    assert "w: a raw parameter, not the weight of a layer: its use was not seen" in made.warning


class Half(nn.Module):
    """Uses one layer of two, and a raw parameter of two."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(SIDE, SIDE), nn.Linear(SIDE, 3 * SIDE)
        self.table = nn.Parameter(torch.randn(SIDE, SIDE))
        self.written = nn.Linear(SIDE, SIDE)

    def forward(self, x):
        self.written.weight.data.clamp_(-1, 1)
        return self.written(self.used(x))


def test_coverage_is_of_what_the_forward_reaches():
    made = plan(Half(), bank="own", inputs={"x": x})
    assert made.masked_weights == 64 + 192
    assert made.unreached_weights == 192
    assert made.coverage == 0.5
    assert made.as_dict()["totals"]["unreached_weights"] == 192
    with pytest.warns(LowCoverageWarning, match="64 of 128 maskable weights stay unmasked"):
        pemnify(Half(), bank="own", inputs={"x": x})


# ---- modules that torch.jit has compiled --------------------------------------------------------


def partly_scripted(kind):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(SIDE, SIDE), nn.LayerNorm([SIDE]), nn.ReLU())
    made = torch.jit.script(inner) if kind == "script" else torch.jit.trace(inner, x)
    return nn.Sequential(nn.Linear(SIDE, 4 * SIDE), nn.Linear(4 * SIDE, SIDE), made)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["script", "trace"])
@pytest.mark.parametrize("bank", ["own", "rp", "mp"])
def test_scripted_parts_stay_and_count(kind, bank, tmp_path):
    model = partly_scripted(kind)
    made = plan(model, bank=bank, inputs={"input": x})
    assert made.untraced == ""
    assert [target.name for target in made.targets] == ["0.weight", "1.weight"]
    assert [(item.name, item.maskable) for item in made.left] == [("2.0.weight", True)]
    assert "torch.jit has compiled" in made.left[0].reason
    assert made.coverage == pytest.approx(512 / 576)
    assert made.parameters == sum(p.numel() for p in model.parameters())
    before = {name: value.clone() for name, value in model[2].state_dict().items()}
    with pytest.warns(LowCoverageWarning, match=r"2\.0\.weight"):
        masked = pemnify(model, bank=bank, inputs={"input": x})
    masked(x).sum().backward()
    assert_same_tensors(model[2].state_dict(), before)
    expected = masked.eval()(x)
    masked.save_pretrained(tmp_path)
    from peft import PeftModel

    again = PeftModel.from_pretrained(partly_scripted(kind), tmp_path).eval()
    torch.testing.assert_close(again(x), expected, rtol=0, atol=0)
    dense = again.merge_and_unload()
    torch.testing.assert_close(dense(x), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_scripted_function_is_seen_in_smaller_operators():
    model = build(WEIGHTS, "torch.jit.script")
    uses = trace(model, {"x": x}).of("w")
    assert [(use.operator, use.role) for use in uses] == [("mm", "product")]
