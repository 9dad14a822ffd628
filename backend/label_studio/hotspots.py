"""Where attention is high, as areas and as points on the tile grid. Pure NumPy; coordinates come out in level-0 pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from skimage import measure

from backend.results.bag import BoolArray, Int64Array
from backend.results.ranks import hottest_first

HOT_FRACTION = 0.1
"""Areas are made of the tiles with the highest attention: this part of the bag, at least one tile."""

MIN_AREA_TILES = 3
"""Smaller areas are left out, except the one with the hottest tile."""

PEAK_DISTANCE_TILES = 3
"""Peaks are at least so many columns or rows apart."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class HotArea:
    """Neighbouring hot tiles. ``outline``: float64 (P, 2), level-0 x and y, P ≥ 3, not closed. ``tiles``: their numbers."""

    outline: FloatArray
    tiles: Int64Array


def hot_areas(
    grid: Int64Array, attention: npt.NDArray[np.floating], tile_size: float, slide_size: tuple[int, int], limit: int
) -> list[HotArea]:
    """Outline the areas of high attention, hottest first.

    Tiles that share an edge belong together. The outline is the 0.5 contour between hot and other tiles, so it runs along tile
    edges and cuts corners by half a tile. Holes are not drawn: the editor's polygons have none.

    Parameters
    ----------
    grid
        int64 (N, 2), column and row of each tile.
    attention
        float (N,).
    tile_size
        Edge of a tile in level-0 pixels.
    slide_size
        (width, height) in level-0 pixels; outlines are clipped to it.
    limit
        Most areas to return.
    """
    if len(grid) == 0:
        return []
    hot = hottest_first(attention)[: max(1, round(len(attention) * HOT_FRACTION))]
    corner = grid[hot].min(axis=0)
    columns, rows = grid[hot].max(axis=0) - corner + 1
    number = np.full((rows, columns), -1, dtype=np.int64)
    number[grid[hot, 1] - corner[1], grid[hot, 0] - corner[0]] = hot

    areas = []
    for part in measure.regionprops(measure.label(number >= 0, connectivity=1)):
        top, left, bottom, right = part.bbox
        tiles = number[top:bottom, left:right][part.image]
        if len(tiles) < MIN_AREA_TILES and hot[0] not in tiles:
            continue
        outline = _outline(part.image, corner + np.array([left, top]), tile_size, slide_size)
        if outline is not None:
            areas.append(HotArea(outline, tiles))
    areas.sort(key=lambda area: float(attention[area.tiles].max()), reverse=True)
    return areas[:limit]


def _outline(mask: BoolArray, corner: Int64Array, tile_size: float, slide_size: tuple[int, int]) -> FloatArray | None:
    """The outer contour of one connected mask whose top-left tile is at ``corner`` (column, row) of the grid."""
    contours = measure.find_contours(np.pad(mask, 1).astype(np.float64), 0.5)
    outer = max(contours, key=lambda contour: abs(_signed_area(contour)))
    simple = measure.approximate_polygon(outer, tolerance=1e-6)[:-1, ::-1]  # straight runs to their ends; (x, y); open
    # Index i of the padded mask is the centre of tile i - 1, which lies half a tile further on.
    level0 = (simple - 0.5 + corner) * tile_size
    clipped: FloatArray = np.clip(level0, 0, np.array(slide_size, dtype=np.float64))
    clipped = clipped[np.any(clipped != np.roll(clipped, 1, axis=0), axis=1)]
    if len(clipped) < 3 or abs(_signed_area(clipped)) == 0:
        return None
    return clipped


def _signed_area(points: FloatArray) -> float:
    a, b = points[:, 0], points[:, 1]
    return float(np.sum(a * np.roll(b, -1) - np.roll(a, -1) * b) / 2)


def peaks(grid: Int64Array, attention: npt.NDArray[np.floating], limit: int) -> Int64Array:
    """Tiles with at least the attention of all their neighbours, hottest first, none nearer than :data:`PEAK_DISTANCE_TILES`.

    Returns
    -------
    int64 (P,), P ≤ ``limit``: tile numbers. The hottest tile is always the first.
    """
    if len(grid) == 0:
        return np.zeros(0, dtype=np.int64)
    shifted = grid - grid.min(axis=0) + 1
    columns, rows = shifted.max(axis=0) + 2
    value = np.full((rows, columns), -np.inf)
    value[shifted[:, 1], shifted[:, 0]] = attention
    around = np.max([value[shifted[:, 1] + dy, shifted[:, 0] + dx] for dx, dy in _neighbours()], axis=0)
    is_peak = attention >= around
    taken: list[int] = []
    for tile in hottest_first(attention):
        if len(taken) == limit:
            break
        apart = np.abs(grid[taken] - grid[tile]).max(axis=1, initial=0) if taken else np.zeros(0)
        if is_peak[tile] and (apart >= PEAK_DISTANCE_TILES).all():
            taken.append(int(tile))
    return np.array(taken, dtype=np.int64)


def _neighbours() -> Iterator[tuple[int, int]]:
    return ((dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1) if dx or dy)
