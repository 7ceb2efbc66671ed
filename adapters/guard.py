"""Loading that checks first: PEFT and transformers read the same folder in several steps.

``PemnConfig.from_pretrained`` checks both files of an adapter, but not everyone asks it: PEFT looks
up the method's name in ``adapter_config.json`` before, reads only the weights where the adapter's
name exists already, and falls back to pickle where there are none; transformers reads the
configuration with PEFT's base class. So their three doors get a wrapper around them
(`wrap_loading`), which does nothing for adapters of other methods or for names on the hub.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

from peft import PeftModel
from transformers.integrations.peft import PeftAdapterMixin

from pemn_surgery.adapters.config import PemnConfig, read_json
from pemn_surgery.adapters.file import CONFIG, WEIGHTS, holds_masks
from pemn_surgery.adapters.registry import PEMN
from pemn_surgery.errors import AdapterFileError

PICKLE = "adapter_model.bin"


def wrap_loading() -> None:
    """Let PEFT's and transformers' loading methods check a local adapter of masks first."""
    peft_model, mixin = cast("Any", PeftModel), cast("Any", PeftAdapterMixin)
    peft_model.from_pretrained = classmethod(_with_config(peft_model.from_pretrained.__func__))
    peft_model.load_adapter = _checked(peft_model.load_adapter)
    mixin.load_adapter = _without_pickle(mixin.load_adapter)


def check_adapter(folder: Path) -> PemnConfig | None:
    """Check the files of a local adapter.

    Args:
        folder: What may be an adapter's folder.

    Returns:
        Its configuration; None if it is not a folder with masks.

    Raises:
        AdapterFileError: If a file is missing, truncated, altered, or pickle.
    """
    weights = folder / WEIGHTS
    if not (folder / CONFIG).is_file() or not _is_ours(folder):
        return None
    if not weights.is_file():
        _refuse_without_weights(folder)
    return PemnConfig.from_pretrained(str(folder))


def _with_config(load: Callable[..., PeftModel]) -> Callable[..., PeftModel]:
    """Hand ``PeftModel.from_pretrained`` the checked configuration."""
    signature = inspect.signature(load)

    @functools.wraps(load)
    def from_pretrained(*args: Any, **kwargs: Any) -> PeftModel:
        given = signature.bind(*args, **kwargs)
        folder = _folder(given.arguments["model_id"], given.arguments.get("kwargs"))
        with _unchanged(folder):
            checked = check_adapter(folder)
            if checked is not None and given.arguments.get("config") is None:
                given.arguments["config"] = checked
            return load(*given.args, **given.kwargs)

    return from_pretrained


def _checked(load: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``PeftModel.load_adapter`` check first."""
    signature = inspect.signature(load)

    @functools.wraps(load)
    def load_adapter(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        folder = _folder(given["model_id"], given.get("kwargs"))
        with _unchanged(folder):
            checked = check_adapter(folder)
            if checked is not None and given["adapter_name"] not in self.peft_config:
                _check_method(folder / CONFIG)
            return load(self, *args, **kwargs)

    return load_adapter


def _without_pickle(load: Callable[..., Any]) -> Callable[..., Any]:
    """Hand transformers' ``load_adapter`` the checked configuration, and never pickle."""
    signature = inspect.signature(load)

    @functools.wraps(load)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        source = given.get("peft_model_id") or getattr(
            given.get("load_config"), "pretrained_model_name_or_path", None
        )
        if source is None or given.get("peft_config") is not None:
            return load(self, *args, **kwargs)
        folder = _folder(source, given.get("adapter_kwargs"))
        with _unchanged(folder):
            checked = check_adapter(folder)
            if checked is None:
                return load(self, *args, **kwargs)
            options = {**given, **given.get("kwargs", {})}
            options = {key: options[key] for key in options if key not in {"self", "kwargs"}}
            options |= {"peft_model_id": str(folder), "peft_config": checked}
            return load(self, **{**options, "use_safetensors": True})

    return load_adapter


def _folder(source: Any, options: dict[str, Any] | None) -> Path:
    return Path(source) / ((options or {}).get("subfolder") or "")


@contextmanager
def _unchanged(folder: Path) -> Iterator[None]:
    """Refuse what was loaded if it was saved anew meanwhile: the files are read one by one."""
    before = _identity(folder)
    yield
    if _identity(folder) != before:
        message = (
            f"The adapter in {str(folder)!r} was saved anew while it was loaded, so the model may "
            "hold parts of both. Load it again, onto a model that has not seen it."
        )
        raise AdapterFileError(message)


def _identity(folder: Path) -> tuple[int, ...]:
    path = folder / WEIGHTS
    if not path.is_file():
        return ()
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _is_ours(folder: Path) -> bool:
    """Tell by either file; the other may be damaged."""
    if (folder / WEIGHTS).is_file():
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


def _check_method(path: Path) -> None:
    method = _method(path)
    if method != PEMN.value:
        message = (
            f"{str(path)!r} says peft_type={method!r}, but the weights beside it are masks "
            f"({PEMN.value}): a save was killed, or the file was altered. Nothing was loaded; save "
            "the adapter again, or load it with PeftModel.from_pretrained."
        )
        raise AdapterFileError(message)


def _refuse_without_weights(folder: Path) -> NoReturn:
    pickled = f"; {PICKLE} is pickle, which is never read" * (folder / PICKLE).is_file()
    message = (
        f"The adapter in {str(folder)!r} has no {WEIGHTS}{pickled}. Nothing was loaded; get the "
        "file from where it was saved."
    )
    raise AdapterFileError(message)
