"""Standardised logistic regression, cross-validated, calibrated and measured: what heads of choices are made of.

The penalty is chosen among :data:`PENALTIES` by cross-validation on at most :data:`_TUNE_ROWS` labels: it is the variance of a prior over the
weights, so what suits a part of the labels suits all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from backend.learning.calibration import calibrated_choice, class_weights, fit_choice
from backend.learning.heads import Float64Array
from backend.learning.metrics import BOOTSTRAPS, Int64Array, choice_metrics

PENALTIES = (0.001, 0.01, 0.1, 1.0)
DEFAULT_PENALTY = 0.01
"""With fewer labels than cross-validation needs: strong, as 768 weights on few labels ask for."""

CV_MIN_PER_CLASS = 5
"""A class with fewer labels is learnt, and not measured."""

CALIBRATE_MIN_LABELS = 30
CALIBRATE_MIN_PER_CLASS = 10
"""With fewer labels (in all; of each measured class) probabilities are those of the regression itself."""

_TUNE_ROWS = 1000
_TUNE_FOLDS = 3
_FEW = 2000
_ABSENT = 10.0


@dataclass(frozen=True, eq=False)
class LogisticFit:
    """Logits of K classes on standardised features, their calibration, and what was measured."""

    coef: Float64Array
    intercept: Float64Array
    temperature: float
    bias: Float64Array
    calibrated: bool
    metrics: dict[str, Any]


def fit_logistic(
    x: npt.NDArray[np.floating[Any]],
    y: Int64Array,
    classes: Sequence[str],
    *,
    groups: Int64Array | None = None,
    class_totals: Int64Array | None = None,
    bootstraps: int = BOOTSTRAPS,
    seed: int = 0,
) -> LogisticFit:
    """Fit on standardised float (N, D) features and int64 (N,) classes, each of which occurs.

    ``groups`` are the slides of tiles: folds never part a slide. ``bootstraps`` are drawn for the intervals of the metrics.
    """
    from threadpoolctl import threadpool_limits

    # L-BFGS is thousands of small products: BLAS threads that wait for each other cost it up to twenty times the time.
    with threadpool_limits(1):
        if len(x) >= x.shape[1]:
            return _fit(x, y, classes, groups, class_totals, bootstraps, seed)
        # Fewer labels than dimensions: weights under a quadratic penalty lie in the span of the labelled, also those of each
        # fold. In coordinates of that span the problem is the same, and many times smaller.
        basis, coordinates = np.linalg.qr(x.T.astype(np.float64))
        fit = _fit(coordinates.T, y, classes, groups, class_totals, bootstraps, seed)
        return replace(fit, coef=fit.coef @ basis.T)


def _fit(
    x: npt.NDArray[np.floating[Any]],
    y: Int64Array,
    classes: Sequence[str],
    groups: Int64Array | None,
    class_totals: Int64Array | None,
    bootstraps: int,
    seed: int,
) -> LogisticFit:
    k = len(classes)
    folds, reason = _folds(y, k, groups, seed)
    c = _choose_penalty(x, y, k, groups, seed) if folds else DEFAULT_PENALTY
    coef, intercept = _solve(x, y, k, c)
    if not folds:
        metrics: dict[str, Any] = {"measured": False, "reason": reason, "penalty": c}
        return LogisticFit(coef, intercept, 1.0, np.zeros(k), False, metrics)

    held_out: Float64Array = np.zeros((len(y), k))
    fold_of: Int64Array = np.full(len(y), -1, dtype=np.int64)
    for number, (train, test) in enumerate(folds):
        w, b = _solve(x[train], y[train], k, c)
        held_out[test] = x[test] @ w.T + b
        fold_of[test] = number
    tested = np.flatnonzero(fold_of >= 0)
    z, truth, fold_of = held_out[tested], y[tested], fold_of[tested]
    counts = np.bincount(truth, minlength=k)
    enough = counts[counts > 0].min() >= CALIBRATE_MIN_PER_CLASS and len(truth) >= CALIBRATE_MIN_LABELS
    temperature: float = 1.0
    bias: Float64Array = np.zeros(k)
    if enough:
        temperature, bias = _calibrate(z, truth, k)
        measured = np.zeros_like(z)
        for number in range(len(folds)):
            # What is measured was calibrated on the other folds, else the calibration would be tested on what it was fitted to.
            here = fold_of == number
            t, shift = _calibrate(z[~here], truth[~here], k)
            measured[here] = calibrated_choice(z[here], t, shift)
    else:
        measured = calibrated_choice(z, 1.0, bias)
    metrics = choice_metrics(
        measured,
        truth,
        classes,
        groups=None if groups is None else groups[tested],
        class_totals=class_totals,
        bootstraps=bootstraps,
        seed=seed,
    )
    metrics |= {
        "penalty": c,
        "folds": len(folds),
        "calibrated": bool(enough),
        "not_measured": [name for name, n in zip(classes, counts, strict=True) if n == 0],
    }
    return LogisticFit(coef, intercept, temperature, bias, bool(enough), metrics)


def _solve(x: npt.NDArray[np.floating[Any]], y: Int64Array, k: int, c: float) -> tuple[Float64Array, Float64Array]:
    """Weights (K, D) and intercepts (K,). A class that is not in ``y`` gets logits well below those of the others."""
    from sklearn.linear_model import LogisticRegression

    present = np.unique(y)
    model = LogisticRegression(C=c, class_weight="balanced", max_iter=2000).fit(x, y)
    coef, intercept = np.zeros((k, x.shape[1])), np.full(k, -_ABSENT)
    if len(present) == 2:
        intercept[present] = 0.0, float(model.intercept_[0])
        coef[present[1]] = model.coef_[0]
    else:
        coef[present], intercept[present] = model.coef_, model.intercept_
    return coef, intercept


def _folds(
    y: Int64Array, k: int, groups: Int64Array | None, seed: int
) -> tuple[list[tuple[Int64Array, Int64Array]], str]:
    """(train, test) rows of each fold; or none, and why. Classes too rare to be tested are in every training part."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    counts = np.bincount(y, minlength=k)
    testable = counts >= CV_MIN_PER_CLASS
    if groups is not None:
        slides = np.array([len(np.unique(groups[y == c])) for c in range(k)])
        testable &= slides >= 2
        if testable.sum() < 2:
            return [], "measured once two classes have been drawn on two slides each"
    if testable.sum() < 2:
        return [], f"measured once two classes have {CV_MIN_PER_CLASS} labels each"
    rows = np.flatnonzero(testable[y])
    rest = np.flatnonzero(~testable[y])
    wanted = 5 if len(y) <= _FEW else 3
    splits: Any
    if groups is None:
        splits = StratifiedKFold(wanted, shuffle=True, random_state=seed).split(rows, y[rows])
    else:
        n = min(wanted, int(slides[testable].min()), int(counts[testable].min()))
        splits = StratifiedGroupKFold(max(2, n), shuffle=True, random_state=seed).split(rows, y[rows], groups[rows])
    folds = []
    for train, test in splits:
        if len(test) == 0:
            continue
        beside = rest if groups is None else rest[~np.isin(groups[rest], groups[rows[test]])]
        train_rows = np.sort(np.concatenate([rows[train], beside]))
        if len(np.unique(y[train_rows])) >= 2:
            folds.append((train_rows, rows[test]))
    return (folds, "") if len(folds) >= 2 else ([], "measured once more slides have been drawn on")


def _choose_penalty(
    x: npt.NDArray[np.floating[Any]], y: Int64Array, k: int, groups: Int64Array | None, seed: int
) -> float:
    """The penalty with the smallest cross-validated log loss, classes weighing the same; the stronger of equals."""
    rows = _part(y, k, seed)
    x, y = x[rows], y[rows]
    folds, _ = _folds(y, k, None if groups is None else groups[rows], seed)
    if not folds:
        return DEFAULT_PENALTY
    losses = []
    for c in PENALTIES:
        loss = 0.0
        for train, test in folds[:_TUNE_FOLDS]:
            w, b = _solve(x[train], y[train], k, c)
            z = x[test] @ w.T + b
            t, shift = _calibrate(z, y[test], k)  # scale aside, which calibration settles later: only the order counts
            p = calibrated_choice(z, t, shift)[np.arange(len(test)), y[test]]
            loss -= float((class_weights(y[test], k) * np.log(np.maximum(p, 1e-12))).mean())
        losses.append(loss)
    return PENALTIES[int(np.argmin(losses))]


def _part(y: Int64Array, k: int, seed: int) -> Int64Array:
    """Up to :data:`_TUNE_ROWS` rows, rare classes first in full: each class gets the same room, and leaves what it does not need."""
    if len(y) <= _TUNE_ROWS:
        return np.arange(len(y))
    rng = np.random.default_rng(seed)
    counts = np.bincount(y, minlength=k)
    room, chosen = _TUNE_ROWS, []
    for position, c in enumerate(np.argsort(counts)):
        take = min(int(counts[c]), room // (k - position))
        chosen.append(rng.choice(np.flatnonzero(y == c), take, replace=False))
        room -= take
    return np.sort(np.concatenate(chosen))


def _calibrate(z: Float64Array, truth: Int64Array, k: int) -> tuple[float, Float64Array]:
    """Over the classes that occur; the others keep a bias of zero."""
    present, index = np.unique(truth, return_inverse=True)
    bias = np.zeros(k)
    if len(present) < 2:
        return 1.0, bias
    temperature, bias[present] = fit_choice(z[:, present], index.astype(np.int64), class_weights(truth, k))
    return temperature, bias
