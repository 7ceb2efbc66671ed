"""Versions of PEFT and transformers: which were tested, and which pairs transformers refuses.

Each release of transformers asks for a least PEFT in ``model.add_adapter`` and the methods around
it, sometimes for one that is not out yet. `pyproject.toml` excludes such pairs; where one is there
all the same, its error says neither which versions met nor what works instead.
"""

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import peft
import transformers
import transformers.integrations.peft as integration
from transformers.utils.peft_utils import check_peft_version

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.injection.all_or_nothing import all_or_nothing
from pemn_surgery.errors import VersionsError, VersionsWarning

# From this release on, and below that one: the ranges of pyproject.toml.
TESTED = {"peft": ("0.21", "0.22"), "transformers": ("5.18", "5.24"), "torch": ("2.9", None)}


@functools.cache
def warn_of_untested() -> None:
    """Warn, once, of a PEFT or transformers outside of the range that was tested."""
    for library in (peft, transformers):
        least, below = TESTED[library.__name__]
        version = library.__version__
        if not _release(least) <= _release(version) < _release(below):
            message = (
                f"{library.__name__} {version} is untested: pemn_surgery wraps functions of it "
                f"(docs/versions.md) and was tested with >={least},<{below}. If something fails, "
                "install versions that were tested together: pip install -c constraints.txt."
            )
            warnings.warn(message, VersionsWarning, stacklevel=2)


def check_versions(method: str) -> None:
    """Refuse a call of transformers that would end at its own check of versions.

    Args:
        method: Name of transformers' method, for the error.

    Raises:
        VersionsError: If transformers asks for a newer PEFT than is installed.
    """
    least = integration.MIN_PEFT_VERSION
    try:
        check_peft_version(min_version=least)
    except ValueError as error:
        raise VersionsError(_refusal(method, least)) from error


def _release(version: str | None) -> list[int]:
    """Return major and minor number; development versions count as what they lead to."""
    return [int(number) for number in re.findall(r"\d+", version or "")[:2]]


def _refusal(method: str, least: str) -> str:
    return (
        f"model.{method} of transformers {transformers.__version__} needs peft >= {least}, and "
        f"peft {peft.__version__} is installed. pemnify(model, ...), get_peft_model(model, "
        "PemnConfig(...)) and PeftModel.from_pretrained(model, folder) do the same with this pair; "
        "or install versions that were tested together: pip install -c constraints.txt. Nothing "
        "was changed."
    )


def checked(add: Callable[..., None]) -> Callable[..., None]:
    """Say in our words that transformers' ``add_adapter`` refuses the installed PEFT."""
    add = all_or_nothing(add)

    @functools.wraps(add)
    def add_adapter(self: Any, adapter_config: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(adapter_config, PemnConfig):
            check_versions("add_adapter")
        add(self, adapter_config, *args, **kwargs)

    return add_adapter
