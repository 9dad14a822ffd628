"""How good a head is, with intervals; every number from answers to labels that the answering model had not seen, nor
anything of their patients.

Intervals hold 95 %. They count patients, not slides, where these are known (for tiles: slides, or patients): percentile
bootstrap over them (Efron & Tibshirani 1993), but never narrower than with one trial for each of them: a class's recall
as a proportion (Wilson 1927), the balanced accuracy as the mean of such proportions (Zou & Donner 2008), since a head
that is right about every one of a few slides would have a bootstrap interval without width.

A class's precision (positive predictive value) depends on how frequent the classes are. It follows from the recalls at
the frequencies that the head assumes (Bayes), and its interval from draws of each recall's Jeffreys posterior (Brown,
Cai, DasGupta 2001), and of the frequencies where they were counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from backend.learning.calibration import class_weights
from backend.learning.heads import Float64Array, at_prevalence, softmax

Int64Array = npt.NDArray[np.int64]
AnyArray = npt.NDArray[Any]

BOOTSTRAPS = 200
_ECE_BINS = 10
_DRAWS = 2000


def wilson(hits: float, n: float) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_of_proportions(hits: AnyArray, counts: AnyArray) -> tuple[float, float]:
    """The 95 % interval of the mean of independent proportions, from their score intervals (Zou & Donner 2008); each
    count is at least 1."""
    parts = hits / counts
    limits = np.array([wilson(float(h), float(n)) for h, n in zip(hits, counts, strict=True)])
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
    logits: Float64Array,
    labels: Int64Array,
    classes: Sequence[str],
    *,
    prior: Float64Array | None = None,
    stated: bool = False,
    groups: Int64Array | None = None,
    labelled: Int64Array | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics of one choice among K.

    Parameters
    ----------
    logits, labels
        float64 (N, K), calibrated for classes that are equally frequent, of labels int64 (N,).
    classes
        The K names.
    prior
        float64 (K,): how frequent the classes are taken to be; ``None``: alike for the confidence, and as labelled for
        the precision.
    stated
        Whether the project states that; otherwise it is as uncertain as the share of each class among so many labels.
    groups
        int64 (N,): the patient of each slide, or the slide of each tile; ``None``: each item is its own.
    labelled
        int64 (K,): all labels of each class, those that are not here included; ``None``: all are here.

    Returns
    -------
    ``balanced_accuracy``, ``auroc`` (macro, one against the rest), ``ece`` (with classes as frequent as ``prior``) as
    ``[value, low, high]``; ``ece_as_labelled`` (as frequent as labelled); ``per_class`` with ``n``, ``groups``,
    ``recall``, ``precision``, ``auroc`` and ``prevalence``: ``labelled`` and ``assumed``.
    """
    k = len(classes)
    counts = np.bincount(labels, minlength=k)
    tested = np.flatnonzero(counts)
    totals = counts if labelled is None else labelled
    as_labelled = (totals / np.maximum(counts, 1))[labels]
    assumed = totals / totals.sum() if prior is None else prior
    at_prior = class_weights(labels, k) if prior is None else (prior / np.maximum(counts, 1))[labels] * len(labels)
    guess = logits.argmax(axis=1)
    right = guess == labels
    probabilities = softmax(at_prevalence(logits, prior))
    confidence = probabilities[np.arange(len(labels)), guess]
    areas = [weighted_auroc(probabilities[:, c], labels == c) for c in range(k)]

    def measure(drawn: Float64Array) -> list[float]:
        held = np.bincount(labels, drawn, minlength=k)
        hit = np.bincount(labels, drawn * right, minlength=k)
        with np.errstate(invalid="ignore", divide="ignore"):
            recall = hit / held
        auroc = np.array([area(drawn * as_labelled) for area in areas])
        ece = expected_calibration_error(confidence, right, drawn * at_prior)
        ece_plain = expected_calibration_error(confidence, right, drawn * as_labelled)
        return [_mean(recall[tested]), _mean(auroc[tested]), ece, ece_plain, *recall.tolist(), *auroc.tolist()]

    rows = _with_intervals(measure, len(labels), groups, seed)
    # Of each class as many trials as there are patients.
    of_class = counts if groups is None else np.array([len(np.unique(groups[labels == c])) for c in range(k)])
    trials = of_class[tested].astype(np.float64)
    hits = np.bincount(labels[right], minlength=k)[tested] / counts[tested] * trials
    rows[0] = _at_least(rows[0], mean_of_proportions(hits, trials), alone=groups is None)
    said = np.zeros((k, k))
    np.add.at(said, (labels, guess), 1)
    seen = None if stated or prior is None else totals[tested] * trials / counts[tested]
    precision = _precision(said[tested] / counts[tested, None], trials, assumed[tested], seen, tested, seed)
    per_class: dict[str, Any] = {}
    for c, name in enumerate(classes):
        recall = rows[4 + c]
        if counts[c]:
            i = int(np.flatnonzero(tested == c)[0])
            recall = _at_least(recall, wilson(float(hits[i]), float(trials[i])), alone=groups is None)
        per_class[name] = {
            "n": int(counts[c]),
            "groups": int(of_class[c]),
            "recall": recall,
            "precision": precision.get(c),
            "auroc": rows[4 + k + c],
            "prevalence": {"labelled": float(totals[c] / totals.sum()), "assumed": float(assumed[c])},
        }
    named = dict(zip(("balanced_accuracy", "auroc", "ece", "ece_as_labelled"), rows[:4], strict=True))
    return {"measured": True, **named, "per_class": per_class}


def _at_least(row: list[float] | None, limits: tuple[float, float], *, alone: bool) -> list[float] | None:
    """``row`` with an interval no narrower than ``limits``; ``alone``: those are the interval."""
    if row is None:
        return None
    value, low, high = row
    return [value, *limits] if alone else [value, min(low, limits[0]), max(high, limits[1])]


def _precision(
    said: Float64Array,
    trials: Float64Array,
    prior: Float64Array,
    seen: Float64Array | None,
    tested: Int64Array,
    seed: int,
) -> dict[int, list[float]]:
    """By class, how many of those called so are so, as ``[value, low, high]``; classes that were never said are left
    out.

    ``said`` float64 (T, K): of each of the T ``tested`` classes the part that was called each class, in so many
    ``trials``; ``prior`` float64 (T,), which follows from counting ``seen`` float64 (T,) where that is given.
    """
    rng = np.random.default_rng(seed)
    prior = prior / prior.sum()
    frequent = prior[None, :] if seen is None else rng.dirichlet(seen, _DRAWS)
    found: dict[int, list[float]] = {}
    for own, c in enumerate(tested):
        total = float(prior @ said[:, c])
        if total == 0:
            continue
        value = float(prior[own] * said[own, c] / total)
        shares = rng.beta(said[:, c] * trials + 0.5, (1 - said[:, c]) * trials + 0.5, size=(_DRAWS, len(tested)))
        drawn = frequent[:, own] * shares[:, own] / (shares * frequent).sum(axis=1)
        low, high = np.percentile(drawn, [2.5, 97.5]).tolist()
        found[int(c)] = [value, float(min(low, value)), float(max(high, value))]
    return found


def number_metrics(
    predicted: Float64Array, truth: Float64Array, *, groups: Int64Array | None = None, seed: int = 0
) -> dict[str, Any]:
    """``mae`` (mean absolute error) and ``r2`` (against always saying the mean) as ``[value, low, high]``; ``groups``
    as for :func:`choice_metrics`."""

    def measure(drawn: Float64Array) -> list[float]:
        total = drawn.sum()
        middle = (drawn * truth).sum() / total
        spread = (drawn * (truth - middle) ** 2).sum()
        error = predicted - truth
        r2 = 1 - (drawn * error**2).sum() / spread if spread > 0 else math.nan
        return [float((drawn * np.abs(error)).sum() / total), float(r2)]

    rows = _with_intervals(measure, len(truth), groups, seed)
    return {"measured": True, "mae": rows[0], "r2": rows[1]}


def _mean(values: Float64Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _with_intervals(
    measure: Callable[[Float64Array], list[float]], n: int, groups: Int64Array | None, seed: int
) -> list[list[float] | None]:
    """Each measure as [value, low, high]; ``None`` where it is undefined."""
    rng = np.random.default_rng(seed)
    values = measure(np.ones(n))
    group = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    n_groups = int(group.max()) + 1
    drawn = np.array(
        [
            measure(np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups).astype(np.float64)[group])
            for _ in range(BOOTSTRAPS)
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
