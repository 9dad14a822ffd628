"""Where tissue is, on a low-resolution picture of the slide. Pure functions.

Stain has colour and glass has none, so tissue is found by chroma (largest minus smallest channel), cut by Otsu's threshold **kept within 14–45**:
without that clamp Otsu splits a blank slide's noise in two and calls half of it tissue, and a slide full of
tissue loses its pale half. Black and white scanner padding, dust and air bubbles have no chroma either.

Ink is told from stain by which channel it absorbs most. Haematoxylin and eosin both absorb green most (optical densities R, G, B of 0.65, 0.70, 0.29 and
0.07, 0.99, 0.11: Ruifrok & Johnston 2001); blue and green ink absorb red most; red ink absorbs green and blue alike; black ink absorbs all.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage
from skimage.filters import threshold_otsu

from backend.results.bag import BoolArray, Float32Array, UInt8Array

CHROMA_MIN, CHROMA_MAX = 14.0, 45.0
SMOOTHING_UM = 8.0
SPECK_UM2 = 4_000.0
HOLE_UM2 = 30_000.0
INK_SPECK_UM2 = 3_000.0
INK_RIM_UM = 24.0
_BLACK = 45
_MAX_TINT = 20.0
_COUNTED_AT_ONCE = 2**18


def tissue_mask(rgb: UInt8Array, mpp: float, *, pen_rules: bool) -> BoolArray:
    """Mark tissue.

    Parameters
    ----------
    rgb
        uint8 (H, W, 3), the slide at about 8 µm per pixel.
    mpp
        µm per pixel of ``rgb``: areas are judged in µm².
    pen_rules
        Whether to take out pen marks. Off for stains that look like ink (a pale blue counterstain).

    Returns
    -------
    bool (H, W), True where there is tissue.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"rgb must be uint8 (H, W, 3), not {rgb.dtype} {rgb.shape}")
    if not mpp > 0:
        raise ValueError(f"mpp must be positive, not {mpp}")
    colours = _without_tint(rgb.astype(np.float32))
    chroma = _smooth_chroma(colours, SMOOTHING_UM / mpp / 2)
    cut = float(np.clip(threshold_otsu(chroma), CHROMA_MIN, CHROMA_MAX)) if np.ptp(chroma) > 0 else CHROMA_MIN
    mask = chroma > cut
    black = _highest(colours) < _BLACK
    taken_out = black
    if pen_rules:
        taken_out = black | ink_mask(colours, mpp)
    # Specks of dust go before holes are filled; ink and padding go last, or a hole in tissue that they made would be filled again.
    mask = _large_parts(mask & ~taken_out, SPECK_UM2, mpp)
    mask = ~_large_parts(~mask, HOLE_UM2, mpp) & ~taken_out
    return _large_parts(mask, SPECK_UM2, mpp)


def ink_mask(colours: Float32Array, mpp: float) -> BoolArray:
    """Mark pen: seeds of saturated ink, grown over the paler ink that touches them, and a rim of 24 µm.

    ``colours`` is float32 (H, W, 3), 0–255. Returns bool (H, W). Seeds below 3 000 µm² are left alone: a few bluish pixels are not a pen.
    """
    red, green, blue = colours[..., 0], colours[..., 1], colours[..., 2]
    high = _highest(colours)
    chroma = high - _lowest(colours)
    # Haematoxylin absorbs green more than red however dense it is; a saturated blue that does not is ink.
    cold = _grow(
        (green - red >= 18) & (chroma >= 40) | (green >= red) & (chroma >= 90), (green - red >= 2) & (chroma >= 10), mpp
    )
    warm_seed = (red >= 150) & (red - green >= 120) & (red - blue >= 100) & (np.abs(blue - green) <= 25)
    warm = _grow(warm_seed, (red - green >= 20) & (np.abs(blue - green) <= 0.25 * (red - green)), mpp)
    dark = _grow((high < 70) & (chroma < 30), (high < 140) & (chroma < 30), mpp)
    ink = cold | warm | dark
    if not ink.any():
        return ink
    # Distances take 24 bytes a pixel: only those of the ink's surroundings are made.
    rim = math.ceil(INK_RIM_UM / mpp) + 1
    (around,) = ndimage.find_objects(ink.view(np.uint8))
    part = tuple(slice(max(0, s.start - rim), s.stop + rim) for s in around)
    ink[part] = np.asarray(ndimage.distance_transform_edt(~ink[part])) * mpp <= INK_RIM_UM
    return ink


def _grow(seed: BoolArray, weak: BoolArray, mpp: float) -> BoolArray:
    """The connected parts of ``weak`` that hold a seed of at least ``INK_SPECK_UM2``."""
    seed = _large_parts(seed, INK_SPECK_UM2, mpp)
    if not seed.any():
        return seed
    labels, count = ndimage.label(weak | seed)
    held = np.zeros(count + 1, np.bool_)
    held[np.unique(labels[seed])] = True
    grown: BoolArray = held[labels]
    return grown


def _large_parts(mask: BoolArray, area_um2: float, mpp: float) -> BoolArray:
    """The connected parts of ``mask`` (by edges) of at least ``area_um2``."""
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


def _smooth_chroma(colours: Float32Array, sigma: float) -> Float32Array:
    """The chroma of (H, W, 3), smoothed: (H, W). Channel by channel, since a large slide's overview is needed once here and not twice."""
    high = low = ndimage.gaussian_filter(colours[..., 0], sigma, mode="nearest")
    for channel in (1, 2):
        smooth = ndimage.gaussian_filter(colours[..., channel], sigma, mode="nearest")
        high, low = np.maximum(high, smooth), np.minimum(low, smooth)
    chroma: Float32Array = np.subtract(high, low)
    return chroma


def _highest(colours: Float32Array) -> Float32Array:
    """The largest channel of (H, W, 3). NumPy's own reduction over so short an axis takes ten times as long."""
    highest: Float32Array = np.maximum(np.maximum(colours[..., 0], colours[..., 1]), colours[..., 2])
    return highest


def _lowest(colours: Float32Array) -> Float32Array:
    lowest: Float32Array = np.minimum(np.minimum(colours[..., 0], colours[..., 1]), colours[..., 2])
    return lowest


def _without_tint(colours: Float32Array) -> Float32Array:
    """Divide by the colour of the glass, where there is glass: a yellowish lamp is not tissue."""
    bright = _lowest(colours) >= 200
    if np.count_nonzero(bright) < 0.02 * bright.size:
        return colours
    glass = np.array([np.median(colours[..., channel][bright]) for channel in range(3)], np.float32)
    if glass.max() - glass.min() > _MAX_TINT:
        return colours
    balanced: Float32Array = colours * (glass.max() / glass)
    np.minimum(balanced, np.float32(255), out=balanced)
    return balanced
