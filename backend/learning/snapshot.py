"""What the last training found out about every slide of a project, in one file: labels, suggestions, ranks, neighbours.

``heads/<project>/slides.npz``: NumPy arrays and JSON texts, no pickles; written under another name and renamed.
Training writes it; the HTTP and publishing processes read it, to say which labelled slides are like the one that is
open, and to colour the map.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import struct
import time
import uuid
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from backend.errors import HeadDamaged
from backend.learning.acquisition import nearest_labelled
from backend.learning.disk import disk
from backend.learning.heads import AnyFloatArray, Float32Array, Float64Array

FILE_NAME = "slides.npz"
_FORMAT = 1
_TEXTS = ("keys", "names", "labels", "suggestions", "patients")
_ARRAYS = ("tasks", "confidence", "priority", "novelty", "cluster", "labelled", "embeddings")

_HIDDEN = re.compile(rf"\.{re.escape(FILE_NAME)}\.[0-9a-f]{{32}}")
_ABANDONED_S = 86_400.0
"""No writer takes a day: a temporary file of that age belongs to one that was killed."""
# What zipfile, NumPy and JSON find wrong with contents; a job's time limit is none of these.
_WRONG = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    EOFError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)

Int64Array = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Neighbour:
    """A labelled slide that is like another: its task, bag key, name, label in words, the cosine of the embeddings in
    [-1, 1], and whether it is known to be of the same patient."""

    task: int
    key: str
    name: str
    label: str
    similarity: float
    same_patient: bool = False


@dataclass(frozen=True, eq=False)
class ProjectSnapshot:
    """The N slides of a project that have an embedding.

    Attributes
    ----------
    about
        JSON values: ``version``, ``fingerprint`` and ``created_at``, and what training reports (``too_few``,
        ``issues``, …).
    tasks
        int64 (N,): Label Studio's task.
    keys, names
        N bag keys and file names.
    labels
        N mappings from control to what the annotators agree on (JSON values); empty for what is not labelled.
    suggestions
        N answers of the main head in words, '' without one.
    confidence
        float64 (N,): of the suggestion, NaN without one.
    priority
        int64 (N,): 1 is to be labelled first, 0 is labelled.
    novelty
        float64 (N,) in [0, 1].
    cluster
        int64 (N,).
    labelled
        int64 (L,): the rows with a label.
    embeddings
        float32 (L, D): theirs.
    patients
        N hashes, the same for slides of one patient, '' where none is known; empty in snapshots of earlier releases.
    """

    about: Mapping[str, Any]
    tasks: Int64Array
    keys: tuple[str, ...]
    names: tuple[str, ...]
    labels: tuple[Mapping[str, Any], ...]
    suggestions: tuple[str, ...]
    confidence: Float64Array
    priority: Int64Array
    novelty: Float64Array
    cluster: Int64Array
    labelled: Int64Array
    embeddings: Float32Array = field(repr=False)
    patients: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.tasks)
        texts = (self.keys, self.names, self.labels, self.suggestions, self.patients or self.keys)
        arrays = (self.confidence, self.priority, self.novelty, self.cluster)
        if any(len(part) != n for part in (*texts, *arrays)) or len(self.embeddings) != len(self.labelled):
            raise ValueError(f"the parts of a snapshot of {n} slides differ in length")

    @cached_property
    def row_of_task(self) -> Mapping[int, int]:
        """The row of each task."""
        return {int(task): row for row, task in enumerate(self.tasks)}

    @cached_property
    def row_of_key(self) -> Mapping[str, int]:
        """A row of each bag (several tasks may show one slide)."""
        return {key: row for row, key in enumerate(self.keys)}

    def label_text(self, row: int) -> str:
        """What the annotators say of a slide, in words; '' if nothing."""
        return "; ".join(words(value) for value in self.labels[row].values())

    def cluster_of(self, task: int) -> int | None:
        """Which slides a task's slide is alike; ``None`` if it was not there yet."""
        row = self.row_of_task.get(task)
        return None if row is None else int(self.cluster[row])

    def neighbours(self, key: str, embedding: AnyFloatArray, *, k: int = 5) -> list[Neighbour]:
        """The labelled slides most like that of ``key``, the nearest first, itself left out; ``embedding`` is float
        (D,)."""
        others = np.array([i for i, row in enumerate(self.labelled) if self.keys[row] != key], dtype=np.int64)
        if not len(others) or embedding.shape != self.embeddings.shape[1:]:
            return []
        own = self.row_of_key.get(key)
        patient = self.patients[own] if own is not None and self.patients else ""
        rows, cosine = nearest_labelled(embedding, self.embeddings[others], k=k)
        found = []
        for i, similarity in zip(rows.tolist(), cosine.tolist(), strict=True):
            row = int(self.labelled[others[i]])
            text = self.label_text(row)
            same = bool(patient) and self.patients[row] == patient
            found.append(
                Neighbour(int(self.tasks[row]), self.keys[row], self.names[row], text, float(similarity), same)
            )
        return found


def words(value: Any) -> str:
    """A label as people read it: a choice, a number, or the chosen ones of several."""
    if isinstance(value, Mapping):
        return ", ".join(name for name, chosen in value.items() if chosen) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def write_snapshot(snapshot: ProjectSnapshot, path: Path) -> None:
    """Put ``snapshot`` in place of what is there, and remove what killed writers left.

    Raises
    ------
    StoreUnavailable
        The disk is full, or may not be written to; what was there still is.
    """
    texts = {name: [dict(v) if isinstance(v, Mapping) else v for v in getattr(snapshot, name)] for name in _TEXTS}
    head = json.dumps({"format": _FORMAT, "about": dict(snapshot.about), **texts})
    hidden = path.with_name(f".{FILE_NAME}.{uuid.uuid4().hex}")
    with disk(_name(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)  # first: they may be what fills the disk
        try:
            with hidden.open("wb") as file:
                arrays = {name: getattr(snapshot, name) for name in _ARRAYS}
                np.savez(file, head=np.frombuffer(head.encode(), dtype=np.uint8), **arrays)
                file.flush()
                os.fsync(file.fileno())
            hidden.replace(path)
        finally:
            hidden.unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    for entry in folder.iterdir():
        if _HIDDEN.fullmatch(entry.name):
            with contextlib.suppress(FileNotFoundError):  # another writer has just finished, or removed it
                if time.time() - entry.stat().st_mtime > _ABANDONED_S:
                    entry.unlink()


def read_snapshot(path: Path) -> ProjectSnapshot | None:
    """What :func:`write_snapshot` wrote, ``None`` if nothing was.

    Raises
    ------
    HeadDamaged
        The file is something else.
    StoreUnavailable
        It cannot be opened or read now, which is no damage.
    """
    try:
        # Read whole before it is understood: NumPy and zipfile raise the system's errors for contents that are wrong,
        # too.
        with disk(_name(path)):
            data = path.read_bytes()
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            head = json.loads(file["head"].tobytes().decode())
            if head["format"] != _FORMAT:
                raise ValueError(f"format {head['format']}, this release reads {_FORMAT}")
            texts: dict[str, Any] = {
                name: tuple(head.get(name, ())) if name == "patients" else tuple(head[name]) for name in _TEXTS
            }
            arrays: dict[str, Any] = {name: file[name] for name in _ARRAYS}
            return ProjectSnapshot(about=head["about"], **texts, **arrays)
    except FileNotFoundError:
        return None
    except (OSError, *_WRONG) as error:
        raise HeadDamaged(f"{_name(path)} cannot be read: {error}.") from error


def _name(path: Path) -> str:
    return f"{path.name} of project {path.parent.name}"
