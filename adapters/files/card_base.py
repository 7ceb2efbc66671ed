"""How a card says to build the base: one line of Python that is right, or a comment.

A line is written only where it is known to be right: a transformers model has a name and a class; a
timm model is built once more, without memory, and compared.
"""

import json
import re
from typing import Any

import torch
from torch import nn

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.adapter_file import MASKS, TENSORS
from pemn_surgery.adapters.files.card_text import BaseCode, base_named_by
from pemn_surgery.adapters.layer import PemnLayer

_AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_EARLIER = re.compile(
    r"^(?P<imports>import timm\n|from transformers import \w+\n)from peft import PeftModel\n\n"
    r"(?P<base>base = .*)$",
    re.MULTILINE,
)


def base_code(config: PemnConfig, model: nn.Module | None, earlier: str = "") -> BaseCode:
    """Return how an adapter's base is built.

    Args:
        config: The adapter's configuration.
        model: The model that carries it, if there is one.
        earlier: The card's text until now; what it says is kept where nothing else is known.
    """
    base = None if model is None else _base_of(model)
    found = _transformers(config, base) or _timm(config, base)
    said = _EARLIER.search(earlier)
    if found is None and base is None and said is not None:
        return BaseCode(said["imports"], said["base"])
    unknown = f"# base: {base_named_by(config)}, built as it was for training"
    return found or BaseCode("", unknown)


def _base_of(model: nn.Module) -> Any:
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def _transformers(config: PemnConfig, base: Any) -> BaseCode | None:
    made_of = config.auto_mapping or {}
    library = made_of.get("parent_library", "transformers")
    named = made_of.get("base_model_class") or _AUTO.get(config.task_type or "")
    if not config.base_model_name_or_path or not named or not library.startswith("transformers"):
        return None
    arguments = [json.dumps(config.base_model_name_or_path)]
    labels = getattr(getattr(base, "config", None), "num_labels", 2)
    if labels != 2 and "Classification" in named:
        arguments.append(f"num_labels={labels}")
    line = f"base = {named}.from_pretrained({', '.join(arguments)})"
    return BaseCode(f"from transformers import {named}\n", line)


def _timm(config: PemnConfig, base: Any) -> BaseCode | None:
    described = getattr(base, "pretrained_cfg", None) or {}
    name = described.get("architecture")
    if not name:
        return None
    arguments = _arguments(base, described)
    if _shapes(base) != _shapes_of(name, arguments):
        return None
    if not config.bank_spec.generated and described.get("tag"):
        name = f"{name}.{described['tag']}"
    shown = "".join(f", {key}={value!r}" for key, value in arguments.items())
    needed = "" if config.bank_spec.generated else "  # with the weights of the fingerprint below"
    return BaseCode("import timm\n", f"base = timm.create_model({json.dumps(name)}{shown}){needed}")


def _arguments(base: Any, described: Any) -> dict[str, Any]:
    """Return what the model was created with, as far as timm remembers it, and its classes."""
    given = dict(getattr(base, "_model_args", None) or {})
    plain = {key: value for key, value in given.items() if _is_plain(value)}
    classes = getattr(base, "num_classes", None)
    if classes is not None and classes != described.get("num_classes"):
        plain["num_classes"] = classes
    return plain


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))


def _shapes(base: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a base's own parameters, masked or replaced ones as they were."""
    shapes = {
        name.replace(".original_module.", "."): parameter.shape
        for name, parameter in base.named_parameters(remove_duplicate=False)
        if not any(f".{part}" in f".{name}" for part in (MASKS, TENSORS, "modules_to_save."))
    }
    masked = [module for module in base.modules() if isinstance(module, PemnLayer)]
    return shapes | {layer.target: torch.Size(layer.shape) for layer in masked}


def _shapes_of(name: str, arguments: dict[str, Any]) -> dict[str, torch.Size] | None:
    import timm

    try:
        with torch.device("meta"):
            built = timm.create_model(name, **arguments)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None
    return {key: value.shape for key, value in built.named_parameters(remove_duplicate=False)}
