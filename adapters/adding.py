"""PEFT's and transformers' ways to add an adapter: all or nothing, and with versions that fit.

`PemnModel` undoes its own part. These libraries change the model before and after it: they enter
the adapter's name, note that there are adapters, wrap modules to save, cast. So their methods are
wrapped (`doors`), which does nothing for adapters of other methods. They also write into the
configuration that they are given; so that it stays the caller's, they are given a copy.

Each release of transformers asks for a least PEFT in ``model.add_adapter`` and the methods around
it, sometimes for one that is not out yet. `pyproject.toml` excludes such pairs; where one is there
all the same, its error says neither which versions met nor what works instead.
"""

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from itertools import chain
from typing import Any

import peft
import transformers
import transformers.integrations.peft as integration
from torch import Tensor, nn
from transformers.utils.peft_utils import check_peft_version

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.adapter_file import is_reading
from pemn_surgery.adapters.within import set_within
from pemn_surgery.errors import VersionsError, VersionsWarning
from pemn_surgery.surgery.undo import undone_on_error

# From this release on, and below that one: the ranges of pyproject.toml.
TESTED = {"peft": ("0.21", "0.22"), "transformers": ("5.18", "5.24"), "torch": ("2.9", None)}
# Whether one of the methods runs: those that it calls get the model's own configuration.
_adding: ContextVar[bool] = ContextVar("adding", default=False)


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
    """Refuse a call of transformers that asks for a newer PEFT than there is (`VersionsError`)."""
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


def tensors_of(model: nn.Module, adapter_name: str) -> Iterator[Tensor]:
    """Yield an adapter's tensors, which a second load under its name writes to."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if adapter_name in name.split("."):
            yield tensor


def all_or_nothing(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a model add an adapter or stay as it was."""

    @functools.wraps(method)
    def whole(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if _adding.get() or not any(isinstance(item, PemnConfig) for item in given):
            return method(self, *args, **kwargs)
        made = [self] if "_modules" in self.__dict__ else []  # else it is just being made
        models = [*made, *(item for item in given if isinstance(item, nn.Module))]
        named = {name: _own(item) for name, item in kwargs.items()}
        with undone_on_error(*models), set_within(_adding, True):
            return method(self, *map(_own, args), **named)

    return whole


def _own(item: Any) -> Any:
    """Return an adapter's own configuration; who loads with one of theirs gets that, as in PEFT."""
    return item.own_copy() if isinstance(item, PemnConfig) and not is_reading() else item
