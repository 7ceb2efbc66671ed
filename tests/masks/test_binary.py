"""Binary weights under masks, g sign(W) M, against the equation and the released code's rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.errors import PretrainedWarning
from pemn_surgery.masks.binary import binarised
from pemn_surgery.masks.selector import Selector
from pemn_surgery.masks.straight_through import straight_through
from tests.adapters import models
from tests.oracles import assert_near, assert_same

_SHAPES = st.sampled_from([(), (0,), (1,), (7,), (3, 5), (4, 2, 3, 3), (2, 0, 3)])
_DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
_SELECTORS = st.sampled_from(
    [Selector("topk", 0.5, 0.0), Selector("topk", 0.9, 0.0), Selector("threshold", 0.5, 0.1)]
)


def numbers(shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def near(found, wanted, tolerance):
    assert found.shape == wanted.shape
    if found.numel():
        assert_near(found, wanted, tolerance)


def one_by_one(weight, mask):
    """Equation 5: the gain is the sum of abs(W) over ones of the mask, divided by their number."""
    pairs = list(zip(weight.flatten().tolist(), mask.flatten().tolist(), strict=True))
    kept = [abs(value) for value, is_kept in pairs if is_kept]
    gain = torch.tensor(sum(kept) / max(len(kept), 1), dtype=torch.float64).to(weight.dtype).item()
    values = [(value > 0) - (value < 0) if is_kept else 0 for value, is_kept in pairs]
    made = [gain * sign for sign in values]
    return torch.tensor(made, dtype=torch.float64).to(weight.dtype).view(weight.shape)


@settings(max_examples=60, deadline=None)
@given(_SHAPES, _DTYPES, _SELECTORS, st.integers(0, 99))
def test_values_and_gradients(shape, dtype, selector, seed):
    weight = numbers(shape, seed, dtype).requires_grad_()
    scores = numbers(shape, seed + 1).requires_grad_()
    pull = numbers(shape, seed + 2, dtype)
    made = straight_through(weight, scores, selector, binarised)
    mask = selector.mask(scores)
    tolerance = 1e-2 if dtype is torch.bfloat16 else 1e-6
    near(made.detach(), one_by_one(weight.detach(), mask), tolerance)
    of_weight, of_scores = torch.autograd.grad(made, (weight, scores), pull)
    wanted = (pull * weight.detach()).float()
    if selector.uses_magnitude:
        wanted = wanted * scores.detach().sign()
    assert_same(of_scores, wanted)
    signs = (weight.detach().sign() * mask).double()  # g depends on each abs(W) that is kept
    share = (pull.double() * signs).sum() / mask.sum().clamp(min=1)
    near(of_weight.double(), signs * share, 10 * tolerance)


def test_gradients_can_be_differentiated_again():
    weight, scores = numbers((4, 5), 0, torch.float64), numbers((4, 5), 1, torch.float64)
    weight.requires_grad_()
    scores.requires_grad_()
    made = straight_through(weight, scores, Selector("threshold", 0.5, 0.0), binarised)
    (of_scores,) = torch.autograd.grad((made**2).sum() / 2, scores, create_graph=True)
    assert_near(of_scores, made * weight, 1e-12)  # dL/dS = W_eff W
    (again,) = torch.autograd.grad(of_scores.sum(), weight)
    kept = (scores > 0).double()
    gain = (weight.abs() * kept).sum() / kept.sum()
    own = (
        gain * weight.sign() * kept
        + weight.sign() * kept * (weight.abs() * kept).sum() / kept.sum()
    )
    assert_near(again, own, 1e-12)


def test_what_the_released_code_does():
    """Its mask is alpha x M, by which it multiplies sign(W); it hands g x abs(W) to the scores."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=False)
    model = pemnify(nn.Sequential(layer), bank="own", form="binary", density=0.3)
    weight = layer.masked_weight.own_weight().detach()
    scores = layer.masked_weight.mask_of("default").scores
    order = scores.detach().abs().flatten().argsort(stable=True)
    out = torch.ones(30)
    out[order[: int(0.7 * 30)]] = 0
    out = out.view(5, 6)
    quantnet = (weight.abs() * out).sum() / out.sum() * out
    assert_near(layer.weight.detach(), weight.sign() * quantnet, 1e-6)
    x = numbers((3, 6), 4)
    model(x).square().sum().backward()
    of_weight = torch.autograd.grad(
        (x @ (w := layer.weight.detach().clone().requires_grad_()).T).square().sum(), w
    )[0]
    assert_near(
        scores.grad, of_weight * weight.sign() * weight.abs() * scores.detach().sign(), 1e-5
    )


@pytest.mark.parametrize("bank", ["own", "rp", "mp"])
def test_saved_loaded_merged(bank, tmp_path):
    drawn = {"bank_init": "kaiming_normal"} if bank == "own" else {}
    model = pemnify(models.net(), bank=bank, form="binary", density=0.4, **drawn).eval()
    for layer in models.mask_layers(model).values():
        values = layer().detach()
        assert len(values.abs().unique()) == 2  # nothing, and one size
        kept = layer.fill()[values != 0].abs()
        assert_near(values.abs().max(), kept.mean(), 1e-6)
    expected = models.logits(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(models.net(), str(tmp_path)).eval()
    models.assert_equal(models.logits(loaded), expected)
    models.assert_equal(models.logits(loaded.merge_and_unload()), expected)


def test_top_k_is_the_default_and_a_trained_model_is_warned_of():
    assert PemnConfig(bank="own", form="binary").selector == "topk"
    net = models.net()
    with torch.no_grad():
        net.bn1.weight[0] = 2.0  # a norm that has learned
    with pytest.warns(PretrainedWarning, match='form="binary" takes the sizes of 4 weights'):
        pemnify(net, bank="own", form="binary", selector="threshold")
