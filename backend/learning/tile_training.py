"""A head on tile latents, from any number of labelled tiles, in bounded memory.

A million tiles come from some hundred slides, and neighbours are nearly copies: far fewer settle the 769 weights of a
class. So the tiles are read once, in pieces, and an even sample of each class (a reservoir; every tile of a class has
the same chance) is what the head is fitted, cross-validated and calibrated on. Classes weigh the same in all three, so
sampling them at different rates does not bias the head; metrics "as labelled" are weighted back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from backend.errors import EmbeddingInvalid
from backend.learning.heads import AnyFloatArray, Head, check_embeddings
from backend.learning.training import TooFewLabels, fit_choice_head

SAMPLE_TILES = 40_000
"""Tiles that a fit looks at: about 120 MB as float32, and a few seconds."""

MIN_TILES = 20


@dataclass(frozen=True, eq=False)
class LabelledTiles:
    """Labelled tiles of one slide: ``slide`` names it, ``latents`` float (n, D), ``labels`` n names; ``group`` is the
    same for slides of one patient, ``None`` where that is not known."""

    slide: object
    latents: AnyFloatArray
    labels: Sequence[str]
    group: object = None


def fit_tile_head(
    control: str,
    classes: Sequence[str],
    pieces: Iterable[LabelledTiles],
    *,
    fingerprint: str,
    min_labels: int = MIN_TILES,
    sample_tiles: int = SAMPLE_TILES,
    seed: int = 0,
) -> Head | TooFewLabels:
    """A head for the label of a tile.

    Parameters
    ----------
    control, classes, fingerprint
        As for :func:`backend.learning.training.fit_choice_head`.
    pieces
        Labelled tiles slide by slide, read once; a generator keeps one slide in memory. A slide may come in several
        pieces.
    min_labels
        Labelled tiles needed in all.
    sample_tiles
        Largest number of tiles that are fitted.

    Raises
    ------
    EmbeddingInvalid
        Latents with NaN or infinite values, or of different lengths; the message names the slide.
    ValueError
        A label that is none of the classes.
    """
    rng = np.random.default_rng(seed)
    quota = max(1, sample_tiles // max(1, len(classes)))
    reservoirs = {name: _Reservoir(quota, rng) for name in classes}
    groups_of: dict[object, int] = {}
    dim: int | None = None
    for piece in pieces:
        latents = piece.latents
        if latents.ndim != 2 or len(latents) != len(piece.labels):
            raise ValueError(f"{len(piece.labels)} labels for latents of shape {latents.shape} on slide {piece.slide}")
        dim = latents.shape[1] if dim is None else dim
        if latents.shape[1] != dim:
            raise EmbeddingInvalid(f"Latents of slide {piece.slide} have length {latents.shape[1]}, others {dim}.")
        check_embeddings(latents, _Names(piece.slide, len(latents)))
        apart = ("slide", piece.slide) if piece.group is None else ("patient", piece.group)
        number = groups_of.setdefault(apart, len(groups_of))
        labels = np.asarray(piece.labels, dtype=object)
        strange = set(piece.labels) - set(classes)
        if strange:
            raise ValueError(f"labels {sorted(strange)} are none of the classes {list(classes)}")
        for name, reservoir in reservoirs.items():
            rows = np.flatnonzero(labels == name)
            if len(rows):
                reservoir.add(latents, rows, number)
    for reservoir in reservoirs.values():
        reservoir.finish()
    kept = [(name, reservoir) for name, reservoir in reservoirs.items() if reservoir.seen]
    width = dim or 0
    latents = np.concatenate([r.latents for _, r in kept]) if kept else np.zeros((0, width), np.float32)
    groups = np.concatenate([r.slides for _, r in kept]) if kept else np.zeros(0, np.int64)
    names = [name for name, reservoir in kept for _ in range(len(reservoir.slides))]
    return fit_choice_head(
        control,
        classes,
        latents,
        names,
        fingerprint=fingerprint,
        level="tile",
        groups=groups,
        class_totals={name: reservoirs[name].seen for name in classes},
        min_labels=min_labels,
        seed=seed,
    )


class _Names(Sequence[object]):
    """Names of the tiles of a slide, made only where one is asked for."""

    def __init__(self, slide: object, n: int) -> None:
        self._slide, self._n = slide, n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: Any) -> str:
        return f"tile {index} of the labelled ones of slide {self._slide}"


class _Reservoir:
    """The rows with the smallest of random keys: an even sample of all that were added."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self._size, self._rng = size, rng
        self.seen = 0
        self._keys: npt.NDArray[np.float64] = np.zeros(0)
        self.slides: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._latents: list[npt.NDArray[np.floating[Any]]] = []

    @property
    def latents(self) -> AnyFloatArray:
        """(n, D), in the type in which they came."""
        return np.concatenate(self._latents)

    def add(self, latents: AnyFloatArray, rows: npt.NDArray[np.int64], slide: int) -> None:
        self.seen += len(rows)
        keys = self._rng.random(len(rows))
        if len(self._keys) >= self._size:
            better = keys < self._keys.max()
            keys, rows = keys[better], rows[better]
            if len(rows) == 0:
                return
        self._keys = np.concatenate([self._keys, keys])
        self.slides = np.concatenate([self.slides, np.full(len(rows), slide, dtype=np.int64)])
        self._latents.append(latents[rows])
        # Cutting copies everything that is kept: only when there is twice as much.
        if len(self._keys) > 2 * self._size:
            self._cut()

    def finish(self) -> None:
        if len(self._keys) > self._size:
            self._cut()

    def _cut(self) -> None:
        kept = np.sort(np.argpartition(self._keys, self._size - 1)[: self._size])
        self._keys, self.slides = self._keys[kept], self.slides[kept]
        self._latents = [np.concatenate(self._latents)[kept]]
