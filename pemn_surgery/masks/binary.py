"""The values and gradients of g sign(W) M: signs of a weight under a mask, and one size for all.

The size g is the mean of abs(W) over what the mask keeps: Multi-Prize Lottery Tickets (Diffenderfer
and Kailkhura, ICLR 2021, section 3, equation 5). Pure functions of tensors, but for `BinaryMask`.
"""

from typing import Any, cast

import torch
from torch import Tensor

from pemn_surgery.masks.adapter_mask import AdapterMask
from pemn_surgery.masks.product import spread
from pemn_surgery.masks.selector import Selector
from pemn_surgery.transforms import takes_functions


class BinaryMask(AdapterMask):
    """One adapter's mask of one weight, of which it leaves the signs and a size."""

    def _by_bits(self, weight: Tensor, *, is_scratch: bool, dtype: torch.dtype) -> Tensor:
        return binarised(spread(weight, self.mask_shape), self.mask()).to(dtype)

    def _by_scores(self, weight: Tensor, scores: Tensor, dtype: torch.dtype) -> Tensor:
        whole = spread(weight, self.mask_shape)
        return binarised_straight_through(whole, scores, self.training_selector).to(dtype)


def binarised(weight: Tensor, mask: Tensor) -> Tensor:
    """Return g sign(W) M with g the mean of abs(W) where M is one; 0 where M has no ones.

    Args:
        weight: Float tensor W.
        mask: Bool tensor M of the same shape.
    """
    kept = weight * mask.to(weight.dtype)
    gain = kept.abs().sum(dtype=torch.float64) / mask.sum().clamp(min=1)
    return kept.sign() * gain.to(weight.dtype)


def binarised_straight_through(weight: Tensor, scores: Tensor, selector: Selector) -> Tensor:
    """Return what `binarised` returns for the mask of scores, with gradients for the scores.

    Args:
        weight: Float tensor W.
        scores: Float tensor S of the same shape.
        selector: Chooses the mask M. As in the released code dL/dM is W dL/dW_eff, as if the weight
            were W M; dL/dS is `Selector.score_grad` of it.

    Returns:
        Tensor like ``weight``.
    """
    mask = selector.mask(scores)
    apply = _Binarised.apply if takes_functions() else _binarised_in_the_open
    return cast("Tensor", apply(weight, scores, mask, selector))


def _binarised_in_the_open(
    weight: Tensor, scores: Tensor, mask: Tensor, selector: Selector
) -> Tensor:
    """Return what `_Binarised` returns, of operations that torch itself can transform.

    The weight gets a zero whose gradient is that of what the mask was chosen from. Scores that are
    not finite choose as ever, but get no gradient.
    """
    chosen_from = selector.chosen_from(scores.nan_to_num())
    zero = (chosen_from - chosen_from.detach()).to(weight.dtype)
    return binarised(weight, mask) + weight * zero


class _Binarised(torch.autograd.Function):
    """g sign(W) M with dL/dM = W dL/dW_eff; the mask hangs on the context: it outlives the graph.

    As g depends on W, dL/dW = sign(W) M (sum of sign(W) M dL/dW_eff) / (number of ones).
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor, selector: Selector
    ) -> Tensor:
        ctx.weight, ctx.scores, ctx.mask, ctx.selector = weight, scores, mask, selector
        return binarised(weight, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            return *_grads_in_the_open(ctx, grad, needed), None, None
        of_weight = of_scores = None
        if needed[0]:
            signs = ctx.weight.sign() * ctx.mask.to(ctx.weight.dtype)
            share = (grad * signs).sum(dtype=torch.float64) / ctx.mask.sum().clamp(min=1)
            of_weight = signs * share.to(ctx.weight.dtype)
        if needed[1]:
            of_mask = (grad * ctx.weight).to(ctx.scores.dtype)
            of_scores = ctx.selector.score_grad(of_mask, ctx.scores)
        return of_weight, of_scores, None, None


def _grads_in_the_open(
    ctx: Any, grad: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor | None, ...]:
    """Return dL/dW and dL/dS as a graph that leads on to W, S and dL/d(g sign(W) M)."""
    inputs = [x for x, need in zip((ctx.weight, ctx.scores), needed, strict=True) if need]
    again = _binarised_in_the_open(ctx.weight, ctx.scores, ctx.mask, ctx.selector)
    found = iter(torch.autograd.grad(again.to(grad.dtype), inputs, grad, create_graph=True))
    return tuple(next(found) if need else None for need in needed)
