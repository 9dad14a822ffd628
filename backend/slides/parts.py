"""Connected parts of masks by their area. Pure functions."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from backend.results.bag import BoolArray

_COUNTED_AT_ONCE = 2**18


def large_parts(mask: BoolArray, area_um2: float, mpp: float) -> BoolArray:
    """The connected parts of ``mask`` (by edges) of at least ``area_um2``; ``mpp``: µm per pixel."""
    labels, count = ndimage.label(mask)
    # In pieces, because bincount makes an int64 copy of what it counts.
    flat = labels.reshape(-1)
    pixels = sum(
        np.bincount(flat[i : i + _COUNTED_AT_ONCE], minlength=count + 1) for i in range(0, len(flat), _COUNTED_AT_ONCE)
    )
    large = np.asarray(pixels) * mpp**2 >= area_um2
    large[0] = False
    kept: BoolArray = large[labels]
    return kept
