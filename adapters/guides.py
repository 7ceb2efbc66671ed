"""What a layer knows of its masks' bits before they are read: for ``coding="context"``, "base"."""

import numpy as np
import torch

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.layer import PemnLayer, scores_stream, weight_stream
from pemn_surgery.coding.context import Guide
from pemn_surgery.numbers import rng, sizes

# Bits of a frozen number's size that are looked at, of a seed's numbers and of a base's own
# (docs/coding.md); of an initial score's, all that there are.
_LOOK_AT_WEIGHTS, _LOOK_AT_BASE = 3, 5


def guides_of(layer: PemnLayer, config: PemnConfig) -> tuple[Guide, ...] | None:
    """Return what guesses a mask in the configuration's coding.

    Args:
        layer: Where the mask lies.
        config: The adapter's configuration.

    Returns:
        Numbers of each weight; None where the coding goes by the mask's density alone.
    """
    if config.coding == "entropy":
        return None
    found = base_sizes(layer) if config.coding == "base" else None
    of_base = () if found is None else (Guide(found, _LOOK_AT_BASE),)
    return (*drawn_guides(layer, config), *of_base)


def is_guessed(layer: PemnLayer, config: PemnConfig) -> bool:
    """Tell whether the size of an initial score says anything of an adapter's mask.

    Args:
        layer: Where the mask lies.
        config: The adapter's configuration.
    """
    drawn = isinstance(config.score_init, str) and config.form == "product"
    return drawn and config.selector_of(None).uses_magnitude


def drawn_guides(layer: PemnLayer, config: PemnConfig) -> tuple[Guide, ...]:
    """Return the seeded numbers that may guess an adapter's mask (``coding="context"``).

    Args:
        layer: Where the mask lies.
        config: The adapter's configuration.

    Returns:
        What initial scores are made of, and frozen weights if they are drawn; nothing where the
        size of an initial score says nothing.
    """
    if not is_guessed(layer, config):
        return ()
    weights = int(torch.Size(layer.shape).numel())
    scores = _drawn(config.seed, scores_stream(layer.target), weights, weights)
    fill = _fill_stream(layer, weights)
    if fill is None or layer.spec.init == "signed_constant":
        return (scores,)
    of_fill = _drawn(layer.spec.seed, *fill, weights)
    return scores, of_fill._replace(log2=_LOOK_AT_WEIGHTS)


def _drawn(seed: int, stream: str, period: int, weights: int) -> Guide:
    key, period = rng.key_of(seed, stream), max(min(period, weights), 1)
    return Guide(sizes.drawn_sizes(key, period, weights), seed=(key, period))


def _fill_stream(layer: PemnLayer, weights: int) -> tuple[str, int] | None:
    """Return the stream of the frozen numbers, and their period."""
    if layer.bank is not None:
        return layer.bank.layout.stream(layer.shape)
    return (weight_stream(layer.target), weights) if layer.spec.generated else None


def base_sizes(layer: PemnLayer) -> np.ndarray | None:
    """Return how large the frozen numbers are that no seed draws (``coding="base"``).

    Args:
        layer: Where they lie.

    Returns:
        `pemn_surgery.numbers.sizes.base_sizes` of them, uint8 of shape (weights,); None where a
        seed draws them, they are quantised, or not here whole (on the meta device, sharded).
    """
    if layer.spec.generated or layer.quantization_backend is not None:
        return None
    values = layer.fill().detach()
    weights = int(torch.Size(layer.shape).numel())
    if values.is_meta or values.numel() != weights or hasattr(values, "full_tensor"):
        return None
    words = values.to(torch.bfloat16).cpu().reshape(-1).view(torch.int16)
    return sizes.base_sizes(words.numpy().view(np.uint16))
