"""Where tissue is, on a low-resolution picture of the slide. Pure functions.

Stain absorbs light and glass does not, so tissue is found by optical density, measured against the glass of the slide
itself (:mod:`backend.slides.glass`), and by how far that density differs between the colours: black borders, shadows,
dust and the edges of coverslips are grey. The thresholds lie just above what glass shows. They do not depend on what
else is on the slide, because one threshold over everything (Otsu's) is moved by each pen mark and each strong stain:
pale tissue beside them is lost.

Ink is looked for first (:mod:`backend.slides.ink`). Grey tissue (silver) is told from other grey by its texture and
its width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from backend.results.bag import BoolArray, Float32Array, UInt8Array
from backend.results.tissue_record import INK, TISSUE
from backend.slides.glass import Glass, find_glass
from backend.slides.ink import EVEN_OVER_UM, find_ink, has_hue, unevenness
from backend.slides.parts import large_parts

SMOOTHING_UM = 8.0
DENSITY, CHROMA = 0.045, 0.022  # where both are this high by a factor of 0.7, or one is, there is tissue
SPECK_UM2 = 4_000.0
HOLE_UM2 = 30_000.0
GREY_UM, GREY_UM2 = 200.0, 100_000.0
_GREY_DENSITY, _GREY_UNEVEN, _GREY_CHROMA = 0.05, 0.12, 0.2
_NOISE = 3.5  # times what 95 % of glass stays below
_BLACK = 45
_SAMPLED = 4


@dataclass(frozen=True)
class TissueMap:
    """What was found on a slide.

    Attributes
    ----------
    labels
        uint8 (H, W): ``GLASS`` 0, ``TISSUE`` 1, ``INK`` 2. Covers the slide's rectangle exactly.
    like_ink
        Part of the tissue whose hue is that of ink: its texture is that of tissue, so it was kept, as stained so.
    """

    labels: UInt8Array
    like_ink: float = 0.0

    @property
    def tissue(self) -> BoolArray:
        """bool (H, W)."""
        mask: BoolArray = self.labels == TISSUE
        return mask

    @property
    def tissue_share(self) -> float:
        """Part of the slide that is tissue."""
        return float(np.count_nonzero(self.labels == TISSUE)) / self.labels.size

    @property
    def ink_share(self) -> float:
        """Part of all that is not glass that was taken as ink."""
        ink, all_of_it = np.count_nonzero(self.labels == INK), np.count_nonzero(self.labels)
        return ink / all_of_it if all_of_it else 0.0


def find_tissue(rgb: UInt8Array, mpp: float, *, pen_rules: bool) -> TissueMap:
    """Tell tissue from glass and ink.

    Parameters
    ----------
    rgb
        uint8 (H, W, 3), the slide at about 8 µm per pixel.
    mpp
        µm per pixel of ``rgb``: areas are judged in µm².
    pen_rules
        Whether pen marks are looked for.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"rgb must be uint8 (H, W, 3), not {rgb.dtype} {rgb.shape}")
    if not mpp > 0:
        raise ValueError(f"mpp must be positive, not {mpp}")
    glass = find_glass(rgb)
    densities = [_smooth(glass.density(rgb, channel), mpp) for channel in range(3)]
    density = densities[0] + densities[1]
    density += densities[2]
    density /= 3
    uneven = unevenness(density, mpp)
    black = np.maximum(np.maximum(rgb[..., 0], rgb[..., 1]), rgb[..., 2]) < _BLACK
    if black.any():
        black = large_parts(black, SPECK_UM2, mpp)  # smaller ones are folds and pigment
    taken_out, padding = black, _at_the_edge(black)
    ink = find_ink(densities, density, uneven, padding, mpp) if pen_rules else None
    chroma = _chroma(densities)
    like_ink = has_hue([values[::_SAMPLED, ::_SAMPLED] for values in densities])
    del densities
    chroma_cut, density_cut = _cuts(chroma, density, glass)
    coloured = (chroma / chroma_cut) ** 2 + (density / density_cut) ** 2 >= 1
    coloured &= (chroma >= _GREY_CHROMA * density) & (chroma >= 0.4 * chroma_cut)
    if ink is not None:
        taken_out = black | ink
    mask = (coloured & ~taken_out) | _grey_tissue(density, chroma, uneven, taken_out, mpp)
    del uneven, chroma
    # Specks of dust go before holes are filled; ink and padding go last, or a hole in tissue that they made would be
    # filled again.
    mask = large_parts(mask, SPECK_UM2, mpp)
    mask = ~large_parts(~mask, HOLE_UM2, mpp)
    if taken_out.any():
        mask = large_parts(mask & ~taken_out, SPECK_UM2, mpp)
    labels = mask.astype(np.uint8)
    if ink is not None:
        labels[ink & ~padding & (coloured | (density > density_cut))] = INK
    sampled = mask[::_SAMPLED, ::_SAMPLED]
    return TissueMap(labels, np.count_nonzero(sampled & like_ink) / max(1, np.count_nonzero(sampled)))


def _chroma(densities: Sequence[Float32Array]) -> Float32Array:
    red, green, blue = densities
    chroma = np.maximum(red, green)
    np.maximum(chroma, blue, out=chroma)
    low = np.minimum(red, green)
    np.minimum(low, blue, out=low)
    chroma -= low
    return chroma


def _at_the_edge(black: BoolArray) -> BoolArray:
    """Those parts of ``black`` that touch the picture's edge: a scanner's padding, not a pen."""
    if not (black[0].any() or black[-1].any() or black[:, 0].any() or black[:, -1].any()):
        return np.zeros_like(black)
    labels, count = ndimage.label(black)
    touching = np.zeros(count + 1, np.bool_)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        touching[edge] = True
    touching[0] = False
    padding: BoolArray = touching[labels]
    return padding


def _smooth(density: Float32Array, mpp: float) -> Float32Array:
    ndimage.gaussian_filter(density, SMOOTHING_UM / mpp / 2, mode="nearest", truncate=3.0, output=density)
    return density


def _cuts(chroma: Float32Array, density: Float32Array, glass: Glass) -> tuple[float, float]:
    """Thresholds of chroma and density: the fixed ones, or higher ones where the slide's own glass is noisier or
    dirtier."""
    height, width = glass.blocks.shape
    if np.count_nonzero(glass.blocks) < 50:
        return CHROMA, DENSITY
    cuts = []
    for values, least in ((chroma, CHROMA), (density, DENSITY)):
        of_blocks = values[2::4, 2::4][:height, :width]
        of_glass = of_blocks[glass.blocks[: of_blocks.shape[0], : of_blocks.shape[1]]]
        cuts.append(float(np.clip(_NOISE * np.percentile(of_glass, 95), least, 2 * least)))
    return cuts[0], cuts[1]


def _grey_tissue(
    density: Float32Array, chroma: Float32Array, uneven: Float32Array, taken_out: BoolArray, mpp: float
) -> BoolArray:
    """Tissue without colour, as silver stains it: uneven and wide, which shadows, dust and edges of coverslips are not."""

    def is_grey(mean: Float32Array, every: int) -> BoolArray:
        part = slice(None, None, every)
        grey: BoolArray = (mean >= _GREY_DENSITY) & (chroma[part, part] <= _GREY_CHROMA * mean)
        return grey & (uneven[part, part] >= _GREY_UNEVEN) & ~taken_out[part, part]

    if np.count_nonzero(is_grey(density[::_SAMPLED, ::_SAMPLED], _SAMPLED)) * (_SAMPLED * mpp) ** 2 < GREY_UM2 / 4:
        return np.zeros_like(taken_out)
    grey = is_grey(ndimage.uniform_filter(density, max(3, round(EVEN_OVER_UM / mpp)), mode="nearest"), 1)
    wide = max(3, round(GREY_UM / mpp))
    opened: BoolArray = ndimage.maximum_filter(ndimage.minimum_filter(grey.view(np.uint8), wide), wide).astype(np.bool_)
    return large_parts(opened, GREY_UM2, mpp) & ~taken_out
