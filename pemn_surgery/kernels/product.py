"""A masked weight in one pass over memory, and the gradients of its scores in another.

Compiled code only; `pemn_surgery.masks.product` says what is computed, and does it itself, with
the same numbers, where there is none or it cannot read the tensors.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pemn_surgery.kernels import library, selection
from pemn_surgery.kernels.library import Kernels
from pemn_surgery.kernels.selection import Rule

_KINDS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Chosen:
    """A masked weight that is about to be made.

    Attributes:
        weight: Float tensor; as many numbers as the masked weight has, or fewer, which then repeat.
        shape: Shape of the masked weight.
        store: What the choice points to: scores, or bits.
        choice: Which weights are kept.
        kernels: The compiled code.
    """

    weight: Tensor
    shape: tuple[int, ...]
    store: Tensor
    choice: library.Choice
    kernels: Kernels

    def mask(self) -> Tensor:
        """Return the bool mask."""
        return selection.mask_of(self.choice, self.shape, self.kernels)

    def count(self) -> int:
        """Return the number of ones of the mask."""
        weights = math.prod(self.shape)
        return self.kernels.mark(self.choice, weights, torch.get_num_threads(), None)

    def product(self, dtype: torch.dtype, scale: float | None) -> Tensor:
        """Return weight x mask (x scale), rounded to the weight's type and then to ``dtype``.

        Args:
            dtype: The weight's own, or one to which a float32 weight is rounded.
            scale: The factor; None for none.
        """
        out = torch.empty(self.shape, dtype=dtype)
        self.kernels.product(
            self.choice, library.numbers(self.weight), out.numel(), scale is not None,
            scale or 0.0, torch.get_num_threads(), out.data_ptr(), library.kind(out),
        )  # fmt: skip
        return out


def choose(weight: Tensor, scores: Tensor, rule: Rule, dtype: torch.dtype) -> Chosen | None:
    """Choose a mask for compiled code to apply; None where it cannot.

    Args:
        weight: Float tensor of the scores' shape, or fewer numbers, which then repeat.
        scores: Float tensor.
        rule: How to choose.
        dtype: Type of the product.
    """
    kernels = _kernels_for(weight, scores)
    if kernels is None or not _is_rounded(weight, dtype):
        return None
    scores = scores.detach()
    choice = selection.choose(scores, rule, kernels)
    return Chosen(weight.detach(), tuple(scores.shape), scores, choice, kernels)


def choose_bits(
    weight: Tensor, packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> Chosen | None:
    """Take a mask of one bit a weight for compiled code to apply; None where it cannot.

    Args:
        weight: Float tensor of that many numbers, or fewer, which then repeat.
        packed: Uint8 tensor of shape (n,): weight i is bit i % 8 of byte i // 8.
        shape: Shape of the masked weight.
        dtype: Type of the product.
    """
    kernels = _kernels_for(weight) if library.is_in_memory(packed) else None
    if kernels is None or not _is_rounded(weight, dtype):
        return None
    packed = packed.detach()
    return Chosen(weight.detach(), shape, packed, library.choice_of_bits(packed), kernels)


def _is_rounded(weight: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a weight's product of this type is what compiled code can round it to."""
    return dtype == weight.dtype or (weight.dtype == torch.float32 and dtype in _KINDS)


@dataclass(frozen=True)
class Pulled:
    """A gradient of a masked weight that compiled code hands on to its scores: dL/dM = grad x W.

    Attributes:
        grad: Gradient of the masked weight.
        weight: Float tensor W; fewer numbers than scores repeat.
        scores: Float tensor of the masked weight's shape.
        kernels: The compiled code.
        in_place: Whether ``grad`` may be overwritten.
    """

    grad: Tensor
    weight: Tensor
    scores: Tensor
    kernels: Kernels
    in_place: bool

    def kept_sum(self, mask: Tensor) -> float:
        """Return the sum of dL/dM where a contiguous bool mask is one."""
        return self.kernels.kept_sum(
            library.numbers(self.grad), library.numbers(self.weight), mask.data_ptr(),
            mask.numel(), torch.get_num_threads(),
        )  # fmt: skip

    def score_grad(self, by_size: bool, scale: float | None = None, shift: float = 0.0) -> Tensor:
        """Return dL/dM (x scale - shift) (x sign of the scores), in the scores' type.

        Args:
            by_size: Whether the sign counts, as the mask was chosen by magnitude.
            scale: The factor; None for neither factor nor shift.
            shift: What is taken away.
        """
        fits = self.in_place and self.grad.dtype == self.scores.dtype
        out = self.grad.detach() if fits else torch.empty_like(self.scores)
        self.kernels.grad(
            library.numbers(self.grad), library.numbers(self.weight), self.scores.data_ptr(),
            library.kind(self.scores), out.numel(), by_size, scale is not None, scale or 0.0,
            shift, torch.get_num_threads(), out.data_ptr(),
        )  # fmt: skip
        return out


def pull(
    grad: Tensor, weight: Tensor, scores: Tensor, *, scaled: bool, in_place: bool
) -> Pulled | None:
    """Take a gradient for compiled code to hand on; None where it cannot.

    Args:
        grad: Gradient of the masked weight.
        weight: Float tensor of the same shape, or fewer numbers, which then repeat.
        scores: Float tensor.
        scaled: Whether the masked weight was multiplied by a scale.
        in_place: Whether ``grad`` may be overwritten.
    """
    numbers = grad.contiguous()
    kernels = _kernels_for(numbers, weight, scores)
    if kernels is None or (scaled and scores.dtype != torch.float32):
        return None
    in_place = in_place or numbers is not grad
    return Pulled(numbers, weight.detach(), scores.detach(), kernels, in_place)


def _kernels_for(*tensors: Tensor) -> Kernels | None:
    if not library.can_read(*tensors) or not all(t.numel() and t.dtype in _KINDS for t in tensors):
        return None
    return library.kernels()
