"""The values and gradients of W (2M - 1): a weight whose sign is flipped where M is zero.

The ``flip`` mode of Self-Masking Networks' released code (Warmerdam et al. 2024): a mask in
{-1, +1}. Flips are their own inverse. Pure functions of tensors, but for `FlipMask`.
"""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from pemn_surgery.masks.adapter_mask import AdapterMask
from pemn_surgery.masks.product import spread
from pemn_surgery.masks.selector import Selector
from pemn_surgery.transforms import takes_functions


class FlipMask(AdapterMask):
    """One adapter's flips of one weight: W where its mask is one, -W where it is zero."""

    drops: ClassVar[bool] = False

    def _by_bits(self, weight: Tensor, *, is_scratch: bool, dtype: torch.dtype) -> Tensor:
        return flipped(spread(weight, self.mask_shape), self.mask()).to(dtype)

    def _by_scores(self, weight: Tensor, scores: Tensor, dtype: torch.dtype) -> Tensor:
        whole = spread(weight, self.mask_shape)
        return flipped_straight_through(whole, scores, self.training_selector).to(dtype)


def flipped(weight: Tensor, mask: Tensor) -> Tensor:
    """Return W where M is one, -W where it is zero.

    Args:
        weight: Float tensor W.
        mask: Bool tensor M of the same shape.
    """
    return torch.where(mask, weight, -weight)


def flipped_straight_through(weight: Tensor, scores: Tensor, selector: Selector) -> Tensor:
    """Return what `flipped` returns for the mask of scores, with gradients for the scores.

    Args:
        weight: Float tensor W.
        scores: Float tensor S of the same shape.
        selector: Chooses the mask M. With M' = 2M - 1, dL/dS is `Selector.score_grad` of dL/dM'.

    Returns:
        Tensor like ``weight``.
    """
    mask = selector.mask(scores)
    apply = _Flips.apply if takes_functions() else _flipped_in_the_open
    return cast("Tensor", apply(weight, scores, mask, selector))


def _flipped_in_the_open(
    weight: Tensor, scores: Tensor, mask: Tensor, selector: Selector
) -> Tensor:
    """Return what `_Flips` returns, of operations that torch itself can transform.

    The signs get a zero whose gradient is that of what they were chosen from. Scores that are not
    finite choose as ever, but get no gradient.
    """
    chosen_from = selector.chosen_from(scores.nan_to_num())
    zero = (chosen_from - chosen_from.detach()).to(weight.dtype)
    return weight * (torch.where(mask, 1.0, -1.0).to(weight.dtype) + zero)


class _Flips(torch.autograd.Function):
    """W (2M - 1) with dL/dS = W dL/dW_eff; the mask hangs on the context: it outlives the graph."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor, selector: Selector
    ) -> Tensor:
        ctx.weight, ctx.scores, ctx.mask, ctx.selector = weight, scores, mask, selector
        return flipped(weight, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            return *_grads_in_the_open(ctx, grad, needed), None, None
        of_weight = flipped(grad.to(ctx.weight.dtype), ctx.mask) if needed[0] else None
        of_scores = None
        if needed[1]:
            of_mask = (grad * ctx.weight).to(ctx.scores.dtype)
            of_scores = ctx.selector.score_grad(of_mask, ctx.scores)
        return of_weight, of_scores, None, None


def _grads_in_the_open(
    ctx: Any, grad: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor | None, ...]:
    """Return dL/dW and dL/dS as a graph that leads on to W, S and dL/d(W (2M - 1))."""
    inputs = [x for x, need in zip((ctx.weight, ctx.scores), needed, strict=True) if need]
    again = _flipped_in_the_open(ctx.weight, ctx.scores, ctx.mask, ctx.selector)
    found = iter(torch.autograd.grad(again.to(grad.dtype), inputs, grad, create_graph=True))
    return tuple(next(found) if need else None for need in needed)
