"""Exact choice of pixels: one reduction, from one level, with a sub-pixel box. Pure functions.

The reference is the area average: each pixel of the answer is the mean of the level over the rectangle it covers. Pillow's filters come close
to it in different ranges (measured on H&E against float64 averages, sub-pixel boxes; PSNR): a whole-number scale on whole
pixels is exact with ``reduce`` (rounding alone, once; a resize with BOX rounds twice and takes four times as long); near 1:1 BILINEAR is best
(63 dB at 1.002, where BOX drops and repeats whole pixels and has 35 dB); from 4/3 on HAMMING is best (43–50 dB, BOX 31–39). ``tests/slides``
holds all three to 40 dB.

``reduce`` computes with 24 bits: at 64 x 64 pixels it is off by 0.03 steps at most, at 300 x 300 by up to 0.7, and from 4096 x 4096 on it
overflows (white becomes black). Where one pixel covers more than :data:`REDUCED_UP_TO` pixels along an edge, :func:`add_area` and :func:`area_mean`
take the average itself, from pieces.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from backend.results.bag import UInt8Array

Float64Array = npt.NDArray[np.float64]

WHITE = (255, 255, 255)

# A level counts as fine enough if it is at most so much coarser than asked: levels are often 2.0003 where 2 was meant.
LEVEL_TOLERANCE = 1.01

REDUCED_UP_TO = 64  # pixels along an edge that become one in a single step

_BILINEAR_BELOW = 4 / 3
_ALIGNED = 1e-6


def best_level(downsamples: Sequence[float], wanted: float, without: Collection[int] = ()) -> int:
    """Index of the coarsest level whose downsample is at most ``wanted`` (within 1 %) and that is not in ``without``.

    0 if even level 0 is coarser.
    """
    fitting = [i for i, ds in enumerate(downsamples) if ds <= wanted * LEVEL_TOLERANCE and i not in without]
    return max(fitting, key=lambda i: downsamples[i], default=0)


def is_aligned(left: float, top: float, scale_x: float, scale_y: float) -> bool:
    """Whether a box starts on a whole pixel and each output pixel covers the same whole number of pixels."""
    return scale_x >= 1 - _ALIGNED and all(abs(v - round(v)) < _ALIGNED for v in (left, top, scale_x, scale_y))


def padding(scale: float) -> int:
    """Pixels beside the box that a filter looks at, for a box that is not aligned.

    Pillow's ``resize(box=…)`` weighs pixels of the image outside the box as well, as far as the filter reaches. A read of exactly the
    box would therefore treat its own border as the end of the world and leave a seam at every tile.
    """
    return math.ceil(max(scale, 1.0)) + 1


def resample(
    image: Image.Image | UInt8Array,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    out: UInt8Array | None = None,
) -> UInt8Array:
    """Scale the part ``box`` of an RGB image to ``size``.

    Parameters
    ----------
    image
        RGB, or uint8 (h, w, 3), with :func:`padding` pixels around the box where there are any.
    box
        left, top, right, bottom in pixels of ``image``; fractions count.
    size
        width and height of the answer in pixels.
    out
        Where to write the answer, uint8 (height, width, 3). Without it new memory is taken.

    Returns
    -------
    uint8 (height, width, 3): ``out``, or a C-contiguous array. Never a view of ``image``.
    """
    if out is None:
        out = np.empty((size[1], size[0], 3), np.uint8)
    left, top, right, bottom = box
    scale_x, scale_y = (right - left) / size[0], (bottom - top) / size[1]
    if is_aligned(left, top, scale_x, scale_y):
        whole = (round(left), round(top), round(right), round(bottom))
        factor = (round(scale_x), round(scale_y))
        if factor != (1, 1):
            out[:] = np.asarray(_as_image(image).reduce(factor, box=whole))
        elif isinstance(image, np.ndarray):
            out[:] = image[whole[1] : whole[3], whole[0] : whole[2]]
        else:
            out[:] = np.asarray(image.crop(whole))
        return out
    near = max(scale_x, scale_y) < _BILINEAR_BELOW
    method = Image.Resampling.BILINEAR if near else Image.Resampling.HAMMING
    image = _as_image(image)
    # Rounding may put a box that ends with the image 1e-13 beyond it, which Pillow refuses.
    inside = (max(left, 0.0), max(top, 0.0), min(right, float(image.width)), min(bottom, float(image.height)))
    out[:] = np.asarray(image.resize(size, method, box=inside))
    return out


def add_area(sums: Float64Array, pixels: UInt8Array, rows: Float64Array, columns: Float64Array) -> None:
    """Add to each cell of a grid the sum of the pixels that it covers; a pixel that it covers in part counts by that part.

    Parameters
    ----------
    sums
        float64 (h, w, 3), added to. Sums of whole pixels are exact.
    pixels
        uint8 (H, W, 3): the piece of the picture that is there now.
    rows, columns
        float64 (h + 1,) and (w + 1,), ascending: the borders of the cells in pixels of ``pixels``, cut to it.
    """
    rows, columns = _on_whole_pixels(rows, pixels.shape[0]), _on_whole_pixels(columns, pixels.shape[1])
    before = np.minimum(columns.astype(np.int64), pixels.shape[1] - 1)
    part = (columns - before)[:, None]
    totals = np.zeros((pixels.shape[1] + 1, 3))
    for i in np.flatnonzero(np.diff(rows) > 0):
        line = _sum_of_rows(pixels, float(rows[i]), float(rows[i + 1]))
        # Sums up to each border; their differences are those of the cells.
        np.cumsum(line, axis=0, out=totals[1:])
        sums[i] += np.diff(totals[before] + part * line[before], axis=0)


def area_mean(sums: Float64Array, inside: Float64Array, area: float, out: UInt8Array) -> None:
    """Write the rounded means of cells of ``area`` pixels into ``out``, uint8 (h, w, 3).

    ``inside``: float64 (h, w), the part of each cell of which the pixels are in ``sums`` (h, w, 3); the rest of it is white.
    """
    means = (sums + WHITE[0] * (area - inside)[..., None]) / area
    out[:] = np.clip(np.floor(means + 0.5), 0, 255)


def _on_whole_pixels(borders: Float64Array, limit: int) -> Float64Array:
    """The borders within [0, limit]; 99.9999999 is 100 with a rounding error."""
    whole = np.round(borders)
    near: Float64Array = np.where(np.abs(borders - whole) < _ALIGNED, whole, borders)
    return np.clip(near, 0, limit)


def _sum_of_rows(pixels: UInt8Array, start: float, end: float) -> Float64Array:
    """float64 (W, 3): the sum of rows ``start`` to ``end`` (fractions count) of uint8 (H, W, 3)."""
    first, last = math.ceil(start), math.floor(end)
    total = np.zeros(pixels.shape[1:])
    if last < first:  # within one row
        total += pixels[last] * (end - start)
        return total
    total += pixels[first:last].sum(axis=0, dtype=np.uint32)
    if start < first:
        total += pixels[first - 1] * (first - start)
    if end > last:
        total += pixels[last] * (end - last)
    return total


def _as_image(pixels: Image.Image | UInt8Array) -> Image.Image:
    return Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
