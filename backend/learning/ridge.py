"""Ridge regression on standardised features, cross-validated and measured: what heads of numbers are made of.

The penalty is the one with the smallest cross-validated error. What is measured is that choice together with the fit,
by an outer cross-validation, as in :mod:`backend.learning.logistic`; no group, such as a patient, stands on both sides
of any of these splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from backend.learning.heads import Float64Array, Spread
from backend.learning.metrics import number_metrics
from backend.learning.splits import Int64Array, number_folds, whole

NUMBER_CV_MIN_LABELS = 10
"""Fewer labels are learnt, and not measured."""

MIN_GROUPS = 5
"""So are labels of fewer patients."""

_ALPHAS = 10.0 ** np.arange(0, 6)
_KNOWN_DIRECTION = 0.01
_TUNE_ROWS = 600
_FEW, _MANY = 200, 2000

Features = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """Weights float64 (D,) and intercept, how sure they are, and what was measured."""

    coef: Float64Array
    intercept: float
    spread: Spread
    metrics: dict[str, Any]


def fit_ridge(x: Features, y: Float64Array, *, groups: Int64Array | None = None, seed: int = 0) -> RidgeFit:
    """Fit on standardised float (N, D) features and float64 (N,) numbers; ``groups`` int64 (N,) are the patients of
    slides."""
    from threadpoolctl import threadpool_limits

    groups = whole(groups)
    with threadpool_limits(1):  # one decomposition after another: threads that wait for each other only cost time
        alpha = _choose_alpha(x, y, groups, seed)
        coef, intercept = _solve(x, y, alpha)
        metrics = _measured(x, y, groups, seed)
        residuals = y - (x @ coef + intercept)
        spread = _spread(np.asarray(x, dtype=np.float64), residuals, alpha, groups)
    return RidgeFit(coef, intercept, spread, {**metrics, "penalty": alpha})


def _measured(x: Features, y: Float64Array, groups: Int64Array | None, seed: int) -> dict[str, Any]:
    if len(y) < NUMBER_CV_MIN_LABELS:
        return {"measured": False, "reason": f"measured once there are {NUMBER_CV_MIN_LABELS} labels"}
    if groups is not None and len(np.unique(groups)) < MIN_GROUPS:
        return {"measured": False, "reason": f"measured once there are slides of at least {MIN_GROUPS} patients"}
    folds = number_folds(len(y), groups, 5 if len(y) <= _MANY else 3, seed)
    predicted = np.zeros(len(y))
    for train, test in folds:
        alpha = _choose_alpha(x[train], y[train], None if groups is None else groups[train], seed)
        coef, intercept = _solve(x[train], y[train], alpha)
        predicted[test] = x[test] @ coef + intercept
    return {**number_metrics(predicted, y, groups=groups, seed=seed), "folds": len(folds)}


def _solve(x: Features, y: Float64Array, alpha: float) -> tuple[Float64Array, float]:
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=alpha, solver="cholesky").fit(x, y)
    return np.asarray(model.coef_, dtype=np.float64), float(model.intercept_)


def _choose_alpha(x: Features, y: Float64Array, groups: Int64Array | None, seed: int) -> float:
    """The penalty with the smallest cross-validated squared error, on a part of many labels; with few, one group is
    left out at a time."""
    rows = np.sort(np.random.default_rng(seed).permutation(len(y))[:_TUNE_ROWS])
    x, y = np.asarray(x[rows], dtype=np.float64), y[rows]
    groups = None if groups is None else groups[rows]
    errors = np.zeros(len(_ALPHAS))
    for train, test in number_folds(len(y), groups, 10 if len(y) <= _FEW else 3, seed):
        mean, middle = x[train].mean(axis=0), y[train].mean()
        centred, ahead = x[train] - mean, x[test] - mean
        # All penalties from one decomposition of the inner products, of whichever side is smaller.
        dual = len(train) < x.shape[1]
        values, vectors = np.linalg.eigh(centred @ centred.T if dual else centred.T @ centred)
        target = vectors.T @ ((y[train] - middle) if dual else centred.T @ (y[train] - middle))
        seen = (ahead @ centred.T if dual else ahead) @ vectors
        predicted = seen @ (target[:, None] / (np.maximum(values, 0)[:, None] + _ALPHAS)) + middle
        errors += ((predicted - y[test][:, None]) ** 2).sum(axis=0)
    return float(_ALPHAS[int(np.argmin(errors))])


def _spread(x: Float64Array, residuals: Float64Array, alpha: float, groups: Int64Array | None) -> Spread:
    """How sure the regression is: x'(X'X + αI)⁻¹x = (|x|² - Σ s²/(s² + α) (v·x)²) / α for the eigenvectors v and
    eigenvalues s² of X'X; the intercept adds 1/n.

    From the same leverages follow the errors of what is left out: residual / (1 - leverage) for one slide, (I - H)⁻¹
    residuals for all slides of a patient, where H holds the leverages between them.
    """
    n, d = x.shape
    x = x - x.mean(axis=0)
    values, vectors = np.linalg.eigh(x @ x.T if n < d else x.T @ x)
    keep = values / (np.abs(values) + alpha) > _KNOWN_DIRECTION
    values, vectors = values[keep], vectors[:, keep]
    directions = x.T @ vectors / np.sqrt(values) if n < d else vectors
    shrinkage = values / (values + alpha)
    along = x @ directions * np.sqrt(shrinkage)
    leverage = ((x**2).sum(axis=1) - (along**2).sum(axis=1)) / alpha + 1 / n
    leverage = np.clip(leverage, 0, 1 - 1e-6)
    errors, extra = residuals / (1 - leverage), leverage / (1 - leverage)
    if groups is not None:
        of, sizes = np.unique(groups, return_inverse=True, return_counts=True)[1:]
        order = np.argsort(of, kind="stable")
        for rows in np.split(order, np.cumsum(sizes)[:-1]):
            if len(rows) == 1:
                continue
            between = (x[rows] @ x[rows].T - along[rows] @ along[rows].T) / alpha + 1 / n
            np.fill_diagonal(between, leverage[rows])
            parts, axes = np.linalg.eigh(between)
            gain = 1 / (1 - np.clip(parts, 0, 1 - 1e-6))
            errors[rows] = axes @ (gain * (axes.T @ residuals[rows]))
            extra[rows] = (axes**2) @ gain - 1
    # The variance must stay above zero, or a fit without error would be certain of everything.
    variance = max(float(np.mean(errors**2)), 1e-12)
    return Spread(variance, float(extra.mean()), alpha, directions, shrinkage)
