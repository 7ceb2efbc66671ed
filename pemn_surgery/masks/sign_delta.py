"""The values and gradients of W + s (2M - 1): a weight, the signs of its change, a scale an output.

This is BitDelta's form of a fine-tuned weight (Liu et al. 2024, section 3), with one scale for each
output of a layer instead of one for the layer; here the signs may be learned, too. Pure functions
of tensors, but for `SignDelta`.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from pemn_surgery.coding import bits
from pemn_surgery.masks.adapter_mask import AdapterMask
from pemn_surgery.masks.product import goes_by_pieces
from pemn_surgery.masks.rows import Rows
from pemn_surgery.masks.selector import Selector
from pemn_surgery.transforms import gathered, takes_functions

# Weights changed at a time where no gradient is needed, small beside large layers.
_PIECE = 1 << 20


class SignDelta(AdapterMask):
    """One adapter's change of one weight: W + s (2M - 1), M its signs, s a scale for each output.

    The scales (`take_row_scale`) can be trained, and so can the signs where they have scores.

    Attributes:
        learns: Whether the signs are learned with the scales: scores may take the place of bits.
        unit: What the scales are multiples of: one step of an optimizer's rate is to be small
            beside the weights. A power of two, so that no scale is rounded; 1 beside bits.
    """

    adds = True
    drops = False
    learns = False
    unit = 1.0

    def forward(
        self, weight: Tensor, *, is_scratch: bool = False, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return ``weight`` changed by plus or minus its output's scale.

        Args:
            weight: Float tensor of ``shape``: a fill, or what another adapter made of it.
            is_scratch: Whether nobody else reads ``weight``, so that it may be overwritten.
            dtype: Type that the result is rounded to; None for the weight's.

        Returns:
            Tensor of the same shape. Gradients reach the scales, and scores straight through.
        """
        if self.scores is None:
            self._verify(self.store)
        if self.places is not None:
            changed = self._changed_in_places(gathered(weight), self.places)
        elif self.scores is None:
            changed = sign_delta_from_bits(
                weight, self.store, self._scale(), self._rows(), in_place=is_scratch
            )
        else:
            view = self._rows().view
            spread = self._rows().spread(self._scale())
            viewed = weight.reshape(view), self.scores.reshape(view)
            mask = self.training_selector.mask(self.scores).reshape(view)
            changed = _straight_through(*viewed, mask, spread, self.selector)
        return changed.view(self.shape).to(dtype or weight.dtype)

    def _changed_in_places(self, weight: Tensor, places: Tensor) -> Tensor:
        part = weight.reshape(-1).index_select(0, places)
        spread = self._scale().index_select(0, self._rows().outputs_at(places))
        scores = None if self.scores is None else gathered(self.scores)
        mask = self.mask() if scores is None else self.training_selector.mask(scores)
        changed = _straight_through(part, scores, mask, spread, self.selector)
        return weight.reshape(-1).index_put((places,), changed)

    @property
    def saved_scale(self) -> Tensor | None:
        """The scales themselves, not as multiples."""
        return self._scale()

    def _scale(self) -> Tensor:
        scale = cast("Tensor", self.row_scale)
        return scale if self.unit == 1 else scale * self.unit

    def _rows(self) -> Rows:
        return cast("Rows", self.rows)

    def extra_repr(self) -> str:
        """Show what is held."""
        held = f"sign_delta, {self._rows().count} scales, {super().extra_repr()}"
        return held if self.unit == 1 else f"{held}, unit={self.unit:g}"


def unit_of(fan_in: int) -> float:
    """Return the power of two that is nearest to 1 / sqrt(fan_in), about what weights are."""
    return 2.0 ** round(-math.log2(fan_in) / 2)


def count_in_units(mask: AdapterMask, fan_in: int) -> None:
    """Let the scales beside learned signs be multiples of a unit, now that they are trained."""
    if isinstance(mask, SignDelta) and mask.learns and mask.unit == 1:
        mask.unit = unit_of(fan_in)
        scale = cast("Tensor", mask.row_scale)
        scale.data = scale.data / mask.unit


def sign_delta(weight: Tensor, mask: Tensor, scale: Tensor, rows: Rows) -> Tensor:
    """Return W + s where M is one, W - s where it is zero.

    The sum is made in the wider type of W and s and rounded once, to W's. Gradients reach W and s.

    Args:
        weight: Float tensor W.
        mask: Bool tensor M of the same shape.
        scale: Float tensor s of shape (rows.count,).
        rows: Where each output's weights lie in W.
    """
    viewed = weight.reshape(rows.view), None, mask.reshape(rows.view)
    return _straight_through(*viewed, rows.spread(scale), None).view(weight.shape)


def sign_delta_from_bits(
    weight: Tensor, stored: Tensor, scale: Tensor, rows: Rows, *, in_place: bool
) -> Tensor:
    """Return what `sign_delta` returns for a stored mask, with little memory if that is large."""
    tracked = scale.requires_grad and torch.is_grad_enabled()
    if tracked or not goes_by_pieces(weight, stored):
        shape = tuple(weight.shape)
        return sign_delta(weight, bits.unpack(stored, shape), scale, rows)
    with torch.no_grad():
        changed = weight if in_place else torch.empty_like(weight)
        before, after = weight.view(-1), changed.view(-1)
        for start, stop, signed in _signed_pieces(stored, scale, rows):
            after[start:stop] = before[start:stop] + signed  # rounded as it is written
        return changed


def _straight_through(
    weight: Tensor,
    scores: Tensor | None,
    mask: Tensor,
    spread: Tensor,
    selector: Selector | None,
) -> Tensor:
    """Return W + s M' with M' = 2M - 1; gradients reach W, s and, straight through, the scores.

    Args:
        weight: Float tensor W.
        scores: Float tensor S of the same shape that M was chosen from, or None.
        mask: Bool tensor M of the same shape.
        spread: Float tensor s that broadcasts to it.
        selector: What chose M, whose `Selector.score_grad` gives dL/dS of dL/dM'; None without S.
    """
    if takes_functions():
        made = _SignDelta.apply(weight, scores, mask, spread, selector)
        return cast("Tensor", made)
    if scores is None or selector is None:
        return _changed(weight, mask, spread)
    # Scores that are not finite choose as ever, but get no gradient.
    chosen_from = selector.chosen_from(scores.nan_to_num())
    zero = (chosen_from - chosen_from.detach()).to(spread.dtype)
    signs = torch.where(mask, 1.0, -1.0).to(spread.dtype) + zero
    return (weight + signs * spread).to(weight.dtype)


def _changed(weight: Tensor, mask: Tensor, spread: Tensor) -> Tensor:
    return (weight + torch.where(mask, spread, -spread)).to(weight.dtype)


def _signed_pieces(stored: Tensor, scale: Tensor, rows: Rows) -> Iterator[tuple[int, int, Tensor]]:
    """Yield first position, position past the last, and +s or -s of the weights between them."""
    for start, height, width, spread in _matrices(scale, rows):
        step = max(_PIECE // width, 1)
        for top in range(0, height, step):
            lines = min(step, height - top)
            first = start + top * width
            last = first + lines * width
            mask = bits.unpack_piece(stored, first - first % 8, last)[first % 8 :]
            of_lines = spread[top : top + lines] if spread.shape[0] > 1 else spread
            signed = torch.where(mask.view(lines, width), of_lines, -of_lines)
            yield first, last, signed.view(-1)


def _matrices(scale: Tensor, rows: Rows) -> Iterator[tuple[int, int, int, Tensor]]:
    """Yield matrices that make up a weight: position, height, width, scales to broadcast."""
    if rows.summed == 1:
        yield 0, rows.count, rows.inner, scale.view(-1, 1)
        return
    width = rows.outputs * rows.inner
    for group, of_group in enumerate(scale.view(rows.outer, 1, rows.outputs, 1)):
        spread = of_group.expand(1, rows.outputs, rows.inner).reshape(1, width)
        yield group * rows.summed * width, rows.summed, width, spread


class _SignDelta(torch.autograd.Function):
    """W + s M' with M' = 2M - 1; dL/ds sums dL/dW M' over what s serves, dL/dS = s dL/dW.

    The tensors hang on the context as attributes rather than as saved tensors: they outlive the
    graph, so one effective weight may serve several backward passes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scores: Tensor | None,
        mask: Tensor,
        spread: Tensor,
        selector: Selector | None,
    ) -> Tensor:
        ctx.mask, ctx.spread = mask, spread
        ctx.scores, ctx.selector = scores, selector
        return _changed(weight, mask, spread)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        wide = grad.to(torch.promote_types(grad.dtype, ctx.spread.dtype))
        of_scores = of_spread = None
        if ctx.needs_input_grad[1]:
            of_mask = (wide * ctx.spread).to(ctx.scores.dtype)
            of_scores = ctx.selector.score_grad(of_mask, ctx.scores)
        if ctx.needs_input_grad[3]:
            signed = torch.where(ctx.mask, wide, -wide)
            of_spread = signed.sum_to_size(ctx.spread.shape).to(ctx.spread.dtype)
        return (grad if ctx.needs_input_grad[0] else None), of_scores, None, of_spread, None
