"""How good a head is, with intervals; every number from answers to labels that the answering model had not seen.

Intervals hold 95 %: percentile bootstrap over slides (Efron & Tibshirani 1993) for all but a class's recall on slides, which is a proportion of independent
trials (Wilson 1927), and the balanced accuracy on slides, the mean of such proportions (Zou & Donner 2008): a head that is right about every one of a
few slides would have a bootstrap interval without width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from backend.learning.calibration import class_weights
from backend.learning.heads import Float64Array

Int64Array = npt.NDArray[np.int64]

BOOTSTRAPS = 200
_ECE_BINS = 10


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_of_proportions(hits: Int64Array, counts: Int64Array) -> tuple[float, float]:
    """The 95 % interval of the mean of independent proportions, from their score intervals (Zou & Donner 2008); each count is at least 1."""
    parts = hits / counts
    limits = np.array([wilson(int(h), int(n)) for h, n in zip(hits, counts, strict=True)])
    down, up = np.sqrt(((parts - limits[:, 0]) ** 2).sum()), np.sqrt(((limits[:, 1] - parts) ** 2).sum())
    return max(0.0, float(parts.mean() - down / len(parts))), min(1.0, float(parts.mean() + up / len(parts)))


def weighted_auroc(scores: Float64Array, positive: npt.NDArray[np.bool_]) -> Callable[[Float64Array], float]:
    """The area under the ROC curve as a function of the items' weights; ties count half. NaN without both classes."""
    _, place = np.unique(scores, return_inverse=True)
    n = int(place.max()) + 1 if len(place) else 0

    def area(weights: Float64Array) -> float:
        up = np.bincount(place, weights * positive, minlength=n)
        down = np.bincount(place, weights * ~positive, minlength=n)
        total = up.sum() * down.sum()
        below = np.cumsum(down) - down
        return float((up * (below + down / 2)).sum() / total) if total > 0 else math.nan

    return area


def expected_calibration_error(confidence: Float64Array, right: npt.NDArray[np.bool_], weights: Float64Array) -> float:
    """Mean distance of confidence and accuracy over ten bins of equal width (Naeini et al. 2015; Guo et al. 2017)."""
    bins = np.minimum((confidence * _ECE_BINS).astype(np.int64), _ECE_BINS - 1)
    gap = np.bincount(bins, weights * (right - confidence), minlength=_ECE_BINS)
    return float(np.abs(gap).sum() / weights.sum())


def choice_metrics(
    probabilities: Float64Array,
    labels: Int64Array,
    classes: Sequence[str],
    *,
    groups: Int64Array | None = None,
    class_totals: Int64Array | None = None,
    bootstraps: int = BOOTSTRAPS,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics of one choice among K.

    Parameters
    ----------
    probabilities, labels
        float64 (N, K), of labels int64 (N,).
    classes
        The K names.
    groups
        int64 (N,): the slide of each tile, which the bootstrap draws whole; ``None``: each item is a slide.
    class_totals
        int64 (K,): labels of each class before a part of them was drawn for the fit; ``None``: all are here.

    Returns
    -------
    ``balanced_accuracy``, ``auroc`` (macro, one against the rest), ``ece`` (classes weighing the same) as ``[value, low, high]``; ``ece_as_labelled``
    (as frequent as labelled); ``per_class`` with ``n``, ``recall``, ``precision``, ``auroc``.
    """
    k = len(classes)
    counts = np.bincount(labels, minlength=k)
    tested = np.flatnonzero(counts)
    balance = class_weights(labels, k)
    as_labelled = np.ones(len(labels))
    if class_totals is not None:
        as_labelled = (class_totals / np.maximum(counts, 1))[labels]
    guess = probabilities.argmax(axis=1)
    right = guess == labels
    confidence = probabilities.max(axis=1)
    areas = [weighted_auroc(probabilities[:, c], labels == c) for c in range(k)]

    def measure(drawn: Float64Array) -> list[float]:
        held = np.bincount(labels, drawn, minlength=k)
        said = np.bincount(guess, drawn * as_labelled, minlength=k)
        hit = np.bincount(labels, drawn * right, minlength=k)
        hit_as_labelled = np.bincount(labels, drawn * right * as_labelled, minlength=k)
        with np.errstate(invalid="ignore", divide="ignore"):
            recall = hit / held
            precision = np.where(said > 0, hit_as_labelled / said, np.nan)
        auroc = np.array([area(drawn * as_labelled) for area in areas])
        ece = expected_calibration_error(confidence, right, drawn * balance)
        ece_plain = expected_calibration_error(confidence, right, drawn * as_labelled)
        overall = [_mean(recall[tested]), _mean(auroc[tested]), ece, ece_plain]
        return [*overall, *recall.tolist(), *precision.tolist(), *auroc.tolist()]

    rows = _with_intervals(measure, len(labels), groups, bootstraps, seed)
    if groups is None and rows[0] is not None:
        hits_of = np.bincount(labels[right], minlength=k)[tested]
        rows[0] = [rows[0][0], *mean_of_proportions(hits_of, counts[tested])]
    per_class: dict[str, Any] = {}
    for c, name in enumerate(classes):
        recall = rows[4 + c]
        if recall is not None and groups is None:
            hits = int((right & (labels == c)).sum())
            recall = [recall[0], *wilson(hits, int(counts[c]))]
        per_class[name] = {
            "n": int(counts[c]),
            "recall": recall,
            "precision": rows[4 + k + c],
            "auroc": rows[4 + 2 * k + c],
        }
    named = dict(zip(("balanced_accuracy", "auroc", "ece", "ece_as_labelled"), rows[:4], strict=True))
    return {"measured": True, **named, "per_class": per_class}


def number_metrics(predicted: Float64Array, truth: Float64Array, *, seed: int = 0) -> dict[str, Any]:
    """``mae`` (mean absolute error) and ``r2`` (against always saying the mean) as ``[value, low, high]``."""

    def measure(drawn: Float64Array) -> list[float]:
        total = drawn.sum()
        middle = (drawn * truth).sum() / total
        spread = (drawn * (truth - middle) ** 2).sum()
        error = predicted - truth
        r2 = 1 - (drawn * error**2).sum() / spread if spread > 0 else math.nan
        return [float((drawn * np.abs(error)).sum() / total), float(r2)]

    rows = _with_intervals(measure, len(truth), None, BOOTSTRAPS, seed)
    return {"measured": True, "mae": rows[0], "r2": rows[1]}


def _mean(values: Float64Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _with_intervals(
    measure: Callable[[Float64Array], list[float]], n: int, groups: Int64Array | None, bootstraps: int, seed: int
) -> list[list[float] | None]:
    """Each measure as [value, low, high]; ``None`` where it is undefined."""
    rng = np.random.default_rng(seed)
    values = measure(np.ones(n))
    group = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    n_groups = int(group.max()) + 1
    drawn = np.array(
        [
            measure(np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups).astype(np.float64)[group])
            for _ in range(bootstraps)
        ]
    )
    rows: list[list[float] | None] = []
    for value, column in zip(values, drawn.T, strict=True):
        known = column[np.isfinite(column)]
        if math.isnan(value) or len(known) == 0:
            rows.append(None)
        else:
            low, high = np.percentile(known, [2.5, 97.5]).tolist()
            rows.append([float(value), float(min(low, value)), float(max(high, value))])
    return rows
