"""All slides of one model as points in the plane: the two principal components of their embeddings."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from backend.errors import StoreUnavailable
from backend.label_studio.services import Services
from backend.learning.snapshot import ProjectSnapshot, words
from backend.results.bag import Float32Array

log = logging.getLogger(__name__)

MAX_SLIDES = 5000
_READ_AT_ONCE = 8
_CHUNK = 500


def principal_plane(embeddings: Float32Array) -> tuple[npt.NDArray[np.float64], tuple[float, float]]:
    """The first two principal components (Pearson 1901; Hotelling 1933).

    Parameters
    ----------
    embeddings
        float32 (N, D), N ≥ 1, finite.

    Returns
    -------
    float64 (N, 2), centred at 0, and the part of the variance that each axis holds. The sign of an axis is arbitrary; it is set so that
    the component of largest magnitude in its direction is positive, so that the same slides give the same map.
    """
    centred = embeddings.astype(np.float64) - embeddings.mean(axis=0, dtype=np.float64)
    # The eigenvectors of the D x D scatter, or of the N x N Gram matrix, whichever is smaller.
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    plane = np.zeros((2, centred.shape[1]))
    plane[: min(2, len(directions))] = directions[:2]
    signs = np.sign(plane[np.arange(2), np.abs(plane).argmax(axis=1)])
    plane *= np.where(signs == 0, 1, signs)[:, None]
    total = float((values**2).sum())
    parts = [float(value**2) / total if total > 0 else 0.0 for value in values[:2]]
    return centred @ plane.T, (parts[0], parts[1] if len(parts) > 1 else 0.0)


@dataclass(frozen=True)
class _Seen:
    """Of one stored result: its embedding, ``None`` if it is of another model; the slide's name; its number of tiles."""

    embedding: Float32Array | None
    slide: str
    tiles: int


@dataclass(frozen=True)
class Said:
    """What is known of a slide: its label in words, whether only a head says so, that head's confidence, and in which project."""

    label: str
    suggested: bool
    confidence: float | None
    project: int


def said_of(project: int, snapshot: ProjectSnapshot) -> dict[str, Said]:
    """By bag key, what annotators say of the slides of a snapshot, else what its main head suggests."""
    heads = [head["control"] for head in snapshot.about.get("heads", ()) if head["level"] == "slide"]
    found: dict[str, Said] = {}
    for row, key in enumerate(snapshot.keys):
        labels = snapshot.labels[row]
        # The answer to what the main head answers too, so that labels and suggestions are of one kind.
        asked = next((name for name in heads[:1] if name in labels), next(iter(labels), None))
        sure = float(snapshot.confidence[row])
        said = Said(
            label=snapshot.suggestions[row] if asked is None else words(labels[asked]),
            suggested=asked is None,
            confidence=None if math.isnan(sure) else round(sure, 4),
            project=project,
        )
        if said.label and (key not in found or found[key].suggested):  # several tasks may show one slide
            found[key] = said
    return found


class EmbeddingMap:
    """The map of what is stored. Of each result the summary is read, once; the map is made again when there are others, or something was learnt.

    Attributes
    ----------
    reading
        How many results are still to be read for the map that is being made.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._seen: dict[str, _Seen] = {}
        self._made: tuple[frozenset[str], dict[str, Any]] | None = None
        self._told: tuple[dict[str, Any], Sequence[ProjectSnapshot], dict[str, Any]] | None = None
        self._lock = threading.Lock()
        self.reading = 0

    def as_json(self) -> dict[str, Any]:
        """``points`` (key, x, y, slide, tiles, url; label, suggested, confidence, project), ``explained`` (part of the variance of x and
        of y), ``left_out`` (how many).

        ``label`` is what annotators say, or with ``suggested`` a head; '' where nothing is said. Of several projects that have a slide, annotators
        go before heads, and the newest training before others. Left out are slides beyond :data:`MAX_SLIDES`; embeddings of
        other models than the current one cannot be compared, and are not counted.
        """
        with self._lock:
            keys = frozenset(self._services.store.keys())
            if self._made is None or self._made[0] != keys:
                self._made = (keys, self._make(keys))
            made = self._made[1]
            versions = self._services.versions
            found = {p: snapshot for p in sorted(versions.projects()) if (snapshot := self._snapshot(p)) is not None}
            # A snapshot is the same object for as long as its file is the same.
            snapshots = list(found.values())
            told = self._told
            if told is None or told[0] is not made or not _same(told[1], snapshots):
                told = self._told = (made, snapshots, _with_labels(made, found.items()))
            return told[2]

    def _snapshot(self, project: int) -> ProjectSnapshot | None:
        try:
            return self._services.versions.snapshot(project)
        except StoreUnavailable as error:
            log.warning("the map lacks what project %d has learnt: %s", project, error)
            return None

    def _make(self, keys: frozenset[str]) -> dict[str, Any]:
        fingerprint = self._services.model.fingerprint
        self._seen = {key: seen for key, seen in self._seen.items() if key in keys}
        ordered = sorted(keys)
        shown: list[str] = []
        at = 0
        while at < len(ordered) and len(shown) < MAX_SLIDES:
            self.reading = len(ordered) - at
            some = ordered[at : at + min(_CHUNK, MAX_SLIDES - len(shown))]
            self._read([key for key in some if key not in self._seen], fingerprint)
            # One that is not seen is gone since the keys were listed.
            shown += [key for key in some if key in self._seen and self._seen[key].embedding is not None]
            at += len(some)
        left_out = len(ordered) - at
        if not shown:
            return {"points": [], "explained": [0.0, 0.0], "left_out": left_out}
        embeddings = np.stack([e for key in shown if (e := self._seen[key].embedding) is not None])
        plane, explained = principal_plane(embeddings)
        points = [
            {
                "key": key,
                "x": round(float(x), 5),
                "y": round(float(y), 5),
                "slide": self._seen[key].slide,
                "tiles": self._seen[key].tiles,
                "url": f"/slides/{key}",
            }
            for key, (x, y) in zip(shown, plane, strict=True)
        ]
        return {"points": points, "explained": list(explained), "left_out": left_out}

    def _read(self, keys: Sequence[str], fingerprint: str) -> None:
        """Look at results, several at once: those in an object store cost a request or two each."""
        with ThreadPoolExecutor(_READ_AT_ONCE, thread_name_prefix="map") as pool:
            for key, found in zip(keys, pool.map(self._services.store.summary, keys), strict=True):
                if found is not None:
                    ours = found.provenance.get("fingerprint") == fingerprint
                    name = str(found.provenance.get("slide", key))
                    self._seen[key] = _Seen(found.embedding if ours else None, name, found.tiles)


def _same(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _with_labels(made: dict[str, Any], snapshots: Iterable[tuple[int, ProjectSnapshot]]) -> dict[str, Any]:
    """The map with what is known of its slides."""
    known: dict[str, Said] = {}
    for project, snapshot in sorted(snapshots, key=lambda item: str(item[1].about.get("created_at")), reverse=True):
        for key, said in said_of(project, snapshot).items():
            if key not in known or (known[key].suggested and not said.suggested):
                known[key] = said
    points = []
    for point in made["points"]:
        about = known.get(point["key"])
        more: dict[str, Any] = {"label": "", "suggested": False, "confidence": None, "project": None}
        if about is not None:
            more = {**about.__dict__, "url": f"{point['url']}?project={about.project}"}
        points.append({**point, **more})
    return {**made, "points": points}
