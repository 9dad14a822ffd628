"""Exact choice of pixels: one reduction, from one level, with a sub-pixel box. Pure functions.

The reference is the area average: each pixel of the answer is the mean of the level over the rectangle it covers. Pillow's filters come close
to it in different ranges (measured on H&E against float64 averages, sub-pixel boxes; PSNR): a whole-number scale on whole
pixels is exact with ``reduce`` (rounding alone, once; a resize with BOX rounds twice and takes four times as long); near 1:1 BILINEAR is best
(63 dB at 1.002, where BOX drops and repeats whole pixels and has 35 dB); from 4/3 on HAMMING is best (43–50 dB, BOX 31–39). ``tests/slides``
holds all three to 40 dB.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from PIL import Image

from backend.results.bag import UInt8Array

WHITE = (255, 255, 255)

# A level counts as fine enough if it is at most so much coarser than asked: levels are often 2.0003 where 2 was meant.
LEVEL_TOLERANCE = 1.01

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


def _as_image(pixels: Image.Image | UInt8Array) -> Image.Image:
    return Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
