"""What an adapter file holds: which keys are masks, of how many weights, and what they take."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from pemn_surgery.coding import bits, codec
from pemn_surgery.coding.header import StoredMask
from pemn_surgery.errors import AdapterFileError, ConfigError, MaskFormatError
from pemn_surgery.masks.masked_weight import masked_child_name
from pemn_surgery.masks.task_tensors import TASK_CHILD

KEY_PREFIX = "base_model.model."
MASKS = "pemn_masks"
TENSORS = "pemn_tensors"
BANK_KEY = f"{KEY_PREFIX}pemn_bank"  # the numbers under the masks, with bank_init="stored"
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


@dataclass
class FileMask:
    """What an adapter file says of one mask.

    Attributes:
        weights: Number of weights that it is of.
        called: What the file calls the masked parameter.
        header: What the mask's own header says; None where the file holds float scores.
        row_scales: Number of scales beside it; 0 but for ``form="sign_delta"`` and ``scale="row"``.
        ones: Number of ones, where it is bits or was decoded; `AdapterFile.ones` has all.
        coded: The mask while it is coded otherwise than beside the base's numbers, else None.
    """

    weights: int
    called: str
    header: StoredMask | None
    row_scales: int = 0
    ones: int | None = None
    coded: Tensor | None = field(default=None, repr=False, compare=False)

    def count(self, mask: Tensor) -> None:
        """Count the ones of this mask, now decoded."""
        self.ones, self.coded = bits.count_ones(mask), None


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds.

    Attributes:
        path: The file.
        nbytes: Its size.
        masks: What it says of each masked parameter, by the parameter's name.
        others: Shape and dtype of every other tensor, by key.
        sealed: The configuration that the file was saved with, as in ``adapter_config.json``;
            None where the file has no seal.
        wish: What the loading method was asked to see otherwise than it is stored.
        bank_floats: Size of the bank in it, if it holds the numbers under the masks.
    """

    path: Path
    nbytes: int
    masks: Mapping[str, FileMask]
    others: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    sealed: Mapping[str, Any] | None
    wish: Wish = Wish()
    bank_floats: int | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Number of weights of each masked parameter, by the parameter's name."""
        return {name: mask.weights for name, mask in self.masks.items()}

    @property
    def headers(self) -> dict[str, StoredMask]:
        """What each mask's own header says; empty where the file holds float scores."""
        return {name: mask.header for name, mask in self.masks.items() if mask.header}

    @property
    def called(self) -> dict[str, str]:
        """What the file calls the masked parameters, by the names that it is seen under."""
        return {name: mask.called for name, mask in self.masks.items()}

    @property
    def is_renamed(self) -> bool:
        """Whether a masked parameter is called otherwise than in the file."""
        return any(name != mask.called for name, mask in self.masks.items())

    @property
    def coded(self) -> dict[str, Tensor]:
        """The masks that are coded still, but for those beside the base's numbers, by name."""
        return {name: mask.coded for name, mask in self.masks.items() if mask.coded is not None}

    @property
    def ones(self) -> dict[str, int]:
        """Number of ones of each mask, but float scores and those coded beside the base.

        Coded masks are decoded when this is asked for, if they were not for a load.

        Raises:
            MaskFormatError: If a coded mask is damaged, or asks for too much memory.
        """
        check_room(self)
        for name, tensor in self.coded.items():
            self.masks[name].count(codec.decode(tensor, mask_key(name, "bits")))
        return {name: mask.ones for name, mask in self.masks.items() if mask.ones is not None}


def mask_key(name: str, kind: str) -> str:
    """Return the file's key of a parameter's mask: its "bits", "scores" or "row_scale"."""
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


def plain_name(key: str) -> str:
    """Return the model's own name of a tensor that PEFT or a task holds a copy of."""
    name = key.removeprefix(KEY_PREFIX).replace(".original_module.", ".")
    return name.replace(f"{TASK_CHILD}.{TENSORS}.", "")


def check_room(file: AdapterFile) -> None:
    """Refuse masks that would take far more memory than their file is worth.

    A code may stand for 2,040 weights a byte, and a file of some megabytes for hundreds of
    gigabytes; masks of density .997 stay within the limit however large their model is.

    Raises:
        MaskFormatError: If it asks for more.
    """
    coded = {name: header for name, header in file.headers.items() if name in file.coded}
    if not coded:
        return
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
    """Tell whether a key is a stored mask's: no scores, nor what lies beside a mask."""
    return is_mask_key(key) and not key.endswith((".row_scale", ".scores", f".{FINGERPRINT}"))


def sort_out(
    path: Path,
    nbytes: int,
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, StoredMask],
    sealed: Mapping[str, Any] | None,
    wish: Wish,
) -> AdapterFile:
    """Return what a file holds, from its tensors and the headers of its masks by key."""
    names = _renamed_keys(path, tensors, wish)
    masks, others, bank_floats = {}, {}, None
    for key, tensor in tensors.items():
        name = parameter_name(names[key])
        if key == BANK_KEY:
            bank_floats = tensor.numel()
        elif not is_mask_key(key):
            others[names[key]] = (tuple(tensor.shape), tensor.dtype)
        elif name in masks and _holds_choice(key):
            _refuse_second(path, name)
        elif _holds_choice(key):
            masks[name] = _file_mask(parameter_name(key), tensor, stored.get(key))
    for key in filter(_holds_scales, tensors):
        name = parameter_name(names[key])
        if name in masks:
            masks[name].row_scales = tensors[key].numel()
    return AdapterFile(path, nbytes, masks, others, sealed, wish, bank_floats)


def _holds_choice(key: str) -> bool:
    """Tell whether a key is that of a mask's bits or scores."""
    return is_mask_key(key) and not (_holds_scales(key) or is_fingerprint_key(key))


def _holds_scales(key: str) -> bool:
    return is_mask_key(key) and key.endswith(".row_scale")


def _file_mask(called: str, tensor: Tensor, header: StoredMask | None) -> FileMask:
    if header is None:
        return FileMask(tensor.numel(), called, None)
    if header.coding == "bits":
        return FileMask(header.weights, called, header, ones=bits.count_ones(tensor))
    coded = None if header.coding == "base" else tensor  # that takes the base
    return FileMask(header.weights, called, header, coded=coded)


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
