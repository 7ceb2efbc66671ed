"""Names on the model hub, and their files on this machine.

A name is ``owner/name``, with ``@revision`` behind it where one is meant, and for an adapter with
the folder within the repository: ``owner/name/folder``. What lies on this machine under the same
words comes first.
"""

import re
from pathlib import Path
from typing import NamedTuple

from pemn_surgery.errors import HubError

_PART = r"[A-Za-z0-9_][\w.-]*"
_NAME = re.compile(rf"({_PART}/{_PART})((?:/{_PART})*)(?:@([^@\s]+))?")


class HubName(NamedTuple):
    """A repository on the hub.

    Attributes:
        text: The words that were given.
        repository: "owner/name".
        folder: Folder within it, "" for none.
        revision: Branch, tag or commit; None for the newest.
    """

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
    """Return a file of a repository, fetched if it is not in the local cache.

    Raises:
        HubError: If it cannot be had.
    """
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
