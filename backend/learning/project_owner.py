"""Whose heads lie under a project's number: ``heads/<project>/project.json``.

Numbers of projects begin at 1 in every Label Studio, so that one MODEL_DIR used with another Label Studio (or with an
emptied one) would give its project 2 the heads of the first one's project 2. Label Studio tells its projects apart by
number and second of creation, as in ``2.1795461014``; so do we. The address and the title are for messages.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from backend.learning.disk import NO_FILE, disk

log = logging.getLogger(__name__)

FILE_NAME = "project.json"


@dataclass(frozen=True)
class Owner:
    """A project: the second (Unix time) in which it was created, its Label Studio's address, its title."""

    created: int
    label_studio: str
    title: str

    def __str__(self) -> str:
        return f"“{self.title}” of {self.label_studio or 'an unknown Label Studio'}"


def read_owner(folder: Path) -> Owner | None:
    """Whose heads a folder holds; ``None`` where that was never written down. Raises :class:`~backend.errors.StoreUnavailable`."""
    try:
        with disk(f"{FILE_NAME} of project {folder.name}"):
            text = (folder / FILE_NAME).read_text(encoding="utf-8")
        value = json.loads(text)
        return Owner(int(value["created"]), str(value["label_studio"]), str(value["title"]))
    except NO_FILE:
        return None
    except (ValueError, LookupError, TypeError) as error:
        log.error(
            "%s of project %s cannot be read, and is written anew by its next training: %s",
            FILE_NAME,
            folder.name,
            error,
        )
        return None


def take_over(root: Path, project: int, owner: Owner) -> Owner | None:
    """Make ``root/<project>`` the folder of ``owner``: to be called before heads are read or written on its behalf.

    A folder of another project of the same number is set aside as ``<project>.<its second of creation>``, and one of
    ``owner`` that was set aside earlier comes back: nothing is deleted. A folder that nobody's name is on is ``owner``'s.

    Returns
    -------
    Whose folder was set aside, ``None`` if none was.

    Raises
    ------
    StoreUnavailable
        The disk refuses.
    """
    folder = root / str(project)
    with disk(f"The folder of project {project}'s heads"):
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".owners.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = read_owner(folder)
            if before == owner:
                return None
            other = before if before is not None and before.created != owner.created else None
            if other is not None:
                folder.rename(_aside(folder, other.created))
            if not folder.exists() and _aside(folder, owner.created).exists():
                _aside(folder, owner.created).rename(folder)
            folder.mkdir(exist_ok=True)
            hidden = folder / f".{FILE_NAME}.{os.getpid()}"
            hidden.write_text(json.dumps(asdict(owner), ensure_ascii=False), encoding="utf-8")
            hidden.replace(folder / FILE_NAME)
    if other is not None:
        log.warning(
            "project=%d: the heads kept under this number were those of %s, and are set aside as %s; this is %s",
            project,
            other,
            _aside(folder, other.created),
            owner,
        )
    return other


def _aside(folder: Path, created: int) -> Path:
    return folder.with_name(f"{folder.name}.{created}")
