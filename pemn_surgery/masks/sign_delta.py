"""The values and gradients of W + s (2M - 1): a weight, the signs of its change, a scale an output.

This is BitDelta's form of a fine-tuned weight (Liu et al. 2024, section 3), with one scale for each
output of a layer instead of one for the layer. Pure functions of tensors, but for `SignDelta`.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from pemn_surgery.coding import bits
from pemn_surgery.masks.adapter_mask import AdapterMask
from pemn_surgery.masks.product import goes_by_pieces
from pemn_surgery.masks.rows import Rows
from pemn_surgery.transforms import takes_functions

# Weights changed at a time where no gradient is needed, small beside large layers.
_PIECE = 1 << 20


class SignDelta(AdapterMask):
    """One adapter's change of one weight: W + s (2M - 1), M its signs, s a scale for each output.

    The signs are always bits; the scales (`take_row_scale`) can be trained.
    """

    adds = True
    drops = False

    def forward(
        self, weight: Tensor, *, is_scratch: bool = False, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return ``weight`` changed by plus or minus its output's scale.

        Args:
            weight: Float tensor of ``shape``: a fill, or what another adapter made of it.
            is_scratch: Whether nobody else reads ``weight``, so that it may be overwritten.
            dtype: Type that the result is rounded to; None for the weight's.

        Returns:
            Tensor of the same shape. Gradients reach the scales.
        """
        stored, scale = self.store, cast("Tensor", self.row_scale)
        self._verify(stored)
        rows = cast("Rows", self.rows)
        changed = sign_delta_from_bits(weight, stored, scale, rows, in_place=is_scratch)
        return changed.to(dtype or weight.dtype)

    def extra_repr(self) -> str:
        """Show what is held."""
        return f"sign_delta, {cast('Rows', self.rows).count} scales, shape={tuple(self.shape)}"


def sign_delta(weight: Tensor, mask: Tensor, scale: Tensor, rows: Rows) -> Tensor:
    """Return W + s where M is one, W - s where it is zero.

    The sum is made in the wider type of W and s and rounded once, to W's. Gradients reach W and s.

    Args:
        weight: Float tensor W.
        mask: Bool tensor M of the same shape.
        scale: Float tensor s of shape (rows.count,).
        rows: Where each output's weights lie in W.
    """
    apply = _SignDelta.apply if takes_functions() else _changed
    return cast("Tensor", apply(weight, mask, scale, rows))


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


def _changed(weight: Tensor, mask: Tensor, scale: Tensor, rows: Rows) -> Tensor:
    spread = rows.spread(scale)
    signed = torch.where(mask.reshape(rows.view), spread, -spread)
    return (weight.reshape(rows.view) + signed).to(weight.dtype).view(weight.shape)


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
    """W + s (2M - 1); dL/ds sums dL/dW (2M - 1) over the output's weights.

    The mask hangs on the context as an attribute rather than as a saved tensor: it outlives the
    graph, so one effective weight may serve several backward passes.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, scale: Tensor, rows: Rows) -> Tensor:
        ctx.mask, ctx.rows, ctx.scale_dtype = mask, rows, scale.dtype
        return _changed(weight, mask, scale, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_scale = None
        if ctx.needs_input_grad[2]:
            wide = grad.to(torch.promote_types(grad.dtype, ctx.scale_dtype))
            signed = torch.where(ctx.mask, wide, -wide)
            grad_scale = signed.reshape(ctx.rows.view).sum(dim=(1, 3)).view(-1)
            grad_scale = grad_scale.to(ctx.scale_dtype)
        return (grad if ctx.needs_input_grad[0] else None), None, grad_scale, None
