"""``wsc-backend export``: every analysed slide of a project with its embedding, labels, suggestions and ranks, in one file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from backend.errors import ResultNotFound
from backend.label_studio.labeling_config import LabelingConfig, parse_config
from backend.label_studio.learnt import slide_heads
from backend.label_studio.services import Services
from backend.label_studio.teaching import Lesson, Progress, Teacher
from backend.learning.heads import Float64Array, Head, predict
from backend.learning.labels import SLIDE_KINDS, SlideLabel, Target
from backend.learning.snapshot import ProjectSnapshot, words
from backend.paths import StrPath
from backend.results.export import readable
from backend.results.slide_table import Cell, Column, ColumnKind, SlideTable, write_table, writer
from backend.slides.places import public

Said = Callable[[str], None]

NOTE = "Research use only, no diagnostic use."


@dataclass(frozen=True)
class Exported:
    """What an export wrote: the file, its slides, how many tasks have no result yet and are left out, and the names of the columns."""

    path: Path
    slides: int
    unanalysed: int
    columns: tuple[str, ...]


def export_project(
    services: Services,
    project: str,
    path: StrPath,
    *,
    kind: str = "",
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
    say: Said = lambda _: None,
) -> Exported:
    """Write the slides of ``project`` (number or title) to ``path``; nothing is computed that is not stored, and no Redis is needed.

    Labels are Label Studio's as they are now, suggestions those of the heads in use, ranks those of the last training.

    Raises
    ------
    ProjectNotFound
        Label Studio has no such project; further errors as of :class:`~backend.label_studio.client.LabelStudioClient`.
    ResultNotFound
        No slide of the project has a result.
    ExportUnsupported, FileExists, ExtraMissing
        As of :func:`~backend.results.slide_table.write_table`, before anything is read.
    """
    path = Path(path)
    writer(path, kind, overwrite=overwrite)
    found = services.client.need_project(project)
    number = int(found.id)
    config = parse_config(str(found.label_config or ""))
    lesson = Teacher(services).lesson(number, config, progress)
    if not lesson.slides:
        raise ResultNotFound(
            f"No slide of project {number} has a result yet ({lesson.unanalysed} tasks).",
            hint="Have them analysed first: `wsc-backend import`, or “Retrieve Predictions” in the Data Manager, with workers running.",
        )
    services.versions.take_over(number, services.client.owner(number))
    snapshot = services.versions.snapshot(number)
    unranked = sum(snapshot is None or slide.task not in snapshot.row_of_task for slide in lesson.slides)
    if unranked:
        say(f"{unranked} slides have no rank: `wsc-backend train {number}` ranks them")
    table = slide_table(services, number, str(found.title), config, lesson, snapshot)
    progress("write", 0, 0)
    write_table(table, path, kind, overwrite=overwrite)
    return Exported(path, len(lesson.slides), lesson.unanalysed, tuple(table.columns))


def slide_table(
    services: Services,
    project: int,
    title: str,
    config: LabelingConfig,
    lesson: Lesson,
    snapshot: ProjectSnapshot | None,
) -> SlideTable:
    """The table of :func:`export_project`; its columns are described in the README."""
    heads, model = services.versions.heads(project), services.model
    version = services.versions.version(project)
    columns: dict[str, Column] = {
        "task": Column("integer", [slide.task for slide in lesson.slides]),
        "slide": Column("text", [readable(slide.name) for slide in lesson.slides]),
        "bag": Column("text", [slide.key for slide in lesson.slides]),
        # Two slides may share a name. Of a bag of patches, its first image.
        "location": Column("text", [readable(public(slide.ref.locations[0])) for slide in lesson.slides]),
        "patient": Column(
            "text", [slide.patient.name if slide.patient is not None else None for slide in lesson.slides]
        ),
        "annotated": Column("yes_no", [slide.task in lesson.annotated for slide in lesson.slides]),
    }
    for target in lesson.targets:
        if target.kind in SLIDE_KINDS:
            _add(columns, _labels(target, lesson))
    confidence: Float64Array = np.full(len(lesson.slides), np.nan)
    for head in slide_heads(heads, config) if heads is not None else ():
        said = _suggestions(head, lesson)
        _add(columns, said)
        sure = np.array(said[f"confidence.{head.control}"].cells, dtype=np.float64)
        confidence = np.fmin(confidence, sure)
    _add(columns, _ranks(lesson, snapshot))
    columns["confidence"] = Column("number", [None if np.isnan(value) else float(value) for value in confidence])
    columns["model_version"] = Column("text", [version] * len(lesson.slides))
    about = {
        "note": NOTE,
        "project": project,
        "title": title,
        "model_version": version,
        "model_name": model.name,
        "fingerprint": model.fingerprint,
        "stand_in": model.stand_in,
        "ranked_at": str(snapshot.about.get("created_at", "")) if snapshot is not None else "",
        "exported_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return SlideTable(columns, lesson.embeddings, about)


def _add(columns: dict[str, Column], more: Mapping[str, Column]) -> None:
    for name, column in more.items():
        while name in columns:  # a control "a" with a choice "b", beside a control "a.b"
            name += "_"
        columns[name] = column


def _labels(target: Target, lesson: Lesson) -> dict[str, Column]:
    """What the annotators agree on, how many they are, and how far they agree."""
    of: dict[str, SlideLabel] = {lesson.by_task[x.task_id].key: x for x in lesson.labels.get(target.name, ())}
    found = [of.get(slide.key) for slide in lesson.slides]
    columns: dict[str, Column] = {}
    if target.multiple:
        for choice in target.labels:
            cells = [
                label.value.get(choice) if label is not None and isinstance(label.value, Mapping) else None
                for label in found
            ]
            columns[f"label.{target.name}.{choice}"] = Column("yes_no", cells)
    else:
        kind: ColumnKind = "text" if target.kind == "Choices" else "number"
        columns[f"label.{target.name}"] = Column(kind, [_single(label) for label in found])
    columns[f"annotators.{target.name}"] = Column("integer", [label.annotators if label else 0 for label in found])
    columns[f"agreement.{target.name}"] = Column("number", [label.agreement if label else None for label in found])
    return columns


def _single(label: SlideLabel | None) -> Cell:
    return label.value if label is not None and isinstance(label.value, str | float) else None


def _suggestions(head: Head, lesson: Lesson) -> dict[str, Column]:
    """What a head says of every slide: its answer, how sure it is, and the probability of each choice."""
    output = predict(head, lesson.embeddings, names=[slide.name for slide in lesson.slides])
    answers: list[Any] = list(output.values)
    if head.kind == "choices":
        answers = [words(value) for value in answers]
    columns = {
        f"suggestion.{head.control}": Column("text" if head.classes else "number", answers),
        f"confidence.{head.control}": Column("number", output.confidence.tolist()),
    }
    for k, name in enumerate(head.classes if output.probabilities is not None else ()):
        assert output.probabilities is not None
        columns[f"probability.{head.control}.{name}"] = Column("number", output.probabilities[:, k].tolist())
    return columns


def _ranks(lesson: Lesson, snapshot: ProjectSnapshot | None) -> dict[str, Column]:
    """As the last training wrote them; ``None`` for slides that it did not know."""
    known = {} if snapshot is None else snapshot.row_of_task
    rows = [known.get(slide.task) for slide in lesson.slides]

    def cells(name: str) -> list[Any]:
        values = [] if snapshot is None else getattr(snapshot, name).tolist()
        return [None if row is None else values[row] for row in rows]

    # Labelled slides have no place in the order, which is 0 in the snapshot and nothing in Label Studio.
    priority = [rank or None for rank in cells("priority")]
    return {
        "priority": Column("integer", priority),
        "novelty": Column("number", cells("novelty")),
        "cluster": Column("integer", cells("cluster")),
    }
