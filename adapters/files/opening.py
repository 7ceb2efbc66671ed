"""Opening an adapter's folder without a model: its configuration and what its file holds."""

from pathlib import Path
from typing import Any, NoReturn

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.adapter_file import CONFIG, WEIGHTS, AdapterFile
from pemn_surgery.adapters.files.disk import is_there
from pemn_surgery.errors import AdapterFileError

# What PEFT raises on JSON that is no configuration of any method.
_NO_CONFIGURATION = (KeyError, TypeError, ValueError, AttributeError)


def open_adapter(folder: str | Path) -> tuple[PemnConfig, AdapterFile]:
    """Return an adapter's configuration and what its file holds.

    Args:
        folder: What ``save_pretrained`` wrote, on this machine.

    Returns:
        The two; within `one_reading` the file's tensors are read once.

    Raises:
        AdapterFileError: If there is no adapter of masks: nothing, another method's, no weights; or
            a file is truncated or altered.
    """
    where = Path(folder)
    if not is_there(where / CONFIG):
        _refuse(folder, _what_is_there(where))
    config = _read(where)
    if not isinstance(config, PemnConfig):
        method = str(getattr(config, "peft_type", None) or "no method").rpartition(".")[2]
        _refuse(folder, f"is an adapter of PEFT's method {method}, which has no masks")
    if config.file is None:
        _refuse(folder, f"has no {WEIGHTS}, so there are no masks to read")
    return config, config.file


def _read(where: Path) -> Any:
    try:
        return PemnConfig.from_pretrained(str(where))
    except AdapterFileError:
        raise
    except _NO_CONFIGURATION as error:
        said = f"{type(error).__name__}: {error}"
        _refuse(where, f"has an {CONFIG} that is no adapter's configuration ({said})")


def _what_is_there(where: Path) -> str:
    if where.is_dir():
        return f"has no {CONFIG}"
    return "is a file" if where.exists() else "does not exist"


def _refuse(folder: str | Path, problem: str) -> NoReturn:
    message = (
        f"{str(folder)!r} {problem}. Give the folder of an adapter of masks that save_pretrained "
        f"made, with {CONFIG} and {WEIGHTS} in it."
    )
    raise AdapterFileError(message)
