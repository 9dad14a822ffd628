"""What the overview says of a project's learning: the curve over its versions, the heads in use, what is missing, the
training."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backend.errors import BackendError, StoreUnavailable
from backend.label_studio.services import Services
from backend.learning.figures import class_figures, patients_words
from backend.learning.heads import HeadKind
from backend.learning.registry import VersionInfo

log = logging.getLogger(__name__)

CURVE_VERSIONS = 200
"""Of so many versions, the newest, a curve is drawn."""

_Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Headline:
    """The one number by which a head is judged, with its 95 % interval where there is one.

    ``metric``: ``balanced_accuracy`` (for several choices its mean over them) or ``r2``, as in
    :mod:`backend.learning.metrics`.
    """

    metric: str
    score: float
    low: float | None = None
    high: float | None = None


def headline(kind: HeadKind, metrics: Mapping[str, Any]) -> Headline | None:
    """The headline of a head's metrics; ``None`` if nothing was measured."""
    if not metrics.get("measured"):
        return None
    if kind == "choices":
        rows = [found.get("balanced_accuracy") for found in metrics["choices"].values() if found.get("measured")]
        values = [float(row[0]) for row in rows if row is not None]
        # The choices' intervals are not independent: their mean has no interval that could be told from them.
        return Headline("balanced_accuracy", sum(values) / len(values)) if values else None
    name = "balanced_accuracy" if kind == "choice" else "r2"
    row = metrics.get(name)
    return None if row is None else Headline(name, *map(float, row))


class ProjectLearning:
    """The :data:`~backend.web.overview.ProjectExtras` of every project; threads may share one.

    Reads the registry's manifests again only when ``current.json`` has changed.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._curves: dict[int, tuple[_Stamp, list[dict[str, Any]]]] = {}
        self._lock = threading.Lock()

    def __call__(self, project: int) -> Mapping[str, Any]:
        """JSON values only.

        ``version``
            The project's model version.
        ``heads``
            In use: ``control``, ``level``, ``kind``, ``classes``, ``labels`` (how many it learnt from), ``calibrated``,
            ``metric``, ``score``, ``low``, ``high`` (all ``None`` if not measured), ``mae`` (of numbers), ``reason``
            (why it was not measured), ``patients`` (what the validation knew of them, in words), ``figures`` (of each
            measured class, see :class:`~backend.learning.figures.ClassFigures`).
        ``curve``
            Measured heads of all versions, oldest first: ``labelled``, ``score``, ``low``, ``high``, ``metric``,
            ``chance`` (what guessing would score), ``model_version``, ``control``, ``level``, ``patients`` (as for the
            heads).
        ``too_few``
            What the other controls still need, in words.
        ``training``
            ``status`` (``scheduled``, ``queued``, ``running``, ``finished``, ``failed``, or ``unknown`` where Redis
            does not answer), ``reason`` and ``ended_at``; ``None`` if none is listed.
        ``learning_problem``
            What cannot be read, '' for nothing.
        """
        try:
            return self._told(project)
        except StoreUnavailable as error:
            nothing: dict[str, Any] = {"version": "", "heads": [], "curve": [], "too_few": []}
            return nothing | {"training": self._training(project), "learning_problem": str(error)}

    def _told(self, project: int) -> dict[str, Any]:
        versions = self._services.versions
        found: dict[str, Any] = {"version": versions.version(project), "curve": [], "learning_problem": ""}
        heads, snapshot = versions.heads(project), versions.snapshot(project)
        found["heads"] = [
            {
                "control": head.control,
                "level": head.level,
                "kind": head.kind,
                "classes": list(head.classes),
                "labels": head.n_labels,
                "calibrated": head.calibrated,
                "reason": str(head.metrics.get("reason", "")),
                "patients": patients_words(head.metrics),
                "figures": [found.as_dict() for found in class_figures(vars(head))],
                "mae": (head.metrics.get("mae") or [None])[0],
                **_headline_json(headline(head.kind, head.metrics)),
            }
            for head in (heads.heads.values() if heads is not None else ())
        ]
        found["too_few"] = [str(few["message"]) for few in snapshot.about["too_few"]] if snapshot is not None else []
        found["training"] = self._training(project)
        try:
            found["curve"] = self._curve(project)
            if heads is None:
                # In words what `versions.heads` said to the log.
                versions.registry.current(project)
        except BackendError as error:
            found["learning_problem"] = str(error)
        return found

    def _training(self, project: int) -> dict[str, Any] | None:
        try:
            state = self._services.training.state(project)
        except BackendError as error:
            return {"status": "unknown", "reason": error.message, "ended_at": None}
        if state is None:
            return None
        status: str = {"started": "running"}.get(state.status, state.status)
        if status == "queued" and state.position is None:
            status = "scheduled"  # it waits for its time: more annotations may come, or a failed one is tried again
        reason = str(state.error.get("message", "")) if state.error is not None else ""
        return {"status": status, "reason": reason, "ended_at": state.ended_at}

    def _curve(self, project: int) -> list[dict[str, Any]]:
        versions = self._services.versions
        pointer = versions.snapshot_file(project).with_name("current.json")
        try:
            status = pointer.stat()
        except FileNotFoundError:
            return []
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        with self._lock:
            known = self._curves.get(project)
        if known is not None and known[0] == stamp:
            return known[1]
        points = curve_points(versions.registry.versions(project)[:CURVE_VERSIONS], self._services.model.fingerprint)
        with self._lock:
            self._curves[project] = (stamp, points)
        return points


def curve_points(versions: Sequence[VersionInfo], fingerprint: str) -> list[dict[str, Any]]:
    """The points of ``curve``, oldest first, out of versions, newest first; those of another model are left out."""
    points: list[dict[str, Any]] = []
    for info in reversed(versions):
        if info.fingerprint != fingerprint:
            continue
        try:
            points += [point for entry in info.manifest["heads"] if (point := _point(info, entry)) is not None]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            log.warning("the manifest of %s is not what training writes: %s", info.version, error)
    return points


def _point(info: VersionInfo, entry: Mapping[str, Any]) -> dict[str, Any] | None:
    found = headline(entry["kind"], entry["metrics"])
    if found is None:
        return None
    chance = None
    if found.metric == "balanced_accuracy":
        chance = 0.5 if entry["kind"] == "choices" else 1 / len(entry["classes"])
    return {
        "labelled": int(entry["n_labels"]),
        **_headline_json(found),
        "chance": chance,
        "model_version": info.version,
        "control": str(entry["control"]),
        "level": str(entry["level"]),
        "patients": patients_words(entry["metrics"]),
    }


def _headline_json(found: Headline | None) -> dict[str, Any]:
    if found is None:
        return {"metric": None, "score": None, "low": None, "high": None}
    return {"metric": found.metric, "score": found.score, "low": found.low, "high": found.high}
