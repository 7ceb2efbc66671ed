"""Example inputs for a model, made from its configuration alone.

The same numbers for every call, small, on the CPU. Nothing is imported from timm or transformers:
what a model takes is read from its ``config`` or ``pretrained_cfg`` and its forward's signature.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pemn_surgery.errors import ExampleInputsError
from pemn_surgery.models.inputs.arguments import (
    ALWAYS,
    DATA,
    MAKERS,
    SENSES,
    TEXT,
    Asked,
    listed,
    method,
)
from pemn_surgery.models.inputs.by_head import CHOICES, is_for, rules_of_head, takes_one
from pemn_surgery.models.inputs.by_type import OF_TYPE, ONE_AT_A_TIME

SMALL_IMAGE = 128  # pixels a side, for architectures that take images of any size
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def example_inputs(model: nn.Module, *, batch: int = 2) -> dict[str, Any]:
    """Make small inputs that a timm or transformers model can be called with.

    A timm model of a fixed input size gets that size; any other its smallest documented one, or
    128 pixels a side. A transformers model gets what its ``config`` and its forward ask for; a
    multimodal one as many placeholder tokens as its own ``get_image_features`` (audio: likewise)
    makes features, so that this part of the model is run once, without gradients, in eval mode.

    Args:
        model: The model; its weights, buffers and mode are left as they are.
        batch: Number of examples; one for the types and heads whose forward takes no more, such
            as a classifier of texts without a padding token.

    Returns:
        Keyword arguments for ``model(**inputs)``: float32, int64 and bool tensors on the CPU,
        equal for every call. The global random state is left alone.

    Raises:
        ExampleInputsError: The model has no configuration to read, or its forward needs an
            argument that there is no rule for.
    """
    unwrap = getattr(model, "get_base_model", None)  # a PeftModel's forward tells nothing
    base: Any = unwrap() if callable(unwrap) else model
    if isinstance(getattr(getattr(base, "config", None), "model_type", None), str):
        return _transformers_inputs(base, batch)
    timm_config = getattr(base, "pretrained_cfg", None) or getattr(base, "default_cfg", None)
    if isinstance(timm_config, Mapping) and timm_config.get("input_size"):
        return _timm_inputs(base, timm_config, batch)
    message = (
        f"{type(base).__name__} has neither a transformers `config` nor a timm `pretrained_cfg` "
        "that tells what it takes (arguments of its forward: "
        f"{', '.join(_arguments(base)) or 'none'}); give `inputs=` yourself"
    )
    raise ExampleInputsError(message)


def _arguments(model: nn.Module) -> dict[str, bool]:
    """Return the names of forward's arguments, True for those without a default."""
    return {
        name: parameter.default is inspect.Parameter.empty
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind not in VARIADIC
    }


# ------------------------------------------------------------------------------------ timm


def _timm_inputs(model: nn.Module, config: Mapping[str, Any], batch: int) -> dict[str, Any]:
    channels, height, width = config["input_size"]
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if built_for:  # create_model(..., img_size=...) leaves the configuration as it was
        height, width = built_for
    elif not config.get("fixed_input_size"):
        small = (channels, min(height, SMALL_IMAGE), min(width, SMALL_IMAGE))
        _, height, width = config.get("min_input_size") or small
    first = _first_channels(model, config)
    if first and first != 16 * channels:  # TResNet's first convolution sees 4 x 4 pixels as one
        channels = first
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, channels, height, width, generator=generator)
    return {next(iter(_arguments(model))): image}


def _first_channels(model: nn.Module, config: Mapping[str, Any]) -> int | None:
    """Return the channels that the first convolution takes: ``in_chans=`` is not in the config."""
    first = listed(config.get("first_conv"))[:1]
    module = dict(model.named_modules()).get(first[0]) if first else None
    return getattr(module, "in_channels", None)


# ------------------------------------------------------------------------------------ transformers


def _transformers_inputs(model: Any, batch: int) -> dict[str, Any]:
    if model.config.model_type in ONE_AT_A_TIME or takes_one(model):
        batch = 1
    if not is_for(model, "MultipleChoice"):
        return _make(Asked(model, batch, _arguments(model)))
    made = _make(Asked(model, batch * CHOICES, _arguments(model)))
    return {name: _in_choices(value, batch) for name, value in made.items()}


def _in_choices(value: Any, batch: int) -> Any:
    return value.unflatten(0, (batch, CHOICES)) if isinstance(value, Tensor) else value


def _make(asked: Asked) -> dict[str, Any]:
    made: dict[str, Any] = {}
    makers = {**MAKERS, **rules_of_head(asked), **OF_TYPE.get(asked.kind, {})}
    for name in _wanted(asked):
        maker = makers.get(name)
        if maker is not None and name not in made:
            made[name] = maker(asked)
    made = {name: value for name, value in made.items() if value is not None}
    if "input_ids" not in made:
        if makers["attention_mask"] is MAKERS["attention_mask"]:
            made.pop("attention_mask", None)  # of the text, which is not there
    elif "input_ids" not in OF_TYPE.get(
        asked.kind, {}
    ):  # else a type's own rule has put them there
        for sense in SENSES:
            _add_placeholders(asked, made, sense)
    _refuse_missing(asked, made)
    return {**made, "use_cache": False} if "use_cache" in asked.arguments else made


def _refuse_missing(asked: Asked, made: dict[str, Any]) -> None:
    missing = [name for name, required in asked.arguments.items() if required and name not in made]
    if missing or not made:
        what = ", ".join(missing) or "something that no rule knows"
        message = (
            f"{type(asked.model).__name__} needs {what}, for which there is no rule; "
            "give `inputs=` yourself"
        )
        raise ExampleInputsError(message)


def _wanted(asked: Asked) -> list[str]:
    """Return the arguments to make: required ones, the main one, and what makes the model whole."""
    required = [name for name, needed in asked.arguments.items() if needed]
    also = [*ALWAYS, *rules_of_head(asked), *OF_TYPE.get(asked.kind, {})]
    for sense in SENSES:
        encode = method(asked.model, f"get_{sense}_features")
        also += _required_of(encode) if encode is not None else []
    if getattr(asked.config, "is_encoder_decoder", False):
        also.append("decoder_input_ids")
    absent = [name for sense in SENSES if asked.lacks(sense) for name in SENSES[sense]]
    names = [*required, *asked.main, *also]
    return [name for name in names if name in asked.arguments and name not in absent]


def _required_of(function: Callable[..., Any]) -> list[str]:
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind not in VARIADIC
    ]


def _taken_by(function: Callable[..., Any], sense: str) -> list[str]:
    """Return the arguments to give to what makes features: required ones and those of a sense."""
    parameters = inspect.signature(function).parameters
    takes_more = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    optional = [name for name in parameters if name not in TEXT]
    return [*_required_of(function), *optional, *(SENSES[sense] if takes_more else ())]


def _add_placeholders(asked: Asked, made: dict[str, Any], sense: str) -> None:
    """Put as many placeholder tokens before the text as the model makes features."""
    token = asked.placeholder(sense)
    encode = method(asked.model, f"get_{sense}_features")
    if token is None or encode is None or not any(name in made for name in DATA[sense]):
        return
    given = {name: made[name] for name in _taken_by(encode, sense) if name in made}
    count = _count_features(asked.model, encode, given) // asked.batch
    marks = torch.full((asked.batch, count), token)
    made["input_ids"] = torch.cat([marks, made["input_ids"]], dim=1)
    kinds = {"attention_mask": 1, "mm_token_type_ids": list(SENSES).index(sense) * 2 + 1}
    for name, kind in kinds.items():  # 1 is an image, 2 a video, 3 audio
        if name in made:
            made[name] = torch.cat([torch.full_like(marks, kind), made[name]], dim=1)


def _count_features(model: nn.Module, encode: Callable[..., Any], inputs: dict[str, Any]) -> int:
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    try:
        model.eval()  # dropout would use the global random state, a batch norm would move
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found = encode(**{name: value.to(device) for name, value in inputs.items()})
    finally:
        for module, mode in modes:
            module.training = mode
    return sum(_rows(one) for one in listed(_features_of(found)))


def _features_of(found: Any) -> Any:
    """Return the features within what a method returned: tensors that stand for tokens."""
    layers = getattr(found, "deepstack_features", None)  # (layer, features) pairs, all alike
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(found, name, None) is not None:
            return getattr(found, name)
    return layers[0][1] if layers else found


def _rows(features: Tensor) -> int:
    return features.numel() // features.shape[-1]
