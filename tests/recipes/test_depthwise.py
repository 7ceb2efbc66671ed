"""The depthwise convolution with a faster backward pass, against torch's own."""

import copy

import pytest
import torch
from torch import nn

from pemn_surgery import pemnify, plan
from pemn_surgery.recipe import depthwise


@pytest.fixture
def always(monkeypatch):
    """Take the fast way whatever the size, its loop as it is written."""
    monkeypatch.setattr(depthwise, "_LARGE", 0)
    monkeypatch.setattr(depthwise, "_compiled_gradient", lambda: depthwise.weight_gradient)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize(("rows", "height", "width"), [(3, 8, 8), (1, 1, 7), (2, 5, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_torchs(kernel, rows, height, width, layout, always):
    torch.manual_seed(0)
    fast = depthwise.DepthwiseConv2d(6, kernel)
    plain = nn.Conv2d(6, 6, kernel, padding="same", groups=6, bias=False)
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(rows, 6, height, width).contiguous(memory_format=layout)
    found = []
    for layer in (fast, plain):
        given = x.clone().requires_grad_()
        out = layer(given)
        out.square().sum().backward()
        found.append((out, given.grad, layer.weight.grad))
    assert type(found[0][0].grad_fn).__name__ == "_DepthwiseBackward"
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_mapped_over_stacked_weights_it_is_torchs_way(always):
    torch.manual_seed(0)
    fast, weights = depthwise.DepthwiseConv2d(4, 3), torch.randn(3, 4, 1, 3, 3, requires_grad=True)
    x = torch.randn(2, 4, 6, 5)

    def output(weight):
        return torch.func.functional_call(fast, {"weight": weight}, (x,))

    mapped = torch.func.vmap(output)(weights)
    alone = [nn.functional.conv2d(x, weight, padding=1, groups=4) for weight in weights]
    grads = [
        torch.autograd.grad(out.square().sum(), weights)[0] for out in (mapped, torch.stack(alone))
    ]
    torch.testing.assert_close(mapped, torch.stack(alone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_under_autocast_it_computes_in_bfloat16(always):
    torch.manual_seed(0)
    fast = depthwise.DepthwiseConv2d(4, 3)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = fast(x)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    exact = nn.functional.conv2d(x.detach(), fast.weight.detach(), padding=1, groups=4)
    torch.testing.assert_close(out.float(), exact, rtol=2e-2, atol=2e-2)
    assert fast.weight.grad.dtype == x.grad.dtype == torch.float32


def test_small_images_and_evaluation_take_torchs_way():
    fast = depthwise.DepthwiseConv2d(4, 3)
    out = fast(torch.randn(2, 4, 6, 6))
    assert type(out.grad_fn).__name__ == "ConvolutionBackward0"
    with torch.no_grad():
        assert fast(torch.randn(2, 4, 6, 6)).grad_fn is None


def test_without_a_compiler_torchs_way_serves(monkeypatch):
    def fails(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(depthwise, "_LARGE", 0)
    monkeypatch.setattr(torch, "compile", lambda _: fails)
    depthwise._compiled_gradient.cache_clear()
    out = depthwise.DepthwiseConv2d(4, 3)(torch.randn(2, 4, 6, 6))
    depthwise._compiled_gradient.cache_clear()
    assert type(out.grad_fn).__name__ == "ConvolutionBackward0"


def test_masks_lie_on_it_as_on_any_convolution(always):
    torch.manual_seed(0)
    net = nn.Sequential(depthwise.DepthwiseConv2d(4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    plain = copy.deepcopy(net)
    plain[0] = nn.Conv2d(4, 4, 3, padding="same", groups=4, bias=False)
    plain[0].load_state_dict(net[0].state_dict())
    assert plan(net, bank="rp", ratio=0.5).masked_weights == 36 + 8
    models = [pemnify(one, bank="rp", ratio=0.5) for one in (net, plain)]
    x = torch.randn(2, 4, 6, 6)
    losses = [model(x).square().sum() for model in models]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    grads = [[p.grad for p in model.parameters() if p.requires_grad] for model in models]
    assert len(grads[0]) > 2
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
