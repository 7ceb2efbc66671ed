"""The values of g sign(W) M: signs of a weight under a mask, and one size for all.

The size g is the mean of abs(W) over what the mask keeps: Multi-Prize Lottery Tickets (Diffenderfer
and Kailkhura, ICLR 2021, section 3, equation 5).
"""

import torch
from torch import Tensor

from pemn_surgery.masks.straight_through import MadeMask


def binarised(weight: Tensor, mask: Tensor) -> Tensor:
    """Return g sign(W) M with g the mean of abs(W) where M is one; 0 where M has no ones.

    Args:
        weight: Float tensor W.
        mask: Bool tensor M of the same shape.
    """
    kept = weight * mask.to(weight.dtype)
    gain = kept.abs().sum(dtype=torch.float64) / mask.sum().clamp(min=1)
    return kept.sign() * gain.to(weight.dtype)


class BinaryMask(MadeMask):
    """One adapter's mask of one weight, of which it leaves the signs and a size."""

    made = staticmethod(binarised)
