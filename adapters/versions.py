"""A pair of transformers and PEFT that transformers itself refuses.

Each release of transformers asks for a least PEFT in ``model.add_adapter`` and the methods around
it, sometimes for one that is not out yet. `pyproject.toml` excludes such pairs; where one is there
all the same, its error says neither which versions met nor what works instead.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import peft
import transformers
import transformers.integrations.peft as integration
from transformers.utils.peft_utils import check_peft_version

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.errors import VersionsError


def wrap_version_check() -> None:
    """Let transformers' ``add_adapter`` say in our words that it refuses the installed PEFT."""
    mixin = cast("Any", integration.PeftAdapterMixin)
    mixin.add_adapter = _checked(mixin.add_adapter)


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


def _refusal(method: str, least: str) -> str:
    return (
        f"model.{method} of transformers {transformers.__version__} needs peft >= {least}, and "
        f"peft {peft.__version__} is installed. pemnify(model, ...), get_peft_model(model, "
        "PemnConfig(...)) and PeftModel.from_pretrained(model, folder) do the same with this pair; "
        "or install versions that were tested together: pip install -c constraints.txt. Nothing "
        "was changed."
    )


def _checked(add: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(add)
    def add_adapter(self: Any, adapter_config: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(adapter_config, PemnConfig):
            check_versions("add_adapter")
        add(self, adapter_config, *args, **kwargs)

    return add_adapter
