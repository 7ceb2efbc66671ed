"""The values and gradients of W + s (2M - 1): a weight, the signs of its change, a scale an output.

This is BitDelta's form of a fine-tuned weight (Liu et al. 2024, section 3), with one scale for each
output of a layer instead of one for the layer. Pure functions of tensors; `adapter_mask` puts them
on layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from pemn_surgery.coding import bits
from pemn_surgery.masks.product import goes_by_pieces
from pemn_surgery.transforms import takes_functions

# Weights changed at a time where no gradient is needed, small beside large layers.
_PIECE = 1 << 20


@dataclass(frozen=True)
class Rows:
    """Where the outputs of a layer lie in its weight.

    A weight, row by row, is ``outer`` x ``summed`` x ``outputs`` x ``inner`` numbers: output
    ``(g, r)`` of ``outer`` x ``outputs`` sums over all ``[g, :, r, :]``. A Linear (out, in) is
    1 x 1 x out x in, transformers' ``Conv1D`` (in, out) is 1 x in x out x 1.

    Attributes:
        outer: Groups, or experts whose inputs come before their outputs.
        summed: Inputs that come before the outputs.
        outputs: Outputs of one group.
        inner: Inputs (and positions in a kernel) that come after the outputs.
    """

    outer: int
    summed: int
    outputs: int
    inner: int

    @property
    def count(self) -> int:
        """Number of outputs, that is of scales."""
        return self.outer * self.outputs

    @property
    def view(self) -> tuple[int, int, int, int]:
        """The weight's shape with one dimension for each attribute."""
        return (self.outer, self.summed, self.outputs, self.inner)

    def spread(self, scale: Tensor) -> Tensor:
        """Return one scale an output, shape (count,), in a shape that broadcasts to ``view``."""
        return scale.view(self.outer, 1, self.outputs, 1)

    def mean(self, weight: Tensor) -> Tensor:
        """Return the mean over each output's weights, shape (count,)."""
        return weight.reshape(self.view).mean(dim=(1, 3)).view(-1)


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
