"""Layers beyond Linear and Conv: transposed, attention, recurrent, embeddings on request.

The oracle is always a plain copy of the network whose weights were set to fill x mask.
"""

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from pemn_surgery import PemnConfig, pemnify, plan
from pemn_surgery.masks.kept import one_forward
from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.masks.rows import Rows
from pemn_surgery.planning.roles import rows_of
from tests.golden.cases import Experts

BANKS = {
    "own": {"bank": "own", "selector": "threshold", "score_init": "kaiming_uniform"},
    "rp": {"bank": "rp", "ratio": 0.3},
}


class First(nn.Module):
    """Returns the first of what a layer returns, for layers that return more."""

    def __init__(self, layer, *more):
        super().__init__()
        self.layer = layer
        self.more = more

    def forward(self, x):
        result = self.layer(x, *(x for _ in self.more))
        return result[0] if isinstance(result, tuple) else result


def attention(**options):
    return First(nn.MultiheadAttention(8, 2, batch_first=True, **options), "key", "value")


WHERE = "layer.weight"
KINDS = {
    "ConvTranspose1d": (lambda: First(nn.ConvTranspose1d(4, 6, 3, groups=2)), (2, 4, 9), [WHERE]),
    "ConvTranspose2d": (lambda: First(nn.ConvTranspose2d(3, 5, 3, 2)), (2, 3, 5, 5), [WHERE]),
    "ConvTranspose3d": (lambda: First(nn.ConvTranspose3d(2, 3, 2)), (1, 2, 3, 3, 3), [WHERE]),
    "attention": (attention, (2, 5, 8), ["layer.in_proj_weight", "layer.out_proj.weight"]),
    "attention, widths": (
        lambda: attention(kdim=8, vdim=8).apply(separate),
        (2, 5, 8),
        [f"layer.{name}_proj_weight" for name in "qkv"] + ["layer.out_proj.weight"],
    ),
    "encoder layer": (
        lambda: First(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)),
        (2, 5, 8),
        [
            "layer.self_attn.in_proj_weight",
            "layer.self_attn.out_proj.weight",
            "layer.linear1.weight",
            "layer.linear2.weight",
        ],
    ),
    "LSTM": (
        lambda: First(nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True)),
        (2, 5, 8),
        [
            f"layer.weight_{kind}_l{depth}{way}"
            for depth in (0, 1)
            for way in ("", "_reverse")
            for kind in ("ih", "hh")
        ],
    ),
    "GRU": (lambda: First(nn.GRU(8, 6)), (5, 2, 8), ["layer.weight_ih_l0", "layer.weight_hh_l0"]),
    "RNNCell": (lambda: First(nn.RNNCell(8, 6)), (2, 8), ["layer.weight_ih", "layer.weight_hh"]),
}


def separate(module):
    """Give an attention layer one projection each for query, key and value."""
    if isinstance(module, nn.MultiheadAttention) and module._qkv_same_embed_dim:
        module._qkv_same_embed_dim = False
        for name, part in zip("qkv", module.in_proj_weight.detach().chunk(3), strict=True):
            module.register_parameter(f"{name}_proj_weight", nn.Parameter(part.clone()))
        module.register_parameter("in_proj_weight", None)


def build(kind, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KINDS[kind][0]()


def batch(kind):
    return torch.randn(KINDS[kind][1], generator=torch.Generator().manual_seed(7))


def children(model):
    found = {m.target: m for m in model.modules() if isinstance(m, MaskedWeight)}
    assert found
    return found


def plain_copy(base, model):
    """The oracle: the untouched network with every weight set to fill x mask."""
    oracle = copy.deepcopy(base)
    for name, child in children(model).items():
        (mask,) = child.pemn_masks.values()
        fill = child.fill().detach()
        oracle.get_parameter(name).data = torch.where(mask.mask(), fill, torch.zeros(()))
    return oracle


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("kind", KINDS)
def test_output_is_that_of_masked_weights(kind, bank, training):
    base = build(kind).train(training)
    model = pemnify(copy.deepcopy(base), **BANKS[bank]).train(training)
    assert sorted(children(model)) == sorted(KINDS[kind][2])
    oracle = plain_copy(base, model)
    expected = oracle(batch(kind))
    torch.testing.assert_close(model(batch(kind)), expected, rtol=0, atol=1e-6)
    with torch.no_grad():  # torch's own fast paths run here
        torch.testing.assert_close(model(batch(kind)), expected.detach(), rtol=0, atol=1e-6)
    assert not torch.allclose(base(batch(kind)), expected)


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_oracle(kind, bank):
    base = build(kind)
    model = pemnify(copy.deepcopy(base), **BANKS[bank])
    oracle = plain_copy(base, model)
    model(batch(kind)).square().sum().backward()
    oracle(batch(kind)).square().sum().backward()
    for name, child in children(model).items():
        (mask,) = child.pemn_masks.values()
        through = oracle.get_parameter(name).grad * child.fill()
        sign = mask.scores.detach().sign() if mask.selector.name == "topk" else 1.0
        torch.testing.assert_close(mask.scores.grad, through * sign, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_and_merged(kind, tmp_path):
    model = pemnify(build(kind), bank="rp", ratio=0.3)
    with torch.no_grad():  # torch's fast paths, which round differently, everywhere or nowhere
        expected = model.eval()(batch(kind))
        model.save_pretrained(str(tmp_path))
        loaded = PeftModel.from_pretrained(build(kind, seed=1), str(tmp_path)).eval()
        assert torch.equal(loaded(batch(kind)), expected)
        merged = model.merge_and_unload().eval()
        assert torch.equal(merged(batch(kind)), expected)
    assert list(merged.state_dict()) == list(build(kind).state_dict())
    assert [type(m) for m in merged.modules()] == [type(m) for m in build(kind).modules()]


class Words(nn.Module):
    """A table of words and a head; the head is tied on request."""

    def __init__(self, tied=False):
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens):
        return self.head(self.words(tokens))


TOKENS = torch.tensor([[1, 4, 10], [0, 2, 2]])


def test_an_embedding_is_masked_only_when_it_is_named():
    assert [t.name for t in plan(Words()).targets] == ["head.weight"]
    base = Words()
    options = {"target_modules": ["words", "head"], **BANKS["own"]}
    model = pemnify(copy.deepcopy(base), **options)
    assert sorted(children(model)) == ["head.weight", "words.weight"]
    torch.testing.assert_close(model(TOKENS), plain_copy(base, model)(TOKENS), rtol=0, atol=1e-6)


def test_a_tied_head_shares_the_mask_of_a_named_embedding(tmp_path):
    model = pemnify(Words(tied=True), PemnConfig(bank="rp", target_modules=["words", "head"]))
    (target,) = children(model)
    assert target == "words.weight"
    net = model.base_model.model
    with one_forward():
        assert net.head.weight is net.words.weight
    expected = model(TOKENS)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(Words(tied=True), str(tmp_path))
    assert torch.equal(loaded(TOKENS), expected)
    merged = model.merge_and_unload()
    assert merged.head.weight is merged.words.weight
    assert torch.equal(merged(TOKENS), expected)


@pytest.mark.parametrize("layer", [nn.ConvTranspose1d(4, 6, 3), Conv1D(6, 4), nn.Linear(4, 6)])
def test_a_vector_that_is_asked_for_is_one_row(layer):
    """Whatever the layer's weight is like: nothing says which of its numbers are outputs."""
    found = plan(nn.Sequential(layer), bank="own", target_parameters=["bias"])
    bias = next(target for target in found.targets if target.name == "0.bias")
    assert (bias.shape, bias.fan_in) == ((6,), 1)
    assert rows_of(layer, (6,)) == Rows(1, 1, 1, 6)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 10),
        nn.Conv1d(6, 10, 3),
        nn.Conv2d(6, 10, (3, 2)),
        nn.Conv2d(6, 12, 3, groups=3),
        nn.ConvTranspose2d(6, 10, 3),
    ],
)
def test_fans_are_those_of_torch(layer):
    (target,) = plan(nn.Sequential(layer), bank="own").targets
    fans = nn.init._calculate_fan_in_and_fan_out(layer.weight)
    assert (target.fan_in, target.fan_out) == fans


def test_fan_out_of_other_layers():
    """transformers' Conv1D is (in, out); each of two experts counts by itself, as (out, in)."""
    (target,) = plan(nn.Sequential(Conv1D(10, 6)), bank="own").targets
    assert (target.fan_in, target.fan_out) == (6, 10)
    found = plan(Experts(), bank="own", target_parameters=["gate_up", "down"]).targets
    assert [(t.fan_in, t.fan_out) for t in found] == [(8, 4), (4, 8)]
    (bias,) = plan(
        nn.Sequential(nn.Linear(4, 6)), bank="own", target_modules=[], target_parameters=["bias"]
    ).targets
    assert (bias.fan_in, bias.fan_out) == (1, 6)
