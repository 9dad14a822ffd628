"""Synthetic H&E slides for the demo, the tests and the training of the stand-in model: pink stroma on white glass, and a planted region of dense
dark nuclei whose place is known. They look like tissue and mean nothing.

Stain is drawn as optical density and turned into colour by Beer-Lambert with the reference vectors of Macenko et al. (ISBI 2009).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image
from scipy import ndimage

from backend.paths import StrPath
from backend.results.bag import BoolArray, Float32Array, Int64Array, UInt8Array
from backend.slides.grid import box_fractions

_Field = npt.NDArray[np.floating[Any]]

_H_STAIN = np.array([0.5626, 0.7201, 0.4062], np.float32)
_E_STAIN = np.array([0.2159, 0.8012, 0.5581], np.float32)
_GLASS = np.array([243.0, 242.0, 245.0], np.float32)
_CELL_PX = 8  # level-0 pixels of one pixel of the masks
_ANGLES = 16
_UM_PER_CM = 10_000.0


@dataclass(frozen=True, eq=False)
class SyntheticSlide:
    """A synthetic slide and the truth about it.

    Attributes
    ----------
    path
        A tiled JPEG pyramid (TIFF) that OpenSlide opens, with mpp.
    size, mpp
        (width, height) of level 0 in pixels, and µm per pixel.
    tumour_mask, tissue_mask
        bool (h, w), each covering the whole slide exactly, about 8 level-0 pixels a cell.
    tumour_box
        Level-0 x0, y0, x1, y1 around the planted region; ``None`` if nothing was planted.
    """

    path: Path
    size: tuple[int, int]
    mpp: float
    tumour_mask: BoolArray
    tissue_mask: BoolArray
    tumour_box: tuple[int, int, int, int] | None

    def is_planted(self, x: npt.ArrayLike, y: npt.ArrayLike) -> BoolArray:
        """Whether level-0 points, each array (…), lie in the planted region. Outside the slide: False."""
        h, w = self.tumour_mask.shape
        xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
        column = np.floor(xs * w / self.size[0]).astype(np.int64)
        row = np.floor(ys * h / self.size[1]).astype(np.int64)
        inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
        planted: BoolArray = inside & self.tumour_mask[np.clip(row, 0, h - 1), np.clip(column, 0, w - 1)]
        return planted

    def planted_fraction(self, coords: Int64Array, tile_size_level0: float) -> npt.NDArray[np.float64]:
        """float64 (N,): the part of each tile, given by its int64 (N, 2) corner, that lies in the planted region."""
        return box_fractions(self.tumour_mask, self.size, coords, tile_size_level0)


def write_synthetic_slide(
    path: StrPath, *, size: tuple[int, int] = (2048, 2048), mpp: float = 0.5, seed: int = 0, planted: bool = True
) -> SyntheticSlide:
    """Draw a slide and write it to ``path``: the same one for the same arguments.

    ``size`` is (width, height) in level-0 pixels, at least 256 each; the picture is drawn whole in memory (about 60 bytes a pixel).
    """
    if min(size) < 256 or not mpp > 0:
        raise ValueError(f"cannot draw a slide of {size} pixels at {mpp} µm per pixel")
    rng = np.random.default_rng(seed)
    shape = (round(size[1] / _CELL_PX), round(size[0] / _CELL_PX))
    tissue_field, tumour_field = _layout(rng, shape, planted)
    write_pyramid(path, _draw(rng, size, mpp, tissue_field, tumour_field), mpp=mpp)
    tissue, tumour = tissue_field > 0, (tumour_field > 0) & (tissue_field > 0)
    return SyntheticSlide(Path(path), size, mpp, tumour, tissue, _box(tumour, size))


def write_pyramid(path: StrPath, rgb: UInt8Array, *, mpp: float | None, quality: int = 88) -> None:
    """Write uint8 (H, W, 3) as a tiled JPEG pyramid of levels 1, 2, 4, … that OpenSlide opens. ``mpp=None``: state no scale."""
    level, downsample = Image.fromarray(rgb), 1
    with tifffile.TiffWriter(path) as writer:
        while True:
            scale = None if mpp is None else (_UM_PER_CM / (mpp * downsample),) * 2
            writer.write(
                np.asarray(level),
                photometric="rgb",
                tile=(256, 256),
                compression="jpeg",
                compressionargs={"level": quality},
                subfiletype=int(downsample > 1),
                resolution=scale,
                resolutionunit=None if mpp is None else "CENTIMETER",
                metadata=None,
            )
            if min(level.size) < 512:
                return
            level, downsample = level.reduce(2), downsample * 2


# --- layout -----------------------------------------------------------------------------------------------------


def _noise(rng: np.random.Generator, shape: tuple[int, int], cells: float, octaves: int = 4) -> Float32Array:
    """Smooth noise of mean about 0 and deviation 1; the coarsest bumps are 1/``cells`` of the long side."""
    # Drawn on a canvas just fine enough for the finest bumps, and enlarged once.
    reduction = max(1.0, max(shape) / max(256.0, 6 * cells * 2 ** (octaves - 1)))
    canvas = (max(2, round(shape[0] / reduction)), max(2, round(shape[1] / reduction)))
    total = np.zeros(canvas, np.float32)
    for octave in range(octaves):
        per_side = cells * 2**octave / max(canvas)
        grid = rng.standard_normal((math.ceil(canvas[0] * per_side) + 3, math.ceil(canvas[1] * per_side) + 3))
        total += 0.55**octave * _enlarge(grid.astype(np.float32), canvas)
    result = (total / (total.std() + 1e-6)).astype(np.float32)
    return result if canvas == shape else _enlarge(result, shape)


def _enlarge(field: Float32Array, shape: tuple[int, int]) -> Float32Array:
    return np.asarray(Image.fromarray(field).resize((shape[1], shape[0]), Image.Resampling.BICUBIC), np.float32)


def _layout(rng: np.random.Generator, shape: tuple[int, int], planted: bool) -> tuple[Float32Array, Float32Array]:
    """Fields that are positive inside the tissue and inside the planted region, each (h, w)."""
    y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    outline = (x[None] / 0.94) ** 2 + (y[:, None] / 0.9) ** 2
    tissue = 0.92 - outline - 0.14 * _noise(rng, shape, 3)
    tears = _noise(rng, shape, 7, 3) - 2.1
    tissue = np.minimum(tissue, -tears)
    centre = rng.uniform(-0.3, 0.3, 2)
    radius = rng.uniform(0.42, 0.5)
    tumour = 1 - ((x[None] - centre[0]) ** 2 + (y[:, None] - centre[1]) ** 2) / radius**2 - 0.22 * _noise(rng, shape, 5)
    if not planted:
        tumour = np.full(shape, -1.0, np.float32)
    return tissue.astype(np.float32), tumour.astype(np.float32)


def _box(mask: BoolArray, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return None
    sx, sy = size[0] / mask.shape[1], size[1] / mask.shape[0]
    x0, x1 = int(columns.min() * sx), math.ceil((columns.max() + 1) * sx)
    y0, y1 = int(rows.min() * sy), math.ceil((rows.max() + 1) * sy)
    return x0, y0, min(x1, size[0]), min(y1, size[1])


# --- drawing ----------------------------------------------------------------------------------------------------


def _draw(
    rng: np.random.Generator, size: tuple[int, int], mpp: float, tissue_field: Float32Array, tumour_field: Float32Array
) -> UInt8Array:
    shape = (size[1], size[0])
    ragged = 0.012 * _noise(rng, shape, max(size) * mpp / 25, 2)
    body = np.clip((_enlarge(tissue_field, shape) + ragged) * 40 + 0.5, 0, 1)
    tumour = np.clip((_enlarge(tumour_field, shape) + 2 * ragged) * 12 + 0.5, 0, 1) * body

    fibres, angle = _fibres(rng, shape, mpp)
    clefts = np.clip((-fibres - 1.25) * 2, 0, 1) * (1 - tumour)
    patchy = _noise(rng, shape, max(size) * mpp / 250, 3)
    eosin = (0.27 + 0.075 * fibres + 0.035 * patchy) * (1 - 0.85 * clefts)
    haematoxylin = 0.05 + 0.015 * patchy
    nests = np.clip((_noise(rng, shape, max(size) * mpp / 70, 2) + 1.1) * 3, 0, 1) * tumour
    eosin = eosin * (1 - nests) + (0.23 + 0.03 * fibres) * nests
    haematoxylin = haematoxylin * (1 - nests) + 0.2 * nests

    lumen, lining = _glands(rng, shape, mpp, body * (1 - tumour))
    eosin = eosin * (1 - lining) + (0.24 + 0.03 * fibres) * lining
    haematoxylin = haematoxylin * (1 - lining) + 0.1 * lining

    eosin, haematoxylin = eosin * body * (1 - lumen), haematoxylin * body * (1 - lumen)
    nuclei = np.zeros(shape, np.float32)
    stroma = (body > 0.9) * (1 - tumour) * (1 - lumen) * (1 - lining) * (clefts < 0.5)
    _strew(rng, nuclei, 0.34 * stroma, 13 / mpp, _bank(rng, mpp, 1.5, (2.4, 4.0), 0.75), angle)
    _strew(rng, nuclei, 0.02 * stroma, 9 / mpp, _bank(rng, mpp, 2.8, (1.0, 1.15), 1.0), None)
    _strew(rng, nuclei, 0.85 * lining * (lining > 0.6), 8.5 / mpp, _bank(rng, mpp, 2.5, (1.1, 1.6), 0.6), None)
    _strew(rng, nuclei, 0.9 * nests * (nests > 0.5), 9.5 / mpp, _bank(rng, mpp, 3.9, (1.0, 1.5), 1.05), None)
    grain = rng.standard_normal(shape, np.float32)
    haematoxylin = np.maximum(haematoxylin, nuclei * (1 + 0.1 * ndimage.gaussian_filter(grain, 0.8)))
    eosin *= 1 - 0.5 * np.minimum(nuclei, 1)
    return _colour(np.stack([haematoxylin, np.maximum(eosin, 0)], axis=-1), mpp, grain)


def _colour(density: Float32Array, mpp: float, grain: Float32Array) -> UInt8Array:
    """Optical densities (H, W, 2) of the two stains as light through them: I = I0 · 10^(-density @ stains), blurred as by an objective."""
    stains = np.stack([v / np.linalg.norm(v) for v in (_H_STAIN, _E_STAIN)])
    blurred = ndimage.gaussian_filter(density, (0.3 / mpp, 0.3 / mpp, 0))
    light = _GLASS * np.power(np.float32(10), -(blurred @ stains.astype(np.float32)) * np.float32(1.15))
    rgb: UInt8Array = np.clip(light + 1.5 * grain[..., None], 0, 255).astype(np.uint8)
    return rgb


def _fibres(rng: np.random.Generator, shape: tuple[int, int], mpp: float) -> tuple[Float32Array, Float32Array]:
    """Collagen: noise drawn out along a direction that wanders. Returns the texture, deviation 1, and the direction in radians."""
    um = max(shape) * mpp
    bend = _noise(rng, shape, um / 900, 3) * (75 / mpp)
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    tilt = rng.uniform(0, math.pi)
    along = x * math.cos(tilt) + y * math.sin(tilt)
    across = -x * math.sin(tilt) + y * math.cos(tilt) + bend
    texture = np.zeros(shape, np.float32)
    for width_um, weight in ((0.9, 0.7), (2.8, 0.75)):
        patch = ndimage.gaussian_filter(rng.standard_normal((512, 512), np.float32), (1.0, 4.0), mode="wrap")
        step = width_um / mpp
        at = [across / step % 512, along / (step * 2.2) % 512]
        texture += weight * ndimage.map_coordinates(patch / patch.std(), at, order=1, mode="grid-wrap")
    rise_y, rise_x = np.gradient(across)
    angle: Float32Array = np.arctan2(-rise_x, rise_y).astype(np.float32)
    return (texture / texture.std()).astype(np.float32), angle


def _glands(
    rng: np.random.Generator, shape: tuple[int, int], mpp: float, allowed: _Field
) -> tuple[Float32Array, Float32Array]:
    """Benign glands: an empty lumen and the epithelium that lines it, each (H, W) in [0, 1]."""
    lumen, lining = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    grid = 240 / mpp
    for row in range(int(shape[0] / grid)):
        for column in range(int(shape[1] / grid)):
            x, y = (column + rng.uniform(0.3, 0.7)) * grid, (row + rng.uniform(0.3, 0.7)) * grid
            long, part, turn, chance = (
                rng.uniform(22, 48) / mpp,
                rng.uniform(0.5, 0.95),
                rng.uniform(0, math.pi),
                rng.random(),
            )
            reach = int(long + 20 / mpp)
            x0, y0, x1, y1 = int(x) - reach, int(y) - reach, int(x) + reach, int(y) + reach
            if x0 < 0 or y0 < 0 or x1 > shape[1] or y1 > shape[0] or chance > 0.55:
                continue
            window = (slice(y0, y1), slice(x0, x1))
            if allowed[window].min() < 0.9:
                continue
            gy, gx = np.mgrid[y0:y1, x0:x1].astype(np.float32)
            u = (gx - x) * math.cos(turn) + (gy - y) * math.sin(turn)
            v = -(gx - x) * math.sin(turn) + (gy - y) * math.cos(turn)
            wave = 1 + 0.08 * np.sin(5 * np.arctan2(v, u) + turn) + 0.05 * np.sin(9 * np.arctan2(v, u))
            outside_um = (np.hypot(u, v / part) / wave - long) * mpp
            inside = np.clip(0.5 - outside_um, 0, 1)
            lumen[window] = np.maximum(lumen[window], inside)
            lining[window] = np.maximum(lining[window], np.clip(11.5 - outside_um, 0, 1) - inside)
    return lumen, lining


def _bank(
    rng: np.random.Generator, mpp: float, radius_um: float, elongation: tuple[float, float], density: float
) -> list[list[Float32Array]]:
    """Nuclei to stamp, for each of 16 directions six: optical density (n, n) with membrane, chromatin and, if large, a nucleolus."""
    return [
        [_nucleus(rng, mpp, radius_um, rng.uniform(*elongation), density, math.pi * k / _ANGLES) for _ in range(6)]
        for k in range(_ANGLES)
    ]


def _nucleus(
    rng: np.random.Generator, mpp: float, radius_um: float, elongation: float, density: float, angle: float
) -> Float32Array:
    short = max(0.8, radius_um * rng.lognormal(0, 0.16) / mpp)
    reach = math.ceil(short * elongation * 1.15) + 2
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
    u, v = x * math.cos(angle) + y * math.sin(angle), -x * math.sin(angle) + y * math.cos(angle)
    around = np.arctan2(v, u)
    phases = rng.uniform(0, 2 * math.pi, 2)
    wave = 1 + 0.07 * np.cos(2 * around + phases[0]) + 0.05 * np.cos(3 * around + phases[1])
    distance = (np.hypot(u / elongation, v) / wave - short) * (1 if short > 1.5 else 1.3)
    inside = np.clip(0.5 - distance, 0, 1)
    chromatin = ndimage.gaussian_filter(rng.standard_normal(x.shape), max(0.5, 0.45 / mpp))
    chromatin /= chromatin.std() + 1e-6
    membrane = np.clip(1 - np.abs(distance + 1) / max(1.0, 0.5 / mpp), 0, 1)
    stamp = inside * density * rng.uniform(0.72, 1.2) * (0.86 + 0.13 * chromatin.clip(-1.5, 1.5) + 0.25 * membrane)
    if radius_um > 3.5:
        ox, oy = rng.normal(0, 0.3 * short, 2)
        nucleolus = np.clip(0.5 - (np.hypot(x - ox, y - oy) - 0.8 / mpp), 0, 1)
        stamp = np.maximum(stamp, nucleolus * inside * density * 1.35)
    result: Float32Array = stamp.clip(0).astype(np.float32)
    return result


def _strew(
    rng: np.random.Generator,
    nuclei: Float32Array,
    chance: _Field,
    spacing: float,
    bank: list[list[Float32Array]],
    angle: Float32Array | None,
) -> None:
    """Stamp nuclei in place: one candidate in each square of ``spacing`` pixels, kept with the chance (H, W) where it falls."""
    h, w = nuclei.shape
    for x, y in _candidates(rng, chance, spacing):
        direction = float(angle[y, x]) + rng.normal(0, 0.25) if angle is not None else rng.uniform(0, math.pi)
        stamps = bank[round(direction / math.pi * _ANGLES) % _ANGLES]
        stamp = stamps[rng.integers(len(stamps))]
        reach = stamp.shape[0] // 2
        if not (reach <= x < w - reach and reach <= y < h - reach):
            continue
        window = (slice(y - reach, y + reach + 1), slice(x - reach, x + reach + 1))
        nuclei[window] = np.maximum(nuclei[window], stamp)


def _candidates(rng: np.random.Generator, chance: _Field, spacing: float) -> Iterator[tuple[int, int]]:
    h, w = chance.shape
    y, x = np.mgrid[0:h:spacing, 0:w:spacing]
    points = np.stack([x.ravel(), y.ravel()], axis=1) + rng.uniform(0, spacing, (x.size, 2))
    points = points[(points[:, 0] < w) & (points[:, 1] < h)].astype(np.int64)
    kept = points[rng.random(len(points)) < chance[points[:, 1], points[:, 0]]]
    for x_, y_ in kept:
        yield int(x_), int(y_)
