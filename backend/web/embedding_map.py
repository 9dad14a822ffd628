"""All slides of one model as points in the plane: the two principal components of their embeddings."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from backend.label_studio.services import Services
from backend.results.bag import Float32Array

MAX_SLIDES = 5000


def principal_plane(embeddings: Float32Array) -> tuple[npt.NDArray[np.float64], tuple[float, float]]:
    """The first two principal components (Pearson 1901; Hotelling 1933).

    Parameters
    ----------
    embeddings
        float32 (N, D), N ≥ 1, finite.

    Returns
    -------
    float64 (N, 2), centred at 0, and the part of the variance that each axis holds. The sign of an axis is arbitrary; it is set so that
    the component of largest magnitude in its direction is positive, so that the same slides give the same map.
    """
    centred = embeddings.astype(np.float64) - embeddings.mean(axis=0, dtype=np.float64)
    # The eigenvectors of the D x D scatter, or of the N x N Gram matrix, whichever is smaller.
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    plane = np.zeros((2, centred.shape[1]))
    plane[: min(2, len(directions))] = directions[:2]
    signs = np.sign(plane[np.arange(2), np.abs(plane).argmax(axis=1)])
    plane *= np.where(signs == 0, 1, signs)[:, None]
    total = float((values**2).sum())
    parts = [float(value**2) / total if total > 0 else 0.0 for value in values[:2]]
    return centred @ plane.T, (parts[0], parts[1] if len(parts) > 1 else 0.0)


@dataclass(frozen=True)
class _Seen:
    """Of one stored result: its embedding, ``None`` if it is of another model; the slide's name; its number of tiles."""

    embedding: Float32Array | None
    slide: str
    tiles: int


class EmbeddingMap:
    """The map of what is stored. Each result is read once; the map is computed again when there are others."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._seen: dict[str, _Seen] = {}
        self._made: tuple[frozenset[str], dict[str, Any]] | None = None
        self._lock = threading.Lock()

    def as_json(self) -> dict[str, Any]:
        """``points`` (key, x, y, slide, tiles, url), ``explained`` (part of the variance of x and of y), ``left_out`` (how many).

        Left out are slides beyond :data:`MAX_SLIDES`; embeddings of other models than the current one cannot be compared, and are
        not counted.
        """
        with self._lock:
            keys = frozenset(self._services.store.keys())
            if self._made is None or self._made[0] != keys:
                self._made = (keys, self._make(keys))
            return self._made[1]

    def _make(self, keys: frozenset[str]) -> dict[str, Any]:
        fingerprint = self._services.model.fingerprint
        self._seen = {key: seen for key, seen in self._seen.items() if key in keys}
        shown: list[str] = []
        left_out = 0
        for key in sorted(keys):
            if len(shown) >= MAX_SLIDES:
                left_out += 1
                continue
            seen = self._seen.get(key)
            if seen is None:
                result = self._services.store.get(key, latents=False)
                if result is None:
                    continue
                ours = result.provenance.get("fingerprint") == fingerprint
                name = str(result.provenance.get("slide", key))
                seen = self._seen[key] = _Seen(result.slide_embedding if ours else None, name, len(result.bag))
            if seen.embedding is not None:
                shown.append(key)
        if not shown:
            return {"points": [], "explained": [0.0, 0.0], "left_out": left_out}
        embeddings = np.stack([e for key in shown if (e := self._seen[key].embedding) is not None])
        plane, explained = principal_plane(embeddings)
        points = [
            {
                "key": key,
                "x": round(float(x), 5),
                "y": round(float(y), 5),
                "slide": self._seen[key].slide,
                "tiles": self._seen[key].tiles,
                "url": f"/slides/{key}",
            }
            for key, (x, y) in zip(shown, plane, strict=True)
        ]
        return {"points": points, "explained": list(explained), "left_out": left_out}
