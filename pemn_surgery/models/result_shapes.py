"""Results of operators whose shape is clear from their arguments: empty, on the meta device.

Torch finds a shape in Python, at up to a millisecond a call, most of what a forward on shapes
takes. None: torch shall say what is wrong with the arguments.
"""

from typing import Any

import torch
from torch import Tensor


def like(x: Tensor, *_: Any, **options: Any) -> Tensor:
    """Return a result like the first argument, its strides included."""
    return torch.empty_like(x)


def normalised(x: Tensor, *_: Any, **options: Any) -> Tensor:
    """Return a contiguous result of the first argument's shape and dtype."""
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def projected(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Return the result (..., out) of a linear map of (..., in) by (out, in)."""
    if weight.dim() != 2 or not x.dim() or x.shape[-1] != weight.shape[1]:
        return None
    same = x.dtype == weight.dtype and (bias is None or bias.shape == weight.shape[:1])
    return x.new_empty((*x.shape[:-1], weight.shape[0])) if same else None


def attended(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor | None:
    """Return the result (..., queries, width) of attention to values (..., keys, width)."""
    same = query.dim() == key.dim() == value.dim() and key.shape[-2] == value.shape[-2]
    if not same or query.shape[:-2] != value.shape[:-2] or query.shape[-1] != key.shape[-1]:
        return None
    return query.new_empty((*query.shape[:-1], value.shape[-1]))
