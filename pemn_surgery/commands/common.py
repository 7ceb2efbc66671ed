"""What several commands share: their parsers' form, names on the model hub, reading adapters.

A name on the hub is ``owner/name``, with ``@revision`` behind it where one is meant, and for an
adapter with the folder within the repository: ``owner/name/folder``. What lies on this machine
under the same words comes first.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pemn_surgery.errors import ConfigError, HubError

if TYPE_CHECKING:
    from pemn_surgery.adapters.config import PemnConfig
    from pemn_surgery.adapters.files.contents import AdapterFile

_PART = r"[A-Za-z0-9_][\w.-]*"
_NAME = re.compile(rf"({_PART}/{_PART})((?:/{_PART})*)(?:@([^@\s]+))?")


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    help_text: str,
    example: str,
) -> argparse.ArgumentParser:
    """Add a command and return its parser; ``run`` maps parsed arguments to an exit code."""
    parser = commands.add_parser(
        name,
        help=help_text,
        description=help_text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def add_adapter(parser: argparse.ArgumentParser, word: str = "adapter") -> None:
    """Add the argument that `adapter_folder` takes."""
    parser.add_argument(
        word,
        help="folder that save_pretrained made, or a name on the hub: "
        "owner/name[/folder][@revision]",
    )


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add ``--overwrite``, which `check_free` asks for."""
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds")


def positive(text: str) -> int:
    """Return an argument as a number of at least 1."""
    value = int(text)
    if value < 1:
        message = f"{value} given; at least 1 is needed"
        raise argparse.ArgumentTypeError(message)
    return value


def print_json(value: Any, default: Any = None) -> None:
    """Print a value as JSON; ``default`` as of `json.dumps`."""
    sys.stdout.write(json.dumps(value, indent=2, default=default) + "\n")


def first_line(error: BaseException) -> str:
    """Return an error of another library in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0].rstrip(".:") if lines else ""
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


class HubName(NamedTuple):
    """A repository on the hub as words name it: "owner/name", a folder in it or "", a revision."""

    text: str
    repository: str
    folder: str
    revision: str | None


def hub_name(text: str) -> HubName | None:
    """Return the repository that words name; None if they cannot be one."""
    found = _NAME.fullmatch(text)
    if found is None:
        return None
    return HubName(text, found[1], found[2].strip("/"), found[3])


def hub_file(name: HubName, file: str) -> Path:
    """Return a file of a repository, from the local cache or the hub, or raise a HubError."""
    from huggingface_hub import hf_hub_download

    folder = name.folder or None
    try:
        return Path(
            hf_hub_download(name.repository, file, subfolder=folder, revision=name.revision)
        )
    except Exception as error:  # what the hub's client raises has no base of its own
        message = (
            f"{name.text!r} is nothing on this machine, and the hub gives no {file} of that name: "
            f"{_reason(error)}. Give a folder, or a name on the hub (owner/name)."
        )
        raise HubError(message) from error


def _reason(error: Exception) -> str:
    from huggingface_hub import constants, errors

    offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no connection"
    reasons: dict[type[Exception], str] = {
        errors.LocalEntryNotFoundError: f"it is not in the local cache, and the hub is not asked "
        f"({offline})",
        errors.GatedRepoError: "its owner has to grant access, and you to log in (hf auth login)",
        errors.RepositoryNotFoundError: "there is no such repository, or it needs a login",
        errors.RevisionNotFoundError: "the repository has no such revision",
        errors.EntryNotFoundError: "the repository has no such file",
    }
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    return next((said for kind, said in reasons.items() if isinstance(error, kind)), lines[0])


def adapter_folder(text: str) -> Path:
    """Return an adapter's folder on this machine; the hub's is fetched, or a HubError raised."""
    name = None if Path(text).exists() else hub_name(text)
    if name is None:
        return Path(text)
    folder = hub_file(name, "adapter_config.json").parent
    hub_file(name, "adapter_model.safetensors")
    return folder


def read_adapter(text: str) -> tuple["PemnConfig", "AdapterFile"]:
    """Return an adapter's configuration and file, or raise an AdapterFileError or a HubError."""
    from pemn_surgery.adapters.files.opening import open_adapter

    return open_adapter(adapter_folder(text))


def check_free(out: Path, names: Collection[str], *, overwrite: bool) -> None:
    """Refuse to write over these files in the folder unless that is asked for (ConfigError)."""
    if out.exists() and not out.is_dir():
        message = f"--out got {str(out)!r}, which is a file; give a folder."
        raise ConfigError(message)
    there = sorted(name for name in names if (out / name).exists())
    if there and not overwrite:
        message = (
            f"--out got {str(out)!r}, which holds {', '.join(there)} already. Give another folder, "
            "or --overwrite to replace it. Nothing was written."
        )
        raise ConfigError(message)
