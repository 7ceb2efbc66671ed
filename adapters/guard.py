"""Loading that checks first, and loads what was checked.

``PemnConfig.from_pretrained`` checks both files of an adapter, but not everyone asks it: PEFT looks
up the method's name in ``adapter_config.json`` before, reads only the weights where the adapter's
name exists already, and falls back to pickle where there are none; transformers reads the
configuration with PEFT's base class. And both read the weights once more to load them, when another
process may have saved others. So these ways are wrapped (`doors`), which does nothing for adapters
of other methods or for names on the hub: the weights are read once and checked, and every later
step of a load gets that content.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pemn_surgery.adapters.adding import check_versions, tensors_of
from pemn_surgery.adapters.base import fingerprint_now, fingerprint_of, masked_layers
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.adapter_file import (
    WEIGHTS,
    held_tensors,
    one_reading,
    put_on_base,
    read_decoded,
)
from pemn_surgery.adapters.files.contents import (
    BANK_KEY,
    AdapterFile,
    Wish,
    is_fingerprint_key,
)
from pemn_surgery.adapters.files.opening import adapter_folder, check_adapter, check_method
from pemn_surgery.adapters.state import warn_of_bits
from pemn_surgery.adapters.tasks.manage import to_trainable
from pemn_surgery.errors import AdapterError
from pemn_surgery.numbers.fingerprint import check_fingerprint, short_form
from pemn_surgery.surgery.undo import undone_on_error

# What neither fingerprint nor tensors tell: weights that take the place of others get their meaning
# from the configuration that is there.
MUST_AGREE = [
    "bank",
    "selector",
    "density",
    "overall_density",
    "density_pattern",
    "threshold",
    "scale",
    "form",
    "support",
    "support_by",
    "support_others",
    "rest",
    "tied",
    "new_rows",
    "base_rows",
]


def or_held(load_file: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Return what was checked where PEFT would read the file again."""

    @functools.wraps(load_file)
    def safe_load_file(filename: str, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        tensors = held_tensors(Path(filename))
        if tensors is None:
            return load_file(filename, *args, **kwargs)
        device = torch.device(kwargs.get("device", args[0] if args else "cpu"))
        return {key: value.to(device) for key, value in tensors.items()}

    return safe_load_file


def with_config(load: Callable[..., PeftModel]) -> Callable[..., PeftModel]:
    """Hand ``PeftModel.from_pretrained`` the checked configuration."""
    signature = inspect.signature(load)

    @functools.wraps(load)
    def from_pretrained(*args: Any, **kwargs: Any) -> PeftModel:
        given = signature.bind(*args, **kwargs)
        folder = adapter_folder(given.arguments["model_id"], given.arguments.get("kwargs"))
        with one_reading(_wish(given, given.arguments["model"])):
            checked = check_adapter(folder)
            if checked is None:
                return load(*given.args, **given.kwargs)
            given.arguments["key_mapping"] = {}  # done: the tensors have the model's names
            if given.arguments.get("config") is None:
                given.arguments["config"] = checked
            with undone_on_error(given.arguments["model"]):
                return load(*given.args, **given.kwargs)

    return from_pretrained


def checked_first(load: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``PeftModel.load_adapter`` check first."""
    signature = inspect.signature(load)

    @functools.wraps(load)
    def load_adapter(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        given = bound.arguments
        folder = adapter_folder(given["model_id"], given.get("kwargs"))
        with one_reading(_wish(bound)):
            checked, held = check_adapter(folder), self.peft_config.get(given["adapter_name"])
            if checked is None:
                return load(self, *args, **kwargs)
            given["key_mapping"] = {}
            if held is None:
                check_method(folder)
            elif isinstance(held, PemnConfig):
                _check_agrees(given["adapter_name"], held, checked)
                _check_base(self, given["adapter_name"], checked)
            with undone_on_error(self, values=tensors_of(self, given["adapter_name"])):
                loaded = load(*bound.args, **bound.kwargs)
            if isinstance(held, PemnConfig):  # PEFT keeps the configuration that was there
                held.lineage = checked.lineage
            return loaded

    return load_adapter


def _wish(given: inspect.BoundArguments, model: Any = None) -> Wish:
    """Return what a loading method of PEFT's is asked for.

    The model's own mapping holds where none is given, as in PEFT's ``from_pretrained``.
    """
    mapping = given.arguments.get("key_mapping")
    if mapping is None:
        mapping = getattr(model, "_checkpoint_conversion_mapping", None)
    ignores = (given.arguments.get("kwargs") or {}).get("ignore_mismatched_sizes", False)
    return Wish(dict(mapping or {}), bool(ignores))


def with_contents(load: Callable[..., Any]) -> Callable[..., Any]:
    """Hand transformers' ``load_adapter`` the checked configuration and tensors."""
    signature = inspect.signature(load)

    @functools.wraps(load)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        source = given.get("peft_model_id") or getattr(
            given.get("load_config"), "pretrained_model_name_or_path", None
        )
        if source is None or given.get("peft_config") or given.get("adapter_state_dict"):
            return load(self, *args, **kwargs)
        folder = adapter_folder(source, given.get("adapter_kwargs"))
        with one_reading():
            checked = check_adapter(folder)
            if checked is None:
                return load(self, *args, **kwargs)
            check_versions("load_adapter")
            options = {**given, **given.get("kwargs", {})}
            options = {key: options[key] for key in options if key not in {"self", "kwargs"}}
            options |= {"peft_model_id": str(folder), "peft_config": checked}
            tensors = read_decoded(folder / WEIGHTS).tensors
            options["adapter_state_dict"] = {
                key: value
                for key, value in tensors.items()
                if not is_fingerprint_key(key) and key != BANK_KEY
            }
            with undone_on_error(self):
                return _load_as_stored(load, self, options, checked)

    return load_adapter


def _load_as_stored(
    load: Callable[..., Any], model: nn.Module, options: Mapping[str, Any], config: PemnConfig
) -> Any:
    """Load into places of the kind that a file holds, scores or bits; transformers converts none.

    Bits that are to be trained become scores afterwards; what else trains is left alone.
    """
    file = cast("AdapterFile", config.origin.file)
    config.keep_scores = len(file.headers) < len(file.masks)
    if not options.get("is_trainable") or config.keep_scores or config.form != "product":
        return load(model, **options)
    name = options.get("adapter_name") or "default"
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    training = model.training
    found = load(model, **{**options, "is_trainable": False})
    warn_of_bits(len(file.headers))
    to_trainable(model, name)
    model.train(training)
    for parameter, is_trained in trained:
        parameter.requires_grad_(is_trained)
    return found


def _check_agrees(name: str, held: PemnConfig, given: PemnConfig) -> None:
    """Refuse weights under the name of an adapter whose configuration reads them otherwise."""
    other = [key for key in MUST_AGREE if getattr(held, key) != getattr(given, key)]
    if held.support_in_force != given.support_in_force:
        other.append("seed")  # which draws the weights that are masked
    if other:
        key = other[0]
        message = (
            f"The model's adapter {name!r} has {key}={getattr(held, key)!r}, the one to load in "
            f"its place {getattr(given, key)!r} ({len(other)} such settings); PEFT keeps the "
            "first. Load it under a name of its own, or delete the other first. Nothing was "
            "changed."
        )
        raise AdapterError(message)


def _check_base(model: nn.Module, name: str, given: PemnConfig) -> None:
    """Refuse an adapter of another base; of other sizes it is refused when it is put in place."""
    layers = masked_layers(model, name).values()
    sizes = {layer.target: layer.mask_of(name).weights for layer in layers}
    file = given.origin.file
    if not given.origin.fingerprint or file is None or file.sizes != sizes:
        return
    now = fingerprint_now(model, name)
    if not file.is_renamed:
        check_fingerprint(given.origin.fingerprint, now, "the given model")
        return
    as_stored = fingerprint_of(list(layers), called=file.called)
    check_fingerprint(given.origin.fingerprint, as_stored, "the given model")
    put_on_base(file, short_form(now))
