"""Which model version a project is at: that of the model, or of the heads trained for the project on top of it.

Two things can be wrong with heads that are in use, and neither makes a project one without heads:

- They cannot be read *now*: too many open files, a network disk that is away. Everything here raises
  :class:`~backend.errors.StoreUnavailable`, which is tried again; nothing is remembered of the attempt.
- They are *damaged*. :meth:`ProjectVersions.in_use` raises :class:`~backend.errors.HeadDamaged`: for whatever would replace or delete better
  predictions on the strength of it. :meth:`ProjectVersions.heads` says so in the log and gives ``None``, so that slides can be shown and
  pre-labelled without heads, and :meth:`ProjectVersions.version` stays what it was, so that Label Studio goes on showing what those heads said. The
  next training makes new ones.

Heads that lie under a project's number and are those of another project (:mod:`backend.learning.project_owner`) are none: a
project that is asked about has no heads then, and no ranks.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from backend.errors import HeadDamaged
from backend.inference.checkpoint import ModelIdentity
from backend.learning.disk import NO_FILE, disk
from backend.learning.project_owner import FILE_NAME as OWNER_FILE
from backend.learning.project_owner import Owner, read_owner, take_over
from backend.learning.registry import HeadRegistry, HeadSet
from backend.learning.snapshot import FILE_NAME, ProjectSnapshot, read_snapshot

log = logging.getLogger(__name__)

T = TypeVar("T")

_OURS = re.compile(r"(?:wsc|stand-in)-[0-9a-f]{6}(?:-h[1-9]\d*)?")
_REMEMBERED = 64


def is_ours(version: object) -> bool:
    """Whether a prediction's model version is one that this backend gives, of whatever model."""
    return isinstance(version, str) and _OURS.fullmatch(version) is not None


def model_of(version: str) -> str:
    """The model below a version: ``wsc-3f2a1c`` of ``wsc-3f2a1c-h4``."""
    return re.sub(r"-h[1-9]\d*$", "", version)


class _Remembered(Generic[T]):
    """What was read from a file, for as long as the file stays the same. Errors are not remembered: what lies beside the file may be put right."""

    def __init__(self, read: Callable[[int], T | None]) -> None:
        self._read = read
        self._kept: OrderedDict[int, tuple[object, T | None]] = OrderedDict()
        self._told: dict[int, str] = {}
        self._lock = threading.Lock()

    def get(self, project: int, file: Path) -> T | None:
        """The value, ``None`` without a file; raises :class:`HeadDamaged` and :class:`~backend.errors.StoreUnavailable`."""
        try:
            with disk(f"{file.name} of project {project}"):
                status = file.stat()
        except NO_FILE:
            return None
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        with self._lock:
            if project in self._kept and self._kept[project][0] == stamp:
                self._kept.move_to_end(project)
                return self._kept[project][1]
        value = self._read(project)
        with self._lock:
            self._told.pop(project, None)
            self._kept[project] = (stamp, value)
            while len(self._kept) > _REMEMBERED:
                self._kept.popitem(last=False)
        return value

    def undamaged(self, project: int, file: Path) -> T | None:
        """As :meth:`get`; ``None``, with an error in the log for each new damage, where that raises :class:`HeadDamaged`."""
        try:
            return self.get(project, file)
        except HeadDamaged as error:
            with self._lock:
                told = self._told.get(project) == str(error)
                self._told[project] = str(error)
            if not told:
                log.error("project %d: %s Going on without.", project, error)
            return None


class ProjectVersions:
    """The versions of all projects, read from the heads' folder; files are read again only when they have changed.

    Parameters
    ----------
    root
        The folder of :class:`~backend.learning.registry.HeadRegistry`.
    model
        Heads of another model than this one do not count.
    label_studio
        The address of the Label Studio whose projects these are, for projects that it has not named itself yet.
    """

    def __init__(self, root: Path, model: ModelIdentity, label_studio: str = "") -> None:
        self.registry = HeadRegistry(root)
        self._root = root
        self._model = model
        self._label_studio = label_studio
        self._created: OrderedDict[int, int] = OrderedDict()
        self._said: set[int] = set()
        self._owners = _Remembered(lambda project: read_owner(root / str(project)))
        self._heads = _Remembered(lambda project: self.registry.current(project, fingerprint=model.fingerprint))
        self._snapshots = _Remembered(lambda project: read_snapshot(self.snapshot_file(project)))

    def note_created(self, project: int | None, created: int | None) -> None:
        """Label Studio has just asked about ``project``, which was created in the second ``created`` (Unix time)."""
        if project is None or created is None:
            return
        self._created[project] = created
        self._created.move_to_end(project)
        while len(self._created) > _REMEMBERED:
            self._created.popitem(last=False)

    def take_over(self, project: int, owner: Owner) -> Owner | None:
        """See :func:`~backend.learning.project_owner.take_over`; for whoever has asked Label Studio itself who ``project`` is."""
        self.note_created(project, owner.created)
        return take_over(self._root, project, owner)

    def _is_anothers(self, project: int) -> bool:
        owner = self._owners.get(project, self._root / str(project) / OWNER_FILE)
        created = self._created.get(project)
        if owner is None:
            return False
        other = (
            owner.created != created
            if created is not None
            else bool(self._label_studio and owner.label_studio and owner.label_studio != self._label_studio)
        )
        if other and project not in self._said:
            self._said.add(project)
            log.warning(
                "project=%d: the heads kept under this number are those of %s, and are not used", project, owner
            )
        return other

    def in_use(self, project: int | None) -> HeadSet | None:
        """The heads that a project uses; ``None`` if it uses none.

        Raises
        ------
        HeadDamaged
            It uses some, and they are damaged.
        """
        if project is None or self._is_anothers(project):
            return None
        return self._heads.get(project, self._pointer(project))

    def heads(self, project: int | None) -> HeadSet | None:
        """As :meth:`in_use`; ``None`` for damaged ones too."""
        if project is None or self._is_anothers(project):
            return None
        return self._heads.undamaged(project, self._pointer(project))

    def version(self, project: int | None) -> str:
        """What Label Studio is to show and compare, such as ``wsc-3f2a1c`` or ``wsc-3f2a1c-h4``; of damaged heads what the last training said."""
        try:
            heads = self.in_use(project)
        except HeadDamaged:
            self.heads(project)  # says it in the log
            snapshot = self.snapshot(project)
            return self._model.model_version if snapshot is None else str(snapshot.about["version"])
        return self._model.model_version if heads is None else heads.version

    def versions(self, project: int | None = None) -> list[str]:
        """All that can be chosen, the model itself first, then heads, newest first; of one project or of all."""
        projects = sorted(self.projects()) if project is None else [project]
        found = [self._model.model_version]
        for number in projects:
            if self._is_anothers(number):
                continue
            for info in self.registry.versions(number):
                if info.fingerprint == self._model.fingerprint:
                    found.append(info.version)
        return list(dict.fromkeys(found))

    def projects(self) -> list[int]:
        """The projects that heads or ranks are stored for."""
        try:
            with disk("The folder of all heads"):
                return [int(path.name) for path in self._root.iterdir() if path.name.isdecimal()]
        except NO_FILE:
            return []

    def snapshot_file(self, project: int) -> Path:
        """Where :class:`~backend.learning.snapshot.ProjectSnapshot` of a project lies."""
        return self._root / str(project) / FILE_NAME

    def snapshot(self, project: int | None) -> ProjectSnapshot | None:
        """What the last training found out about the project's slides; ``None`` if there was none with this model, or it is damaged."""
        if project is None or self._is_anothers(project):
            return None
        found = self._snapshots.undamaged(project, self.snapshot_file(project))
        return None if found is None or found.about.get("fingerprint") != self._model.fingerprint else found

    def _pointer(self, project: int) -> Path:
        return self._root / str(project) / "current.json"
