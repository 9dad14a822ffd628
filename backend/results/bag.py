"""A bag (the tiles of one slide) and what the model said of it. Frozen data, no I/O.

Coordinates are level-0 pixels, x before y, of a tile's top-left corner. A tile's edge in level-0 pixels is
``tile_px * tile_mpp / mpp`` and rarely a whole number: the tile in column *c* starts at ``round(c * edge)``, computed from *c* itself, so
that rounding never adds up towards the far edge.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from backend.results.tissue_record import TissueRecord

Int64Array = npt.NDArray[np.int64]
Float16Array = npt.NDArray[np.float16]
Float32Array = npt.NDArray[np.float32]
UInt8Array = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]

SLIDE_REF = "slide_ref"
"""Name in a result's provenance of where the slide lies, as JSON text: for us, not for what is exported."""

BAG_KEY = "bag_key"
"""Name in a result's provenance of the bag key under which it was computed."""

SLIDE_ID = "slide_id"
"""Name in a result's provenance of the slide that it is of, as 40 hexadecimal digits: in the folders of `predict`."""

BagKind = Literal["slide", "patches"]
MppSource = Literal["slide", "task", "default", "forced", "none"]


@dataclass(frozen=True, eq=False)
class Bag:
    """Where the tiles of one slide lie.

    Attributes
    ----------
    kind
        ``"slide"``: tiles cut from one slide on a grid. ``"patches"``: N images given as such, one page each.
    coords
        int64 (N, 2), level-0 x and y of each tile's top-left corner. All zero for patches.
    grid
        int64 (N, 2), column and row of each tile. ``(i, 0)`` for patch i.
    grid_size
        (columns, rows) of the whole grid, tissue or not.
    tile_size_level0
        Edge of a tile in level-0 pixels (a float: see the module's docstring). ``tile_px`` for patches.
    slide_size
        (width, height) of level 0 in pixels; (0, 0) for patches.
    tile_px
        Edge of a tile as the encoder sees it, in pixels.
    tile_mpp
        µm per pixel of a tile as the encoder sees it. 0.0 for patches: unknown.
    mpp, mpp_source
        µm per level-0 pixel and who said so. 0.0 and ``"none"`` for patches.
    patch_sizes
        int64 (N, 2), width and height of each patch as given; ``None`` for slides.
    bounds
        x, y, width, height of the scanned area in level-0 pixels where the file states one (``openslide.bounds-*``), else ``None``. Coordinates do
        not start there: they are always those of level 0.
    notes
        What a rule took away or overruled (a level, ink, a scale), a sentence each, for people: ``doctor``, the summary and the provenance show them.
    tissue
        What was taken for tissue; ``None`` for patches and in earlier results.
    """

    kind: BagKind
    coords: Int64Array
    grid: Int64Array
    grid_size: tuple[int, int]
    tile_size_level0: float
    slide_size: tuple[int, int]
    tile_px: int
    tile_mpp: float
    mpp: float
    mpp_source: MppSource
    patch_sizes: Int64Array | None = None
    bounds: tuple[int, int, int, int] | None = None
    notes: tuple[str, ...] = ()
    tissue: TissueRecord | None = None

    def __post_init__(self) -> None:
        n = len(self.coords)
        if self.coords.shape != (n, 2) or self.grid.shape != (n, 2):
            raise ValueError(f"coords {self.coords.shape} and grid {self.grid.shape} must both be (N, 2)")
        if self.kind == "patches" and (self.patch_sizes is None or self.patch_sizes.shape != (n, 2)):
            raise ValueError("a bag of patches needs patch_sizes of shape (N, 2)")

    def __len__(self) -> int:
        return len(self.coords)


@dataclass(frozen=True, eq=False)
class BagResult:
    """What the model said of a bag.

    Attributes
    ----------
    bag
        The tiles, in the order of every array below: row i is tile i.
    latents
        float16 (N, D): the squeezer's latent of each tile.
    attention_logits
        float32 (N, H): the attention of each tile and head before the softmax.
    slide_embedding
        float32 (D,): the grouper's slide vector.
    provenance
        How the result came about: JSON values only. At least ``model_version``, ``fingerprint``, ``model_name``,
        ``stand_in``, ``precision``, ``mmm_release``, ``slide``, ``reader``.
    """

    bag: Bag
    latents: Float16Array
    attention_logits: Float32Array
    slide_embedding: Float32Array
    provenance: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.bag)
        if self.latents.ndim != 2 or len(self.latents) != n:
            raise ValueError(f"latents {self.latents.shape} do not belong to a bag of {n} tiles")
        if self.attention_logits.ndim != 2 or len(self.attention_logits) != n:
            raise ValueError(f"attention_logits {self.attention_logits.shape} do not belong to a bag of {n} tiles")
        if self.slide_embedding.ndim != 1:
            raise ValueError(f"slide_embedding has shape {self.slide_embedding.shape}, not (D,)")

    @cached_property
    def attention(self) -> Float32Array:
        """float32 (N, H): softmax of the logits over the tiles of the bag, each column sums to 1. No clamp."""
        logits = self.attention_logits.astype(np.float64)
        weights: npt.NDArray[np.float64] = np.exp(logits - logits.max(axis=0, keepdims=True))
        weights /= weights.sum(axis=0, keepdims=True)
        return weights.astype(np.float32)

    @cached_property
    def mean_attention(self) -> Float32Array:
        """float32 (N,): mean of :attr:`attention` over the heads; sums to 1."""
        mean: npt.NDArray[np.float64] = np.mean(self.attention, axis=1, dtype=np.float64)
        return mean.astype(np.float32)


def digest(parts: Mapping[str, object]) -> str:
    """40 hexadecimal digits of the SHA-256 of ``parts`` as canonical JSON: the form of every key of ours."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]
