"""What an adapter file holds: which keys are masks, of how many weights, and what they take."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from pemn_surgery import bits, codec
from pemn_surgery.bits import StoredMask
from pemn_surgery.errors import AdapterFileError, ConfigError, MaskFormatError
from pemn_surgery.masks.masked_weight import masked_child_name

KEY_PREFIX = "base_model.model."
MASKS = "pemn_masks"
TENSORS = "pemn_tensors"
FINGERPRINT = "fingerprint"  # beside scores; bits have it in their header

# A part of a model may be called like one of these: a key is known by its last three parts.
_MASK_KEY = re.compile(rf"(^|\.){masked_child_name('')}[^.]+\.{MASKS}\.[^.]+$")

# Where no model says how many weights a mask has, its file must be worth the memory it asks for.
_ROOM = 1 << 30
_ROOM_A_BYTE = 128


@dataclass(frozen=True)
class Wish:
    """What PEFT's loading methods may be asked for.

    Attributes:
        key_mapping: Replacements by regular expressions, of keys without PEFT's prefix; the first
            that matches counts.
        ignores_sizes: Whether tensors of other sizes than the model's are left out; masks are not.
    """

    key_mapping: Mapping[str, str] = field(default_factory=dict)
    ignores_sizes: bool = False

    def renamed(self, name: str) -> str:
        """Return what a key, or the name of a tensor or module, is called in the model."""
        start = KEY_PREFIX if name.startswith(KEY_PREFIX) else ""
        for pattern, replacement in self.key_mapping.items():
            changed, count = re.subn(pattern, replacement, name.removeprefix(start))
            if count:
                return start + changed
        return name


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds.

    Attributes:
        path: The file.
        nbytes: Its size.
        masks: Number of weights of each masked parameter, by the parameter's name.
        counted: Number of ones of each mask that is bits or was decoded; `ones` has all.
        coded: Coded masks that were not, by key.
        stored: What the header of each mask says; empty where the file holds float scores.
        others: Shape and dtype of every other tensor, by key.
        scales: Number of row scales beside each mask; empty but for ``form="sign_delta"``.
        sealed: The configuration that the file was saved with, as in ``adapter_config.json``;
            None where the file has no seal.
        wish: What the loading method was asked to see otherwise than it is stored.
        stored_names: What the file calls the masked parameters, by the names that it is seen under.
    """

    path: Path
    nbytes: int
    masks: Mapping[str, int]
    counted: dict[str, int] = field(repr=False)
    coded: dict[str, Tensor] = field(repr=False, compare=False)
    stored: Mapping[str, StoredMask]
    others: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    scales: Mapping[str, int]
    sealed: Mapping[str, Any] | None
    wish: Wish = Wish()
    stored_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_renamed(self) -> bool:
        """Whether a masked parameter is called otherwise than in the file."""
        return any(name != stored for name, stored in self.stored_names.items())

    @property
    def ones(self) -> Mapping[str, int]:
        """Number of ones of each mask, but float scores and those coded beside the base.

        Coded masks are decoded when this is asked for, if they were not for a load.

        Raises:
            MaskFormatError: If a coded mask is damaged, or asks for too much memory.
        """
        check_room(self)
        for key, tensor in [*self.coded.items()]:
            self.count(key, codec.decode(tensor, key))
        return {name: self.counted[name] for name in self.masks if name in self.counted}

    def count(self, key: str, mask: Tensor) -> None:
        """Count the ones of a mask that is decoded.

        Args:
            key: The mask's key.
            mask: What `bits.pack` returned.
        """
        self.counted[parameter_name(key)] = bits.count_ones(mask)
        self.coded.pop(key, None)


def mask_key(name: str, kind: str) -> str:
    """Return the file's key of a parameter's mask.

    Args:
        name: The parameter's name, for example "layer1.0.conv1.weight".
        kind: "bits", "scores" or "row_scale".
    """
    path, _, parameter = name.rpartition(".")
    module = f"{path}." if path else ""
    return f"{KEY_PREFIX}{module}{masked_child_name(parameter)}.{MASKS}.{kind}"


def is_mask_key(key: str) -> bool:
    """Tell whether a file's key is a mask's: its bits, scores, scales or fingerprint."""
    return _MASK_KEY.search(key) is not None


def is_fingerprint_key(key: str) -> bool:
    """Tell whether a file's key is that of the base beside a mask's scores."""
    return is_mask_key(key) and key.endswith(f".{FINGERPRINT}")


def parameter_name(key: str) -> str:
    """Return the parameter's name of a mask's key (the inverse of `mask_key`)."""
    module = key.removeprefix(KEY_PREFIX).rpartition(f".{MASKS}.")[0]
    path, _, child = module.rpartition(".")
    parameter = child.removeprefix(masked_child_name(""))
    return f"{path}.{parameter}" if path else parameter


def check_room(file: AdapterFile) -> None:
    """Refuse masks that would take far more memory than their file is worth.

    A code may stand for 2,040 weights a byte, and a file of some megabytes for hundreds of
    gigabytes; masks of density .997 stay within the limit however large their model is.

    Args:
        file: What was read, its coded masks not decoded.

    Raises:
        MaskFormatError: If it asks for more.
    """
    if not file.coded:
        return
    coded = {parameter_name(key): file.stored[parameter_name(key)] for key in file.coded}
    decoding = max(codec.room(mask) for mask in coded.values())
    needed = sum(bits.packed_bytes(mask.weights) for mask in coded.values()) + decoding
    most = _ROOM + _ROOM_A_BYTE * file.nbytes
    if needed > most:
        largest = max(coded, key=lambda name: coded[name].weights)
        message = (
            f"The coded masks in {str(file.path)!r} ({file.nbytes:,} bytes) say that they stand "
            f"for {sum(mask.weights for mask in coded.values()):,} weights ({largest!r} for "
            f"{coded[largest].weights:,}) and would take {needed:,} bytes of memory; without a "
            f"model that shows such weights at most {most:,} are taken. Load the adapter with "
            "PeftModel.from_pretrained(base, folder), which compares sizes with the model's; if "
            "there is no such model, the file was altered."
        )
        raise MaskFormatError(message)


def is_mask(key: str) -> bool:
    """Tell whether a key is a stored mask's: no scores, nor what lies beside a mask.

    Args:
        key: A tensor's key.
    """
    return is_mask_key(key) and not key.endswith((".row_scale", ".scores", f".{FINGERPRINT}"))


def sort_out(
    path: Path,
    nbytes: int,
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, StoredMask],
    sealed: Mapping[str, Any] | None,
    wish: Wish,
) -> AdapterFile:
    """Return what a file holds.

    Args:
        path: The file.
        nbytes: Its size.
        tensors: Its tensors by key, as they are stored.
        stored: The header of each mask by key.
        sealed: The configuration in its seal.
        wish: What is asked for; the keys above are those of the file.
    """
    names = _renamed_keys(path, tensors, wish)
    masked = (key for key in tensors if is_mask_key(key))
    stored_names = {parameter_name(names[key]): parameter_name(key) for key in masked}
    tensors = {names[key]: value for key, value in tensors.items()}
    stored = {names[key]: value for key, value in stored.items()}
    masks, counted, coded, others, scales = {}, {}, {}, {}, {}
    for key, tensor in tensors.items():
        name = parameter_name(key)
        if not is_mask_key(key):
            others[key] = (tuple(tensor.shape), tensor.dtype)
        elif key.endswith(".row_scale"):
            scales[name] = tensor.numel()
        elif is_fingerprint_key(key):
            continue
        elif name in masks:
            _refuse_second(path, name)
        else:
            masks[name] = stored[key].weights if key in stored else tensor.numel()
    for key, header in stored.items():
        if header.coding == "bits":
            counted[parameter_name(key)] = bits.count_ones(tensors[key])
        elif header.coding != "base":  # that takes the base
            coded[key] = tensors[key]
    headers = {parameter_name(key): header for key, header in stored.items()}
    return AdapterFile(
        path, nbytes, masks, counted, coded, headers, others, scales, sealed, wish, stored_names
    )


def _renamed_keys(path: Path, keys: Iterable[str], wish: Wish) -> dict[str, str]:
    """Return what keys are called in the model, by themselves."""
    names = {key: wish.renamed(key) for key in keys}
    if len(set(names.values())) < len(names):
        twice = next(name for name, count in Counter(names.values()).items() if count > 1)
        message = (
            f"key_mapping={dict(wish.key_mapping)} gives several tensors of {str(path)!r} one name "
            f"({twice!r}). Nothing was loaded; give patterns that keep names apart."
        )
        raise ConfigError(message)
    return names


def _refuse_second(path: Path, name: str) -> NoReturn:
    message = (
        f"The adapter file {str(path)!r} holds two masks of {name!r}; it was altered, or put "
        "together from two. Nothing was loaded; get the file again from where it was saved."
    )
    raise AdapterFileError(message)
