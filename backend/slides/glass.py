"""The colour of empty glass, wherever on the slide, on a low-resolution picture of it. Pure functions.

Glass is what is bright, has no texture, and has a colour that much of the slide shares: the brightest such colour as
a rule. Its lamp and its mounting medium may be yellowish, bluish or grey, and uneven, so a surface of second degree
is laid through it. Against that surface optical densities are measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from backend.results.bag import BoolArray, Float32Array, UInt8Array

Float64Array = npt.NDArray[np.float64]

_BLOCK_PX = 4
_SMOOTH = 10  # largest difference of grey values within a block without texture
_WHITE = 253  # from here on it is what scanners fill in where they did not scan, or a lamp that is too bright
_DARKEST = 110
_BINS = 64  # a channel
_PEAK_SHARE, _PEAK_BLOCKS = 0.01, 6
_BESIDE_WHITE = 0.05
_TINT_MAX, _PURPLE_MAX = 0.28, 0.035
_NEUTRAL = 0.015
_NEAR = (0.06, 0.045, 0.035, 0.025, 0.02, 0.02)  # density by which glass may differ from the surface, fit after fit
_FITTED_FROM, _FITTED_AT_MOST = 60, 10_000
_NO_GLASS = 243.0


@dataclass(frozen=True)
class Glass:
    """The light that comes through empty glass.

    Attributes
    ----------
    terms
        float64 (3, 6): of each channel the base-10 logarithm of its grey value, as factors of 1, x, y, x², xy, y²,
        where x and y go from -1 to 1 over the picture.
    blocks
        bool (h // 4, w // 4): blocks of 4 x 4 pixels that are glass, of many every few.
    """

    terms: Float64Array
    blocks: BoolArray

    def density(self, rgb: UInt8Array, channel: int) -> Float32Array:
        """float32 (H, W): optical density of one channel of ``rgb`` (H, W, 3), not below 0."""
        height, width = rgb.shape[:2]
        x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
        y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
        a, bx, by, bxx, bxy, byy = self.terms[channel].astype(np.float32)
        logarithms = np.log10(np.maximum(np.arange(256), 1)).astype(np.float32)
        density: Float32Array = np.take(-logarithms, rgb[..., channel])
        density += a + bx * x + bxx * x * x
        # Row by row: of the last term another array as large as this one would be made.
        for row, slope, offset in zip(density, (bxy * y)[:, 0], (by * y + byy * y * y)[:, 0], strict=True):
            row += slope * x[0] + offset
        return np.maximum(density, 0, out=density)


def find_glass(rgb: UInt8Array) -> Glass:
    """The glass of a slide: uint8 (H, W, 3). Where none is found, as on a picture full of tissue, it is taken for an
    ordinary white."""
    means, smooth = _blocks(rgb)
    white = smooth & (means.min(axis=2) >= _WHITE)
    bright = smooth & ~white & (means.min(axis=2) >= _DARKEST)
    colour = _colour(means[bright], int(white.sum()), smooth.size)
    if colour is None:
        constant = np.full(3, 255.0 if white.any() else _NO_GLASS)
        return Glass(_constant(constant), white)
    return _fitted(means, bright, colour)


def _blocks(rgb: UInt8Array) -> tuple[Float32Array, BoolArray]:
    """Mean colour, float32 (h, w, 3), of blocks of 4 x 4 pixels, and which of them have no texture, bool (h, w)."""
    height, width = (max(1, length // _BLOCK_PX) for length in rgb.shape[:2])
    rgb = rgb[: height * _BLOCK_PX, : width * _BLOCK_PX]
    step = min(_BLOCK_PX, *rgb.shape[:2])
    rows = [rgb[i::step] for i in range(step)]
    high, low = np.maximum.reduce(rows), np.minimum.reduce(rows)
    high = np.maximum.reduce([high[:, i::step] for i in range(step)])
    low = np.minimum.reduce([low[:, i::step] for i in range(step)])
    total = np.add.reduce(rows, dtype=np.uint16)
    total = np.add.reduce([total[:, i::step] for i in range(step)], dtype=np.uint16)
    return (total / np.float32(step * step)).astype(np.float32), (high - low).max(axis=2) <= _SMOOTH


def _colour(colours: Float32Array, white: int, blocks: int) -> Float32Array | None:
    """The colour that glass has in most places, out of those (N, 3) of bright blocks without texture; ``None``: there
    is none."""
    if not len(colours):
        return None
    bins = (colours * (_BINS / 256)).astype(np.int64)
    counts = np.bincount((bins[:, 0] * _BINS + bins[:, 1]) * _BINS + bins[:, 2], minlength=_BINS**3)
    near = ndimage.uniform_filter(counts.reshape((_BINS,) * 3).astype(np.float32), 3, mode="constant") * 27
    peaks = np.argwhere((near >= max(_PEAK_SHARE * blocks, _PEAK_BLOCKS)) & (near == ndimage.maximum_filter(near, 3)))
    chosen, held = (np.full(3, 255.0), _BESIDE_WHITE * blocks) if white > _PEAK_SHARE * blocks else (None, 0.0)
    for peak in sorted(peaks.tolist(), key=sum, reverse=True):
        inside = (np.abs(bins - peak) <= 1).all(axis=1)
        colour, count = np.median(colours[inside], axis=0), float(near[tuple(peak)])
        if not _may_be_glass(colour):
            continue
        # A label or a border that was filled in is brighter than glass; pale tissue is darker, and of another hue.
        if chosen is None or (count > held and _is_dimmer(colour, chosen)):
            chosen, held = colour, (count if chosen is None else max(count, 2 * held))
    if chosen is None or chosen.min() >= 255:
        return None
    return chosen.astype(np.float32)


def _may_be_glass(colour: Float32Array) -> bool:
    density = np.log10(255 / colour)
    red, green, blue = (float(value) for value in density - density.min())
    return max(red, green, blue) <= _TINT_MAX and green - max(red, blue) <= _PURPLE_MAX


def _is_dimmer(colour: Float32Array, than: Float32Array) -> bool:
    """Whether a colour is another only by less or yellower light, and not by stain: that absorbs green or red most."""
    red, green, blue = (float(value) for value in np.log10(than / colour))
    grey = max(red, green, blue) - min(red, green, blue) <= _NEUTRAL
    return grey or blue >= green >= red


def _constant(colour: Float32Array) -> Float64Array:
    terms = np.zeros((3, 6))
    terms[:, 0] = np.log10(colour)
    return terms


def _fitted(means: Float32Array, bright: BoolArray, colour: Float32Array) -> Glass:
    """The surface through the blocks (h, w, 3) near ``colour``; those near the surface join them, until all of uneven
    glass has."""
    height, width = bright.shape
    y, x = np.nonzero(bright)
    every = len(y) // _FITTED_AT_MOST + 1
    y, x = y[::every], x[::every]
    values = np.log10(means[y, x])
    u = 2 * (x + 0.5) / width - 1
    v = 2 * (y + 0.5) / height - 1
    terms = _constant(colour)
    design = np.stack([np.ones_like(u), u, v, u * u, u * v, v * v], axis=1)
    inside: BoolArray = np.zeros(len(values), np.bool_)
    for near in _NEAR:
        inside = np.asarray((np.abs(values - design @ terms.T) <= near).all(axis=1))
        if np.count_nonzero(inside) < _FITTED_FROM:
            break
        # A little stiffness: where there is no glass the surface shall not bend away.
        square = design[inside].T @ design[inside] + np.diag([0, 0.02, 0.02, 0.05, 0.05, 0.05]) * inside.sum()
        terms = np.linalg.solve(square, design[inside].T @ (values[inside] - np.log10(colour))).T
        terms[:, 0] += np.log10(colour)
    blocks = np.zeros_like(bright)
    blocks[y[inside], x[inside]] = True
    return Glass(terms, blocks)
