"""The numbers of a bank that no seed draws: given to `pemnify`, or read with an adapter."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.adapter_file import read_adapter
from pemn_surgery.adapters.files.contents import BANK_KEY, AdapterFile
from pemn_surgery.adapters.within import set_within
from pemn_surgery.errors import AdapterFileError, ConfigError
from pemn_surgery.numbers.bank import Layout

# What `pemnify` was given, while PEFT injects the adapter.
_given: ContextVar[Tensor | None] = ContextVar("bank_values", default=None)


def giving(values: Tensor | None) -> AbstractContextManager[None]:
    """Have `stored_values` take these, within the block."""
    return set_within(_given, values)


def with_stored_bank(
    config: PemnConfig | None, options: Mapping[str, Any], values: Tensor | None
) -> dict[str, Any]:
    """Return options with what values of a bank say of them: where it comes from, how long it is.

    Raises:
        ConfigError: If a configuration, or an option, says that the bank comes from elsewhere.
    """
    if values is None:
        return dict(options)
    _check_values(values)
    said = config.bank_init if config is not None else options.get("bank_init", "stored")
    if said != "stored":
        message = (
            f'Got bank_values and bank_init={said!r}; given numbers are a "stored" bank. Leave '
            "one of the two out. Nothing was changed."
        )
        raise ConfigError(message)
    if config is not None:
        return dict(options)
    is_open = options.get("bank") == "rp" and not {"ratio", "length"} & options.keys()
    length = {"length": values.numel()} if is_open else {}
    return {**options, **length, "bank_init": "stored"}


def stored_values(config: PemnConfig, layout: Layout) -> Tensor:
    """Return the numbers of a stored bank, one row.

    Raises:
        ConfigError: If none were given, or another number of them than the bank has.
        AdapterFileError: If the adapter's file holds none, or another number.
    """
    if config.origin.file is not None:
        return _in_file(config.origin.file, layout)
    values = _given.get()
    if values is None:
        message = (
            'bank_init="stored" takes numbers that no seed draws, and none were given: '
            f"{_needed(layout)} Give them by pemnify(model, ..., bank_values=tensor), or load an "
            "adapter from a local folder (huggingface_hub.snapshot_download), whose file has them. "
            "Nothing was changed."
        )
        raise ConfigError(message)
    if values.numel() != layout.floats:
        message = (
            f"Got bank_values of {values.numel():,} numbers. {_needed(layout)} Nothing was changed."
        )
        raise ConfigError(message)
    return values.detach().reshape(-1)


def _in_file(file: AdapterFile, layout: Layout) -> Tensor:
    if file.bank_floats != layout.floats:
        message = (
            f"{str(file.path)!r} holds {file.bank_floats or 'no'} numbers of a bank. "
            f"{_needed(layout)} The file was altered, or is of another model. Nothing was changed."
        )
        raise AdapterFileError(message)
    return read_adapter(file.path).tensors[file.wish.renamed(BANK_KEY)].reshape(-1)


def _needed(layout: Layout) -> str:
    made_of = ", ".join(
        f"{one.length:,} of {one.source!r}{f' for shape {shape}' if shape else ''}"
        for shape, one in layout.by_shape[:3]
    )
    more = ", ..." * (len(layout.by_shape) > 3)
    return f"The bank {layout.spec.bank!r} has {layout.floats:,} numbers here ({made_of}{more})."


def _check_values(values: Any) -> None:
    is_float = isinstance(values, Tensor) and values.is_floating_point()
    if not is_float or values.is_meta or not torch.isfinite(values).all():
        held = f"{values.dtype}" if isinstance(values, Tensor) else type(values).__name__
        message = (
            f"Got bank_values of {held}; a float tensor of finite numbers is needed. Nothing was "
            "changed."
        )
        raise ConfigError(message)
