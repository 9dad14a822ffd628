"""From labels to heads: what a control needs before it is learnt, and the fit of each kind of answer.

Too few labels are not an error: the result is then a :class:`TooFewLabels` that says how many more are needed, for
panel and log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from backend.errors import EmbeddingInvalid
from backend.learning.heads import AnyFloatArray, Float64Array, Head, HeadLevel, check_embeddings
from backend.learning.logistic import LogisticFit, fit_logistic
from backend.learning.metrics import Int64Array, choice_metrics
from backend.learning.prevalence import class_prior
from backend.learning.ridge import fit_ridge

MIN_PER_CLASS = 2
"""Two classes need so many labels each before there is a head."""

MIN_LABELS = 4
_FLOAT32_ROWS = 20_000


@dataclass(frozen=True)
class TooFewLabels:
    """There is no head yet.

    Attributes
    ----------
    missing
        How many more labels are needed, by class; the key ``""`` stands for any class (or any number).
    message
        The same for people.
    """

    control: str
    level: HeadLevel
    n_labels: int
    missing: Mapping[str, int]
    message: str

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "control": self.control,
            "level": self.level,
            "n_labels": self.n_labels,
            "missing": dict(self.missing),
            "message": self.message,
        }


def fit_choice_head(
    control: str,
    classes: Sequence[str],
    embeddings: AnyFloatArray,
    labels: Sequence[str],
    *,
    fingerprint: str,
    level: HeadLevel = "slide",
    names: Sequence[object] | None = None,
    groups: Int64Array | None = None,
    class_totals: Mapping[str, int] | None = None,
    priors: Mapping[str, float] | None = None,
    background: AnyFloatArray | None = None,
    min_labels: int = MIN_LABELS,
    measure: bool = True,
    seed: int = 0,
) -> Head | TooFewLabels:
    """A head for one choice among several.

    Parameters
    ----------
    control, classes
        The control, and the choices it offers; the head knows those that occur among the labels, the rest are in
        ``metrics["unseen"]``.
    embeddings, labels
        float (N, D) and N of the ``classes``.
    fingerprint
        Of the model that made the embeddings.
    names
        The N slides, for the message about a broken embedding.
    groups
        int64 (N,), the patient of each slide, or the slide (or patient) of each tile: no validation parts one; see
        :func:`backend.learning.splits.patient_groups`. ``None``: each label is its own.
    class_totals
        Labels of each class where ``labels`` are a sample of them.
    priors
        How frequent classes are, each in (0, 1), as far as the project states it; see
        :mod:`backend.learning.prevalence`. Only for slides.
    background
        float (M, D): all embeddings of the project; the standardisation is that of them instead of the labelled ones
        (few labels tell little about scale).
    min_labels
        Labels needed in all.
    measure
        Whether to measure how good it is, which takes most of the time.

    Raises
    ------
    EmbeddingInvalid
        An embedding has NaN or infinite values.
    ValueError
        A label that is none of the classes, or as many labels as embeddings are not given.
    """
    _check(embeddings, labels, names, background)
    strange = set(labels) - set(classes)
    if strange:
        raise ValueError(f"labels {sorted(strange)} are none of the classes {list(classes)}")
    counts = {name: labels.count(name) if isinstance(labels, list) else list(labels).count(name) for name in classes}
    refusal = _too_few(control, level, counts, len(labels), min_labels)
    if refusal is not None:
        return refusal
    seen = tuple(name for name in classes if counts[name])
    index = {name: i for i, name in enumerate(seen)}
    y = np.array([index[label] for label in labels], dtype=np.int64)
    mean, scale = _standardisation(embeddings, background)
    totals = class_totals or counts
    x = _standardised(embeddings, mean, scale)
    fit = fit_logistic(x, y, len(seen), groups=groups, level=level, measure=measure, seed=seed)
    # How often people draw a class says nothing of how often tiles have it.
    prior = class_prior(seen, totals, priors or {}) if level == "slide" else None
    labelled = np.array([totals[name] for name in seen], dtype=np.int64)
    stated = any(name in (priors or {}) for name in seen)
    metrics = _metrics(fit, seen, prior, stated, labelled, seed)
    return Head(
        control=control,
        level=level,
        kind="choice",
        classes=seen,
        mean=mean,
        scale=scale,
        coef=fit.coef,
        intercept=fit.intercept,
        temperature=np.full(len(seen), fit.temperature),
        bias=fit.bias,
        calibrated=fit.calibrated,
        n_labels=len(labels) if class_totals is None else sum(class_totals.values()),
        label_counts={name: n for name, n in totals.items() if n},
        fingerprint=fingerprint,
        metrics={**metrics, "unseen": [name for name in classes if not counts[name]]},
        prior=prior,
        prior_stated=tuple(name for name in seen if name in (priors or {})) if level == "slide" else (),
    )


def fit_choices_head(
    control: str,
    classes: Sequence[str],
    embeddings: AnyFloatArray,
    labels: Sequence[Mapping[str, bool]],
    *,
    fingerprint: str,
    names: Sequence[object] | None = None,
    groups: Int64Array | None = None,
    priors: Mapping[str, float] | None = None,
    background: AnyFloatArray | None = None,
    min_labels: int = MIN_LABELS,
    seed: int = 0,
) -> Head | TooFewLabels:
    """A head for several choices at once: a yes or no for each, learnt from the slides for which it is known.

    As :func:`fit_choice_head`; ``labels`` are N mappings ``{choice: chosen}``, ``priors`` say how often each is chosen.
    Choices without two slides that have it and two that have not are left out and listed in ``metrics["unseen"]``; with
    none left there is no head. Metrics are per choice, in ``metrics["choices"]``.
    """
    _check(embeddings, labels, names, background)
    known: dict[str, tuple[Int64Array, Int64Array]] = {}
    chosen: dict[str, int] = {}
    missing: dict[str, int] = {}
    for name in classes:
        rows = np.array([i for i, label in enumerate(labels) if name in label], dtype=np.int64)
        y = np.array([labels[i][name] for i in rows], dtype=np.int64)
        yes, no = int(y.sum()), int(len(y) - y.sum())
        short = max(0, MIN_PER_CLASS - yes) + max(0, MIN_PER_CLASS - no)
        if short or len(labels) < min_labels:
            missing[name] = max(short, min_labels - len(labels))
            continue
        known[name] = rows, y
        chosen[name] = yes
    if not known:
        fewest = min(missing.values(), default=0)
        text = f"'{control}': {fewest} more labelled slides at least, so that some choice is known chosen and not chosen twice each."
        return TooFewLabels(control, "slide", len(labels), missing, text)
    mean, scale = _standardisation(embeddings, background)
    x = _standardised(embeddings, mean, scale)
    stated = priors or {}
    fits: dict[str, LogisticFit] = {}
    prior: dict[str, float] = {}
    metrics: dict[str, dict[str, Any]] = {}
    for name, (rows, y) in known.items():
        fits[name] = fit_logistic(x[rows], y, 2, groups=None if groups is None else groups[rows], seed=seed)
        prior[name] = stated.get(name, float(y.mean()))
        either = np.array([1 - prior[name], prior[name]])
        metrics[name] = _metrics(fits[name], ("no", "yes"), either, name in stated, np.bincount(y, minlength=2), seed)
    kept = list(fits.values())
    return Head(
        control=control,
        level="slide",
        kind="choices",
        classes=tuple(fits),
        mean=mean,
        scale=scale,
        coef=np.stack([fit.coef[1] - fit.coef[0] for fit in kept]),
        intercept=np.array([fit.intercept[1] - fit.intercept[0] for fit in kept]),
        temperature=np.array([fit.temperature for fit in kept]),
        bias=np.array([fit.bias[1] - fit.bias[0] for fit in kept]),
        calibrated=all(fit.calibrated for fit in kept),
        n_labels=len(labels),
        label_counts=chosen,
        fingerprint=fingerprint,
        metrics={
            "measured": any(found["measured"] for found in metrics.values()),
            "choices": metrics,
            "unseen": [name for name in classes if name not in fits],
        },
        prior=np.array(list(prior.values())),
        prior_stated=tuple(name for name in fits if name in stated),
    )


def fit_number_head(
    control: str,
    embeddings: AnyFloatArray,
    numbers: Sequence[float],
    *,
    fingerprint: str,
    rating: bool = False,
    names: Sequence[object] | None = None,
    groups: Int64Array | None = None,
    background: AnyFloatArray | None = None,
    min_labels: int = MIN_LABELS,
    seed: int = 0,
) -> Head | TooFewLabels:
    """A head for a number, by ridge regression whose penalty is chosen by cross-validation.

    As :func:`fit_choice_head`, with N finite ``numbers``. ``rating``: whole numbers, within those seen. The tolerance
    of the confidence is half a star for a rating, and half a standard deviation of the labels for other numbers. All
    labels being the same number counts as too few.
    """
    _check(embeddings, numbers, names, background)
    y = np.array(numbers, dtype=np.float64)
    if not np.isfinite(y).all():
        raise ValueError("a label is not a finite number")
    more = min_labels - len(y)
    if more > 0 or len(np.unique(y)) < 2:
        what = f"{more} more labelled slides" if more > 0 else f"a slide with another number than {y[0]:g}"
        return TooFewLabels(control, "slide", len(y), {"": max(more, 1)}, f"'{control}': {what} needed.")
    mean, scale = _standardisation(embeddings, background)
    fit = fit_ridge(_standardised(embeddings, mean, scale), y, groups=groups, seed=seed)
    return Head(
        control=control,
        level="slide",
        kind="rating" if rating else "number",
        classes=(),
        mean=mean,
        scale=scale,
        coef=fit.coef[None, :],
        intercept=np.array([fit.intercept]),
        temperature=np.ones(1),
        bias=np.zeros(1),
        calibrated=False,
        n_labels=len(y),
        label_counts={"": len(y)},
        fingerprint=fingerprint,
        metrics=fit.metrics,
        tolerance=0.5 if rating else float(y.std() / 2),
        value_range=(float(y.min()), float(y.max())),
        spread=fit.spread,
    )


def _metrics(
    fit: LogisticFit, classes: Sequence[str], prior: Float64Array | None, stated: bool, labelled: Int64Array, seed: int
) -> dict[str, Any]:
    """What can be measured of a fit; ``prior``, ``stated`` and ``labelled`` as for
    :func:`~backend.learning.metrics.choice_metrics`."""
    if fit.tested is None:
        return {"measured": False, "reason": fit.reason or "not asked for", "penalty": fit.about["penalty"]}
    found = choice_metrics(
        fit.tested.logits,
        fit.tested.labels,
        classes,
        prior=prior,
        stated=stated,
        groups=fit.tested.groups,
        labelled=labelled,
        seed=seed,
    )
    return {**found, **fit.about, "not_measured": [name for name, of in found["per_class"].items() if not of["n"]]}


def _too_few(control: str, level: HeadLevel, counts: Mapping[str, int], n: int, min_labels: int) -> TooFewLabels | None:
    what = "slides" if level == "slide" else "tiles"
    missing: dict[str, int] = {}
    # The classes that are nearest to having enough: two of them are needed.
    for name in sorted(counts, key=lambda c: -counts[c])[:2]:
        if counts[name] < MIN_PER_CLASS:
            missing[name] = MIN_PER_CLASS - counts[name]
    anywhere = min_labels - n - sum(missing.values())
    if anywhere > 0:
        missing[""] = anywhere
    if len(counts) < 2:
        text = f"'{control}' offers a single label; a head needs two to tell apart."
        return TooFewLabels(control, level, n, {"": MIN_PER_CLASS}, text)
    if not missing:
        return None
    only = [name for name, count in counts.items() if count]
    told = [f"{count} labelled '{name}'" if name else f"{count} of any label" for name, count in missing.items()]
    if len(counts) > 2 and len(only) < 2:
        told = [f"{MIN_PER_CLASS} {what} of another label than {only[0]!r}"] if only else [f"{what} of two labels"]
    text = f"'{control}': more labelled {what} are needed ({n} so far): {', '.join(told)}."
    return TooFewLabels(control, level, n, missing, text)


def _check(
    embeddings: AnyFloatArray,
    labels: Sequence[object],
    names: Sequence[object] | None,
    background: AnyFloatArray | None,
) -> None:
    if len(embeddings) != len(labels):
        raise ValueError(f"{len(labels)} labels for {len(embeddings)} embeddings")
    check_embeddings(embeddings, names)
    if background is not None:
        check_embeddings(background)
        if background.shape[1] != embeddings.shape[1]:
            raise EmbeddingInvalid(
                f"Embeddings of length {embeddings.shape[1]} and {background.shape[1]} are of different models."
            )


def _standardisation(embeddings: AnyFloatArray, background: AnyFloatArray | None) -> tuple[Float64Array, Float64Array]:
    from sklearn.preprocessing import StandardScaler

    of = embeddings if background is None else background
    if of.dtype == np.float16:
        of = of.astype(np.float32)
    scaler = StandardScaler().fit(of)
    return np.asarray(scaler.mean_, dtype=np.float64), np.asarray(scaler.scale_, dtype=np.float64)


def _standardised(embeddings: AnyFloatArray, mean: Float64Array, scale: Float64Array) -> AnyFloatArray:
    # Many rows: half the memory matters more than the last digits.
    x: AnyFloatArray = embeddings.astype(np.float32 if len(embeddings) > _FLOAT32_ROWS else np.float64)
    np.subtract(x, mean, out=x, casting="same_kind")
    np.divide(x, scale, out=x, casting="same_kind")
    return x
