"""Example inputs for a model, made from its configuration alone.

The same numbers for every call, small, on the CPU. Nothing is imported from timm or transformers:
what a model takes is read from its ``config`` or ``pretrained_cfg`` and its forward's signature.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pemn_surgery import inputs_transformers
from pemn_surgery.errors import ExampleInputsError

SMALL_IMAGE = 128  # pixels a side; every timm architecture without a fixed size takes it


def example_inputs(model: nn.Module, *, batch: int = 2) -> dict[str, Any]:
    """Make small inputs that a timm or transformers model can be called with.

    A timm model of a fixed input size gets that size, any other its smallest documented size or
    128 pixels a side. A transformers model gets what its ``config`` and its forward ask for; a
    multimodal one as many placeholder tokens as its own ``get_image_features`` makes features,
    so that this part of the model is run once, without gradients and in eval mode.

    Args:
        model: The model; its weights, buffers and mode are left as they are.
        batch: Number of examples.

    Returns:
        Keyword arguments for ``model(**inputs)``: float32 and int64 tensors on the CPU, equal
        for every call. The global random state is not used.

    Raises:
        ExampleInputsError: The model has no configuration to read, or an argument of its forward
            is of an unknown kind.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
    if isinstance(getattr(getattr(base, "config", None), "model_type", None), str):
        return inputs_transformers.make_inputs(base, batch)
    timm_config = getattr(base, "pretrained_cfg", None) or getattr(base, "default_cfg", None)
    if isinstance(timm_config, Mapping) and timm_config.get("input_size"):
        return _timm_inputs(base, timm_config, batch)
    name = type(base).__name__
    arguments = ", ".join(inspect.signature(base.forward).parameters) or "none"
    message = (
        f"{name} has neither a transformers `config` nor a timm `pretrained_cfg` to read what it "
        f"takes (arguments of its forward: {arguments}); give `inputs=` yourself"
    )
    raise ExampleInputsError(message)


def _timm_inputs(model: nn.Module, config: Mapping[str, Any], batch: int) -> dict[str, Any]:
    channels, height, width = config["input_size"]
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if built_for:  # create_model(..., img_size=...) leaves the configuration as it was
        height, width = built_for
    elif config.get("min_input_size"):
        _, height, width = config["min_input_size"]
    elif not config.get("fixed_input_size"):
        height, width = min(height, SMALL_IMAGE), min(width, SMALL_IMAGE)
    generator = torch.Generator().manual_seed(0)
    channels = _first_channels(model, config) or channels
    image = torch.randn(batch, channels, height, width, generator=generator)
    return {next(iter(inspect.signature(model.forward).parameters)): image}


def _first_channels(model: nn.Module, config: Mapping[str, Any]) -> int | None:
    """Return the channels that the first convolution takes: ``in_chans=`` is not in the config."""
    first = config.get("first_conv")
    name = first[0] if isinstance(first, (list, tuple)) and first else first
    module = dict(model.named_modules()).get(name) if isinstance(name, str) else None
    return getattr(module, "in_channels", None)
