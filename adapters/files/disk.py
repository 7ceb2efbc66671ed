"""Files that are not there, files that cannot be read, and files that hold something else.

``Path.is_file`` says no to all of them, and safetensors has one sentence for all of them.
"""

import errno
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from safetensors import SafetensorError

from pemn_surgery.errors import AdapterFileError

# What safetensors and torch may raise on a header that means nothing.
_NO_CONTENT = (SafetensorError, ValueError, TypeError, RuntimeError, AttributeError)


def is_there(path: Path) -> bool:
    """Tell whether anything has this name: a file, or what cannot be read as one.

    Raises:
        AdapterFileError: If the system does not tell, for example of a folder without permission.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no name at all
        return False
    except OSError as error:
        if _mode(path.parent):  # a name that no file can have is a name on the hub
            refuse_unreadable(path, error)
        return False
    return True


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Raise `AdapterFileError` where a safetensors file cannot be opened or read, or is damaged."""
    try:
        _check_opens(path)
        yield
    except OSError as error:
        refuse_unreadable(path, error)
    except _NO_CONTENT as error:
        if "(os error " in str(error):  # safetensors says in words alone what the system said
            refuse_unreadable(path, OSError(system_number(error), str(error)))
        message = (
            f"The adapter file {str(path)!r} ({path.stat().st_size} bytes) cannot be read: "
            f"{error}. It is truncated or altered; nothing was loaded. Get the file again from "
            "where it was saved."
        )
        raise AdapterFileError(message) from error


def read_text(path: Path) -> str:
    """Return a text file's content.

    Raises:
        AdapterFileError: If it cannot be opened or read.
        UnicodeDecodeError: If it is not UTF-8.
    """
    try:
        _check_opens(path)
        return path.read_text(encoding="utf-8")
    except OSError as error:
        refuse_unreadable(path, error)


def _check_opens(path: Path) -> None:
    """Let the system say why a file does not open; safetensors calls all of them missing."""
    mode = _mode(path)
    if mode and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # would wait for ever
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device")
    with path.open("rb"):
        pass


def refuse_unreadable(path: Path, error: OSError) -> NoReturn:
    """Refuse a file that the system does not read (`AdapterFileError`)."""
    said = error.strerror or str(error)
    message = f"{str(path)!r} cannot be read: {_what(path)}{said}. Nothing was loaded; {_do(path)}"
    raise AdapterFileError(message) from error


def _what(path: Path) -> str:
    if stat.S_ISLNK(_mode(path, follow=False)) and not _mode(path):
        return f"it is a link to {str(path.readlink())!r}, which is not there: "
    return "it is a folder: " if stat.S_ISDIR(_mode(path)) else ""


def _do(path: Path) -> str:
    if stat.S_ISDIR(_mode(path)):
        return "an adapter's files lie in its folder, under these names themselves."
    if stat.S_ISLNK(_mode(path, follow=False)) and not _mode(path):
        return "get the file again from where it was saved."
    return "let this process read it (permissions, the disk), or copy it anew."


def system_number(error: Exception) -> int:
    """Return the system's number in the words of an error of safetensors, 0 if there is none."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def _mode(path: Path, *, follow: bool = True) -> int:
    """Return what the system says that this is (`stat`), 0 if it is not there or does not say."""
    try:
        return path.stat(follow_symlinks=follow).st_mode
    except (OSError, ValueError):
        return 0
