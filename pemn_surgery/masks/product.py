"""The values and gradients of W * M * c: a weight, a mask and a scale.

Pure functions of tensors; `masked_weight` puts them on layers.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from pemn_surgery.coding import bits
from pemn_surgery.kernels import product
from pemn_surgery.masks.selector import Selector
from pemn_surgery.masks.unshared import is_unshared
from pemn_surgery.transforms import is_transformed, takes_functions

# Weights masked at a time where no gradient is needed, multiples of 8: a processor's temporaries
# stay in its cache; a device is asked for more at once.
_PIECE, _PIECE_ON_DEVICE = 1 << 16, 1 << 22


def masked(weight: Tensor, mask: Tensor, *, scaled: bool) -> Tensor:
    """Return W * M, or W * M / sqrt(mean(M)) (Self-Masking Networks, section 3).

    Args:
        weight: Float tensor W.
        mask: Bool tensor M of the same shape.
        scaled: Whether to divide by the square root of the mask's density.
    """
    kept = weight * mask.to(weight.dtype)
    return kept * _scale(mask.sum(), mask.numel()) if scaled else kept


def masked_by_bits(
    weight: Tensor,
    stored: Tensor,
    shape: tuple[int, ...],
    *,
    scaled: bool,
    in_place: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return what `masked` returns for a stored mask, bit for bit, without gradients.

    Nothing of the weight's size is made but the result. ``weight`` may be one period of a weight
    that repeats (see `spread`), ``stored`` is the mask as `bits` stores it.
    """
    wanted = dtype or weight.dtype
    chosen = product.choose_bits(weight, stored[bits.HEADER_BYTES :], shape, wanted)
    if chosen is not None:
        scale = _scale(torch.tensor(chosen.count()), math.prod(shape)) if scaled else None
        return chosen.product(wanted, None if scale is None else float(scale))
    whole = spread(weight, shape)
    in_place = in_place or whole.numel() > weight.numel()
    return masked_by_pieces(whole, stored, scaled=scaled, in_place=in_place).to(wanted)


def masked_by_pieces(weight: Tensor, stored: Tensor, *, scaled: bool, in_place: bool) -> Tensor:
    """Return what `masked` returns for a stored mask, bit for bit, with little memory beside it.

    The mask is unpacked a piece at a time, so that nothing of the weight's size is made but the
    result. There are no gradients.
    """
    with torch.no_grad():
        kept = weight if in_place else torch.empty_like(weight)
        before, after, weights = weight.view(-1), kept.view(-1), weight.numel()
        most = min(_PIECE if weight.is_cpu else _PIECE_ON_DEVICE, weights)
        room = torch.empty(most, dtype=weight.dtype, device=weight.device)
        for start in range(0, weights, max(most, 1)):
            stop = min(start + most, weights)
            mask = room[: stop - start].copy_(bits.unpack_piece(stored, start, stop))
            torch.mul(before[start:stop], mask, out=after[start:stop])
        return kept.mul_(_scale(torch.tensor(bits.count_ones(stored)), weights)) if scaled else kept


def masked_straight_through(
    weight: Tensor,
    scores: Tensor,
    selector: Selector,
    *,
    scaled: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return what `masked` returns for the mask of scores, with gradients for the scores.

    Args:
        weight: Float tensor W; or one period of it where it repeats (see `spread`) and torch
            transforms nothing.
        scores: Float tensor S of the shape of W.
        selector: Chooses the mask M; dL/dS is its `Selector.score_grad` of dL/dM.
        scaled: As in `masked`.
        dtype: Type that the result is rounded to; None for the weight's.

    Returns:
        Tensor like ``scores``, of type ``dtype``.
    """
    wanted = dtype or weight.dtype
    if takes_functions():
        made = _StraightThrough.apply(weight, scores, selector, scaled, wanted)
        return cast("Tensor", made)
    return _masked_in_the_open(weight, scores, selector.mask(scores), selector, scaled).to(wanted)


def spread(period: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a weight of this shape whose numbers repeat after a period."""
    weights = math.prod(shape)
    if period.numel() >= weights:
        return period.view(shape)
    return period.repeat(-(-weights // period.numel()))[:weights].view(shape)


def goes_by_pieces(weight: Tensor, stored: Tensor) -> bool:
    """Tell whether a plain tensor is masked without gradients and outside of tracing."""
    if is_transformed() or not weight.is_contiguous():
        return False
    tracked = weight.requires_grad and torch.is_grad_enabled()
    return not tracked and type(weight) in (Tensor, nn.Parameter) and type(stored) is Tensor


def _masked_in_the_open(
    weight: Tensor, scores: Tensor, mask: Tensor, selector: Selector, scaled: bool
) -> Tensor:
    """Return what `_StraightThrough` returns, of operations that torch itself can transform.

    The mask gets a zero whose gradient is that of what it was chosen from. Scores that are not
    finite choose as ever, but get no gradient.
    """
    chosen_from = selector.chosen_from(scores.nan_to_num())
    zero = chosen_from - chosen_from.detach()
    kept = weight * (mask.to(weight.dtype) + zero.to(weight.dtype))
    if not scaled:
        return kept
    ones = mask.sum().to(torch.float32) + zero.sum(dtype=torch.float32)
    return kept * _scale(ones, mask.numel())


class _StraightThrough(torch.autograd.Function):
    """W * M * c with dL/dS of dL/dM as the selector has it.

    The tensors hang on the context as attributes rather than as saved tensors: they are leaves that
    outlive the graph, so one effective weight may serve several backward passes. Where gradients
    are to be differentiated again they are those of the same weight made in the open.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scores: Tensor,
        selector: Selector,
        scaled: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.weight, ctx.scores, ctx.selector, ctx.scaled = weight, scores, selector, scaled
        ctx.needs_mask = scaled or ctx.needs_input_grad[0]
        rule = selector.rule(scores.numel())
        chosen = None if rule is None else product.choose(weight, scores, rule, dtype)
        if chosen is not None:
            ctx.mask = chosen.mask() if ctx.needs_mask else None
            scale = float(_scale(torch.tensor(chosen.count()), scores.numel())) if scaled else None
            return chosen.product(dtype, scale)
        mask = selector.mask(scores)
        ctx.mask = mask if ctx.needs_mask else None
        return masked(spread(weight, tuple(scores.shape)), mask, scaled=scaled).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        in_place = is_unshared(grads)
        (grad,) = grads
        if torch.is_grad_enabled():
            return *_grads_in_the_open(ctx, grad), None, None, None
        need_weight, need_scores = ctx.needs_input_grad[:2]
        grad_weight = None
        if need_weight:
            grad_weight = masked(grad.to(ctx.weight.dtype), ctx.mask, scaled=ctx.scaled)
        grad_scores = _score_grad(ctx, grad, in_place=in_place) if need_scores else None
        return grad_weight, grad_scores, None, None, None


def _grads_in_the_open(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return dL/dW and dL/dS as a graph that leads on to W, S and dL/d(W M c)."""
    needed = ctx.needs_input_grad[:2]
    inputs = [x for x, need in zip((ctx.weight, ctx.scores), needed, strict=True) if need]
    weight = spread(ctx.weight, tuple(ctx.scores.shape))
    mask = ctx.selector.mask(ctx.scores) if ctx.mask is None else ctx.mask  # then no matter which
    again = _masked_in_the_open(weight, ctx.scores, mask, ctx.selector, ctx.scaled)
    found = iter(torch.autograd.grad(again.to(grad.dtype), inputs, grad, create_graph=True))
    return tuple(next(found) if need else None for need in needed)


def _score_grad(ctx: Any, grad: Tensor, *, in_place: bool) -> Tensor:
    """Return dL/dS, in the gradient's memory where that may be overwritten.

    With c = mean(M)^-1/2 not detached, dc/dM = -c^3 / (2n).
    """
    pulled = product.pull(grad, ctx.weight, ctx.scores, scaled=ctx.scaled, in_place=in_place)
    if pulled is not None and not ctx.selector.is_sampled:
        by_magnitude = ctx.selector.uses_magnitude
        if not ctx.scaled:
            return pulled.score_grad(by_magnitude)
        scale, shift = _scale_and_shift(ctx.mask, torch.tensor(pulled.kept_sum(ctx.mask)))
        return pulled.score_grad(by_magnitude, float(scale), float(shift))
    through = (grad * spread(ctx.weight, tuple(ctx.scores.shape))).to(ctx.scores.dtype)
    if ctx.scaled:
        kept_sum = (through * ctx.mask.to(through.dtype)).sum()
        scale, shift = _scale_and_shift(ctx.mask, kept_sum)
        through = through * scale - shift
    return ctx.selector.score_grad(through, ctx.scores)


def _scale_and_shift(mask: Tensor, kept_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Return c, and what its own gradient takes from every dL/dM."""
    scale = _scale(mask.sum(), mask.numel())
    return scale, kept_sum * scale**3 / (2 * mask.numel())


def _scale(ones: Tensor, weights: int) -> Tensor:
    """Return 1 / sqrt(density) as a float32 scalar; 1 for a mask without ones."""
    return (weights / ones.clamp(min=1).to(torch.float32)).sqrt()
