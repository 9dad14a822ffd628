"""A head: a small linear model on slide embeddings or tile latents, as arrays. Inference is NumPy, so a stored head
needs no scikit-learn.

What a head says weighs the classes alike, whatever their frequency (in training by class weights, and in calibration):
a rare class is not ignored. How sure it is of that follows the frequency of the classes, see
:mod:`backend.learning.prevalence`: a slide that looks like a class that one in twenty slides has may be called that
with a confidence below one half.

Numbers: the confidence is the probability, under a normal error, that the true number lies within ``tolerance`` of the
predicted one, where the error's variance grows with the distance from what was labelled (ridge regression as a Bayesian
linear model: Bishop 2006, eq. 3.59).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from backend.errors import EmbeddingInvalid, HeadMismatch

Float64Array = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
AnyFloatArray = npt.NDArray[np.floating[Any]]

HeadKind = Literal["choice", "choices", "number", "rating"]
HeadLevel = Literal["slide", "tile"]

_CHUNK_ROWS = 65_536


@dataclass(frozen=True, eq=False)
class Spread:
    """How sure a ridge regression is of its numbers.

    Attributes
    ----------
    variance
        Mean squared leave-one-out error of the labelled.
    mean_leverage
        The leverage that this error already contains.
    alpha
        The ridge penalty.
    directions
        float64 (D, R), orthonormal: the standardised directions in which there are labels.
    shrinkage
        float64 (R,), in [0, 1]: how well each is known.
    """

    variance: float
    mean_leverage: float
    alpha: float
    directions: Float64Array
    shrinkage: Float64Array


@dataclass(frozen=True, eq=False)
class Head:
    """A trained head.

    Attributes
    ----------
    control, level, kind
        The control whose answer it gives; what it looks at; one choice, several choices, a number, or a whole number of
        stars.
    classes
        The K choices it can say, in the order of the labelling config; empty for numbers.
    mean, scale
        float64 (D,): standardisation.
    coef, intercept
        float64 (K, D) and (K,): the logits before calibration; K = 1 for numbers.
    temperature, bias
        float64 (K,) each: calibrated logits are ``logits / temperature + bias``. Ones and zeros where not calibrated.
    calibrated
        Whether there were labels enough to calibrate.
    label_counts
        Labels per class (for ``choices``: how often chosen); for numbers ``{"": n}``.
    n_labels
        Labelled slides, or tiles.
    fingerprint
        Of the model that made the embeddings; a head fits no other.
    metrics
        What was measured on labels that the measured model had not seen; JSON values. ``{"measured": False, "reason":
        …}`` with too few.
    tolerance, value_range, spread
        Only for numbers.
    prior
        float64 (K,): how frequent the classes are taken to be (of several choices: how often each is chosen); ``None``:
        all alike, as for tiles, numbers, and heads stored by earlier releases.
    prior_stated
        The classes whose frequency the project states; that of the others is as among the labels.
    """

    control: str
    level: HeadLevel
    kind: HeadKind
    classes: tuple[str, ...]
    mean: Float64Array
    scale: Float64Array
    coef: Float64Array
    intercept: Float64Array
    temperature: Float64Array
    bias: Float64Array
    calibrated: bool
    n_labels: int
    label_counts: Mapping[str, int]
    fingerprint: str
    metrics: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 0.0
    value_range: tuple[float, float] = (0.0, 0.0)
    spread: Spread | None = None
    prior: Float64Array | None = None
    prior_stated: tuple[str, ...] = ()

    @property
    def dim(self) -> int:
        """D, the length of the embeddings it takes."""
        return len(self.mean)


@dataclass(frozen=True, eq=False)
class HeadOutput:
    """What a head says of N slides.

    Attributes
    ----------
    values
        N answers: the most probable choice, or tuple of choices, were all equally frequent; or a number.
    confidence
        float64 (N,) in [0, 1]: the calibrated probability of the answer; for several choices that of the least certain
        one; for numbers the probability to be within the head's tolerance.
    probabilities
        float64 (N, K); ``None`` for numbers. Rows sum to 1 for ``choice``; each column is a yes or no of its own for
        ``choices``.
    alike
        As ``probabilities``, were all classes equally frequent; ``None`` for numbers.
    """

    values: tuple[str | float | tuple[str, ...], ...]
    confidence: Float64Array
    probabilities: Float64Array | None
    alike: Float64Array | None = None


def check_embeddings(embeddings: AnyFloatArray, names: Sequence[object] | None = None) -> None:
    """Refuse what is not a finite (N, D) array; ``names`` are the N slides (or tasks), for the message.

    Raises
    ------
    EmbeddingInvalid
        Naming up to five of the slides with NaN or infinity.
    """
    if embeddings.ndim != 2:
        raise EmbeddingInvalid(f"Embeddings have shape {embeddings.shape}, not (N, D).")
    if names is not None and len(names) != len(embeddings):
        raise ValueError(f"{len(names)} names for {len(embeddings)} embeddings")
    bad = [
        start + int(row)
        for start in range(0, len(embeddings), _CHUNK_ROWS)
        for row in np.flatnonzero(~np.isfinite(embeddings[start : start + _CHUNK_ROWS]).all(axis=1))
    ]
    if bad:
        told = ", ".join(str(names[row]) if names is not None else f"row {row}" for row in bad[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise EmbeddingInvalid(
            f"The stored embedding has NaN or infinite values: {told}{more}.",
            hint="Have these slides analysed again: delete their results, then predict.",
        )


def logits(head: Head, embeddings: AnyFloatArray, *, names: Sequence[object] | None = None) -> Float64Array:
    """float64 (N, K): the head's logits (or numbers) before calibration, for float (N, D) embeddings."""
    check_embeddings(embeddings, names)
    if embeddings.shape[1] != head.dim:
        raise HeadMismatch(
            f"The head '{head.control}' takes embeddings of length {head.dim}, not {embeddings.shape[1]}.",
            hint="It belongs to another model: train again.",
        )
    weights = (head.coef / head.scale).T
    offset = head.intercept - head.mean @ weights
    return np.asarray(embeddings.astype(np.float64) @ weights + offset, dtype=np.float64)


def uncalibrated_probabilities(head: Head, embeddings: AnyFloatArray) -> Float64Array:
    """float64 (N, K): as the plain logistic regression has them."""
    return _to_probabilities(head.kind, logits(head, embeddings))


def probabilities(
    head: Head, embeddings: AnyFloatArray, *, names: Sequence[object] | None = None, alike: bool = False
) -> Float64Array:
    """float64 (N, K): calibrated probability of each class, as frequent as the head takes it to be, or ``alike``. Only
    for heads of choices.

    Raises
    ------
    EmbeddingInvalid, HeadMismatch
        See :func:`check_embeddings` and :func:`logits`.
    """
    z = _calibrated(head, embeddings, names)
    return _to_probabilities(head.kind, z if alike else at_prevalence(z, head.prior, several=head.kind == "choices"))


def predict(head: Head, embeddings: AnyFloatArray, *, names: Sequence[object] | None = None) -> HeadOutput:
    """What the head says of float (N, D) embeddings, and how sure it is."""
    if not head.classes:
        return _predict_numbers(head, embeddings, names)
    z = _calibrated(head, embeddings, names)
    alike = _to_probabilities(head.kind, z)
    p = _to_probabilities(head.kind, at_prevalence(z, head.prior, several=head.kind == "choices"))
    if head.kind == "choice":
        best = alike.argmax(axis=1)
        sure = p[np.arange(len(p)), best]
        return HeadOutput(tuple(head.classes[k] for k in best), sure, p, alike)
    chosen = alike >= 0.5
    answers = tuple(tuple(name for name, yes in zip(head.classes, row, strict=True) if yes) for row in chosen)
    return HeadOutput(answers, np.where(chosen, p, 1 - p).min(axis=1), p, alike)


def tile_probabilities(head: Head, latents: AnyFloatArray) -> Float32Array:
    """float32 (N, K): calibrated probability of each class for each tile, from latents (N, D) of any float type.

    Works in pieces, so that a large bag of float16 latents is never held a second time in float64.
    """
    if head.level != "tile":
        raise HeadMismatch(f"The head '{head.control}' was trained on whole slides, not on tiles.")
    result = np.empty((len(latents), len(head.classes)), dtype=np.float32)
    for start in range(0, len(latents), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        result[part] = probabilities(head, latents[part], alike=True)
    return result


def softmax(z: Float64Array) -> Float64Array:
    """Softmax of each row of float64 (N, K)."""
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True), dtype=np.float64)


def sigmoid(z: Float64Array) -> Float64Array:
    """The logistic function, without overflow."""
    e = np.exp(-np.abs(z))
    return np.asarray(np.where(z >= 0, 1.0, e) / (1.0 + e), dtype=np.float64)


def _calibrated(head: Head, embeddings: AnyFloatArray, names: Sequence[object] | None) -> Float64Array:
    if not head.classes:
        raise ValueError(f"the head '{head.control}' predicts numbers, which have no classes")
    return np.asarray(logits(head, embeddings, names=names) / head.temperature + head.bias, dtype=np.float64)


def at_prevalence(z: Float64Array, prior: Float64Array | None, *, several: bool = False) -> Float64Array:
    """float64 (N, K): calibrated logits of equally frequent classes, for classes as frequent as ``prior`` float64 (K,)
    says.

    The odds are multiplied by how much more frequent each class is (Saerens et al. 2002, see
    :mod:`backend.learning.prevalence`). ``several``: each column is a yes or no of its own, whose prior is that of yes.
    ``None``: as they are.
    """
    if prior is None:
        return z
    return np.asarray(z + np.log(prior) - (np.log1p(-prior) if several else 0.0), dtype=np.float64)


def _to_probabilities(kind: HeadKind, z: Float64Array) -> Float64Array:
    return softmax(z) if kind == "choice" else sigmoid(z)


def _predict_numbers(head: Head, embeddings: AnyFloatArray, names: Sequence[object] | None) -> HeadOutput:
    from scipy.special import erf

    if head.spread is None:
        raise ValueError(f"the head '{head.control}' predicts numbers and has no spread")
    numbers = logits(head, embeddings, names=names)[:, 0]
    spread = head.spread
    x = (embeddings.astype(np.float64) - head.mean) / head.scale
    known = (x @ spread.directions) ** 2 @ spread.shrinkage
    leverage = np.maximum((x**2).sum(axis=1) - known, 0) / spread.alpha
    deviation = np.sqrt(spread.variance * (1 + leverage) / (1 + spread.mean_leverage))
    with np.errstate(divide="ignore"):
        confidence = erf(head.tolerance / (np.sqrt(2) * deviation))
    if head.kind == "rating":
        numbers = np.clip(np.rint(numbers), *head.value_range)
    return HeadOutput(tuple(float(n) for n in numbers), np.asarray(confidence, dtype=np.float64), None)
