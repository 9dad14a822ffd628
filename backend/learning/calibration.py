"""Calibration of logits by a temperature and a bias for each class.

Temperature scaling with bias correction (BCTS: Alexandari, Kundaje, Shrikumar, "Maximum likelihood with bias-corrected calibration is
hard-to-beat at label shift adaptation", ICML 2020); with two classes it is Platt's scaling. Fitted by weighted maximum likelihood on logits of models
that had not seen the labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from backend.learning.heads import Float64Array

_BIAS_PENALTY = 1.0
_TEMPERATURE_RANGE = (0.05, 50.0)


def class_weights(labels: npt.NDArray[np.int64], n_classes: int) -> Float64Array:
    """float64 (N,): weights with which all classes present weigh the same and the mean weight is 1."""
    counts = np.bincount(labels, minlength=n_classes)
    present = int((counts > 0).sum())
    return np.asarray((len(labels) / (present * np.maximum(counts, 1)))[labels], dtype=np.float64)


def fit_choice(
    logits: Float64Array, labels: npt.NDArray[np.int64], weights: Float64Array
) -> tuple[float, Float64Array]:
    """Temperature and bias (K,) of one choice among K.

    Parameters
    ----------
    logits
        float64 (N, K).
    labels
        int64 (N,), class of each.
    weights
        float64 (N,).
    """
    n, k = logits.shape
    truth = np.zeros((n, k))
    truth[np.arange(n), labels] = 1

    def loss(at: Float64Array) -> tuple[float, Float64Array]:
        inverse, bias = np.exp(at[0]), at[1:]
        z = logits * inverse + bias
        z = z - z.max(axis=1, keepdims=True)
        log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        error = weights[:, None] * (np.exp(log_p) - truth)
        value = -(weights * log_p[np.arange(n), labels]).sum() + _BIAS_PENALTY / 2 * (bias**2).sum()
        gradient = np.concatenate(([(error * logits).sum() * inverse], error.sum(axis=0) + _BIAS_PENALTY * bias))
        return float(value), gradient

    return _minimise(loss, k)


def _minimise(loss: Any, n_biases: int) -> tuple[float, Float64Array]:
    from scipy.optimize import minimize

    low, high = _TEMPERATURE_RANGE
    bounds = [(-np.log(high), -np.log(low))] + [(None, None)] * n_biases
    found = minimize(loss, np.zeros(1 + n_biases), jac=True, method="L-BFGS-B", bounds=bounds)
    return float(np.exp(-found.x[0])), np.asarray(found.x[1:], dtype=np.float64)
