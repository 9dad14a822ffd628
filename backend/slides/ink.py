"""Pen marks on a low-resolution picture of a slide, told from stain. Pure functions.

No colour is ink's alone: Giemsa, Alcian blue and light green absorb red most, as blue and green pens do. What a pen
mark has and stained tissue has not is evenness: over 40 µm its density varies by some percent, that of tissue by ten
to fifty. So a mark begins where something has the hue of ink **and** is even, and grows from there over paler and
less even parts of that hue.

Hues are ratios of optical densities, which do not change with the amount of stain (Beer and Lambert). Haematoxylin
and eosin absorb green most (R, G, B of 0.65, 0.70, 0.29 and 0.07, 0.99, 0.11: Ruifrok & Johnston 2001), blue and
green ink red, red ink green and blue alike, black ink all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from backend.results.bag import BoolArray, Float32Array
from backend.slides.parts import large_parts

EVEN_OVER_UM = 40.0
EVEN = 0.065  # standard deviation of density over its mean; of ink 0.02 to 0.06, of tissue above 0.08 in 99 % of it
NARROW_UM, NARROW_EVEN = 24.0, 0.03  # for thin strokes: tissue is hardly ever as even over as little
SEED_UM2 = 3_000.0
GROWN_UM = 500.0
PIECES_UM = 80.0
RIM_UM = 24.0
_SEED_SHARE = 0.1
_SAMPLED = 4


def unevenness(density: Float32Array, mpp: float, over_um: float = EVEN_OVER_UM) -> Float32Array:
    """float32 (H, W): standard deviation over mean of the density (H, W) in the square around each pixel."""
    size = max(3, round(over_um / mpp))
    mean = ndimage.uniform_filter(density, size, mode="nearest")
    uneven: Float32Array = density * density
    ndimage.uniform_filter(uneven, size, mode="nearest", output=uneven)
    uneven -= mean * mean
    np.maximum(uneven, 0, out=uneven)
    np.sqrt(uneven, out=uneven)
    np.maximum(mean, 0.02, out=mean)
    uneven /= mean
    return uneven


def find_ink(
    densities: Sequence[Float32Array], density: Float32Array, uneven: Float32Array, padding: BoolArray, mpp: float
) -> BoolArray | None:
    """Mark pen, with a rim of 24 µm; ``None``: there is none.

    Parameters
    ----------
    densities
        float32 (H, W) each: optical density of red, green and blue.
    density, uneven
        float32 (H, W): their mean, and its :func:`unevenness`.
    padding
        bool (H, W): what a scanner filled in; it is no mark.
    mpp
        µm per pixel. Even parts below 3 000 µm² are left alone: a few bluish pixels are not a pen.
    """
    sampled = [values[::_SAMPLED, ::_SAMPLED] for values in densities]
    marks = np.zeros(padding.shape, np.bool_)
    for hue in _HUES:
        # Most slides have no such hue, which a sample tells, or have it in small pieces.
        if np.count_nonzero(hue(*sampled)[1]) * (_SAMPLED * mpp) ** 2 < SEED_UM2:
            continue
        shape, dense = hue(*densities)
        large = large_parts(dense & ~padding, SEED_UM2, mpp)
        if not large.any():
            continue
        even = uneven < EVEN
        part = _bounds(large, 2)
        even[part] |= unevenness(density[part], mpp, NARROW_UM) < NARROW_EVEN
        seed = large_parts(large & even, SEED_UM2, mpp)
        if seed.any():
            marks |= _grown(seed, shape, dense, mpp)
    return _around(marks, RIM_UM, mpp) if marks.any() else None


def has_hue(densities: Sequence[Float32Array]) -> BoolArray:
    """bool (H, W): where the hue is beyond doubt that of blue, green or red ink, be it ink or a stain."""
    return _cold(*densities)[1] | _warm(*densities)[1]


# Each hue of ink, from densities of red, green and blue: where it is, and where it is beyond doubt.


def _cold(red: Float32Array, green: Float32Array, blue: Float32Array) -> tuple[BoolArray, BoolArray]:
    chroma = np.maximum(red, blue) - np.minimum(green, blue)
    return (red >= green) & (chroma >= 0.02), (red >= 1.1 * green) & (chroma >= 0.15)


def _warm(red: Float32Array, green: Float32Array, blue: Float32Array) -> tuple[BoolArray, BoolArray]:
    hue = (green >= 3 * red) & (np.abs(green - blue) <= 0.3 * green) & (green - red >= 0.1)
    return hue, hue & (green - red >= 0.6)


def _grey(red: Float32Array, green: Float32Array, blue: Float32Array) -> tuple[BoolArray, BoolArray]:
    low, high = np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)
    hue = (low >= 0.2) & (low >= 0.75 * high)
    return hue, hue & (low >= 0.45)


_HUES = (_cold, _warm, _grey)


def _grown(seed: BoolArray, hue: BoolArray, dense: BoolArray, mpp: float) -> BoolArray:
    """Marks that begin at ``seed`` and reach at most ``GROWN_UM`` from there: over what has the hue and hangs together
    with it, and over dense pieces within ``PIECES_UM``."""
    near = _around(seed, GROWN_UM, mpp)
    labels, count = ndimage.label((hue & near) | seed)
    grown = np.bincount(labels.reshape(-1), minlength=count + 1)
    seeds = np.bincount(labels[seed], minlength=count + 1)
    # Even pieces of tissue are few and small in what surrounds them.
    is_mark = seeds >= _SEED_SHARE * grown
    is_mark[0] = False
    marks: BoolArray = is_mark[labels]
    if marks.any():
        marks |= dense & _around(marks, PIECES_UM, mpp)
    return marks


def _around(mask: BoolArray, um: float, mpp: float) -> BoolArray:
    """All pixels at most ``um`` away from one of ``mask``."""
    # Distances take 24 bytes a pixel: only those of the surroundings are made.
    part = _bounds(mask, math.ceil(um / mpp) + 1)
    near = np.zeros_like(mask)
    near[part] = np.asarray(ndimage.distance_transform_edt(~mask[part])) * mpp <= um
    return near


def _bounds(mask: BoolArray, pad: int) -> tuple[slice, slice]:
    """The rectangle that holds all of ``mask``, and ``pad`` more pixels on each side."""
    ((rows, columns),) = ndimage.find_objects(mask.view(np.uint8))
    return slice(max(0, rows.start - pad), rows.stop + pad), slice(max(0, columns.start - pad), columns.stop + pad)
