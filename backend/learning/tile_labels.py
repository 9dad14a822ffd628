"""From drawn regions to labels of tiles, by the exact area of each tile that they cover (:mod:`backend.learning.drawn_shapes`)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from backend.learning.drawn_shapes import BadRegion, DecodeRle, Frame, Shape, drawn_kind, shape_of
from backend.learning.labels import Annotation, Issue, Target, human_regions
from backend.results.bag import Bag, Int64Array

_SAME = 1e-9
"""Covered parts of a tile that differ by less count as equal."""


@dataclass(frozen=True, eq=False)
class TileLabels:
    """The labelled tiles of one bag for one control: ``tiles`` int64 (M,) ascending rows of the bag, ``labels`` their M labels."""

    task_id: int
    control: str
    tiles: Int64Array
    labels: tuple[str, ...]


def tile_labels(
    annotations: Sequence[Annotation],
    targets: Sequence[Target],
    bag: Bag,
    *,
    decode_rle: DecodeRle,
    min_overlap: float,
    machine_controls: Collection[str] = (),
) -> tuple[list[TileLabels], list[Issue]]:
    """Labels of the tiles of one task that people drew on.

    A tile gets an annotator's label if the union of that annotator's regions of the label covers at least ``min_overlap`` of it, and more of it than
    those of any other label. Several annotators: majority of those who labelled the tile; ties teach nothing. A tile that nobody covered has no
    label: not drawn on does not mean negative.

    Parameters
    ----------
    annotations
        Of one task, one per annotator.
    targets
        Controls that may be learnt; those that label slides are passed over.
    bag
        The task's tiles.
    decode_rle
        Decodes ``value.rle`` to RGBA bytes, row by row; raises ``ValueError`` for what is not run-length code.
    min_overlap
        In (0, 1].
    machine_controls
        Names of controls whose regions are all a machine's.

    Returns
    -------
    One entry for each control with at least one labelled tile, and what could not be used.
    """
    if not 0 < min_overlap <= 1:
        raise ValueError(f"min_overlap {min_overlap} must lie in (0, 1]")
    if len({annotation.task_id for annotation in annotations}) > 1:
        raise ValueError("the annotations belong to several tasks")
    issues: list[Issue] = []
    frame = Frame(bag, decode_rle)
    votes: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for annotation in annotations:
        drawn: dict[str, dict[str, list[Shape]]] = defaultdict(lambda: defaultdict(list))
        for target, region in human_regions(annotation, targets, machine_controls=machine_controls):
            for label in _labels_of(annotation, target, region, issues):
                shape = _shape(annotation, target, region, frame, issues)
                if shape is not None:
                    drawn[target.name][label].append(shape)
        for control, by_label in drawn.items():
            for tile, label in _one_annotator(annotation, control, by_label, frame, min_overlap, issues):
                votes[control][tile].append(label)
    found = [
        entry
        for target in targets
        if target.name in votes
        and (entry := _majority(annotations[0].task_id, target.name, votes[target.name], issues))
    ]
    return found, issues


def _labels_of(annotation: Annotation, target: Target, region: Mapping[str, Any], issues: list[Issue]) -> Sequence[str]:
    value = region.get("value")
    said = value.get(target.key) if isinstance(value, Mapping) else None
    if not isinstance(said, list) or not said or not all(isinstance(label, str) for label in said):
        detail = f"region {region.get('id')!r:.40} has the labels {said!r:.80}, not a list of names"
        issues.append(Issue("malformed", annotation.task_id, detail, target.name, annotation.id))
        return ()
    removed = [label for label in said if label not in target.labels]
    if removed:
        detail = f"the labelling config does not have {', '.join(map(repr, removed))}"
        issues.append(Issue("label_removed", annotation.task_id, detail, target.name, annotation.id))
    return [label for label in said if label in target.labels]


def _shape(
    annotation: Annotation, target: Target, region: Mapping[str, Any], frame: Frame, issues: list[Issue]
) -> Shape | None:
    kind = drawn_kind(target.key)
    if kind is None:
        raise ValueError(f"{target.kind} is not drawn")
    try:
        return shape_of(kind, region, frame)
    except BadRegion as bad:
        detail = f"region {region.get('id')!r:.40}: {bad}"
        issues.append(Issue(bad.code, annotation.task_id, detail, target.name, annotation.id))
        return None


# --- votes ------------------------------------------------------------------------------------------------------


def _one_annotator(
    annotation: Annotation,
    control: str,
    by_label: Mapping[str, Sequence[Shape]],
    frame: Frame,
    min_overlap: float,
    issues: list[Issue],
) -> list[tuple[int, str]]:
    labels = list(by_label)
    covered = np.stack([frame.fractions(by_label[label]) for label in labels])
    enough = covered >= min_overlap - _SAME
    for label, tiles in zip(labels, enough, strict=True):
        if not tiles.any():
            detail = f"its regions of {label!r} cover no tile by {min_overlap:.0%} or more"
            issues.append(Issue("nothing_covered", annotation.task_id, detail, control, annotation.id))
    best = covered.max(axis=0)
    tied = (enough & (covered >= best - _SAME)).sum(axis=0) > 1
    if tied.any():
        detail = f"{int(tied.sum())} tiles are covered equally with two labels"
        issues.append(Issue("conflict", annotation.task_id, detail, control, annotation.id))
    winner = covered.argmax(axis=0)
    return [(int(tile), labels[winner[tile]]) for tile in np.flatnonzero(enough.any(axis=0) & ~tied)]


def _majority(task_id: int, control: str, votes: Mapping[int, Sequence[str]], issues: list[Issue]) -> TileLabels | None:
    tiles: list[int] = []
    labels: list[str] = []
    ties = disputed = 0
    for tile in sorted(votes):
        counts = Counter(votes[tile]).most_common()
        disputed += len(counts) > 1
        if len(counts) > 1 and counts[0][1] == counts[1][1]:
            ties += 1
            continue
        tiles.append(tile)
        labels.append(counts[0][0])
    if disputed > ties:
        issues.append(Issue("disagreement", task_id, f"{disputed - ties} tiles, decided by the majority", control))
    if ties:
        issues.append(Issue("tie", task_id, f"{ties} tiles are labelled differently without a majority", control))
    return TileLabels(task_id, control, np.array(tiles, dtype=np.int64), tuple(labels)) if tiles else None
