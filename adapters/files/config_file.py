"""Reading ``adapter_config.json``, and which of two configurations an adapter has."""

import copy
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from peft.config import PeftConfig

from pemn_surgery.adapters.files.adapter_file import AdapterFile, seal
from pemn_surgery.adapters.files.disk import read_text
from pemn_surgery.errors import AdapterFileError, ConfigError


def read_json(path: Path) -> dict[str, Any]:
    """Return what an ``adapter_config.json`` holds.

    Args:
        path: The file.

    Raises:
        AdapterFileError: If it cannot be read, or is not a JSON object.
    """
    try:
        written = json.loads(read_text(path))
    except AdapterFileError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: neither JSON nor UTF-8
        refuse_file(path, f"is not JSON ({type(error).__name__}: {error})")
    if not isinstance(written, dict):
        refuse_file(path, f"holds {type(written).__name__}, a configuration is an object")
    return written


def decide(path: Path, written: dict[str, Any], file: AdapterFile) -> Mapping[str, Any]:
    """Return the configuration that belongs to the weights, which decide.

    One of another save lies there after a save that was killed between the two files. In that of
    the same save, what PEFT keeps for itself (the base's name, the task) may be edited.

    Args:
        path: The ``adapter_config.json``.
        written: What it holds.
        file: The weights beside it.

    Raises:
        AdapterFileError: If it was altered, or belongs to other weights that have no seal.
    """
    sealed = file.sealed
    if sealed is None:
        _check_unsealed(path, written, file)
        return written
    if written.get("digest") != sealed["digest"]:
        return copy.deepcopy(dict(sealed))  # PEFT adds to a configuration's lists
    free = {item.name for item in fields(PeftConfig)} - {"peft_type"}
    altered = [key for key in sealed if key not in free and written.get(key) != sealed[key]]
    if altered:
        key = altered[0]
        refuse_file(
            path,
            f"says {key}={written.get(key)!r}, but the adapter was saved with {sealed[key]!r} "
            f"({len(altered)} such fields)",
        )
    return written


def _check_unsealed(path: Path, written: dict[str, Any], file: AdapterFile) -> None:
    """Refuse weights that have lost their seal and are others than the configuration's."""
    digest = written.get("digest")
    if digest is not None and seal(file.path, written)["digest"] != digest:
        refuse_file(
            path,
            f"was saved with other weights (digest {digest!r}) than those of {file.path.name}, "
            'which hold no digest; if that was done on purpose, remove "digest" from it. Otherwise',
        )


def refuse_file(path: Path, problem: str) -> NoReturn:
    """Refuse an ``adapter_config.json``.

    Args:
        path: The file.
        problem: What is wrong with it, after its name.

    Raises:
        AdapterFileError: Always.
    """
    message = (
        f"{str(path)!r} {problem}; it is truncated or altered. Nothing was loaded; get it again "
        "from where it was saved."
    )
    raise AdapterFileError(message)


def refuse_option(path: Path, error: ConfigError) -> NoReturn:
    """Refuse an ``adapter_config.json`` with an option that cannot be.

    Args:
        path: The file.
        error: Which option, and why.

    Raises:
        AdapterFileError: Always.
    """
    message = (
        f"{str(path)!r} is no configuration of masks: {error} It is truncated or altered, or of a "
        "later release. Nothing was loaded; get it again from where it was saved, or upgrade "
        "pemn-surgery."
    )
    raise AdapterFileError(message) from error
