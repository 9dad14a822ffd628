"""Standardised logistic regression, cross-validated and calibrated: what heads of choices are made of.

One procedure makes a head out of labels: the penalty is chosen among :data:`PENALTIES` by cross-validation, a model
with that penalty is fitted, and temperature and bias are fitted to the logits that models with that penalty give to
labels that they had not seen. What is measured is that whole procedure, by an outer cross-validation: it runs on each
part of the labels anew, and its result is asked about the others (Varma & Simon, "Bias in error estimation when using
cross-validation for model selection", BMC Bioinformatics 2006). No group, such as a patient, stands on both sides of
any of these splits.

The penalty is the variance of a prior over the weights, so what suits a part of the labels suits all of them: with many
it is chosen on :data:`_TUNE_ROWS` of them. The standardisation of the features is not part of the procedure: it comes
from all slides of the project, without labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from backend.learning.calibration import class_weights, fit_choice
from backend.learning.heads import Float64Array
from backend.learning.splits import CV_MIN_PER_CLASS, Fold, Int64Array, class_folds, whole

PENALTIES = (0.001, 0.01, 0.1, 1.0)
DEFAULT_PENALTY = 0.01
"""With fewer labels than cross-validation needs: strong, as 768 weights on few labels ask for."""

CALIBRATE_MIN_LABELS = 30
CALIBRATE_MIN_PER_CLASS = 10
"""With fewer labels (in all; of each measured class) probabilities are those of the regression itself."""

LEAST_GROUPS = {"slide": 3, "tile": 2}
"""Patients of a class's slides (slides of a class's tiles) without which it is learnt, and not measured."""

_TUNE_ROWS = 600
_INNER_FOLDS = 3
_LEAST_INSIDE = 3
_FEW, _MANY = 500, 2000
_ABSENT = 10.0
_LEAST = np.log(1e-12)

Features = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Tested:
    """M labels with what a model said of each that had not seen it, nor anything of its group.

    ``logits`` float64 (M, K), calibrated as the model's own; ``labels`` and ``groups`` int64 (M,), the latter ``None``
    where each is its own.
    """

    logits: Float64Array
    labels: Int64Array
    groups: Int64Array | None


@dataclass(frozen=True, eq=False)
class LogisticFit:
    """Logits of K classes on standardised features, their calibration, and what can be measured.

    ``tested`` is ``None`` where nothing can be, for the ``reason`` in words; ``about`` are ``penalty``, ``folds``,
    ``calibrated`` for the metrics.
    """

    coef: Float64Array
    intercept: Float64Array
    temperature: float
    bias: Float64Array
    calibrated: bool
    tested: Tested | None
    reason: str
    about: dict[str, Any]


def fit_logistic(
    x: Features,
    y: Int64Array,
    k: int,
    *,
    groups: Int64Array | None = None,
    level: str = "slide",
    measure: bool = True,
    seed: int = 0,
) -> LogisticFit:
    """Fit on standardised float (N, D) features and int64 (N,) classes below ``k``, each of which occurs.

    ``groups`` int64 (N,): the patients of slides, or the slides (or patients) of tiles. ``measure``: whether to test
    what can be, which takes most of the time.
    """
    from sklearn import config_context
    from threadpoolctl import threadpool_limits

    groups = whole(groups)
    # L-BFGS is thousands of small products: BLAS threads that wait for each other cost it up to twenty times the time.
    # Checks of what is known to be finite would cost small fits a third of theirs.
    with threadpool_limits(1), config_context(assume_finite=True, skip_parameter_validation=True):
        if len(x) >= x.shape[1]:
            return _fit(x, y, k, groups, level, measure, seed)
        # Fewer labels than dimensions: weights under a quadratic penalty lie in the span of the labelled, also those of
        # each fold. In coordinates of that span the problem is the same, and many times smaller.
        basis, coordinates = np.linalg.qr(x.T.astype(np.float64))
        fit = _fit(coordinates.T, y, k, groups, level, measure, seed)
        return replace(fit, coef=fit.coef @ basis.T)


@dataclass(frozen=True, eq=False)
class _Model:
    coef: Float64Array
    intercept: Float64Array
    temperature: float
    bias: Float64Array
    penalty: float

    def logits(self, x: Features) -> Float64Array:
        return np.asarray((x @ self.coef.T + self.intercept) / self.temperature + self.bias, dtype=np.float64)


def _fit(
    x: Features, y: Int64Array, k: int, groups: Int64Array | None, level: str, measure: bool, seed: int
) -> LogisticFit:
    least = LEAST_GROUPS[level]
    folds, reason = class_folds(y, k, groups, 5 if len(y) <= _FEW else 3, seed, least_groups=least, level=level)
    tested = np.concatenate([test for _, test in folds]) if folds else np.zeros(0, np.int64)
    counts = np.bincount(y[tested], minlength=k)
    enough = len(tested) >= CALIBRATE_MIN_LABELS and int(counts[counts > 0].min()) >= CALIBRATE_MIN_PER_CLASS
    model = _procedure(x, y, k, groups, enough, CV_MIN_PER_CLASS, seed)
    about: dict[str, Any] = {"penalty": model.penalty, "folds": len(folds), "calibrated": enough}
    found = None
    if folds and measure:
        parts = []
        for train, test in folds:
            theirs = None if groups is None else whole(groups[train])
            parts.append(_procedure(x[train], y[train], k, theirs, enough, _LEAST_INSIDE, seed).logits(x[test]))
        z = np.concatenate(parts)
        found = Tested(z, y[tested], None if groups is None else groups[tested])
    return LogisticFit(model.coef, model.intercept, model.temperature, model.bias, enough, found, reason, about)


def _procedure(
    x: Features, y: Int64Array, k: int, groups: Int64Array | None, calibrate: bool, least: int, seed: int
) -> _Model:
    """A model out of labels, with penalty and calibration chosen by those labels alone; ``least`` as of
    :func:`class_folds`."""
    penalty, unseen = _choose_penalty(x, y, k, groups, least, seed)
    if calibrate and len(y) > _TUNE_ROWS:
        # Models on a part of the labels are less sure than one on all of them will be.
        folds, _ = class_folds(y, k, groups, _INNER_FOLDS if len(y) <= _MANY else 2, seed, least=least)
        unseen = [(_logits(x[test], *_solve(x[train], y[train], k, penalty)), y[test]) for train, test in folds]
    temperature: float = 1.0
    bias: Float64Array = np.zeros(k)
    if calibrate and unseen:
        temperature, bias = _calibrate(
            np.concatenate([z for z, _ in unseen]), np.concatenate([t for _, t in unseen]), k
        )
    coef, intercept = _solve(x, y, k, penalty)
    return _Model(coef, intercept, temperature, bias, penalty)


def _logits(x: Features, coef: Float64Array, intercept: Float64Array) -> Float64Array:
    return np.asarray(x @ coef.T + intercept, dtype=np.float64)


def _solve(x: Features, y: Int64Array, k: int, c: float) -> tuple[Float64Array, Float64Array]:
    """Weights (K, D) and intercepts (K,). A class that is not in ``y`` gets logits well below those of the others."""
    return next(_path(x, y, k, (c,)))


def _path(
    x: Features, y: Int64Array, k: int, penalties: Sequence[float]
) -> Iterator[tuple[Float64Array, Float64Array]]:
    """:func:`_solve` for each of ``penalties``, each starting from the one before."""
    from sklearn.linear_model import LogisticRegression

    present = np.unique(y)
    model = LogisticRegression(class_weight="balanced", max_iter=2000, warm_start=True)
    for c in penalties:
        model.set_params(C=c).fit(x, y)
        coef, intercept = np.zeros((k, x.shape[1])), np.full(k, -_ABSENT)
        if len(present) == 2:
            intercept[present] = 0.0, float(model.intercept_[0])
            coef[present[1]] = model.coef_[0]
        else:
            coef[present], intercept[present] = model.coef_, model.intercept_
        yield coef, intercept


def _choose_penalty(
    x: Features, y: Int64Array, k: int, groups: Int64Array | None, least: int, seed: int
) -> tuple[float, list[tuple[Float64Array, Int64Array]]]:
    """The penalty with the smallest cross-validated log loss, classes weighing the same, and the stronger of equals;
    and for each fold the logits that a model with that penalty gives to what it had not seen, with the classes."""
    from scipy.special import logsumexp

    rows = _part(y, k, seed)
    x, y = x[rows], y[rows]
    folds: Sequence[Fold]
    folds, _ = class_folds(y, k, None if groups is None else whole(groups[rows]), _INNER_FOLDS, seed, least=least)
    if not folds:
        return DEFAULT_PENALTY, []
    losses = np.zeros(len(PENALTIES))
    unseen: list[list[tuple[Float64Array, Int64Array]]] = [[] for _ in PENALTIES]
    for train, test in folds:
        truth, weights = y[test], class_weights(y[test], k)
        for i, model in enumerate(_path(x[train], y[train], k, PENALTIES)):
            z = _logits(x[test], *model)
            unseen[i].append((z, truth))
            t, shift = _calibrate(z, truth, k)  # scale aside, which calibration settles later: only the order counts
            scaled = z / t + shift
            log_p = scaled[np.arange(len(z)), truth] - logsumexp(scaled, axis=1)
            losses[i] -= float((weights * np.maximum(log_p, _LEAST)).mean())
    best = int(np.argmin(losses))
    return PENALTIES[best], unseen[best]


def _part(y: Int64Array, k: int, seed: int) -> Int64Array:
    """Up to :data:`_TUNE_ROWS` rows, rare classes first in full: each class gets the same room, and leaves what it does
    not need."""
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
