"""A training: annotations → heads → a new model version → every slide of the project scored, pushed and ranked anew.

Everything works on stored embeddings, so that it takes seconds. Each step can be repeated: a training that dies is run
again from its start.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

import numpy as np
from redis import Redis

from backend.errors import HeadDamaged
from backend.jobs.queue import WaitingTask
from backend.label_studio.api_errors import TaskGone
from backend.label_studio.fitting import fit_target
from backend.label_studio.labeling_config import LabelingConfig, parse_config
from backend.label_studio.learnt import slide_heads
from backend.label_studio.publisher import services_of
from backend.label_studio.ranking import write_ranks
from backend.label_studio.services import Services
from backend.label_studio.teaching import Lesson, Progress, Teacher
from backend.learning.acquisition import choice_like, labelling_order
from backend.learning.heads import Float64Array, Head, predict
from backend.learning.registry import HeadSet
from backend.learning.snapshot import ProjectSnapshot, words, write_snapshot
from backend.settings import Settings

log = logging.getLogger(__name__)

_ISSUES_KEPT = 200
NOT_CONNECTED = "the project is not connected to this backend, so nothing was sent to Label Studio"


@dataclass(frozen=True)
class TrainingReport:
    """What a training did.

    Attributes
    ----------
    version, previous
        The project's model version now and before.
    heads
        The heads in use: control, level, kind, n_labels, label_counts, calibrated, metrics, prior_stated.
    too_few
        What other controls still need, see :meth:`TooFewLabels.as_dict`.
    unused
        Controls of the labelling config that are neither filled nor learnt from, and why.
    issues
        What taught nothing or less than it seems (the first of them), see :class:`~backend.learning.labels.Issue`.
    slides, unanalysed, labelled
        Slides with an embedding, tasks without, and annotated tasks.
    pushed, ranked
        Tasks whose prediction was queued for a push, and tasks whose rank was written.
    connected
        Whether the project is connected to this backend; if not, nothing was pushed and no rank written.
    """

    project: int
    version: str
    previous: str
    heads: Sequence[Mapping[str, Any]] = ()
    too_few: Sequence[Mapping[str, Any]] = ()
    issues: Sequence[Mapping[str, Any]] = ()
    unused: Sequence[str] = ()
    slides: int = 0
    unanalysed: int = 0
    labelled: int = 0
    pushed: int = 0
    ranked: int = 0
    connected: bool = True

    @property
    def message(self) -> str:
        """One line for people."""
        heads = ", ".join(f"{head['control']} ({head['n_labels']} labels)" for head in self.heads)
        needs = " ".join(str(few["message"]) for few in self.too_few)
        moved = f"{self.previous} → {self.version}" if self.version != self.previous else f"stays {self.version}"
        parts = [moved, f"heads: {heads}" if heads else "no heads yet", needs]
        parts.append(f"{self.labelled} of {self.slides + self.unanalysed} slides labelled")
        parts.append(f"{len(self.issues)} annotations or answers not used" if self.issues else "")
        parts += [f"not used: {control}" for control in self.unused]
        parts.append("" if self.connected else NOT_CONNECTED)
        return "; ".join(part for part in parts if part)

    def as_dict(self) -> dict[str, Any]:
        """As JSON, short enough for a job's result."""
        return {
            **self.__dict__,
            "issues": list(self.issues)[:20],
            "unused": list(self.unused)[:20],
            "message": self.message,
        }


def train_project(settings: Settings, redis: Redis, project: int, progress: Progress) -> dict[str, Any]:
    """:func:`train` for a worker process, which has settings and a Redis connection."""
    try:
        return train(services_of(settings, redis), project, progress).as_dict()
    except TaskGone:
        return {"project": project, "message": "the project does not exist (any more) in Label Studio"}


@lru_cache(maxsize=2)
def _teacher_of(services: Services) -> Teacher:
    return Teacher(services)


def train(services: Services, project: int, progress: Progress) -> TrainingReport:
    """Train the heads of a project on what its annotations say now; see the module.

    Heads are replaced only if something that they depend on has changed; without any label left, none is used.

    Raises
    ------
    LabelConfigUnsupported
        The labelling config cannot be read.
    LabelStudioUnreachable, LabelStudioError, TaskGone
        Label Studio is away; refuses; does not know the project.
    QueueUnavailable
        Redis does not answer, so nothing can be pushed.
    StoreUnavailable, DownloadFailed
        Results, heads or an annotated slide cannot be looked up now.
    HeadDamaged
        The heads in use are damaged, and cannot be made anew, as slides that taught them are not there.
    """
    services.versions.take_over(project, services.client.owner(project))
    label_config = services.client.label_config(project)
    services.training.config_changed(project, label_config)
    config = parse_config(label_config)
    teacher = _teacher_of(services)
    lesson = teacher.lesson(project, config, progress)
    before, old = services.versions.version(project), services.versions.snapshot(project)
    current: HeadSet | HeadDamaged | None
    try:
        current, chosen_for = services.versions.in_use(project), services.versions.registry.chosen_for(project)
    except HeadDamaged as error:
        log.error("project=%d is trained anew: %s", project, error)
        current, chosen_for = error, ""
    if not isinstance(current, HeadDamaged) and chosen_for == lesson.digest(services.model.fingerprint):
        # Somebody put these heads in use (or none), and the labels are those that they had before them then.
        heads, too_few = current, _still_too_few(old, current)
    else:
        heads, too_few = _heads(services, project, lesson, teacher, current, old, progress)
    return _settle(services, project, config, lesson, heads, too_few, progress, before=before)


def put_in_use(services: Services, project: int, version: str | None, progress: Progress) -> TrainingReport:
    """Use a stored version of the heads again (``None``: none), and score, push and rank every slide anew with it.

    It stays until a label changes: a training on the labels that there are now keeps it, one on others trains anew.

    Raises
    ------
    HeadNotFound, HeadDamaged, HeadMismatch
        There is no such version; it cannot be read; it was trained on embeddings of another model. Nothing has changed
        then.
    LabelConfigUnsupported, LabelStudioUnreachable, LabelStudioError, TaskGone, QueueUnavailable, StoreUnavailable,
    DownloadFailed
        As of :func:`train`.
    """
    services.queue.ping()
    services.versions.take_over(project, services.client.owner(project))
    config = parse_config(services.client.label_config(project))
    lesson = _teacher_of(services).lesson(project, config, progress)
    before, old = services.versions.version(project), services.versions.snapshot(project)
    registry, fingerprint = services.versions.registry, services.model.fingerprint
    # Written down with the choice itself: should we die right after it, the next training on these labels keeps it, and
    # goes on from there.
    chosen_for = lesson.digest(fingerprint)
    heads = None
    if version is None:
        registry.retire(project, chosen_for=chosen_for)
    else:
        heads = registry.restore(project, version, fingerprint=fingerprint, chosen_for=chosen_for)
    return _settle(services, project, config, lesson, heads, _still_too_few(old, heads), progress, before=before)


def _settle(
    services: Services,
    project: int,
    config: LabelingConfig,
    lesson: Lesson,
    heads: HeadSet | None,
    too_few: Sequence[Mapping[str, Any]],
    progress: Progress,
    *,
    before: str,
) -> TrainingReport:
    """Score every slide with the heads in use, write that down, and have Label Studio follow."""
    old = services.versions.snapshot(project)
    snapshot = _snapshot(services, lesson, config, heads, too_few)
    write_snapshot(snapshot, services.versions.snapshot_file(project))
    version = str(snapshot.about["version"])
    progress("version", 0, 0)
    connected = services.client.follow_version(project, services.settings.browser_url, version)
    if services.training.note_connection(project, connected) and not connected:
        log.warning("project=%d is not connected to this backend: its events start no training any more", project)
    # One that died before its last push has left slides behind, perhaps even before its snapshot: heads in use may be
    # newer than that.
    settled = old is not None and old.about.get("settled") and old.about["version"] == before == version
    pushed = ranked = 0
    if connected:
        pushed = _push(services, project, lesson, snapshot, old if settled else None, version, progress)
        write_snapshot(
            replace(snapshot, about={**snapshot.about, "settled": True}), services.versions.snapshot_file(project)
        )
        if services.settings.rank_tasks:
            ranked = write_ranks(services, project, lesson, snapshot, progress)
    report = TrainingReport(
        project=project,
        version=version,
        previous=before if old is None else str(old.about["version"]),
        heads=snapshot.about["heads"],
        too_few=snapshot.about["too_few"],
        issues=snapshot.about["issues"],
        unused=[str(control) for control in config.unused],
        slides=len(lesson.slides),
        unanalysed=lesson.unanalysed,
        labelled=len(lesson.annotated),
        pushed=pushed,
        ranked=ranked,
        connected=connected,
    )
    for issue in lesson.issues:
        log.info(
            "project=%d task=%d not used (%s): %s %s", project, issue.task_id, issue.code, issue.control, issue.detail
        )
    return report


# --- fitting --------------------------------------------------------------------------------------------------------


def _still_too_few(old: ProjectSnapshot | None, heads: HeadSet | None) -> Sequence[Mapping[str, Any]]:
    """What the last training missed, less what ``heads`` have."""
    known = {} if heads is None else heads.heads
    return [few for few in (old.about["too_few"] if old is not None else ()) if few["control"] not in known]


def _heads(
    services: Services,
    project: int,
    lesson: Lesson,
    teacher: Teacher,
    current: HeadSet | HeadDamaged | None,
    old: ProjectSnapshot | None,
    progress: Progress,
) -> tuple[HeadSet | None, Sequence[Mapping[str, Any]]]:
    """The heads in use after this training, and what is missing for others; ``current`` and ``old`` are what was there
    before it."""
    registry = services.versions.registry
    digest = lesson.digest(services.model.fingerprint)
    if isinstance(current, HeadSet):
        manifest = next((info.manifest for info in registry.versions(project) if info.current), {})
        # The snapshot may be older than the heads, where a training died between the two.
        known = manifest.get("too_few", old.about["too_few"] if old is not None else None)
        if manifest.get("digest") == digest and known is not None:
            return current, list(known)  # nothing that they depend on has changed
    heads: list[Head] = []
    too_few: list[dict[str, Any]] = []
    progress("fit", 0, len(lesson.targets))
    for done, target in enumerate(lesson.targets, start=1):
        fitted = fit_target(services, lesson, target, teacher)
        if isinstance(fitted, Head):
            heads.append(fitted)
        elif fitted is not None:
            too_few.append(fitted.as_dict())
            log.info("project=%d %s", project, fitted.message)
        progress("fit", done, len(lesson.targets))
    if heads:
        about = {"digest": digest, "too_few": too_few}
        return registry.add(project, heads, model_version=services.model.model_version, about=about), too_few
    if current is not None and lesson.unplaced:
        # Nobody has taken these labels back: it is slides or results that are not there, as on a disk that is not
        # mounted.
        log.warning("project=%d: %d annotated slides are not there; its heads stay", project, len(lesson.unplaced))
        if isinstance(current, HeadDamaged):
            raise current
        return current, too_few
    if current is not None:
        registry.retire(project)
        log.info("project=%d has too few labels left: its heads are not used any more", project)
    return None, too_few


# --- scoring --------------------------------------------------------------------------------------------------------


def _snapshot(
    services: Services,
    lesson: Lesson,
    config: LabelingConfig,
    heads: HeadSet | None,
    too_few: Sequence[Mapping[str, Any]],
) -> ProjectSnapshot:
    n = len(lesson.slides)
    confidence: Float64Array = np.full(n, np.nan)
    suggestions = [""] * n
    uncertain: Float64Array | None = None
    for index, head in enumerate(slide_heads(heads, config) if heads is not None and n else ()):
        output = predict(head, lesson.embeddings)
        confidence = np.fmin(confidence, output.confidence)
        if index == 0:
            suggestions = [words(value) for value in output.values]
            uncertain = choice_like(head, output)
    of_slide: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, labels in lesson.labels.items():
        for label in labels:
            value = dict(label.value) if isinstance(label.value, Mapping) else label.value
            of_slide[lesson.by_task[label.task_id].key][name] = value
    # What was said of a slide in one task is said of it in every task that shows it.
    said = [dict(of_slide.get(slide.key, {})) for slide in lesson.slides]
    done = {slide.key for slide in lesson.slides if slide.task in lesson.annotated}
    annotated = np.array([slide.key in done for slide in lesson.slides], dtype=np.bool_)
    names = [slide.name for slide in lesson.slides]
    order = labelling_order(lesson.embeddings, annotated, uncertain, names=names)
    labelled = np.array([row for row in lesson.distinct if said[row]], dtype=np.int64)
    about = {
        "version": heads.version if heads is not None else services.model.model_version,
        "fingerprint": services.model.fingerprint,
        "created_at": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "heads": [_about(head) for head in heads.heads.values()] if heads is not None else [],
        "too_few": [dict(few) for few in too_few],
        "issues": [issue.as_dict() for issue in lesson.issues[:_ISSUES_KEPT]],
        "unanalysed": lesson.unanalysed,
    }
    return ProjectSnapshot(
        about=about,
        tasks=np.array([slide.task for slide in lesson.slides], dtype=np.int64),
        keys=tuple(slide.key for slide in lesson.slides),
        names=tuple(names),
        labels=tuple(said),
        suggestions=tuple(suggestions),
        confidence=confidence,
        priority=order.priority,
        novelty=order.novelty,
        cluster=order.cluster,
        labelled=labelled,
        embeddings=lesson.embeddings[labelled],
        patients=tuple(slide.patient.key if slide.patient is not None else "" for slide in lesson.slides),
    )


def _about(head: Head) -> dict[str, Any]:
    return {
        "control": head.control,
        "level": head.level,
        "kind": head.kind,
        "n_labels": head.n_labels,
        "label_counts": dict(head.label_counts),
        "calibrated": head.calibrated,
        "metrics": dict(head.metrics),
        "prior_stated": list(head.prior_stated),
    }


def _push(
    services: Services,
    project: int,
    lesson: Lesson,
    snapshot: ProjectSnapshot,
    old: ProjectSnapshot | None,
    version: str,
    progress: Progress,
) -> int:
    """Queue a push for every task; with ``old``, of the same version, only for those that it did not place, or placed
    elsewhere."""
    rows = np.argsort(np.where(snapshot.priority > 0, snapshot.priority, len(snapshot.tasks) + 1), kind="stable")
    waiting = [
        (lesson.slides[row].key, WaitingTask(project, lesson.slides[row].task, "", version, services.needs))
        for row in rows.tolist()
        if old is None or old.cluster_of(lesson.slides[row].task) != int(snapshot.cluster[row])
    ]
    for done, (key, task) in enumerate(waiting, start=1):
        services.queue.put_back_waiting(key, [task])
        services.queue.enqueue_publish(key)
        progress("push", done, len(waiting))
    return len(waiting)
