"""What a project can teach: its slides that have embeddings, what annotators say of them, and of their tiles."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from backend.errors import BackendError, DownloadFailed, RequestInvalid, ResultDamaged
from backend.label_studio import rle
from backend.label_studio.answers import slide_ref
from backend.label_studio.labeling_config import HEAD_KINDS, LabelingConfig
from backend.label_studio.patients import Patient, PatientField, patient_of
from backend.label_studio.services import Services
from backend.learning.heads import Float32Array
from backend.learning.labels import (
    SLIDE_KINDS,
    TILE_KINDS,
    Annotation,
    Issue,
    SlideLabel,
    Target,
    TargetKind,
    human_regions,
    one_for_each_slide,
    read_annotations,
    slide_labels,
)
from backend.learning.tile_labels import TileLabels, tile_labels
from backend.learning.tile_training import LabelledTiles
from backend.results.bag import digest
from backend.slides.names import slide_name
from backend.slides.source import SlideRef

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

_LOOKUPS_AT_ONCE = 16
_EMBEDDINGS_KEPT = 50_000


@dataclass(frozen=True)
class Slide:
    """A task whose slide has an embedding: ``row`` in :attr:`Lesson.embeddings`, Label Studio's ``task`` and its
    ``data``, and whose slide it is (``None`` where nothing says so)."""

    row: int
    task: int
    data: Mapping[str, Any]
    key: str
    ref: SlideRef
    patient: Patient | None = None

    @property
    def name(self) -> str:
        """The slide's name for people."""
        return str(self.data.get("name") or slide_name(self.ref.locations[0]))


@dataclass(frozen=True, eq=False)
class Lesson:
    """All that there is to learn from.

    Attributes
    ----------
    slides, embeddings
        N slides, and float32 (N, D) in their order.
    labels
        By the name of a control for whole slides, what annotators agree on, of tasks with an embedding only; of several
        tasks that show one slide under the first.
    tiles
        By the name of a control for regions, the labelled tiles of each slide, likewise.
    annotated
        Tasks that somebody has annotated and not skipped.
    issues
        What taught nothing, or less than it seems.
    unanalysed
        Tasks whose slide has no result yet.
    """

    targets: tuple[Target, ...]
    slides: tuple[Slide, ...]
    embeddings: Float32Array
    labels: Mapping[str, Sequence[SlideLabel]]
    tiles: Mapping[str, Sequence[tuple[Slide, TileLabels]]]
    annotated: frozenset[int]
    issues: tuple[Issue, ...]
    unanalysed: int = 0
    by_task: Mapping[int, Slide] = field(default_factory=dict)

    @property
    def unplaced(self) -> frozenset[int]:
        """Annotated tasks whose slide, result or embedding is not there."""
        return self.annotated & {issue.task_id for issue in self.issues if issue.code == "no_embedding"}

    @property
    def distinct(self) -> list[int]:
        """Rows of different slides: the first of those that show the same one."""
        first: dict[str, int] = {}
        for slide in self.slides:
            first.setdefault(slide.key, slide.row)
        return list(first.values())

    def digest(self, fingerprint: str) -> str:
        """What the heads depend on: the same digest, the same heads."""
        controls = {
            t.name: [t.kind, list(t.labels), t.multiple, [list(prior) for prior in t.priors]]
            for t in self.targets
            if t.name in {*self.labels, *self.tiles}
        }
        taught = [self.by_task[x.task_id] for found in self.labels.values() for x in found]
        taught += [slide for found in self.tiles.values() for slide, _ in found]
        patients = {slide.key: slide.patient.key for slide in taught if slide.patient is not None}
        said = {
            name: sorted(
                [self.by_task[x.task_id].key, dict(x.value) if isinstance(x.value, Mapping) else x.value] for x in found
            )
            for name, found in self.labels.items()
        }
        drawn = {
            name: sorted([slide.key, x.tiles.tolist(), list(x.labels)] for slide, x in found)
            for name, found in self.tiles.items()
        }
        about = {"fingerprint": fingerprint, "controls": controls, "patients": patients}
        return digest({**about, "slides": said, "tiles": drawn})


def targets_of(config: LabelingConfig) -> tuple[Target, ...]:
    """What heads may learn: answers that a head can suggest, and drawn labels where a control has at least two to tell
    apart."""
    found = []
    for control in config.controls:
        kind = cast(TargetKind, control.kind)
        if control.kind in HEAD_KINDS and kind in SLIDE_KINDS and not control.skip:
            found.append(Target(control.name, kind, control.labels, control.multiple, control.priors))
        elif kind in TILE_KINDS and len(control.labels) > 1:
            found.append(Target(control.name, kind, control.labels))  # model_skip or not: people draw with it
    return tuple(found)


class Teacher:
    """Reads lessons. Keeps the embeddings it has read, which never change."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._embeddings: dict[str, Float32Array] = {}
        self._lock = threading.Lock()

    def lesson(self, project: int, config: LabelingConfig, progress: Progress) -> Lesson:
        """Everything that ``project`` teaches now; errors as of
        :class:`~backend.label_studio.client.LabelStudioClient`.

        Raises
        ------
        StoreUnavailable
            The store of results is away: a slide that cannot be looked up is none that lacks a result.
        DownloadFailed
            The server of an annotated slide is away, so that labels would be missing. A slide without labels is left
            out instead.
        """
        progress("read", 0, 0)
        client = self._services.client
        annotations, issues = client.annotated_tasks(project, read_annotations)
        targets = targets_of(config)
        annotated = frozenset(a.task_id for a in annotations)
        slides, embeddings, missing = self._slides(client.tasks(project), config, annotated, progress, issues)
        by_task = {slide.task: slide for slide in slides}
        here = one_for_each_slide(
            (a for a in annotations if a.task_id in by_task), {slide.task: slide.key for slide in slides}
        )
        for task in sorted(annotated - set(by_task)):
            issues.append(Issue("no_embedding", task, missing.get(task, "its slide has no result yet")))
        labels: dict[str, list[SlideLabel]] = {}
        for target in targets:
            if target.kind in SLIDE_KINDS:
                labels[target.name], found = slide_labels(here, target)
                issues += found
        tiles = self._tiles(here, targets, by_task, issues, progress)
        return Lesson(
            targets=targets,
            slides=tuple(slides),
            embeddings=embeddings,
            labels={name: found for name, found in labels.items() if found},
            tiles=tiles,
            annotated=annotated,
            issues=tuple(issues),
            unanalysed=len(missing),
            by_task=by_task,
        )

    def _slides(
        self,
        tasks: Sequence[tuple[int, dict[str, Any]]],
        config: LabelingConfig,
        annotated: frozenset[int],
        progress: Progress,
        issues: list[Issue],
    ) -> tuple[list[Slide], Float32Array, dict[int, str]]:
        slides: list[Slide] = []
        rows: list[Float32Array] = []
        missing: dict[int, str] = {}
        pool = ThreadPoolExecutor(_LOOKUPS_AT_ONCE, thread_name_prefix="locate")
        try:
            located = pool.map(lambda task: self._locate(task[1], config), tasks)
            for done, ((task, data), found) in enumerate(zip(tasks, located, strict=True), start=1):
                progress("slides", done, len(tasks))
                if isinstance(found, BackendError):
                    # What passes must not look like labels that were taken back. A slide without labels can wait for
                    # the next training.
                    if found.retryable and (task in annotated or not isinstance(found, DownloadFailed)):
                        raise found
                    missing[task] = found.message
                    continue
                ref, key, embedding, patient = found
                if isinstance(patient, PatientField):
                    issues.append(Issue("patient_unclear", task, str(patient)))
                    patient = None
                if embedding is None:
                    missing[task] = "its slide has no result yet"
                elif rows and embedding.shape != rows[0].shape:
                    issues.append(Issue("no_embedding", task, f"its embedding has length {embedding.shape}"))
                elif not np.isfinite(embedding).all():
                    problem = "its stored embedding has NaN or infinite values: delete the result, and predict again"
                    issues.append(Issue("embedding_invalid", task, problem))
                    missing[task] = problem
                else:
                    slides.append(Slide(len(rows), task, data, key, ref, patient))
                    rows.append(embedding)
        finally:
            pool.shutdown(cancel_futures=True)
        return slides, np.stack(rows) if rows else np.zeros((0, 1), np.float32), missing

    def _locate(
        self, data: Mapping[str, Any], config: LabelingConfig
    ) -> tuple[SlideRef, str, Float32Array | None, Patient | PatientField | None] | BackendError:
        try:
            ref = slide_ref(self._services, config, data)
            key = self._services.key(ref)
            try:
                patient: Patient | PatientField | None = patient_of(data, ref, self._services.settings)
            except PatientField as problem:
                patient = problem
            return ref, key, self._embedding(key), patient
        except BackendError as error:
            return error
        except UnicodeError as error:
            return RequestInvalid(f"its slide has a location that is no text: {error}")
        except OSError as error:
            return DownloadFailed(f"its slide cannot be looked at now: {error.strerror or error}")

    def _embedding(self, key: str) -> Float32Array | None:
        with self._lock:
            known = self._embeddings.get(key)
        if known is not None:
            return known
        found = self._services.store.slide_embedding(key)
        if found is not None and np.isfinite(found).all():
            with self._lock:
                if len(self._embeddings) >= _EMBEDDINGS_KEPT:
                    self._embeddings.clear()
                self._embeddings[key] = found
        return found

    def _tiles(
        self,
        annotations: Sequence[Annotation],
        targets: Sequence[Target],
        by_task: Mapping[int, Slide],
        issues: list[Issue],
        progress: Progress,
    ) -> dict[str, list[tuple[Slide, TileLabels]]]:
        drawn: dict[int, list[Annotation]] = defaultdict(list)
        for annotation in annotations:
            if human_regions(annotation, targets):
                drawn[annotation.task_id].append(annotation)
        found: dict[str, list[tuple[Slide, TileLabels]]] = defaultdict(list)
        for done, (task, theirs) in enumerate(sorted(drawn.items()), start=1):
            progress("regions", done, len(drawn))
            slide = by_task[task]
            result = self._services.store.get(slide.key, latents=False)
            if result is None:
                issues.append(Issue("no_embedding", task, "its result is gone, so what is drawn on it teaches nothing"))
                continue
            overlap = self._services.settings.tile_label_min_overlap
            tiles, problems = tile_labels(theirs, targets, result.bag, decode_rle=rle.decode, min_overlap=overlap)
            issues += problems
            for entry in tiles:
                found[entry.control].append((slide, entry))
        return dict(found)

    def labelled_tiles(
        self, entries: Sequence[tuple[Slide, TileLabels]], groups: Sequence[int | None] | None = None
    ) -> Iterator[LabelledTiles]:
        """The latents of labelled tiles, slide by slide: one slide's are in memory at a time. ``groups`` has the number
        of each slide's patient.

        Raises
        ------
        ResultDamaged
            A result has gone since the lesson was read: what is left is not what the lesson's digest says, so the
            lesson is to be read anew.
        """
        for (slide, entry), group in zip(entries, groups or [None] * len(entries), strict=True):
            result = self._services.store.get(slide.key)
            if result is None:
                raise ResultDamaged(f"The stored result of {slide.name} is damaged, or has just been deleted.")
            yield LabelledTiles(slide.name, result.latents[entry.tiles], entry.labels, group)
