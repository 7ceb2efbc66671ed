"""What a learned mask tells about itself beyond the densities of its layers.

A context is something that a decoder knows before it reads a weight's bit: where the weight lies,
bits already decoded, the frozen weight, another task's mask on the same base. Two lengths are given
for each, both summed over layers:

* ``ideal``: sum over contexts of n H(share of ones), as if the decoder knew all shares for nothing.
  More contexts never make it longer, so alone it proves nothing.
* ``adaptive``: what a decoder that begins without knowledge and counts really needs
  (Krichevsky-Trofimov): 2^-length = B(ones + 1/2, zeros + 1/2) / B(1/2, 1/2).

Contexts are combined by one logistic regression over all layers (`combined`), whose length is a
real one too: features are known to the decoder, coefficients are rounded to float16 and paid for.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Array = Any  # of numpy; shapes and element types are in the docstrings

QUANTILES = 16
NUMBER_BITS = 16  # a coefficient, and a layer's number of ones
PRIOR = 4.0  # how many weights' worth a layer's density counts beside counts so far
STEPS = 12


@dataclass(frozen=True)
class Layer:
    """A mask with what a decoder may have beside it.

    Attributes:
        mask: bool ``[outputs, inputs, taps, taps]``; a Linear layer's has 1 x 1 taps.
        weight: The frozen weight, float of the same shape.
        other: Another task's mask of the same weight, or None.
    """

    mask: Array
    weight: Array
    other: Array | None = None

    @property
    def density(self) -> float:
        """Share of ones."""
        return float(self.mask.mean())


def four_dimensional(tensor: torch.Tensor) -> Array:
    """A convolution's or Linear layer's tensor as an array ``[outputs, inputs, taps, taps]``."""
    array = tensor.numpy()
    return array if array.ndim == 4 else array[..., None, None]


# -- contexts one at a time ------------------------------------------------------------------------


def _nothing(layer: Layer) -> Array:
    return np.zeros(layer.mask.shape, np.int64)


def _index(axes: tuple[int, ...]) -> Callable[[Layer], Array]:
    """The position along these axes."""

    def context(layer: Layer) -> Array:
        shape = layer.mask.shape
        found = np.zeros(shape, np.int64)
        for axis in axes:
            places = np.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(4)])
            found = found * shape[axis] + places
        return found

    return context


def _neighbours(layer: Layer) -> Array:
    """The taps to the left and above in the same kernel: 0, 1, or 2 where there is none."""
    around = np.full(layer.mask.shape + np.array([0, 0, 1, 1]), 2, np.int64)
    around[:, :, 1:, 1:] = layer.mask
    return 3 * around[:, :, 1:, :-1] + around[:, :, :-1, 1:]


def _kernel_so_far(layer: Layer) -> Array:
    """The tap, and how many ones come before it in its kernel."""
    taps = layer.mask.shape[2] * layer.mask.shape[3]
    rows = layer.mask.reshape(*layer.mask.shape[:2], taps)
    before = rows.cumsum(2) - rows
    return (np.arange(taps) * (taps + 1) + before).reshape(layer.mask.shape)


def _rank(values: Array) -> Array:
    """Which of 16 equally filled bins a value is in."""
    order = values.reshape(-1).argsort(kind="stable")
    ranks = np.empty(order.size, np.int64)
    ranks[order] = np.arange(order.size)
    return (ranks * QUANTILES // order.size).reshape(values.shape)


def _other(layer: Layer) -> Array:
    return _nothing(layer) if layer.other is None else layer.other.astype(np.int64)


CONTEXTS: dict[str, Callable[[Layer], Array]] = {
    "layer": _nothing,
    "output filter": _index((0,)),
    "input channel": _index((1,)),
    "tap": _index((2, 3)),
    "left and upper neighbour": _neighbours,
    "tap and ones before it in the kernel": _kernel_so_far,
    "|weight|": lambda layer: _rank(np.abs(layer.weight)),
    "weight": lambda layer: _rank(layer.weight),
    "another task's mask": _other,
    "another task's mask and |weight|": lambda layer: (
        2 * _rank(np.abs(layer.weight)) + _other(layer)
    ),
}


def lengths(mask: Array, context: Array) -> tuple[float, float]:
    """Return the ideal and the adaptive length in bits of a mask given a context.

    Args:
        mask: bool, any shape.
        context: int64 >= 0 of the same shape.
    """
    labels = context.reshape(-1)
    total = np.bincount(labels).astype(np.float64)
    ones = np.bincount(labels, weights=mask.reshape(-1))
    zeros = total - ones
    ideal = sum(
        _times_log(part, whole)
        for parts in (ones, zeros)
        for part, whole in zip(parts, total, strict=True)
    )
    half = np.array([0.5])
    adaptive = (_log_beta(half, half) - _log_beta(ones + 0.5, zeros + 0.5)).sum() / math.log(2)
    return ideal, float(adaptive)


def _times_log(part: float, whole: float) -> float:
    return part * math.log2(whole / part) if part else 0.0


def _log_beta(a: Array, b: Array) -> Array:
    gammas = [torch.lgamma(torch.from_numpy(values)).numpy() for values in (a, b, a + b)]
    return gammas[0] + gammas[1] - gammas[2]


def alone(layers: Sequence[Layer]) -> dict[str, dict[str, float]]:
    """Return the bytes of masks under each context of `CONTEXTS`: ``ideal`` and ``adaptive``."""
    found = {}
    for name, context in CONTEXTS.items():
        both = [lengths(layer.mask, context(layer)) for layer in layers]
        ideal, adaptive = (sum(values) / 8 for values in zip(*both, strict=True))
        found[name] = {"ideal": ideal, "adaptive": adaptive}
    return found


def ones_by_magnitude(layers: Sequence[Layer]) -> list[float]:
    """Return the share of ones among each layer's smallest, ..., largest 16th of |weight|."""
    bins = np.concatenate([_rank(np.abs(layer.weight)).reshape(-1) for layer in layers])
    ones = np.concatenate([layer.mask.reshape(-1) for layer in layers])
    return (np.bincount(bins, weights=ones) / np.bincount(bins)).tolist()


# -- contexts together -----------------------------------------------------------------------------


def _deviation(ones: Array, total: Array, density: float) -> Array:
    """Log odds of counts so far, relative to the layer's; 0 where nothing was counted."""
    kept = (ones + PRIOR * density) / (total - ones + PRIOR * (1 - density))
    return np.log(kept) - math.log(density / (1 - density))


def _counts(layer: Layer) -> list[Array]:
    """Ones so far, in the order of storage: in the filter, the channel, the kernel, the tap..."""
    mask, density = layer.mask.astype(np.int64), layer.density
    outputs, inputs, height, width = mask.shape
    found = []
    for shape in ((outputs, -1), (outputs * inputs, -1)):  # of the filter, of the kernel
        rows = mask.reshape(shape)
        found.append(_deviation(rows.cumsum(1) - rows, np.arange(rows.shape[1]), density))
    above = np.arange(outputs)[:, None]
    kernels = mask.sum((2, 3))
    of_channel = _deviation(kernels.cumsum(0) - kernels, above * height * width, density)
    found.append(np.broadcast_to(of_channel[:, :, None, None], mask.shape))
    same = mask.reshape(outputs, -1)  # the same channel and tap in the filters before
    found.append(_deviation(same.cumsum(0) - same, above, density))
    taps = mask.reshape(outputs * inputs, -1)
    found.append(_deviation(taps.cumsum(0) - taps, np.arange(len(taps))[:, None], density))
    near = _neighbours(layer)
    found += [np.where(part == 2, 0, part - density) for part in (near // 3, near % 3)]
    return found


def _bins(labels: Array) -> list[Array]:
    return [labels == number for number in range(1, QUANTILES)]


def _weights(layer: Layer) -> list[Array]:
    return _bins(_rank(np.abs(layer.weight))) + _bins(_rank(layer.weight))


def _others(layer: Layer) -> list[Array]:
    """The other task's bit, relative to its density; and where the weight is large, once more."""
    if layer.other is None:
        return [np.zeros(layer.mask.shape)] * 2
    bit = layer.other - layer.other.mean()
    return [bit, bit * (_rank(np.abs(layer.weight)) - (QUANTILES - 1) / 2)]


SETS: dict[str, tuple[Callable[[Layer], list[Array]], ...]] = {
    "decoded bits": (_counts,),
    "decoded bits, weights": (_counts, _weights),
    "decoded bits, weights, another task's mask": (_counts, _weights, _others),
}


def combined(layers: Sequence[Layer]) -> dict[str, dict[str, float]]:
    """Return the bytes of masks under each of `SETS`: ``adaptive``, its coefficients included.

    A bit's log odds are its layer's, which is sent as a number of ones, plus the features times
    coefficients that all layers share.
    """
    mixed = [layer for layer in layers if 0 < layer.density < 1]
    bit = np.concatenate([layer.mask.reshape(-1) for layer in mixed]).astype(np.float32)
    start = np.concatenate(
        [
            np.full(layer.mask.size, math.log(layer.density / (1 - layer.density)), np.float32)
            for layer in mixed
        ]
    )
    found = {}
    for name, parts in SETS.items():
        columns = _columns(mixed, parts)
        coefficients = _fitted(columns, start, bit).astype(np.float16).astype(np.float32)
        numbers = len(coefficients) + len(layers)
        length = _length(columns, start, bit, coefficients) + numbers * NUMBER_BITS
        found[name] = {"adaptive": length / 8}
    return found


def _columns(layers: Sequence[Layer], parts: Sequence[Callable[[Layer], list[Array]]]) -> Array:
    """Return the features, float32 ``[weights, features]``, a constant first."""
    tables = []
    for layer in layers:
        features = [np.ones(layer.mask.shape), *(f for part in parts for f in part(layer))]
        tables.append(np.stack([f.reshape(-1).astype(np.float32) for f in features], 1))
    return np.concatenate(tables)


def _fitted(columns: Array, start: Array, bit: Array) -> Array:
    """Return the coefficients of a logistic regression.

    Newton's steps, slightly damped (features may depend on each other), and halved while they
    overshoot, until one saves less than a bit.
    """
    found = np.zeros(columns.shape[1], np.float32)
    length = _length(columns, start, bit, found)
    for _ in range(STEPS):
        share = 0.5 + 0.5 * np.tanh((start + columns @ found) / 2)
        slope = columns.T @ (bit - share)
        curve = (columns.T * (share * (1 - share))) @ columns + np.eye(len(found))
        step = np.linalg.solve(curve, slope.astype(np.float64)).astype(np.float32)
        before = length
        while (length := _length(columns, start, bit, found + step)) > before:
            step /= 2
        found += step
        if before - length < 1:
            break
    return found


def _length(columns: Array, start: Array, bit: Array, coefficients: Array) -> float:
    """Return the bits of a mask under these coefficients."""
    odds = start + columns @ coefficients
    content = np.logaddexp(0, np.where(bit > 0, -odds, odds)).sum(dtype=np.float64)
    return float(content) / math.log(2)
