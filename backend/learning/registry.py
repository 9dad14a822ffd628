"""Versions of a project's heads: ``wsc-3f2a1c-h4`` is the fourth set of heads trained on embeddings of the model ``wsc-3f2a1c``.

::

    heads/<project>/
        h0004/            heads.json and arrays.safetensors: written under a hidden name, flushed, renamed; never changed again
        current.json      which number is in use, and whether somebody chose it: replaced by a rename
        .lock             held (flock) by whoever writes; readers need no lock

A number is never used twice: the next one is above all folders and above the highest ever given, which ``current.json`` remembers. A crash leaves at
most a hidden folder, which the next writer removes.

Every method raises :class:`~backend.errors.StoreUnavailable` where the disk refuses to be read or written now: that is no damage, and passes.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from backend.errors import HeadDamaged, HeadMismatch, HeadNotFound
from backend.learning.disk import NO_FILE, disk
from backend.learning.head_files import read_heads, read_manifest, write_heads
from backend.learning.heads import Head

log = logging.getLogger(__name__)

_FOLDER = re.compile(r"h(\d{4,})")
_VERSION = re.compile(r"(?P<model>.+)-h(?P<number>[1-9]\d*)")
_HIDDEN = ".new-"


@dataclass(frozen=True)
class VersionInfo:
    """One stored version: its name, number, the model below it, when it was made (ISO 8601, UTC), whether it is in use, and its manifest."""

    version: str
    number: int
    model_version: str
    fingerprint: str
    created_at: str
    current: bool
    manifest: dict[str, Any]


@dataclass(frozen=True, eq=False)
class HeadSet:
    """All heads of one version, by control."""

    version: str
    number: int
    model_version: str
    fingerprint: str
    heads: dict[str, Head]


class HeadRegistry:
    """The heads of all projects below one folder; safe for several processes.

    Parameters
    ----------
    root
        A local folder, such as ``MODEL_DIR/heads``.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def add(
        self,
        project: int,
        heads: Sequence[Head],
        *,
        model_version: str,
        about: dict[str, Any] | None = None,
        promote: bool = True,
    ) -> HeadSet:
        """Store a new version, and put it in use.

        Parameters
        ----------
        project
            Label Studio's number of the project.
        heads
            At least one, each of another control, all of one fingerprint.
        model_version
            Such as ``wsc-3f2a1c``: of the model that made the embeddings.
        about
            Further JSON values of the manifest, such as why it was trained.
        promote
            Whether it is in use at once.
        """
        prints, controls = {head.fingerprint for head in heads}, [head.control for head in heads]
        if len(prints) != 1 or len(set(controls)) != len(controls):
            raise ValueError(f"heads of the controls {controls} and the fingerprints {sorted(prints)} are not one set")
        fingerprint = prints.pop()
        with self._locked(project) as folder:
            number = self._next_number(folder)
            version = f"{model_version}-h{number}"
            hidden = folder / f"{_HIDDEN}{uuid.uuid4().hex}"
            hidden.mkdir()
            created = datetime.now(timezone.utc).isoformat(timespec="seconds")
            write_heads(
                heads,
                hidden,
                **(about or {}),
                version=version,
                number=number,
                model_version=model_version,
                fingerprint=fingerprint,
                created_at=created,
            )
            for file in hidden.iterdir():
                _flush(file)
            _flush(hidden)
            hidden.rename(folder / _name(number))
            _flush(folder)
            if promote:
                self._point(folder, number, number)
        return HeadSet(version, number, model_version, fingerprint, {head.control: head for head in heads})

    def current(self, project: int, *, fingerprint: str | None = None) -> HeadSet | None:
        """The heads in use.

        ``None`` if there are none, or if ``fingerprint`` is given and they were trained on embeddings of another model.

        Raises
        ------
        HeadDamaged
            They cannot be read.
        """
        pointer = self._pointer(self._folder(project))
        if pointer is None or pointer["number"] is None:
            return None
        found = self._load(project, pointer["number"])
        return None if fingerprint is not None and found.fingerprint != fingerprint else found

    def chosen_for(self, project: int) -> str:
        """What :meth:`restore` or :meth:`retire` was told that it was chosen for; '' for what a training put in use.

        Raises
        ------
        HeadDamaged
            ``current.json`` cannot be read.
        """
        pointer = self._pointer(self._folder(project))
        return "" if pointer is None else str(pointer.get("chosen_for", ""))

    def load(self, project: int, version: str) -> HeadSet:
        """The heads of a version, in use or not; :class:`~backend.errors.HeadNotFound` if there is no such version."""
        return self._load(project, self._number(project, version))

    def versions(self, project: int) -> list[VersionInfo]:
        """All readable versions, newest first. A damaged folder is left out here; :meth:`load` says what is wrong with it."""
        folder = self._folder(project)
        pointer = self._pointer(folder)
        in_use = None if pointer is None else pointer["number"]
        found = []
        for number in sorted(self._numbers(folder), reverse=True):
            try:
                manifest = read_manifest(folder / _name(number))
                names = (str(manifest[key]) for key in ("model_version", "fingerprint", "created_at"))
                model_version, fingerprint, created = names
                version = str(manifest["version"])
            except (HeadDamaged, KeyError):
                continue
            found.append(VersionInfo(version, number, model_version, fingerprint, created, number == in_use, manifest))
        return found

    def restore(self, project: int, version: str, *, fingerprint: str | None = None, chosen_for: str = "") -> HeadSet:
        """Put a stored version in use again, after reading it whole.

        ``chosen_for`` is written down with it, in the same step: see :meth:`chosen_for`.

        Raises
        ------
        HeadNotFound, HeadDamaged
            There is no such version, or it cannot be read.
        HeadMismatch
            ``fingerprint`` is given, and the version belongs to another model.
        """
        number = self._number(project, version)
        found = self._load(project, number)
        if fingerprint is not None and found.fingerprint != fingerprint:
            raise HeadMismatch(
                f"{version} was trained on embeddings of another model ({found.model_version}).",
                hint="Configure that model again, or train.",
            )
        with self._locked(project) as folder:
            self._point(folder, number, self._highest(folder), chosen_for)
        return found

    def retire(self, project: int, *, chosen_for: str = "") -> None:
        """Use no heads, for example when every label was deleted; stored versions stay. ``chosen_for`` as of :meth:`restore`."""
        with self._locked(project) as folder:
            self._point(folder, None, self._highest(folder), chosen_for)

    # --- files ------------------------------------------------------------------------------------------------------

    def _folder(self, project: int) -> Path:
        if isinstance(project, bool) or not isinstance(project, int) or project < 0:
            raise ValueError(f"{project!r} is not the number of a project")
        return self._root / str(project)

    @contextmanager
    def _locked(self, project: int) -> Iterator[Path]:
        folder = self._folder(project)
        with disk(_heads_of(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / ".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # freed with the file, also when the process dies
                for left in folder.glob(f"{_HIDDEN}*"):
                    # Nobody else writes now: this is what a crash left.
                    if left.is_dir():
                        shutil.rmtree(left)
                    else:
                        left.unlink()
                yield folder

    def _numbers(self, folder: Path) -> list[int]:
        try:
            with disk(_heads_of(folder)):
                names = [path.name for path in folder.iterdir()]
        except NO_FILE:
            return []
        return [int(match.group(1)) for name in names if (match := _FOLDER.fullmatch(name))]

    def _highest(self, folder: Path) -> int:
        try:
            pointer = self._pointer(folder)
        except HeadDamaged as error:
            # Writing is what mends a damaged pointer, so it must not stop at one; the folders still say what was given.
            log.warning("%s It is written anew.", error)
            pointer = None
        return max([0 if pointer is None else pointer["highest"], *self._numbers(folder)])

    def _next_number(self, folder: Path) -> int:
        return self._highest(folder) + 1

    def _number(self, project: int, version: str) -> int:
        match = _VERSION.fullmatch(version)
        number = int(match["number"]) if match else 0
        folder = self._folder(project)
        if number not in self._numbers(folder) or read_manifest(folder / _name(number)).get("version") != version:
            known = ", ".join(info.version for info in self.versions(project)) or "none"
            raise HeadNotFound(f"Project {project} has no version {version[:80]!r}.", hint=f"Stored: {known}.")
        return number

    def _load(self, project: int, number: int) -> HeadSet:
        heads, manifest = read_heads(self._folder(project) / _name(number))
        try:
            version, model_version, fingerprint = (
                str(manifest[key]) for key in ("version", "model_version", "fingerprint")
            )
        except KeyError as error:
            raise HeadDamaged(f"The manifest of {_name(number)} lacks {error}.", hint="Train again.") from None
        return HeadSet(version, number, model_version, fingerprint, {head.control: head for head in heads})

    def _pointer(self, folder: Path) -> dict[str, Any] | None:
        try:
            with disk(f"current.json of project {folder.name}"):
                text = (folder / "current.json").read_text(encoding="utf-8")
            pointer: dict[str, Any] = json.loads(text)
            number, highest = pointer["number"], pointer["highest"]
        except FileNotFoundError:
            return None
        except (*NO_FILE, ValueError, LookupError, TypeError, RecursionError) as error:
            raise HeadDamaged(f"current.json of project {folder.name} cannot be read: {error}.") from error
        if not isinstance(highest, int) or not (number is None or isinstance(number, int)):
            raise HeadDamaged(f"current.json of project {folder.name} holds {pointer!r:.80}.")
        return pointer

    def _point(self, folder: Path, number: int | None, highest: int, chosen_for: str = "") -> None:
        hidden = folder / f"{_HIDDEN}{uuid.uuid4().hex}"
        pointer = {"number": number, "highest": highest, "chosen_for": chosen_for}
        hidden.write_text(json.dumps(pointer), encoding="utf-8")
        _flush(hidden)
        hidden.replace(folder / "current.json")
        _flush(folder)


def _heads_of(folder: Path) -> str:
    return f"The folder of project {folder.name}'s heads"


def _name(number: int) -> str:
    return f"h{number:04d}"


def _flush(path: Path) -> None:
    """Onto the disk, so that a rename that survives a power cut does not name something empty."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
