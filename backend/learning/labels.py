"""From annotations to labels: who said what of which slide, and what the annotators agree on. Pure, no I/O.

Input is Label Studio's own JSON: tasks as exported (``annotations`` inside), or the ``annotation`` of a webhook. A
control's *target* says what may be learnt from it; the caller makes the targets from the labelling config. What cannot
be used is never dropped silently: it is an :class:`Issue`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal

TargetKind = Literal["Choices", "Number", "Rating", "RectangleLabels", "PolygonLabels", "EllipseLabels", "BrushLabels"]
IssueCode = Literal[
    "malformed",  # the JSON is not what Label Studio writes
    "skipped",  # the annotator cancelled the task
    "label_removed",  # a label or choice that the labelling config does not (or no longer) have
    "tie",  # annotators disagree, and there is no majority
    "disagreement",  # annotators disagree, and the majority decided
    "image_rotated",  # the region's coordinates are those of a turned image
    "nothing_covered",  # a region covers no tile by enough
    "no_embedding",  # the slide has no result: not analysed yet, or its analysis failed
    "embedding_invalid",  # its stored embedding is not finite
    "contradiction",  # one annotator answered differently in two tasks that show one slide
    "patient_unclear",  # the task's field for the patient holds no name
    "conflict",  # tiles that one annotator covered equally with two labels
]

SLIDE_KINDS: tuple[TargetKind, ...] = ("Choices", "Number", "Rating")
TILE_KINDS: tuple[TargetKind, ...] = ("RectangleLabels", "PolygonLabels", "EllipseLabels", "BrushLabels")
_HUMAN_ORIGINS = ("manual", "prediction-changed", "changed")


@dataclass(frozen=True)
class Target:
    """A control of the labelling config that heads may learn.

    Attributes
    ----------
    name, kind
        The control's ``name``, and its tag.
    labels
        The choices or labels that the config has now, in its order; empty for Number and Rating.
    multiple
        ``Choices`` only: several may be chosen, so each is a yes or no of its own.
    priors
        ``Choices`` only: how frequent the project says that a choice is, for those of which it does.
    """

    name: str
    kind: TargetKind
    labels: tuple[str, ...] = ()
    multiple: bool = False
    priors: tuple[tuple[str, float], ...] = ()

    @property
    def key(self) -> str:
        """The key of the answer in a result's ``value``."""
        return self.kind.lower()


@dataclass(frozen=True)
class Issue:
    """Something that taught nothing, or less than it seems; ``detail`` is for people."""

    code: IssueCode
    task_id: int
    detail: str
    control: str = ""
    annotation_id: int | None = None

    def as_dict(self) -> dict[str, str | int | None]:
        """As JSON."""
        return {
            "code": self.code,
            "task_id": self.task_id,
            "control": self.control,
            "annotation_id": self.annotation_id,
            "detail": self.detail,
        }


@dataclass(frozen=True)
class Annotation:
    """One submitted annotation. ``annotator`` is who made it; ``results`` are its result items as Label Studio wrote
    them; ``tasks`` are all that it comes from where several tasks show one slide, see :func:`one_for_each_slide`."""

    id: int
    task_id: int
    annotator: str
    updated_at: str
    results: tuple[Mapping[str, Any], ...]
    tasks: tuple[int, ...] = ()


@dataclass(frozen=True)
class SlideLabel:
    """What the annotators of one task agree on.

    Attributes
    ----------
    value
        The choice; the number; or for multiple choices what is known of each: ``{choice: chosen}`` without those that
        tied.
    annotators
        How many voted.
    agreement
        Part of the votes that agree with ``value`` (mean over the choices for multiple; for numbers those equal to it),
        in [0, 1].
    """

    task_id: int
    value: str | float | Mapping[str, bool]
    annotators: int
    agreement: float


def read_annotations(tasks: Iterable[Mapping[str, Any]]) -> tuple[list[Annotation], list[Issue]]:
    """The annotations of exported tasks: the newest of each annotator and task.

    Cancelled annotations (an annotator skipped the task), drafts and anything that is not an annotation are issues.
    """
    found: list[Annotation] = []
    issues: list[Issue] = []
    for task in tasks:
        task_id, annotations = task.get("id"), task.get("annotations")
        if not _is_id(task_id) or not isinstance(annotations, list):
            number = task_id if isinstance(task_id, int) else -1
            issues.append(Issue("malformed", number, f"a task with id {task_id!r:.80} has no list of annotations"))
            continue
        assert isinstance(task_id, int)
        for raw in annotations:
            annotation = read_annotation(task_id, raw)
            (issues if isinstance(annotation, Issue) else found).append(annotation)  # type: ignore[arg-type]
    return newest_of_each(found), issues


def read_annotation(task_id: int, raw: Any) -> Annotation | Issue:
    """One annotation as in a webhook's ``annotation`` or an export."""
    if not isinstance(raw, Mapping) or not _is_id(raw.get("id")):
        return Issue("malformed", task_id, f"not an annotation: {raw!r:.120}")
    number: int = raw["id"]
    if raw.get("was_cancelled"):
        return Issue("skipped", task_id, "the annotator skipped the task", annotation_id=number)
    results = raw.get("result")
    if not isinstance(results, list) or not all(isinstance(item, Mapping) for item in results):
        return Issue("malformed", task_id, f"its result is {results!r:.120}, not a list", annotation_id=number)
    who = raw.get("completed_by")
    if isinstance(who, Mapping):
        who = who.get("id", who.get("email"))
    # An annotation without an author is nobody's second opinion: it counts as an annotator of its own.
    annotator = f"user {who}" if who is not None else f"annotation {number}"
    # What is read-only a machine made: it teaches nothing, and a heatmap of it is as large as all else together.
    kept = tuple(item for item in results if not item.get("readonly"))
    return Annotation(number, task_id, annotator, str(raw.get("updated_at") or ""), kept)


def newest_of_each(annotations: Iterable[Annotation]) -> list[Annotation]:
    """One annotation per task and annotator, the newest: nobody outvotes the others by submitting twice."""
    newest: dict[tuple[int, str], Annotation] = {}
    for annotation in annotations:
        key = (annotation.task_id, annotation.annotator)
        before = newest.get(key)
        if before is None or (before.updated_at, before.id) < (annotation.updated_at, annotation.id):
            newest[key] = annotation
    return list(newest.values())


def one_for_each_slide(annotations: Iterable[Annotation], slide_of: Mapping[int, object]) -> list[Annotation]:
    """The annotations of tasks that show one slide as those of the first of these tasks: a slide counts once.

    What one annotator said in several of them is one annotation, with the newest last.

    Parameters
    ----------
    annotations
        As :func:`read_annotations` gives.
    slide_of
        What each of their tasks shows.
    """
    first: dict[object, int] = {}
    for task, slide in slide_of.items():
        first[slide] = min(task, first.get(slide, task))
    parts: dict[tuple[int, str], list[Annotation]] = defaultdict(list)
    for annotation in annotations:
        parts[first[slide_of[annotation.task_id]], annotation.annotator].append(annotation)
    found = []
    for (task, _), said in parts.items():
        said.sort(key=lambda annotation: (annotation.updated_at, annotation.id))
        results = tuple(item for annotation in said for item in annotation.results)
        tasks = tuple(sorted({annotation.task_id for annotation in said}))
        found.append(replace(said[-1], task_id=task, results=results, tasks=tasks))
    return found


def slide_labels(
    annotations: Sequence[Annotation], target: Target, *, accept_suggestions: bool = True
) -> tuple[list[SlideLabel], list[Issue]]:
    """The label of each task that the annotators agree on.

    Choices: the choice with most votes; a tie teaches nothing. Multiple: the same for each choice by itself, where an
    annotator who answered the control and left a choice out voted against it. Numbers and ratings: the median.

    Parameters
    ----------
    annotations
        As :func:`read_annotations` gives: one per task and annotator.
    target
        One of kind Choices, Number or Rating.
    accept_suggestions
        Whether a machine's suggestion that a person submitted unchanged counts as that person's answer (default:
        submitting it is agreeing with it). Read-only results never count.

    Returns
    -------
    Labels in the order of task ids, and what could not be used.
    """
    if target.kind not in SLIDE_KINDS:
        raise ValueError(f"{target.kind} '{target.name}' labels regions, not slides")
    votes: dict[int, list[frozenset[str] | float]] = defaultdict(list)
    tasks: dict[int, set[int]] = defaultdict(set)
    issues: list[Issue] = []
    for annotation in annotations:
        answer = _answer(annotation, target, accept_suggestions, issues)
        if answer is not None:
            votes[annotation.task_id].append(answer)
            tasks[annotation.task_id].update(annotation.tasks)
    labels: list[SlideLabel] = []
    for task_id in sorted(votes):
        label = _agreed(task_id, votes[task_id], target, issues, _together(tasks[task_id]))
        if label is not None:
            labels.append(label)
    return labels, issues


def is_persons(region: Mapping[str, Any], *, accept_suggestions: bool = False) -> bool:
    """Whether a person made (or changed) a result item: by ``readonly`` and ``origin``.

    Label Studio copies a prediction's regions into the submitted annotation; ours are read-only, and keep the origin
    ``prediction``. Items without an origin were imported or made by API: somebody's, hence a person's.
    """
    if region.get("readonly"):
        return False
    origin = region.get("origin")
    return origin is None or origin in _HUMAN_ORIGINS or (accept_suggestions and origin == "prediction")


def human_regions(
    annotation: Annotation, targets: Iterable[Target], *, machine_controls: Collection[str] = ()
) -> list[tuple[Target, Mapping[str, Any]]]:
    """The drawn regions of people, with their targets; ``machine_controls`` are ignored by name (an attention map
    teaches nothing)."""
    by_name = {t.name: t for t in targets if t.kind in TILE_KINDS and t.name not in machine_controls}
    found: list[tuple[Target, Mapping[str, Any]]] = []
    for region in annotation.results:
        target = by_name.get(str(region.get("from_name")))
        if target is not None and is_persons(region):
            found.append((target, region))
    return found


# --- one annotator's answer -------------------------------------------------------------------------------------


def _answer(
    annotation: Annotation, target: Target, accept_suggestions: bool, issues: list[Issue]
) -> frozenset[str] | float | None:
    def problem(code: IssueCode, detail: str) -> None:
        issues.append(Issue(code, annotation.task_id, detail, target.name, annotation.id))

    mine = [
        item
        for item in annotation.results
        if item.get("from_name") == target.name and is_persons(item, accept_suggestions=accept_suggestions)
    ]
    if not mine:
        return None
    if any(item.get("value") != mine[-1].get("value") for item in mine[:-1]) and len(annotation.tasks) > 1:
        problem("contradiction", f"{annotation.annotator} said something else before{_together(annotation.tasks)}")
    item = mine[-1]
    value = item.get("value")
    said = value.get(target.key) if isinstance(value, Mapping) else None
    if target.kind != "Choices":
        if isinstance(said, bool) or not isinstance(said, int | float) or not math.isfinite(said):
            problem("malformed", f"its {target.key} is {said!r:.80}, not a number")
            return None
        return float(said)
    if not isinstance(said, list) or not all(isinstance(choice, str) for choice in said):
        problem("malformed", f"its choices are {said!r:.80}, not a list of names")
        return None
    removed = [choice for choice in said if choice not in target.labels]
    if removed:
        problem("label_removed", f"the labelling config does not offer {', '.join(map(repr, removed))}")
    kept = frozenset(said) - frozenset(removed)
    if target.multiple:
        return None if removed and not kept else kept
    if removed:
        return None
    if len(kept) != 1:
        problem("malformed", f"one choice is allowed, and it has {len(kept)}")
        return None
    return kept


# --- what several annotators agree on ---------------------------------------------------------------------------


def _agreed(
    task_id: int, votes: Sequence[frozenset[str] | float], target: Target, issues: list[Issue], together: str
) -> SlideLabel | None:
    def problem(code: IssueCode, detail: str) -> None:
        issues.append(Issue(code, task_id, detail + together, target.name))

    if target.kind != "Choices":
        numbers = [vote for vote in votes if isinstance(vote, float)]
        middle = float(median(numbers))
        if len(set(numbers)) > 1:
            problem("disagreement", f"numbers from {min(numbers):g} to {max(numbers):g}, the median {middle:g} is used")
        return SlideLabel(task_id, middle, len(numbers), numbers.count(middle) / len(numbers))

    sets = [vote for vote in votes if isinstance(vote, frozenset)]
    if target.multiple:
        known: dict[str, bool] = {}
        agreements: list[float] = []
        for choice in target.labels:
            yes = sum(choice in vote for vote in sets)
            if 2 * yes == len(sets):
                problem("tie", f"{yes} of {len(sets)} annotators chose {choice!r}")
                continue
            known[choice] = 2 * yes > len(sets)
            agreements.append(max(yes, len(sets) - yes) / len(sets))
            if 0 < yes < len(sets):
                problem("disagreement", f"{yes} of {len(sets)} annotators chose {choice!r}")
        return SlideLabel(task_id, known, len(sets), sum(agreements) / len(agreements)) if known else None
    counts = Counter(next(iter(vote)) for vote in sets).most_common()
    if len(counts) > 1:
        told = ", ".join(f"{count} x {choice!r}" for choice, count in counts)
        if counts[0][1] == counts[1][1]:
            problem("tie", told)
            return None
        problem("disagreement", told)
    return SlideLabel(task_id, counts[0][0], len(sets), counts[0][1] / len(sets))


def _together(tasks: Collection[int]) -> str:
    return f" (tasks {', '.join(map(str, sorted(tasks)))} show one slide)" if len(tasks) > 1 else ""


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
