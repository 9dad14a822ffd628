"""Percentile ranks of attention: what colours and bands are made of. The weights themselves are what is exported."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from backend.results.bag import Float32Array


def percentile_ranks(attention: npt.NDArray[np.floating]) -> Float32Array:
    """Where each tile stands among the tiles of its bag, from 0 (lowest attention) to 1 (highest).

    Parameters
    ----------
    attention
        float (N,), finite.

    Returns
    -------
    float32 (N,): ``(tiles below + half of the other tiles with the same value) / (N - 1)``, the mid-rank divided by its
    range. Equal values get equal ranks; a bag whose tiles are all equal, and so a bag of one, gets 0.5 throughout.
    """
    n = len(attention)
    if n < 2:
        return np.full(n, 0.5, dtype=np.float32)
    _, inverse, counts = np.unique(attention, return_inverse=True, return_counts=True)
    below = np.cumsum(counts) - counts
    ranks = (below + 0.5 * (counts - 1)) / (n - 1)
    return np.asarray(ranks[inverse], dtype=np.float32)


def hottest_first(attention: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """int64 (N,): tile numbers by falling attention; tiles that are equal keep their order in the bag."""
    return np.argsort(-attention.astype(np.float64), kind="stable").astype(np.int64)
