"""Saving so that a reader finds the old adapter or the new one, whichever instant a save dies at.

An adapter is two files, and no file system replaces two at once: a folder cannot be renamed over
one that holds something, and where two folders can be swapped (Linux alone), what else lies in the
user's folder - a card, a tokenizer, checkpoints - would go away with the old one. So one of the
two decides. The weights hold the configuration too, and a digest over both (`adapter_file`);
``adapter_config.json`` repeats it for PEFT, the hub and people.

PEFT writes all it has to write into a folder beside the adapter (``.pemn_saving_...``). There the
weights are sealed and every file is flushed to the disk; then each takes its place by one rename,
the weights first:

* killed before that rename, the old adapter is there, untouched;
* killed after it, the new one is: `PemnConfig.from_pretrained` sees by the digest that
  ``adapter_config.json`` is of another save, and takes the configuration in the weights;
* two processes that save to one place interleave in any order, and the last weights decide.

A first save has nothing to lose: until ``adapter_config.json`` is there, there is no adapter.
Every adapter of a model is put in place by itself, so a kill may leave some old and some new.

A killed save leaves its folder. The next save removes it: whoever saves holds a lock on the folder
that it writes to, and the system takes the lock back from the dead. A lock on the adapter itself,
held while PEFT writes, would be simpler, but deadlocks ranks that all save and gather shards.
"""

import contextlib
import errno
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.adapter_file import CONFIG, SEAL, WEIGHTS, seal
from pemn_surgery.adapters.files.disk import system_number
from pemn_surgery.errors import AdapterWriteError, ConfigError

try:
    import fcntl
except ImportError:  # Windows: what a killed save left stays until somebody removes it
    fcntl = None

CARD = "README.md"
_SCRATCH = ".pemn_saving_"


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file's content at once: a reader finds all of the old or all of the new.

    Raises:
        AdapterWriteError: If it cannot be written; the old file is still there.
    """
    with _named_errors(path), _beside(path.parent) as scratch:
        (scratch / path.name).write_bytes(content)
        _move(scratch / path.name, path)


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: PemnConfig) -> None:
    """Write an adapter's two files as a save does: whole or not at all.

    Raises:
        AdapterWriteError: If it cannot be written; an old adapter is still there.
    """
    with _named_errors(folder), _beside(folder) as scratch:
        save_file(dict(tensors), scratch / WEIGHTS, {"format": "pt"})
        config.save_pretrained(str(scratch))
        _put_in_place(scratch, folder)


def save_whole(save: Callable[..., None], given: inspect.BoundArguments) -> None:
    """Save a model with masks by PEFT's own method, whole or not at all.

    Raises:
        AdapterWriteError: If it cannot be written; old adapters are still there.
        ConfigError: If pickle is asked for.
    """
    options = given.arguments
    if not options["safe_serialization"]:
        message = (
            "save_pretrained got safe_serialization=False, which writes pickle; masks are never "
            "saved to pickle nor read from it. Leave the option out. Nothing was written."
        )
        raise ConfigError(message)
    folder = Path(options["save_directory"])
    if folder.is_file() or not options["is_main_process"]:  # PEFT refuses, or writes nothing
        save(*given.args, **given.kwargs)
        return
    with _named_errors(folder), _beside(folder) as scratch:
        if (folder / CARD).is_file():
            shutil.copyfile(folder / CARD, scratch / CARD)  # PEFT completes the card that it finds
        options["save_directory"] = str(scratch)
        save(*given.args, **given.kwargs)
        _put_in_place(scratch, folder)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except AdapterWriteError:
        raise
    except (OSError, SafetensorError) as error:
        message = (
            f"{str(path)!r} cannot be written: {error}. What was there is still whole, unless the "
            "new is whole in its place already. Make room, or save to a folder that can be written."
        )
        number = getattr(error, "errno", None) or system_number(error) or errno.EIO
        raise AdapterWriteError(number, message) from error


def _put_in_place(scratch: Path, folder: Path) -> None:
    adapters = [path.parent for path in sorted(scratch.rglob(CONFIG))]
    for adapter in adapters:
        _seal(adapter)
        _put_adapter(adapter, folder / adapter.relative_to(scratch))
    if (scratch / CARD).is_file():
        _move(scratch / CARD, folder / CARD)


def _put_adapter(adapter: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)  # an adapter may be called "project/task"
    if adapter.stat().st_dev != folder.stat().st_dev:  # a link to another disk: rename on that one
        with _beside(folder) as scratch:
            shutil.copytree(adapter, scratch, dirs_exist_ok=True)
            _move_both(scratch, folder)
    else:
        _move_both(adapter, folder)


def _move_both(adapter: Path, folder: Path) -> None:
    _move(adapter / WEIGHTS, folder / WEIGHTS)  # from here on it is the new adapter
    _move(adapter / CONFIG, folder / CONFIG)


def config_text(configuration: Mapping[str, Any]) -> str:
    """Return what ``adapter_config.json`` holds."""
    return json.dumps(configuration, indent=2, sort_keys=True)


def sealed_metadata(configuration: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of an adapter's weights: the configuration, its digest filled in."""
    return {"format": "pt", SEAL: json.dumps(configuration, sort_keys=True, separators=(",", ":"))}


def header_bytes(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Return how a safetensors file of such tensors begins: the header's length, and the header."""
    content = json.dumps({**tensors, "__metadata__": metadata}, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)  # tensors begin at a multiple of eight
    return len(content).to_bytes(8, "little") + content


def _seal(adapter: Path) -> None:
    """Write the configuration and the digest into both files of an adapter."""
    weights, config = adapter / WEIGHTS, adapter / CONFIG
    configuration = seal(weights, json.loads(config.read_text(encoding="utf-8")))
    config.write_text(config_text(configuration), encoding="utf-8")
    _write_metadata(weights, sealed_metadata(configuration))


def _write_metadata(weights: Path, metadata: Mapping[str, str]) -> None:
    """Put metadata into the header of a safetensors file; the tensors are copied as they are.

    The library's own writer takes them in no fixed order, so equal adapters would be other files.
    """
    sealed = weights.with_suffix(".sealed")
    with weights.open("rb") as old, sealed.open("wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        new.write(header_bytes(header, metadata))
        shutil.copyfileobj(old, new)
    sealed.replace(weights)


def _move(source: Path, target: Path) -> None:
    """Flush a file to the disk, and then let it take another's place."""
    _flush(source)
    source.replace(target)
    if os.name != "nt":  # Windows opens no folders, and needs no flush of them
        _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """Yield a new folder within one, on the same file system, that is gone afterwards."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _remove_leftovers(folder)
        scratch, lock = _new_scratch(folder)
        try:
            inner = scratch / "new"  # the Trainer takes a checkpoint's own folders for adapters
            inner.mkdir()
            yield inner
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            if lock is not None:
                os.close(lock)
    finally:
        if is_new:  # after a failure it is empty and goes; otherwise it stays
            with contextlib.suppress(OSError):
                folder.rmdir()


def _new_scratch(folder: Path) -> tuple[Path, int | None]:
    """Make a folder and lock it; another where a save takes it for a leftover before that."""
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=folder))
        try:
            lock = _lock(scratch)
        except (BlockingIOError, FileNotFoundError):
            continue
        except OSError:  # a file system without locks, where leftovers stay
            return scratch, None
        if scratch.exists():
            return scratch, lock
        os.close(lock)


def _remove_leftovers(folder: Path) -> None:
    for scratch in folder.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):  # locked: someone is saving
            lock = _lock(scratch)
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(lock)


def _lock(scratch: Path) -> int:
    """Return a descriptor that holds the folder's lock until it is closed."""
    if fcntl is None:
        raise OSError(scratch)
    descriptor = os.open(scratch, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
