"""Which model version a project is at: that of the model, or of the heads trained for the project on top of it."""

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
    """What was read from a file, for as long as the file stays the same."""

    def __init__(self, read: Callable[[int], T | None]) -> None:
        self._read = read
        self._kept: OrderedDict[int, tuple[object, T | None]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, project: int, file: Path) -> T | None:
        """The value; ``None`` without a file, and (with an error in the log, once) for one that cannot be read."""
        try:
            status = file.stat()
        except FileNotFoundError:
            return None
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        with self._lock:
            if project in self._kept and self._kept[project][0] == stamp:
                self._kept.move_to_end(project)
                return self._kept[project][1]
        try:
            value = self._read(project)
        except HeadDamaged as error:
            # Slides are pre-labelled without heads rather than not at all; training writes what is damaged anew.
            log.error("project %d: %s Going on without its heads.", project, error)
            value = None
        with self._lock:
            self._kept[project] = (stamp, value)
            while len(self._kept) > _REMEMBERED:
                self._kept.popitem(last=False)
        return value


class ProjectVersions:
    """The versions of all projects, read from the heads' folder; files are read again only when they have changed.

    Parameters
    ----------
    root
        The folder of :class:`~backend.learning.registry.HeadRegistry`.
    model
        Heads of another model than this one do not count.
    """

    def __init__(self, root: Path, model: ModelIdentity) -> None:
        self.registry = HeadRegistry(root)
        self._root = root
        self._model = model
        self._heads = _Remembered(lambda project: self.registry.current(project, fingerprint=model.fingerprint))
        self._snapshots = _Remembered(lambda project: read_snapshot(self.snapshot_file(project)))

    def heads(self, project: int | None) -> HeadSet | None:
        """The heads that a project uses; ``None`` if it has none, or if they cannot be read."""
        return None if project is None else self._heads.get(project, self._root / str(project) / "current.json")

    def version(self, project: int | None) -> str:
        """What Label Studio is to show and compare, such as ``wsc-3f2a1c`` or ``wsc-3f2a1c-h4``."""
        heads = self.heads(project)
        return self._model.model_version if heads is None else heads.version

    def versions(self, project: int | None = None) -> list[str]:
        """All that can be chosen, the model itself first, then heads, newest first; of one project or of all."""
        projects = sorted(self.projects()) if project is None else [project]
        found = [self._model.model_version]
        for number in projects:
            for info in self.registry.versions(number):
                if info.fingerprint == self._model.fingerprint:
                    found.append(info.version)
        return list(dict.fromkeys(found))

    def projects(self) -> list[int]:
        """The projects that heads or ranks are stored for."""
        if not self._root.is_dir():
            return []
        return [int(path.name) for path in self._root.iterdir() if path.name.isdecimal()]

    def snapshot_file(self, project: int) -> Path:
        """Where :class:`~backend.learning.snapshot.ProjectSnapshot` of a project lies."""
        return self._root / str(project) / FILE_NAME

    def snapshot(self, project: int | None) -> ProjectSnapshot | None:
        """What the last training found out about the project's slides; ``None`` if there was none with this model."""
        found = None if project is None else self._snapshots.get(project, self.snapshot_file(project))
        return None if found is None or found.about.get("fingerprint") != self._model.fingerprint else found
