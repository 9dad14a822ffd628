"""Parts of the labels to learn from and to be judged by, so that slides of one patient (or tiles of one slide) never
stand on both sides.

A *group* is what must not be parted: an int64 number for each label. Without groups each label is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
Fold = tuple[Int64Array, Int64Array]
"""Rows to learn from, and rows to be judged by."""

CV_MIN_PER_CLASS = 5
"""A class with fewer labels is learnt, and not measured."""

_MANY_GROUPS = 300
_MUST_NOT_BE_PARTED = {"slide": "patients", "tile": "slides"}


@dataclass(frozen=True, eq=False)
class PatientGroups:
    """Who the patients of N slides are.

    Attributes
    ----------
    groups
        int64 (N,): the same number for slides of one patient, and for tasks that show one slide; a number of its own
        for each slide without a patient.
    slides
        How many different slides there are.
    unknown
        How many of these have no patient.
    patients
        How many patients the others have.
    """

    groups: Int64Array
    slides: int
    unknown: int
    patients: int

    def as_dict(self) -> dict[str, int]:
        """As JSON: the member ``patients`` of a head's metrics."""
        return {"slides": self.slides, "unknown": self.unknown, "patients": self.patients}


def patient_groups(patients: Sequence[str], slides: Sequence[object]) -> PatientGroups:
    """The groups of N slides.

    Parameters
    ----------
    patients
        N names, '' where none is known.
    slides
        N names of what is shown: equal ones are one slide, whatever their patients are called.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(patients)
    slide_of: dict[object, int] = {}
    shown = [slide_of.setdefault(slide, len(slide_of)) for slide in slides]
    patient_of: dict[str, int] = {}
    named = [(row, patient_of.setdefault(name, len(patient_of))) for row, name in enumerate(patients) if name]
    # A graph of slides and patients, whose connected parts must not be parted.
    total = len(slide_of) + len(patient_of)
    ends = [(shown[row], len(slide_of) + patient) for row, patient in named]
    at = np.array(ends, dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(at), dtype=np.int8), (at[:, 0], at[:, 1])), shape=(total, total))
    part = connected_components(graph, directed=False)[1] if total else np.zeros(0, np.int64)
    groups = part[np.array(shown, dtype=np.int64)] if n else np.zeros(0, np.int64)
    known = len({shown[row] for row, _ in named})
    return PatientGroups(groups.astype(np.int64), len(slide_of), len(slide_of) - known, len(patient_of))


def whole(groups: Int64Array | None) -> Int64Array | None:
    """``groups``, or ``None`` where each label is a group of its own."""
    return None if groups is None or len(np.unique(groups)) == len(groups) else groups


def class_folds(
    y: Int64Array,
    k: int,
    groups: Int64Array | None,
    n_folds: int,
    seed: int,
    *,
    least: int = CV_MIN_PER_CLASS,
    least_groups: int = 2,
    level: str = "slide",
) -> tuple[list[Fold], str]:
    """Folds for int64 (N,) classes below ``k``; or none, and why.

    Classes with fewer than ``least`` labels, or labels of fewer than ``least_groups`` groups, are not judged: they are
    in every part to learn from, but for what shares a group with the other part.
    """
    counts = np.bincount(y, minlength=k)
    testable = counts >= least
    if testable.sum() < 2:
        return [], f"measured once two classes have {least} labels each"
    of_class = counts
    if groups is not None:
        of_class = np.array([len(np.unique(groups[y == c])) for c in range(k)])
        testable &= of_class >= least_groups
        if testable.sum() < 2:
            return [], _too_few_groups(least_groups, level)
    rows, rest = np.flatnonzero(testable[y]), np.flatnonzero(~testable[y])
    n = max(2, min(n_folds, int(of_class[testable].min()), int(counts[testable].min())))
    folds = []
    for train, test in _split(y[rows], None if groups is None else groups[rows], n, seed):
        if len(test) == 0:
            continue
        beside = rest if groups is None else rest[~np.isin(groups[rest], groups[rows[test]])]
        train_rows = np.sort(np.concatenate([rows[train], beside]))
        if len(np.unique(y[train_rows])) >= 2:
            folds.append((train_rows, rows[test]))
    return (
        (folds, "") if len(folds) >= 2 else ([], f"measured once there are labels of more {_MUST_NOT_BE_PARTED[level]}")
    )


def number_folds(n: int, groups: Int64Array | None, n_folds: int, seed: int) -> list[Fold]:
    """Folds for ``n`` numbers: as many as there are groups, up to ``n_folds``; none with a single group."""
    from sklearn.model_selection import GroupKFold

    of = np.arange(n) if groups is None else groups
    wanted = min(n_folds, len(np.unique(of)))
    if wanted < 2:
        return []
    return list(GroupKFold(wanted, shuffle=True, random_state=seed).split(of, groups=of))


def _too_few_groups(least: int, level: str) -> str:
    if level == "tile":
        return f"measured once two classes have been drawn on {_word(least)} slides each, of different patients"
    return f"measured once two classes have slides of at least {_word(least)} patients each"


def _word(number: int) -> str:
    return {2: "two", 3: "three"}.get(number, str(number))


def _split(y: Int64Array, groups: Int64Array | None, n: int, seed: int) -> Any:
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    if groups is None:
        return StratifiedKFold(n, shuffle=True, random_state=seed).split(y, y)
    unique, of = np.unique(groups, return_inverse=True)
    if len(unique) <= _MANY_GROUPS:
        return StratifiedGroupKFold(n, shuffle=True, random_state=seed).split(y, y, groups)
    # That takes a second for some thousand groups; with so many it is enough to spread those with the rarest classes
    # evenly.
    rarity = np.argsort(np.argsort(np.bincount(y)))[y]
    rarest = np.full(len(unique), rarity.max(), dtype=np.int64)
    np.minimum.at(rarest, of, rarity)
    parts = StratifiedKFold(n, shuffle=True, random_state=seed).split(rarest, rarest)
    return [(np.flatnonzero(np.isin(of, train)), np.flatnonzero(np.isin(of, test))) for train, test in parts]
