"""Writing an adapter's masks in another coding, from its files alone."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.adapter_file import one_reading, read_adapter_file, read_decoded
from pemn_surgery.adapters.files.atomic import CARD, write_adapter
from pemn_surgery.adapters.files.card import complete_card
from pemn_surgery.adapters.files.contents import (
    AdapterFile,
    is_fingerprint_key,
    is_mask_key,
    parameter_name,
)
from pemn_surgery.adapters.files.file_checks import check_without_base
from pemn_surgery.adapters.files.opening import open_adapter
from pemn_surgery.coding import bits, codec
from pemn_surgery.coding.header import CodingName
from pemn_surgery.errors import ConfigError
from pemn_surgery.masks.selector import Selector, check_finite
from pemn_surgery.numbers import fingerprint as fingerprints

RecodingName = Literal["bits", "entropy"]


def recode(folder: str | Path, coding: RecodingName, out: str | Path | None = None) -> AdapterFile:
    """Write an adapter's masks in another coding; everything else of it stays as it is.

    Scores, as a Trainer's checkpoint holds them, become the masks that they choose.

    Args:
        folder: The adapter's folder.
        coding: "bits" or "entropy", as in `PemnConfig`. "context" and "base" need the model's
            layers, and are made by saving from it.
        out: Folder for the new adapter; None puts it in place of the old one, all at once.

    Returns:
        What the new file holds.

    Raises:
        AdapterFileError: If the adapter is missing, truncated or altered.
        ConfigError: If there is no such coding, or scores would be replaced by their masks.
        NonFiniteScoresError: If scores contain NaN or infinity.
        AdapterWriteError: If it cannot be written; the old adapter is still there.
    """
    _check_coding(coding, folder)
    into = Path(folder if out is None else out)
    with one_reading():
        config, file = open_adapter(folder)
        check_without_base(file)
        _check_keeps_scores(file, Path(folder), into)
        given = read_decoded(file.path).tensors
        scores = {parameter_name(key): value for key, value in given.items() if _is_scores(key)}
        for name, value in scores.items():
            check_finite(value, name)
        selectors = config.selectors(scores)
        tensors = {
            _new_key(key): _recoded(key, value, coding, config, selectors)
            for key, value in given.items()
            if not is_fingerprint_key(key)  # bits have it in their header
        }
    config.coding = coding
    write_adapter(into, tensors, config)
    _bring_card(Path(folder), into)
    return read_adapter_file(into / file.path.name)


def _bring_card(folder: Path, into: Path) -> None:
    if (folder / CARD).is_file() and not (into / CARD).exists():
        shutil.copyfile(folder / CARD, into / CARD)
    complete_card(into)


def _recoded(
    key: str,
    value: Tensor,
    coding: RecodingName,
    config: PemnConfig,
    selectors: Mapping[str, Selector],
) -> Tensor:
    if not is_mask_key(key) or key.endswith(".row_scale"):
        return value
    stored = value
    if _is_scores(key):
        base = fingerprints.short_form(config.fingerprint or {})
        stored = bits.pack(selectors[parameter_name(key)].mask(value), base)
    return codec.encode(stored) if coding == "entropy" else stored


def _new_key(key: str) -> str:
    return f"{key.removesuffix('.scores')}.bits" if _is_scores(key) else key


def _is_scores(key: str) -> bool:
    return is_mask_key(key) and key.endswith(".scores")


def _check_coding(coding: Any, folder: str | Path) -> None:
    if coding in get_args(RecodingName):
        return
    remedy = ""
    if coding in get_args(CodingName):
        remedy = (
            f' For "{coding}", which codes masks beside what the model tells of each weight: model '
            f"= PeftModel.from_pretrained(base, {str(folder)!r}); "
            f'model.peft_config["default"].coding = "{coding}"; model.save_pretrained(folder).'
        )
    message = f'recode got coding={coding!r}; files alone give "bits" or "entropy".{remedy}'
    raise ConfigError(message)


def _check_keeps_scores(file: AdapterFile, folder: Path, into: Path) -> None:
    scores = len(file.masks) - len(file.headers)
    if scores and folder.resolve() == into.resolve():
        message = (
            f"{str(folder)!r} holds float scores of {scores} masks, a training to be resumed; "
            "masks in their place would lose it. Give another folder for the masks (out, --out)."
        )
        raise ConfigError(message)
