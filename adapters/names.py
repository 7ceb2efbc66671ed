"""Adapters' names: what one may be, and where it stands in a key of the model.

PEFT looks for ``.name.`` anywhere in a key. A module or tensor of the model may be called like an
adapter ("weight", "head", "default"), and then a second adapter's file loses tensors without a
word. So keys with masks are taken apart here by the containers that hold adapters.
"""

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.contents import MASKS, TENSORS
from pemn_surgery.errors import AdapterNameError
from pemn_surgery.masks.masked_weight import masked_child_name
from pemn_surgery.masks.task_tensors import TASK_CHILD

_MOST_BYTES = 255  # of a folder's name, on Linux, macOS and Windows alike
_SHOWN = 60  # characters of a name in an error
_ATTRIBUTES = nn.ModuleDict()

# The container, the adapter's name, and one of its tensors.
_OURS = re.compile(
    rf"(?P<container>(^|\.)({masked_child_name('')}[^.]+\.{MASKS}|{TASK_CHILD}\.{TENSORS}))"
    r"\.(?P<name>[^.]+)(?P<tensor>\.[^.]+)$"
)


def check_adapter_name(name: Any, saved_whole: Iterable[str] = ()) -> None:
    """Refuse a name that an adapter cannot be added, saved or loaded under (`AdapterNameError`).

    PEFT would take an adapter that is called like a module that is saved whole for that module.
    """
    problem = _problem(name)
    ends = [one for one in saved_whole if not problem and name.endswith(one)]
    if ends:
        problem = f"it ends like {ends[0]!r}, a module of modules_to_save, which PEFT finds by that"
    if problem:
        message = (
            f"{_shown(name)} cannot be an adapter's name: {problem}. Choose another, for example "
            "'task_1'; 'project/task' is a folder in a folder. Nothing was changed."
        )
        raise AdapterNameError(message)


def saved_whole(configs: Iterable[PemnConfig]) -> list[str]:
    """Return the modules that adapters train and save whole."""
    return [module for config in configs for module in config.modules_to_save or ()]


def without_name(key: str, adapter_name: str) -> str:
    """Return a state dict's key as an adapter's file has it; one that names no adapter stays."""
    found = _OURS.search(key)
    if found is None or found["name"] != adapter_name:
        return key
    return key[: found.end("container")] + found["tensor"]


def by_containers(keep: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Tell other adapters' keys by their containers where there are masks."""

    @functools.wraps(keep)
    def kept(state_dict: dict[str, Tensor], unwanted_adapter_names: list[str]) -> Any:
        if not any(_OURS.search(key) for key in state_dict):
            return keep(state_dict, unwanted_adapter_names)
        unwanted = set(unwanted_adapter_names)
        return {key: value for key, value in state_dict.items() if not _names(key) & unwanted}

    return kept


def _names(key: str) -> set[str]:
    """Return the adapters that a key names, by the containers that it goes through."""
    found = _OURS.search(key)
    whole = re.findall(r"\.modules_to_save\.([^.]+)(?=\.)", key)
    return {*whole, found["name"]} if found else {*whole}


def _problem(name: Any) -> str:
    """Return what stands against a name on any model, or ""."""
    if not isinstance(name, str):
        return f"it is {type(name).__name__}, not a string"
    if "." in name:
        return "it has a dot, which separates the parts of a tensor's key"
    parts = name.split("/")
    if not all(parts):
        return "it is empty, or one of the folders that it names is"
    if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in name):  # halves of pairs
        return "it has a character that no file's name can have"
    longest = max(len(part.encode()) for part in parts)
    if longest > _MOST_BYTES:
        return f"it has {longest} bytes, and a folder's name at most {_MOST_BYTES}"
    return "PEFT's containers have an attribute of that name" if hasattr(_ATTRIBUTES, name) else ""


def _shown(name: Any) -> str:
    text = repr(name)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
