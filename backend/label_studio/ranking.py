"""The order of labelling, written into the tasks' data so that the Data Manager can sort by it."""

from __future__ import annotations

import logging

import numpy as np

from backend.label_studio.api_errors import TaskGone
from backend.label_studio.services import Services
from backend.label_studio.task_fields import TaskFields
from backend.label_studio.teaching import Lesson, Progress
from backend.learning.snapshot import ProjectSnapshot

log = logging.getLogger(__name__)

RANKED = 300
"""So many slides, the first of the order that have changed, get their rank written."""


def _is_first(priority: object) -> bool:
    return isinstance(priority, int | float) and 0 < priority <= RANKED


def write_ranks(services: Services, project: int, lesson: Lesson, snapshot: ProjectSnapshot, progress: Progress) -> int:
    """Write ranks into the tasks' data, the most urgent first; stops where a newer training waits, which does it
    anyway.

    Only of the first :data:`RANKED` that have changed, and of those that would stand among the first wrongly: each field
    of each task is a request, and nobody labels by rank 5 000 before the next training.
    """
    rows = np.argsort(np.where(snapshot.priority > 0, snapshot.priority, len(snapshot.tasks) + 1), kind="stable")
    written, fields = 0, TaskFields(services.client, project)
    for done, row in enumerate(rows.tolist(), start=1):
        slide = lesson.slides[row]
        sure = float(snapshot.confidence[row])
        wanted = {
            "priority": int(snapshot.priority[row]) or None,  # labelled: no rank, which the Data Manager sorts last
            "novelty": round(float(snapshot.novelty[row]), 3),
            "confidence": None if np.isnan(sure) else round(sure, 3),
        }
        changed = {name: value for name, value in wanted.items() if slide.data.get(name) != value}
        if not changed or (written >= RANKED and not _is_first(slide.data.get("priority"))):
            continue
        if done % 20 == 0 and services.training.again(project):
            log.info("project=%d: %d ranks left to the training that waits", project, len(rows) - done)
            break
        try:
            fields.set(slide.task, changed)
            written += 1
        except TaskGone:
            log.info("project=%d task=%d was deleted meanwhile", project, slide.task)
        progress("rank", done, len(rows))
    return written
