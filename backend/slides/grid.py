"""The grid of tiles over a slide, and the same tile in every coordinate system that asks for it. Pure geometry.

A tile's edge in level-0 pixels is rarely a whole number. Column *c* starts at ``round(c * edge)``, computed from *c* itself, so that
rounding never adds up; it ends where column *c* + 1 starts, so that tiles leave no gap and do not overlap. Everything outward (percent, GeoJSON)
is cut at the slide's border.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from backend.results.bag import Bag, Int64Array

Float64Array = npt.NDArray[np.float64]
Rectangle = tuple[float, float, float, float]


@dataclass(frozen=True)
class Grid:
    """A grid of square tiles over a slide.

    Attributes
    ----------
    slide_size
        (width, height) of level 0 in pixels.
    tile_size_level0
        Edge of a tile in level-0 pixels, a float.
    columns, rows
        How many tiles cover the slide; the last ones may stick out.
    """

    slide_size: tuple[int, int]
    tile_size_level0: float
    columns: int
    rows: int

    @classmethod
    def covering(cls, slide_size: tuple[int, int], tile_size_level0: float) -> Grid:
        """The smallest grid whose tiles cover every pixel of the slide."""
        if not (tile_size_level0 >= 1 and math.isfinite(tile_size_level0) and min(slide_size) >= 1):
            raise ValueError(f"no grid of tiles of {tile_size_level0} px over a slide of {slide_size}")
        columns, rows = (_count(length, tile_size_level0) for length in slide_size)
        return cls(slide_size, float(tile_size_level0), columns, rows)

    @classmethod
    def of_bag(cls, bag: Bag) -> Grid:
        """The grid that a bag of kind ``"slide"`` was cut by."""
        if bag.kind != "slide":
            raise ValueError("a bag of patches has no grid")
        return cls(bag.slide_size, bag.tile_size_level0, *bag.grid_size)

    def level0_of(self, column: int, row: int) -> tuple[int, int]:
        """Level-0 x and y of a tile's top-left corner."""
        return round(column * self.tile_size_level0), round(row * self.tile_size_level0)

    def coords_of(self, cells: Int64Array) -> Int64Array:
        """:meth:`level0_of` for int64 (N, 2) columns and rows at once; rounds halves to even, as Python does."""
        return _starts(cells, self.tile_size_level0)

    def cell_of(self, x: float, y: float) -> tuple[int, int]:
        """Column and row of the tile that holds the level-0 point (x, y). Points outside the slide raise ``ValueError``."""
        width, height = self.slide_size
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"({x}, {y}) lies outside the slide of {width} x {height}")
        return _cell(x, self.tile_size_level0), _cell(y, self.tile_size_level0)

    def rectangle(self, column: int, row: int) -> tuple[int, int, int, int]:
        """Level-0 x0, y0, x1, y1 of a tile, cut at the slide's border; x1 and y1 are where the next tile starts."""
        self._check(column, row)
        x0, y0 = self.level0_of(column, row)
        x1, y1 = self.level0_of(column + 1, row + 1)
        return x0, y0, min(x1, self.slide_size[0]), min(y1, self.slide_size[1])

    def percent_rectangle(self, column: int, row: int) -> Rectangle:
        """x, y, width, height of a tile as Label Studio has them: percent of the slide's width and height."""
        x0, y0, x1, y1 = self.rectangle(column, row)
        width, height = self.slide_size
        return 100 * x0 / width, 100 * y0 / height, 100 * (x1 - x0) / width, 100 * (y1 - y0) / height

    def level0_of_percent(self, x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
        """Level-0 x0, y0, x1, y1 of a rectangle in percent."""
        w, h = self.slide_size
        return x * w / 100, y * h / 100, (x + width) * w / 100, (y + height) * h / 100

    def cell_of_percent(self, x: float, y: float, width: float, height: float) -> tuple[int, int]:
        """Column and row of the tile that holds the centre of a rectangle in percent."""
        x0, y0, x1, y1 = self.level0_of_percent(x, y, width, height)
        return self.cell_of((x0 + x1) / 2, (y0 + y1) / 2)

    def to_geojson(self, column: int, row: int) -> list[list[int]]:
        """A tile as the outer ring of a GeoJSON polygon in level-0 pixels: five [x, y], the last is the first (RFC 7946, 3.1.6)."""
        x0, y0, x1, y1 = self.rectangle(column, row)
        return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]

    def cell_of_geojson(self, ring: Sequence[Sequence[float]]) -> tuple[int, int]:
        """Column and row of the tile that holds the middle of a ring's bounds."""
        xs, ys = [p[0] for p in ring], [p[1] for p in ring]
        return self.cell_of((min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2)

    def cells_in(self, x0: float, y0: float, x1: float, y1: float) -> tuple[int, int, int, int]:
        """First column, first row, end column, end row (exclusive) of the tiles that a level-0 rectangle touches, within the slide."""
        width, height = self.slide_size
        left, right = max(0.0, min(x0, x1)), min(float(width), max(x0, x1))
        top, bottom = max(0.0, min(y0, y1)), min(float(height), max(y0, y1))
        if left >= right or top >= bottom:
            return 0, 0, 0, 0
        first = self.cell_of(left, top)
        last = self.cell_of(math.nextafter(right, 0), math.nextafter(bottom, 0))
        return first[0], first[1], last[0] + 1, last[1] + 1

    def column_edges(self) -> Int64Array:
        """int64 (columns + 1,): where columns start and the last one ends, not cut at the border."""
        return _starts(np.arange(self.columns + 1), self.tile_size_level0)

    def row_edges(self) -> Int64Array:
        """int64 (rows + 1,): as :meth:`column_edges`."""
        return _starts(np.arange(self.rows + 1), self.tile_size_level0)

    def _check(self, column: int, row: int) -> None:
        if not (0 <= column < self.columns and 0 <= row < self.rows):
            raise ValueError(f"tile ({column}, {row}) is not on the grid of {self.columns} x {self.rows}")


def _starts(index: Int64Array, edge: float) -> Int64Array:
    starts: Int64Array = np.rint(index * edge).astype(np.int64)
    return starts


def _count(length: int, edge: float) -> int:
    count = max(1, math.ceil(length / edge))
    # A tile that would start at or beyond the border (its overhang was less than half a pixel) holds nothing.
    while count > 1 and round((count - 1) * edge) >= length:
        count -= 1
    while round(count * edge) < length:
        count += 1
    return count


def _cell(position: float, edge: float) -> int:
    cell = math.floor(position / edge)
    # Starts are rounded, so the quotient may be off by one at a border.
    if round((cell + 1) * edge) <= position:
        return cell + 1
    return cell - 1 if round(cell * edge) > position else cell


def tissue_fractions(mask: npt.NDArray[np.bool_], grid: Grid) -> Float64Array:
    """The part of each tile that is tissue, exactly.

    Parameters
    ----------
    mask
        bool (h, w), covering the slide's rectangle exactly.
    grid
        The tiles.

    Returns
    -------
    float64 (rows, columns) in [0, 1]: area of tissue over the full area of the tile, so a tile that sticks out of the slide counts as such.

    The integral of a picture of constant pixels is bilinear between their corners, so reading it there by interpolation is exact.
    """
    integral = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.float64)
    integral[1:, 1:] = mask.cumsum(axis=0, dtype=np.float64).cumsum(axis=1)
    columns, rows = grid.column_edges(), grid.row_edges()
    scale_x, scale_y = mask.shape[1] / grid.slide_size[0], mask.shape[0] / grid.slide_size[1]
    at_y = _interpolate(integral, np.minimum(rows, grid.slide_size[1]) * scale_y)
    at = _interpolate(at_y.T, np.minimum(columns, grid.slide_size[0]) * scale_x).T
    area = np.diff(np.diff(at, axis=0), axis=1) / (scale_x * scale_y)
    fractions: Float64Array = np.clip(area / np.outer(np.diff(rows), np.diff(columns)), 0.0, 1.0)
    return fractions


def box_fractions(
    mask: npt.NDArray[np.bool_], slide_size: tuple[int, int], coords: Int64Array, edge: float
) -> Float64Array:
    """float64 (N,): the part of each square that the mask covers; as :func:`tissue_fractions`, for squares anywhere.

    ``coords`` is int64 (N, 2), level-0 corners; ``edge`` is the squares' edge in level-0 pixels.
    """
    integral = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.float64)
    integral[1:, 1:] = mask.cumsum(axis=0, dtype=np.float64).cumsum(axis=1)
    scale = np.array([mask.shape[1] / slide_size[0], mask.shape[0] / slide_size[1]])
    low = np.clip(coords, 0, slide_size) * scale
    high = np.clip(coords + edge, 0, slide_size) * scale
    area = (
        _at_points(integral, high[:, 0], high[:, 1])
        - _at_points(integral, low[:, 0], high[:, 1])
        - _at_points(integral, high[:, 0], low[:, 1])
        + _at_points(integral, low[:, 0], low[:, 1])
    )
    fractions: Float64Array = np.clip(area / (scale[0] * scale[1] * edge**2), 0.0, 1.0)
    return fractions


def _at_points(integral: Float64Array, x: Float64Array, y: Float64Array) -> Float64Array:
    column = np.clip(np.floor(x).astype(np.int64), 0, integral.shape[1] - 2)
    row = np.clip(np.floor(y).astype(np.int64), 0, integral.shape[0] - 2)
    fx, fy = x - column, y - row
    top = integral[row, column] * (1 - fx) + integral[row, column + 1] * fx
    bottom = integral[row + 1, column] * (1 - fx) + integral[row + 1, column + 1] * fx
    value: Float64Array = top * (1 - fy) + bottom * fy
    return value


def _interpolate(rows: Float64Array, positions: Float64Array) -> Float64Array:
    """Rows of ``rows`` at fractional positions, linearly."""
    low = np.clip(np.floor(positions).astype(np.int64), 0, len(rows) - 2)
    part = (positions - low)[:, None]
    mixed: Float64Array = rows[low] * (1 - part) + rows[low + 1] * part
    return mixed
