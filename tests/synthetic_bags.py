"""Bags with a planted region of high attention, made without a slide or a model."""

from __future__ import annotations

import numpy as np

from backend.results.bag import Bag, BagResult

PROVENANCE = {
    "model_version": "WSC test 1",
    "model_name": "test",
    "fingerprint": "f" * 40,
    "stand_in": False,
    "precision": "float32",
    "mmm_release": "1.6.3",
    "slide": "synthetic",
    "reader": "none",
}


def grid_of(
    slide_size: tuple[int, int], mpp: float, tile_px: int = 224, tile_mpp: float = 0.5
) -> tuple[int, int, float]:
    """Columns, rows and edge in level-0 pixels of the whole tiles that fit on a slide."""
    edge = tile_px * tile_mpp / mpp
    return int(slide_size[0] // edge), int(slide_size[1] // edge), edge


def synthetic_result(
    slide_size: tuple[int, int] = (20_000, 15_000),
    mpp: float = 0.25,
    *,
    planted: tuple[int, int, int, int] = (0, 0, 0, 0),
    tissue: float = 1.0,
    heads: int = 8,
    seed: int = 0,
    stand_in: bool = False,
) -> BagResult:
    """A bag on a grid; tiles in columns c0..c1 and rows r0..r1 (``planted``, ends excluded) outrank all others in every head.

    ``tissue`` is the part of the other tiles that is in the bag; the planted ones always are.
    """
    rng = np.random.default_rng(seed)
    columns, rows, edge = grid_of(slide_size, mpp)
    column, row = (axis.ravel() for axis in np.meshgrid(np.arange(columns), np.arange(rows)))
    c0, r0, c1, r1 = planted
    hot = (column >= c0) & (column < c1) & (row >= r0) & (row < r1)
    kept = hot | (rng.random(len(column)) < tissue)
    kept[0] |= not kept.any()
    grid = np.stack([column[kept], row[kept]], axis=1).astype(np.int64)
    logits = rng.uniform(-1, 1, size=(len(grid), heads)) + 6.0 * hot[kept][:, None]
    bag = Bag(
        kind="slide",
        coords=np.round(grid * edge).astype(np.int64),
        grid=grid,
        grid_size=(columns, rows),
        tile_size_level0=edge,
        slide_size=slide_size,
        tile_px=224,
        tile_mpp=0.5,
        mpp=mpp,
        mpp_source="slide",
    )
    return _result(bag, logits, rng, stand_in)


def synthetic_patches(sizes: list[tuple[int, int]], hot: int, *, seed: int = 0) -> BagResult:
    """A bag of patches of the given (width, height), of which number ``hot`` has the highest attention."""
    rng = np.random.default_rng(seed)
    n = len(sizes)
    logits = rng.uniform(-1, 1, size=(n, 8))
    logits[hot] += 6
    bag = Bag(
        kind="patches",
        coords=np.zeros((n, 2), dtype=np.int64),
        grid=np.stack([np.arange(n), np.zeros(n)], axis=1).astype(np.int64),
        grid_size=(n, 1),
        tile_size_level0=224.0,
        slide_size=(0, 0),
        tile_px=224,
        tile_mpp=0.0,
        mpp=0.0,
        mpp_source="none",
        patch_sizes=np.array(sizes, dtype=np.int64),
    )
    return _result(bag, logits, rng, stand_in=False)


def _result(bag: Bag, logits: np.ndarray, rng: np.random.Generator, stand_in: bool) -> BagResult:
    return BagResult(
        bag=bag,
        latents=np.zeros((len(bag), 768), dtype=np.float16),
        attention_logits=logits.astype(np.float32),
        slide_embedding=rng.normal(size=768).astype(np.float32),
        provenance={**PROVENANCE, "stand_in": stand_in},
    )
