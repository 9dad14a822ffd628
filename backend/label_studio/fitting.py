"""One control of a project → its head: which labels, of which slides and patients, with which stated frequencies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from backend.label_studio.services import Services
from backend.label_studio.teaching import Lesson, Slide, Teacher
from backend.learning.heads import Head
from backend.learning.labels import TILE_KINDS, SlideLabel, Target
from backend.learning.splits import PatientGroups, patient_groups
from backend.learning.tile_training import fit_tile_head
from backend.learning.training import TooFewLabels, fit_choice_head, fit_choices_head, fit_number_head


def fit_target(services: Services, lesson: Lesson, target: Target, teacher: Teacher) -> Head | TooFewLabels | None:
    """The head of a control, or what it lacks; ``None`` where nobody has drawn with it, so that nothing is missing
    either.

    Raises
    ------
    ResultDamaged
        See :meth:`~backend.label_studio.teaching.Teacher.labelled_tiles`.
    """
    fingerprint, least = services.model.fingerprint, services.settings.train_min_labels
    if target.kind in TILE_KINDS:
        entries = lesson.tiles.get(target.name)
        if not entries:
            return None
        known = groups_of(lesson, [slide for slide, _ in entries])
        pieces = teacher.labelled_tiles(entries, known.groups.tolist())
        return _with_patients(fit_tile_head(target.name, target.labels, pieces, fingerprint=fingerprint), known)
    labels: Sequence[SlideLabel] = lesson.labels.get(target.name, ())
    slides = [lesson.by_task[label.task_id] for label in labels]
    known = groups_of(lesson, slides)
    x = lesson.embeddings[[slide.row for slide in slides]]
    common: dict[str, Any] = {
        "fingerprint": fingerprint,
        "names": [slide.name for slide in slides],
        "groups": known.groups,
        "background": lesson.embeddings[lesson.distinct] if len(lesson.embeddings) else None,
        "min_labels": least,
    }
    values: list[Any] = [label.value for label in labels]
    if target.kind != "Choices":
        return _with_patients(fit_number_head(target.name, x, values, rating=target.kind == "Rating", **common), known)
    fit: Callable[..., Head | TooFewLabels] = fit_choices_head if target.multiple else fit_choice_head
    return _with_patients(fit(target.name, target.labels, x, values, priors=dict(target.priors), **common), known)


def groups_of(lesson: Lesson, slides: Sequence[Slide]) -> PatientGroups:
    """The patients of some slides of a lesson; copies of a slide, whose embeddings are the same, are one slide."""
    names = [slide.patient.key if slide.patient is not None else "" for slide in slides]
    return patient_groups(names, [lesson.embeddings[slide.row].tobytes() for slide in slides])


def _with_patients(fitted: Head | TooFewLabels, known: PatientGroups) -> Head | TooFewLabels:
    if not isinstance(fitted, Head):
        return fitted
    return replace(fitted, metrics={**fitted.metrics, "patients": known.as_dict()})
