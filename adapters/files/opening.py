"""Opening an adapter's folder: its configuration and what its file holds.

Who wants masks calls `open_adapter`; who may be given another method's, as PEFT's loaders,
`check_adapter`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.adapter_file import CONFIG, WEIGHTS, holds_masks, read_json
from pemn_surgery.adapters.files.contents import AdapterFile
from pemn_surgery.adapters.files.disk import is_there
from pemn_surgery.adapters.registry import PEMN
from pemn_surgery.errors import AdapterFileError

PICKLE = "adapter_model.bin"

# What PEFT raises on JSON that is no configuration of any method.
_NO_CONFIGURATION = (KeyError, TypeError, ValueError, AttributeError)


def open_adapter(folder: str | Path) -> tuple[PemnConfig, AdapterFile]:
    """Return an adapter's configuration and what its file holds.

    Raises:
        AdapterFileError: If there is no adapter of masks: nothing, another method's, no weights; or
            a file is truncated or altered.
    """
    where = Path(folder)
    if not is_there(where / CONFIG):
        _refuse(folder, _what_is_there(where))
    try:
        config: Any = PemnConfig.from_pretrained(str(where))
    except AdapterFileError:
        raise
    except _NO_CONFIGURATION as error:
        said = f"{type(error).__name__}: {error}"
        _refuse(where, f"has an {CONFIG} that is no adapter's configuration ({said})")
    if not isinstance(config, PemnConfig):
        method = str(getattr(config, "peft_type", None) or "no method").rpartition(".")[2]
        _refuse(folder, f"is an adapter of PEFT's method {method}, which has no masks")
    if config.origin.file is None:
        _refuse(folder, f"has no {WEIGHTS}, so there are no masks to read")
    return config, config.origin.file


def check_adapter(folder: Path) -> PemnConfig | None:
    """Return a local adapter's checked configuration; None if it is not a folder with masks.

    Raises:
        AdapterFileError: If a file is missing, truncated, altered, or pickle.
    """
    if not is_there(folder / CONFIG) or not _is_ours(folder):
        return None
    if not is_there(folder / WEIGHTS):
        pickled = f"; {PICKLE} is pickle, which is never read" * (folder / PICKLE).is_file()
        message = (
            f"The adapter in {str(folder)!r} has no {WEIGHTS}{pickled}. Nothing was loaded; get "
            "the file from where it was saved."
        )
        raise AdapterFileError(message)
    return PemnConfig.from_pretrained(str(folder))


def adapter_folder(source: Any, options: Mapping[str, Any] | None) -> Path:
    """Return the folder that a loading method means, if it is one."""
    return Path(source) / ((options or {}).get("subfolder") or "")


def check_method(folder: Path) -> None:
    """Refuse a folder whose weights are masks, but whose configuration says another method.

    Raises:
        AdapterFileError: If it says so; PEFT would load the weights as that.
    """
    path = folder / CONFIG
    method = _method(path)
    if method != PEMN.value:
        message = (
            f"{str(path)!r} says peft_type={method!r}, but the weights beside it are masks "
            f"({PEMN.value}): a save was killed, or the file was altered. Nothing was loaded; save "
            "the adapter again, or load it with PeftModel.from_pretrained."
        )
        raise AdapterFileError(message)


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


def _is_ours(folder: Path) -> bool:
    """Tell by either file; the other may be damaged."""
    if is_there(folder / WEIGHTS):
        try:
            return holds_masks(folder / WEIGHTS)
        except AdapterFileError:
            pass
    return _method(folder / CONFIG) == PEMN.value


def _method(path: Path) -> Any:
    try:
        return read_json(path).get("peft_type")
    except AdapterFileError:  # of whichever method; its own loader says so
        return None
