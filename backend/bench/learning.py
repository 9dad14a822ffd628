"""What a training costs without Label Studio: fit and rescore a project's slides, and fit a head on tile latents."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from backend.bench.measure import Figure, Plan, below
from backend.learning.heads import Float32Array, Head, predict
from backend.learning.splits import Int64Array
from backend.learning.tile_training import LabelledTiles, fit_tile_head
from backend.learning.training import TooFewLabels, fit_choice_head

DIM = 768
_CLASSES = ("A", "B", "C")
_TILES_A_SLIDE = 10_000


def run(plan: Plan) -> list[Figure]:
    """Seconds, and mebibytes for the tile head, by number of slides or tiles."""
    slides, tiles = {"smallest": (60, 400), "quick": (10_000, 100_000), "full": (10_000, 1_000_000)}[plan.size]
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(len(_CLASSES), DIM)).astype(np.float32)
    embeddings, labels = _some(rng, centres, slides)
    seconds = sorted(_fit_and_rescore(embeddings, labels) for _ in range(plan.rounds))[plan.rounds // 2]
    name = f"fit and rescore, {slides} slides, all labelled"
    figures = [below("learning", name, seconds, 3, "s") if slides == 10_000 else Figure("learning", name, seconds, "s")]
    patients = rng.integers(max(1, slides // 3), size=slides)
    seconds = sorted(_fit_and_rescore(embeddings, labels, patients) for _ in range(plan.rounds))[plan.rounds // 2]
    name = f"fit and rescore, {slides} slides of {len(np.unique(patients))} patients"
    figures.append(
        below("learning", name, seconds, 5, "s") if slides == 10_000 else Figure("learning", name, seconds, "s")
    )
    before = _peak_mib()
    started = time.perf_counter()
    head = fit_tile_head("tiles", _CLASSES, _pieces(rng, centres, tiles), fingerprint="benchmark")
    seconds = time.perf_counter() - started
    _must_be_a_head(head)
    name, note = f"fit on {tiles} tile latents", "one run; drawing the latents included"
    figures.append(
        below("learning", name, seconds, 60, "s", note)
        if tiles == 1_000_000
        else Figure("learning", name, seconds, "s", note=note)
    )
    figures.append(Figure("learning", f"peak memory, {tiles} tile latents", _peak_mib() - before, "MiB"))
    return figures


def _some(rng: np.random.Generator, centres: Float32Array, n: int) -> tuple[Float32Array, list[str]]:
    """Overlapping classes: some labels cannot be learnt, as among people's."""
    which = rng.integers(len(centres), size=n)
    return 0.1 * centres[which] + rng.standard_normal((n, DIM), dtype=np.float32), [_CLASSES[k] for k in which]


def _fit_and_rescore(embeddings: Float32Array, labels: list[str], patients: Int64Array | None = None) -> float:
    started = time.perf_counter()
    of_project: dict[str, Any] = {"fingerprint": "benchmark", "background": embeddings, "groups": patients}
    head = fit_choice_head("diagnosis", _CLASSES, embeddings, labels, **of_project)
    predict(_must_be_a_head(head), embeddings)
    return time.perf_counter() - started


def _pieces(rng: np.random.Generator, centres: Float32Array, tiles: int) -> Iterator[LabelledTiles]:
    for number, start in enumerate(range(0, tiles, _TILES_A_SLIDE)):
        latents, labels = _some(rng, centres, min(_TILES_A_SLIDE, tiles - start))
        yield LabelledTiles(f"slide {number}", latents.astype(np.float16), labels)


def _must_be_a_head(head: Head | TooFewLabels) -> Head:
    if not isinstance(head, Head):
        raise RuntimeError(head.message)
    return head


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
