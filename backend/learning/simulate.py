"""Replays labelling on embeddings whose labels are known: how many labels each way of choosing the next slide needs.

Every round the head is trained as it would be for annotators (the same function, the same least number of labels),
judged by its balanced accuracy on items that are never labelled, and asked what to label next. Before there is a head,
nothing is suggested: the accuracy is that of guessing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from backend.learning.acquisition import margins, next_batch, principal_components
from backend.learning.heads import AnyFloatArray, Float64Array, Head, predict, probabilities
from backend.learning.training import fit_choice_head

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
StrategyName = Literal["random", "uncertainty", "default"]

STRATEGIES: tuple[StrategyName, ...] = ("random", "uncertainty", "default")
_HELD_OUT = 1 / 3


@dataclass(frozen=True, eq=False)
class KnownSet:
    """Embeddings with known labels: float (N, D) and int64 (N,) from 0; ``held_out`` bool (N,) are judged, never
    labelled. ``groups`` int64 (N,): slides with the same number are of one patient, and on one side; ``None``:
    unknown."""

    name: str
    embeddings: AnyFloatArray
    labels: Int64Array
    held_out: BoolArray
    groups: Int64Array | None = None


@dataclass(frozen=True, eq=False)
class Curves:
    """Learning curves on one set.

    Attributes
    ----------
    n_labels
        int64 (R,): labels after each round.
    accuracy
        For each strategy float64 (seeds, R): balanced accuracy on the held-out items.
    """

    dataset: str
    n_labels: Int64Array
    accuracy: Mapping[str, Float64Array]

    def interval(self, strategy: str) -> tuple[Float64Array, Float64Array, Float64Array]:
        """Mean over the seeds, and its 95 % interval (Student's t), each float64 (R,)."""
        from scipy.stats import t

        values = self.accuracy[strategy]
        n = len(values)
        mean = values.mean(axis=0)
        half = np.zeros_like(mean) if n < 2 else t.ppf(0.975, n - 1) * values.std(axis=0, ddof=1) / np.sqrt(n)
        return mean, mean - half, mean + half

    def labels_to_match_random(self, strategy: str) -> int | None:
        """The least labels with which the strategy's mean accuracy is what random reaches with all of them; ``None``:
        it never is."""
        goal = self.accuracy["random"].mean(axis=0)[-1]
        reached = np.flatnonzero(self.accuracy[strategy].mean(axis=0) >= goal)
        return int(self.n_labels[reached[0]]) if len(reached) else None

    def summary(self) -> dict[str, Any]:
        """As JSON: for each strategy the labels to match random, and the final accuracy with its interval."""
        rows: dict[str, Any] = {}
        for strategy in self.accuracy:
            mean, low, high = self.interval(strategy)
            rows[strategy] = {
                "labels_to_match_random": self.labels_to_match_random(strategy),
                "final": [float(mean[-1]), float(low[-1]), float(high[-1])],
                "mean": [round(float(value), 4) for value in mean],
            }
        return {
            "dataset": self.dataset,
            "seeds": len(self.accuracy["random"]),
            "n_labels": self.n_labels.tolist(),
            "strategies": rows,
        }


def digits(seed: int) -> KnownSet:
    """scikit-learn's 1 797 handwritten digits (64 values each, ten classes); a third is held out, by ``seed``."""
    from sklearn.datasets import load_digits

    data = load_digits()
    labels = data.target.astype(np.int64)
    return KnownSet("digits", data.data.astype(np.float32), labels, _split(labels, seed))


def imbalanced(seed: int, n: int = 5000, dim: int = 768, positives: float = 0.05) -> KnownSet:
    """``n`` items to label and half as many held out, of which one in twenty is positive.

    32 normal factors, in one direction of which positives lie four standard deviations away, mixed into ``dim`` values
    with noise of half their size.
    """
    rng = np.random.default_rng(seed)
    total, factors = n + n // 2, 32
    labels = (rng.permutation(total) < round(positives * total)).astype(np.int64)
    direction = rng.normal(size=factors)
    direction /= np.linalg.norm(direction)
    hidden = rng.normal(size=(total, factors)) + 4.0 * labels[:, None] * direction
    mixing = rng.normal(size=(factors, dim)) / np.sqrt(factors)
    embeddings = (hidden @ mixing + 0.5 * rng.normal(size=(total, dim))).astype(np.float32)
    return KnownSet("imbalanced", embeddings, labels, np.arange(total) >= n)


def from_file(path: Path) -> Callable[[int], KnownSet]:
    """A set of one's own: an ``.npz`` with ``embeddings`` float (N, D) and ``labels`` (N,) of any names, and
    ``patients`` (N,) where they are known; a third is held out, by seed, and no patient is in both parts."""
    with np.load(path, allow_pickle=False) as data:
        embeddings, names, patients = data["embeddings"], data["labels"], data.get("patients")
    labels = np.unique(names, return_inverse=True)[1].astype(np.int64)
    groups = None if patients is None else np.unique(patients, return_inverse=True)[1].astype(np.int64)
    return lambda seed: KnownSet(path.stem, embeddings, labels, _split(labels, seed, groups), groups)


def replay(known: KnownSet, strategy: StrategyName, *, budget: int, batch_size: int, seed: int) -> Float64Array:
    """float64 (budget / batch_size,): balanced accuracy on the held-out items after each round of ``batch_size``
    labels."""
    rng = np.random.default_rng(seed)
    pool = np.flatnonzero(~known.held_out)
    x, y = known.embeddings[pool], known.labels[pool]
    names = [str(label) for label in range(int(known.labels.max()) + 1)]
    features = principal_components(x, seed=seed) if strategy == "default" else np.zeros((len(pool), 0))
    labelled: BoolArray = np.zeros(len(pool), dtype=np.bool_)
    head: Head | None = None
    curve: list[float] = []
    for number in range(budget // batch_size):
        certain = probabilities(head, x, alike=True) if head is not None else None
        open_ = np.flatnonzero(~labelled)
        if strategy == "default":
            chosen = next_batch(features, labelled, certain, batch_size, seed=seed * 1000 + number)
        elif strategy == "uncertainty" and certain is not None:
            chosen = open_[np.argsort(margins(certain[open_]), kind="stable")[:batch_size]]
        else:
            chosen = rng.choice(open_, batch_size, replace=False)
        labelled[chosen] = True
        fitted = fit_choice_head(
            "simulated",
            names,
            x[labelled],
            [names[label] for label in y[labelled]],
            fingerprint="simulated",
            background=x,
            groups=None if known.groups is None else known.groups[pool][labelled],
            measure=False,  # each round's head is judged by what is held out
        )
        head = fitted if isinstance(fitted, Head) else None
        curve.append(_judge(head, known, len(names)))
    return np.array(curve)


def simulate(
    datasets: Mapping[str, Callable[[int], KnownSet]] | None = None,
    *,
    seeds: int = 10,
    budget: int = 200,
    batch_size: int = 10,
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[Curves]:
    """Replay each strategy on each set with each seed.

    Parameters
    ----------
    datasets
        Sets by name, each a function of the seed; by default :func:`digits` and :func:`imbalanced`.
    quick
        Two seeds, 60 labels and small sets: for a look, not for a claim.
    progress
        Called with a line after each replay of a seed.
    """
    if datasets is None:
        small = 600 if quick else 5000
        datasets = {"digits": digits, "imbalanced": lambda seed: imbalanced(seed, n=small)}
    if quick:
        seeds, budget = min(seeds, 2), min(budget, 60)
    if seeds < 1 or batch_size < 1 or budget < batch_size:
        raise ValueError(f"{seeds} seeds and {budget} labels in batches of {batch_size} are nothing to replay")
    result = []
    for name, make in datasets.items():
        accuracy: dict[str, list[Float64Array]] = {strategy: [] for strategy in STRATEGIES}
        for seed in range(seeds):
            start = time.monotonic()
            known = make(seed)
            for strategy in STRATEGIES:
                accuracy[strategy].append(replay(known, strategy, budget=budget, batch_size=batch_size, seed=seed))
            if progress is not None:
                progress(f"{name}: seed {seed + 1} of {seeds}, {time.monotonic() - start:.1f} s")
        n_labels = np.arange(1, budget // batch_size + 1) * batch_size
        result.append(Curves(name, n_labels, {key: np.array(rows) for key, rows in accuracy.items()}))
    return result


def write_report(curves: Sequence[Curves], folder: Path) -> tuple[Path, Path]:
    """``learning-curves.png`` and ``learning-curves.json`` in ``folder``, which is made; returns their paths."""
    from backend.learning.curves_plot import draw_curves

    folder.mkdir(parents=True, exist_ok=True)
    picture, table = folder / "learning-curves.png", folder / "learning-curves.json"
    draw_curves(curves, picture)
    table.write_text(json.dumps([curve.summary() for curve in curves], indent=1), encoding="utf-8")
    return picture, table


def _judge(head: Head | None, known: KnownSet, n_classes: int) -> float:
    """Mean recall over the classes of the held-out items; without a head that of a guess."""
    if head is None:
        return 1 / n_classes
    truth = known.labels[known.held_out]
    said = np.array([int(str(value)) for value in predict(head, known.embeddings[known.held_out]).values])
    hits = np.bincount(truth, said == truth, minlength=n_classes)
    held = np.bincount(truth, minlength=n_classes)
    return float((hits[held > 0] / held[held > 0]).mean())


def _split(labels: Int64Array, seed: int, groups: Int64Array | None = None) -> BoolArray:
    """A third of each class, or of the patients."""
    rng = np.random.default_rng(seed)
    held_out: BoolArray = np.zeros(len(labels), dtype=np.bool_)
    if groups is not None:
        patients = rng.permutation(np.unique(groups))
        return np.isin(groups, patients[: round(len(patients) * _HELD_OUT)])
    for c in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == c))
        held_out[rows[: round(len(rows) * _HELD_OUT)]] = True
    return held_out
