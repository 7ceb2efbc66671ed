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
    TEXT_LENGTH,
    Asked,
    Maker,
    listed,
    method,
    text,
)
from pemn_surgery.models.inputs.by_type import OF_TYPE, ONE_AT_A_TIME

SMALL_IMAGE = 128  # pixels a side, for architectures that take images of any size
_CHOICES = 2  # that an example of multiple choice has
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
        f"{', '.join(_arguments(base.forward)) or 'none'}); give `inputs=` yourself"
    )
    raise ExampleInputsError(message)


def _arguments(function: Callable[..., Any]) -> dict[str, bool]:
    """Return the names of a function's arguments, True for those without a default."""
    return {
        name: parameter.default is inspect.Parameter.empty
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in VARIADIC
    }


def _required(arguments: Mapping[str, bool]) -> list[str]:
    return [name for name, needed in arguments.items() if needed]


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
    return {next(iter(_arguments(model.forward))): image}


def _first_channels(model: nn.Module, config: Mapping[str, Any]) -> int | None:
    """Return the channels that the first convolution takes: ``in_chans=`` is not in the config."""
    first = listed(config.get("first_conv"))[:1]
    module = dict(model.named_modules()).get(first[0]) if first else None
    return getattr(module, "in_channels", None)


# ------------------------------------------------------------------------------------ transformers


def _transformers_inputs(model: Any, batch: int) -> dict[str, Any]:
    if model.config.model_type in ONE_AT_A_TIME or _takes_one(model):
        batch = 1
    arguments = _arguments(model.forward)
    if not _is_for(model, "MultipleChoice"):
        return _make(Asked(model, batch, arguments))
    made = _make(Asked(model, batch * _CHOICES, arguments))
    return {
        name: value.unflatten(0, (batch, _CHOICES)) if isinstance(value, Tensor) else value
        for name, value in made.items()
    }


def _make(asked: Asked) -> dict[str, Any]:
    made: dict[str, Any] = {}
    rules_of_type = OF_TYPE.get(asked.kind, {})
    makers = {**MAKERS, **_rules_of_head(asked), **rules_of_type}
    for name in _wanted(asked):
        maker = makers.get(name)
        if maker is not None and name not in made:
            made[name] = maker(asked)
    made = {name: value for name, value in made.items() if value is not None}
    if "input_ids" not in made:
        if makers["attention_mask"] is MAKERS["attention_mask"]:
            made.pop("attention_mask", None)  # of the text, which is not there
    elif "input_ids" not in rules_of_type:  # else a type's own rule has put them there
        for sense in SENSES:
            _add_placeholders(asked, made, sense)
    _refuse_missing(asked, made)
    return {**made, "use_cache": False} if "use_cache" in asked.arguments else made


def _refuse_missing(asked: Asked, made: dict[str, Any]) -> None:
    missing = [name for name in _required(asked.arguments) if name not in made]
    if missing or not made:
        what = ", ".join(missing) or "something that no rule knows"
        message = (
            f"{type(asked.model).__name__} needs {what}, for which there is no rule; "
            "give `inputs=` yourself"
        )
        raise ExampleInputsError(message)


def _wanted(asked: Asked) -> list[str]:
    """Return the arguments to make: required ones, the main one, and what makes the model whole."""
    also = [*ALWAYS, *_rules_of_head(asked), *OF_TYPE.get(asked.kind, {})]
    for sense in SENSES:
        encode = method(asked.model, f"get_{sense}_features")
        also += _required(_arguments(encode)) if encode is not None else []
    if getattr(asked.config, "is_encoder_decoder", False):
        also.append("decoder_input_ids")
    absent = [name for sense in SENSES if asked.lacks(sense) for name in SENSES[sense]]
    main = listed(getattr(asked.model, "main_input_name", "input_ids"))
    names = [*_required(asked.arguments), *main, *also]
    return [name for name in names if name in asked.arguments and name not in absent]


def _taken_by(function: Callable[..., Any], sense: str) -> list[str]:
    """Return the arguments to give to what makes features: required ones and those of a sense."""
    parameters = inspect.signature(function).parameters
    takes_more = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    optional = [name for name in parameters if name not in TEXT]
    required = _required(_arguments(function))
    return [*required, *optional, *(SENSES[sense] if takes_more else ())]


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
    return sum(one.numel() // one.shape[-1] for one in listed(_features_of(found)))


def _features_of(found: Any) -> Any:
    """Return the features within what a method returned: tensors that stand for tokens."""
    layers = getattr(found, "deepstack_features", None)  # (layer, features) pairs, all alike
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(found, name, None) is not None:
            return getattr(found, name)
    return layers[0][1] if layers else found


# ------------------------------------------------------------------------------------ heads
# What a head is for is told by the name that transformers gives its class, or a class that this is
# derived from: BertForMultipleChoice is for multiple choice.


def _is_for(model: nn.Module, task: str) -> bool:
    """Tell whether a model's head is for a task, written as in names of classes."""
    return any(f"For{task}" in kind.__name__ for kind in type(model).__mro__)


def _takes_one(model: Any) -> bool:
    """Tell whether a head takes one text at a time: it looks for the last token before the pads."""
    if not _is_for(model, "SequenceClassification"):
        return False
    config = model.config
    about_text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(about_text, "pad_token_id", None) is None


def _rules_of_head(asked: Asked) -> dict[str, Maker]:
    """Return what a head is given beside or instead of what its arguments' names say."""
    if _is_for(asked.model, "QuestionAnswering") or _is_for(asked.model, "MultipleChoice"):
        return {"input_ids": _pair_of_texts, "decoder_input_ids": MAKERS["decoder_input_ids"]}
    if _is_for(asked.model, "ImageTextRetrieval") and asked.number("num_query_tokens"):
        return {
            "input_ids": _queries_and_text,
            "attention_mask": lambda asked: torch.ones_like(_queries_and_text(asked)),
        }
    two_parts = getattr(asked.config, "is_encoder_decoder", False)
    if two_parts and _is_for(asked.model, "SequenceClassification"):
        # It reads the decoder's states where the encoder's text ends.
        return {
            "input_ids": _text_with_an_end,
            "decoder_input_ids": lambda asked: text(asked, TEXT_LENGTH),
        }
    return {}


def _text_with_an_end(asked: Asked) -> Tensor:
    """Return texts that end with the token for that (batch, length)."""
    found = text(asked)
    ends = listed(asked.config.eos_token_id)
    if ends != [None]:
        found[:, -1] = ends[0]
    return found


def _queries_and_text(asked: Asked) -> Tensor:
    """Return texts after the tokens of what an image is asked (batch, queries + length)."""
    queries = torch.full(
        (asked.batch, asked.number("num_query_tokens")), asked.placeholder("image") or 0
    )
    return torch.cat([queries, text(asked)], dim=1)


def _pair_of_texts(asked: Asked) -> Tensor:
    """Return pairs of texts, with two separators between and one at the end (batch, length)."""
    found = text(asked)
    separator = getattr(asked.config, "sep_token_id", None)
    if separator is not None:
        found[:, [3, 4, -1]] = separator
    return found
