"""The values of W (2M - 1): a weight whose sign is flipped where M is zero.

The ``flip`` mode of Self-Masking Networks' released code (Warmerdam et al. 2024): a mask in
{-1, +1}. Flips are their own inverse.
"""

from typing import ClassVar

import torch
from torch import Tensor

from pemn_surgery.masks.straight_through import MadeMask


def flipped(weight: Tensor, mask: Tensor) -> Tensor:
    """Return W where M is one, -W where it is zero.

    Args:
        weight: Float tensor W.
        mask: Bool tensor M of the same shape.
    """
    return torch.where(mask, weight, -weight)


class FlipMask(MadeMask):
    """One adapter's flips of one weight: W where its mask is one, -W where it is zero."""

    drops: ClassVar[bool] = False
    made = staticmethod(flipped)
