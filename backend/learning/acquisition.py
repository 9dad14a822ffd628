"""Which slide to label next, and which labelled slides are like it.

Before there is a head: MaxHerding (Bae et al., "Generalized coverage for more robust low-budget active learning", ECCV
2024), which covers the project by slides that are typical and unlike each other. With a head: the slides with the
smallest margin between the two most probable classes, and of ten times as many as a batch needs those that CLUE (Prabhu
et al., "Active domain adaptation via clustering uncertainty-weighted embeddings", ICCV 2021) finds unlike each other.
The strategies are those of ``scikit-activeml``; distances are taken between the leading principal components of the
standardised embeddings, where they are not drowned by hundreds of small ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from backend.learning.heads import AnyFloatArray, Float64Array, Head, HeadOutput, check_embeddings

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

BATCH = 20
_COMPONENTS = 32
_SHORTLIST = 10
_HERD_MAX = 4000
_CLUSTERS_MAX = 20


@dataclass(frozen=True, eq=False)
class LabellingOrder:
    """What to label next, for N slides.

    Attributes
    ----------
    priority
        int64 (N,): 1 for the slide to label first, 2 for the next; 0 for labelled ones.
    novelty
        float64 (N,) in [0, 1]: how unlike the most similar *other* labelled slide it is, ``(1 - cosine) / 2`` of the
        centred embeddings; 1 as long as no slide is labelled.
    cluster
        int64 (N,): which slides are alike; numbers from 0.
    """

    priority: Int64Array
    novelty: Float64Array
    cluster: Int64Array


def labelling_order(
    embeddings: AnyFloatArray,
    labelled: BoolArray,
    probabilities: Float64Array | None,
    *,
    batch_size: int = BATCH,
    names: Sequence[object] | None = None,
    seed: int = 0,
) -> LabellingOrder:
    """Rank the unlabelled slides of a project.

    The first ``batch_size`` are chosen together, uncertain (or without a head: typical) and diverse; those after them
    by uncertainty (or typicality) alone, until the next ranking.

    Parameters
    ----------
    embeddings
        float (N, D), all slides of the project.
    labelled
        bool (N,).
    probabilities
        float64 (N, K) as :func:`choice_like` gives; ``None`` before there is a head.

    Raises
    ------
    EmbeddingInvalid
        NaN or infinite values, naming the slide.
    """
    check_embeddings(embeddings, names)
    n = len(embeddings)
    if labelled.shape != (n,) or (probabilities is not None and len(probabilities) != n):
        raise ValueError(f"labelled {labelled.shape} and probabilities must be about the {n} slides")
    if n == 0:
        return LabellingOrder(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))
    features = principal_components(embeddings, seed=seed)
    cluster, distance = _clusters(features, seed)
    priority = np.zeros(n, dtype=np.int64)
    open_ = np.flatnonzero(~labelled)
    first = next_batch(features, labelled, probabilities, batch_size, seed=seed)
    key = distance if probabilities is None else margins(probabilities)
    rest = np.setdiff1d(open_, first)
    order = np.concatenate([first, rest[np.argsort(key[rest], kind="stable")]])
    priority[order] = np.arange(1, len(order) + 1)
    return LabellingOrder(priority, _novelty(embeddings, labelled), cluster)


def choice_like(head: Head, output: HeadOutput) -> Float64Array:
    """float64 (N, K ≥ 2): probabilities whose margin says how sure the head is, for heads of any kind.

    One choice: its own, were all classes equally frequent: a margin at the prevalence would pass over what looks like a
    rare class. Several: chosen or not, of the least certain one, likewise. Numbers: the confidence *c* as ``((1 + c) /
    2, (1 - c) / 2)``, whose margin is *c*.
    """
    if head.kind == "choice" and output.alike is not None:
        return output.alike
    if head.kind == "choices" and output.alike is not None:
        sure = np.maximum(output.alike, 1 - output.alike).min(axis=1)
        return np.stack([sure, 1 - sure], axis=1)
    return np.stack([(1 + output.confidence) / 2, (1 - output.confidence) / 2], axis=1)


def margins(probabilities: Float64Array) -> Float64Array:
    """float64 (N,): the two highest probabilities' difference; small is uncertain."""
    two = np.partition(probabilities, -2, axis=1)[:, -2:]
    return np.asarray(two[:, 1] - two[:, 0], dtype=np.float64)


def principal_components(embeddings: AnyFloatArray, *, seed: int = 0) -> Float64Array:
    """float64 (N, ≤ 32): leading principal components of the standardised embeddings."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    x = StandardScaler().fit_transform(embeddings.astype(np.float64))
    if len(x) < 2 or not x.any():  # slides that are all the same have no directions
        return np.zeros((len(x), 1))
    pca = PCA(min(_COMPONENTS, *x.shape), random_state=seed, svd_solver="randomized")
    with threadpool_limits(1):
        return np.asarray(pca.fit_transform(x), dtype=np.float64)


def next_batch(
    features: Float64Array, labelled: BoolArray, probabilities: Float64Array | None, batch_size: int, *, seed: int = 0
) -> Int64Array:
    """int64 (≤ batch_size,): rows to label next, the most wanted first.

    ``features`` as :func:`principal_components` gives; the rest as for :func:`labelling_order`.
    """
    from threadpoolctl import threadpool_limits

    open_ = np.flatnonzero(~labelled)
    size = min(batch_size, len(open_))
    if size == 0:
        return open_
    if size == len(open_) and probabilities is not None:
        return open_[np.argsort(margins(probabilities[open_]), kind="stable")]
    with threadpool_limits(1):  # many small products
        if probabilities is None:
            return _typical(features, labelled, open_, size, seed)
        return _uncertain(features, labelled, probabilities, open_, size, seed)


def _typical(features: Float64Array, labelled: BoolArray, open_: Int64Array, size: int, seed: int) -> Int64Array:
    from skactiveml.pool import MaxHerding

    rng = np.random.default_rng(seed)
    rows = open_
    if len(rows) > _HERD_MAX:  # its memory grows with the square; an even sample is covered by the same slides
        rows = np.sort(rng.choice(rows, _HERD_MAX, replace=False))
    done = np.flatnonzero(labelled)
    if len(done) > _HERD_MAX:
        done = np.sort(rng.choice(done, _HERD_MAX, replace=False))
    pool = np.concatenate([done, rows])
    known = np.where(np.arange(len(pool)) < len(done), 0.0, np.nan)
    x = features[pool]
    x[~x.any(axis=1), 0] = 1e-9  # it divides by the length of each vector
    chosen = MaxHerding(random_state=seed).query(x, known, batch_size=size)
    return np.asarray(pool[chosen], dtype=np.int64)


def _uncertain(
    features: Float64Array, labelled: BoolArray, probabilities: Float64Array, open_: Int64Array, size: int, seed: int
) -> Int64Array:
    from skactiveml.pool import Clue, UncertaintySampling

    from backend.learning.known_classifier import KnownProbabilities

    known = np.where(labelled, 0.0, np.nan)
    classes = list(range(probabilities.shape[1]))
    strategy = UncertaintySampling(method="margin_sampling", random_state=seed)
    shortlist = strategy.query(
        features,
        known,
        clf=KnownProbabilities(probabilities[open_], classes=classes),
        fit_clf=False,
        candidates=open_,
        batch_size=min(size * _SHORTLIST, len(open_)),
    )
    if len(np.unique(features[shortlist], axis=0)) <= size:  # copies of few slides: nothing to spread over
        return np.asarray(shortlist[:size], dtype=np.int64)
    shortlist = np.sort(shortlist)
    diverse = Clue(method="margin_sampling", cluster_algo_dict={"random_state": seed, "n_init": 1}, random_state=seed)
    chosen = diverse.query(
        features,
        known,
        estimator=KnownProbabilities(probabilities[shortlist], classes=classes),
        fit_estimator=False,
        candidates=shortlist,
        batch_size=size,
    )
    order = np.argsort(margins(probabilities[chosen]), kind="stable")
    return np.asarray(chosen[order], dtype=np.int64)


# --- novelty, clusters, neighbours ------------------------------------------------------------------------------


def nearest_labelled(
    embedding: AnyFloatArray, labelled_embeddings: AnyFloatArray, *, k: int = 5
) -> tuple[Int64Array, Float64Array]:
    """The labelled slides most like one slide.

    Parameters
    ----------
    embedding
        float (D,).
    labelled_embeddings
        float (M, D); leave the slide itself out.

    Returns
    -------
    Rows int64 (≤ k,), most similar first, and their cosines float64 in [-1, 1].
    """
    check_embeddings(embedding[None, :])
    check_embeddings(labelled_embeddings)
    cosine = (_unit(labelled_embeddings) @ _unit(embedding[None, :])[0]).clip(-1, 1)
    rows = np.argsort(-cosine, kind="stable")[:k]
    return rows, cosine[rows]


def _unit(x: AnyFloatArray) -> Float64Array:
    wide = x.astype(np.float64)
    # A vector of zeros is like nothing: its cosine to all is 0.
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12), dtype=np.float64)


def _novelty(embeddings: AnyFloatArray, labelled: BoolArray) -> Float64Array:
    """Centred, since what all embeddings have in common would make every cosine close to 1."""
    known = np.flatnonzero(labelled)
    novelty = np.ones(len(embeddings))
    if len(known) == 0:
        return novelty
    unit = _unit(embeddings - embeddings.mean(axis=0, dtype=np.float64))
    for start in range(0, len(unit), 1000):
        part = slice(start, start + 1000)
        cosine = unit[part] @ unit[known].T
        own = np.arange(len(unit))[part][:, None] == known[None, :]
        cosine[own] = -1
        novelty[part] = (1 - cosine.max(axis=1).clip(-1, 1)) / 2
    return novelty


def _clusters(features: Float64Array, seed: int) -> tuple[Int64Array, Float64Array]:
    """The cluster of each slide, and its distance to the cluster's centre."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    distinct = len(np.unique(features, axis=0))
    k = min(_CLUSTERS_MAX, distinct, max(2, math.isqrt(len(features) // 2)))
    with threadpool_limits(1):
        distances = KMeans(k, n_init=3, random_state=seed).fit_transform(features)
    return np.asarray(distances.argmin(axis=1), dtype=np.int64), np.asarray(distances.min(axis=1), dtype=np.float64)
