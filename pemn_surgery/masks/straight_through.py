"""Weights made of a frozen weight W and a mask M whose scores learn by dL/dM = W dL/dW_eff.

So do flips, W (2M - 1), and binary weights, g sign(W) M, in their papers' released code. What W_eff
is, as a pure function of W and M, is all that a form says for itself.
"""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from pemn_surgery.masks.adapter_mask import AdapterMask
from pemn_surgery.masks.product import spread
from pemn_surgery.masks.selector import Selector
from pemn_surgery.transforms import takes_functions

# From W and a bool tensor M of its shape to W_eff.
Made = Callable[[Tensor, Tensor], Tensor]


class MadeMask(AdapterMask):
    """One adapter's mask of one weight, of which a function makes another.

    Attributes:
        made: The function.
    """

    made: ClassVar[Made]

    def _by_bits(self, weight: Tensor, *, is_scratch: bool, dtype: torch.dtype) -> Tensor:
        return type(self).made(spread(weight, self.mask_shape), self.mask()).to(dtype)

    def _by_scores(self, weight: Tensor, scores: Tensor, dtype: torch.dtype) -> Tensor:
        whole = spread(weight, self.mask_shape)
        return straight_through(whole, scores, self.training_selector, type(self).made).to(dtype)


def straight_through(weight: Tensor, scores: Tensor, selector: Selector, made: Made) -> Tensor:
    """Return the weight that is made with the mask of scores, with gradients for the scores.

    Args:
        weight: Float tensor W.
        scores: Float tensor S of the same shape.
        selector: Chooses the mask M; dL/dS is its `Selector.score_grad` of dL/dM.
        made: The function.

    Returns:
        Tensor like ``weight``. W gets the gradient of the function.
    """
    mask = selector.mask(scores)
    apply = _StraightThrough.apply if takes_functions() else _in_the_open
    return cast("Tensor", apply(weight, scores, mask, selector, made))


def _in_the_open(
    weight: Tensor, scores: Tensor, mask: Tensor, selector: Selector, made: Made
) -> Tensor:
    """Return what `_StraightThrough` returns, of operations that torch itself can transform.

    The weight gets a zero whose gradient is that of what the mask was chosen from. Scores that are
    not finite choose as ever, but get no gradient.
    """
    chosen_from = selector.chosen_from(scores.nan_to_num())
    zero = (chosen_from - chosen_from.detach()).to(weight.dtype)
    return made(weight, mask) + weight * zero


class _StraightThrough(torch.autograd.Function):
    """The function of W and M with dL/dM = W dL/dW_eff.

    The tensors hang on the context as attributes rather than as saved tensors: they outlive the
    graph, so one effective weight may serve several backward passes.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor, selector: Selector, made: Made
    ) -> Tensor:
        ctx.weight, ctx.scores, ctx.given = weight, scores, (mask, selector, made)
        return made(weight, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            return *_grads_in_the_open(ctx, grad, needed), None, None, None
        mask, selector, made = ctx.given
        of_scores = None
        if needed[1]:
            of_mask = (grad * ctx.weight).to(ctx.scores.dtype)
            of_scores = selector.score_grad(of_mask, ctx.scores)
        of_weight = _pulled(ctx.weight, mask, made, grad) if needed[0] else None
        return of_weight, of_scores, None, None, None


def _pulled(weight: Tensor, mask: Tensor, made: Made, grad: Tensor) -> Tensor:
    """Return dL/dW."""
    with torch.enable_grad():
        leaf = weight.detach().requires_grad_()
        (found,) = torch.autograd.grad(made(leaf, mask), leaf, grad.to(weight.dtype))
    return found


def _grads_in_the_open(
    ctx: Any, grad: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor | None, ...]:
    """Return dL/dW and dL/dS as a graph that leads on to W, S and dL/dW_eff."""
    inputs = [x for x, need in zip((ctx.weight, ctx.scores), needed, strict=True) if need]
    again = _in_the_open(ctx.weight, ctx.scores, *ctx.given)
    found = iter(torch.autograd.grad(again.to(grad.dtype), inputs, grad, create_graph=True))
    return tuple(next(found) if need else None for need in needed)
