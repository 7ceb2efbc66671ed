"""Several tasks at once: fill x sum of alpha_i x (mask x scale)_i, with gradients for alpha.

While an unknown task is looked for (`pemn_surgery.adapters.tasks.inference`), every masked layer
and every module with tensors that tasks own reads such a mixture in place of the active adapter.
All of it is linear in alpha: SupSup, Wortsman et al., NeurIPS 2020, section 3.3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from pemn_surgery.transforms import takes_functions

# Applies one adapter's mask and scale to a weight; None where the adapter leaves it unmasked.
Masking = Callable[[Tensor], Tensor] | None


@dataclass(frozen=True, eq=False)
class Mixture:
    """Which adapters are mixed, and with which weights.

    Attributes:
        names: The adapters.
        alphas: Float tensor of shape (number of adapters,), on any device.
    """

    names: tuple[str, ...]
    alphas: Tensor

    def of_masks(self, fill: Tensor, maskings: Sequence[Masking]) -> Tensor:
        """Return the mixed effective weight, with gradients for ``alphas`` alone.

        One masked weight is made at a time, in the forward and again in the backward pass, so that
        memory does not grow with the number of adapters. The sum is made in float32 at least.
        """
        alphas = self.alphas.to(fill.device, _sum_dtype(fill))
        mix = _MixedMasks.apply if takes_functions() else _mixed
        return cast("Tensor", mix(fill.detach(), alphas, maskings))

    def of_tensors(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the mixture of unmasked tensors, with gradients for ``alphas`` alone.

        What is not a float (a counter) cannot be mixed: it is a copy of the first adapter's.
        """
        first = tensors[0].detach()
        if not first.is_floating_point():
            return first.clone()
        alphas = self.alphas.to(first.device, _sum_dtype(first))
        total = torch.zeros_like(first, dtype=alphas.dtype)
        for alpha, tensor in zip(alphas, tensors, strict=True):
            total = total + alpha * tensor.detach()
        return total.to(first.dtype)


class _MixedMasks(torch.autograd.Function):
    """W = sum of alpha_i c_i M_i x F, and dL/dalpha_i = <dL/dW, c_i M_i x F>."""

    @staticmethod
    def forward(ctx: Any, fill: Tensor, alphas: Tensor, maskings: Sequence[Masking]) -> Tensor:
        ctx.fill, ctx.maskings = fill, maskings
        wide = fill.to(alphas.dtype)
        total = torch.zeros_like(wide)
        for alpha, masking in zip(alphas, maskings, strict=True):
            total.addcmul_(_apply(masking, wide), alpha)
        return total.to(fill.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pull = grads[0].to(_sum_dtype(ctx.fill))
        wide = ctx.fill.to(pull.dtype)
        shares = [(pull * _apply(masking, wide)).sum() for masking in ctx.maskings]
        return None, torch.stack(shares), None


def _mixed(fill: Tensor, alphas: Tensor, maskings: Sequence[Masking]) -> Tensor:
    """Return what `_MixedMasks` returns, of operations that torch itself can transform."""
    wide = fill.to(alphas.dtype)
    total = torch.zeros_like(wide)
    for alpha, masking in zip(alphas, maskings, strict=True):
        total = torch.addcmul(total, _apply(masking, wide), alpha)
    return total.to(fill.dtype)


def _apply(masking: Masking, weight: Tensor) -> Tensor:
    """Return one adapter's weight; its scores get no gradient."""
    return weight if masking is None else masking(weight).detach()


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    """Hundreds of small shares would be lost in bfloat16."""
    return torch.promote_types(tensor.dtype, torch.float32)
