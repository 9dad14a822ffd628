"""A tile is at the same place in level-0 pixels, on the grid, in Label Studio's percent and in GeoJSON, exactly."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from backend.slides.grid import box_fractions, tissue_fractions
from backend.slides.tiling import Grid


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    mpp = draw(st.floats(0.05, 5))
    tile_px = draw(st.sampled_from([32, 224, 256, 518]))
    edge = tile_px * draw(st.sampled_from([0.25, 0.5, 0.4987, 1.0])) / mpp
    assume(edge >= 2)
    columns, rows = draw(st.integers(1, 25_000)), draw(st.integers(1, 25_000))
    width = max(1, math.floor((columns - draw(st.floats(0, 0.999))) * edge))
    height = max(1, math.floor((rows - draw(st.floats(0, 0.999))) * edge))
    return Grid.covering((width, height), edge)


@st.composite
def tiles(draw: st.DrawFn) -> tuple[Grid, int, int]:
    grid = draw(grids())
    far = st.integers(0, 3)
    column = draw(st.integers(0, grid.columns - 1) | far.map(lambda k: max(0, grid.columns - 1 - k)))
    row = draw(st.integers(0, grid.rows - 1) | far.map(lambda k: max(0, grid.rows - 1 - k)))
    return grid, column, row


@given(tiles())
def test_level0_and_grid_round_trip(tile: tuple[Grid, int, int]) -> None:
    grid, column, row = tile
    x, y = grid.level0_of(column, row)
    assert grid.cell_of(x, y) == (column, row)
    x0, y0, x1, y1 = grid.rectangle(column, row)
    assert (x0, y0) == (x, y)
    assert grid.cell_of(x1 - 1, y1 - 1) == (column, row)


@given(tiles())
def test_percent_and_level0_round_trip(tile: tuple[Grid, int, int]) -> None:
    grid, column, row = tile
    percent = grid.percent_rectangle(column, row)
    assert all(0 <= v <= 100 for v in percent)
    assert percent[0] + percent[2] <= 100 + 1e-9
    assert percent[1] + percent[3] <= 100 + 1e-9
    assert tuple(round(v) for v in grid.level0_of_percent(*percent)) == grid.rectangle(column, row)
    assert grid.cell_of_percent(*percent) == (column, row)


@given(tiles())
def test_geojson_and_grid_round_trip(tile: tuple[Grid, int, int]) -> None:
    grid, column, row = tile
    ring = grid.to_geojson(column, row)
    assert ring[0] == ring[-1]
    assert len(ring) == 5
    assert all(isinstance(v, int) for point in ring for v in point)
    assert (ring[0][0], ring[0][1], ring[2][0], ring[2][1]) == grid.rectangle(column, row)
    # RFC 7946: the outer ring is counter-clockwise, that is, its signed area is positive.
    assert sum(a[0] * b[1] - b[0] * a[1] for a, b in pairwise(ring)) > 0
    assert grid.cell_of_geojson(ring) == (column, row)


@given(tiles())
def test_no_drift_at_the_far_edge(tile: tuple[Grid, int, int]) -> None:
    grid, column, row = tile
    x, y = grid.level0_of(column, row)
    assert abs(x - column * grid.tile_size_level0) <= 0.5
    assert abs(y - row * grid.tile_size_level0) <= 0.5
    cells = np.array([[column, row]], np.int64)
    assert grid.coords_of(cells).tolist() == [[x, y]]


@given(grids())
def test_tiles_cover_the_slide_without_gap_or_overlap(grid: Grid) -> None:
    columns, rows = grid.column_edges(), grid.row_edges()
    assert columns[0] == rows[0] == 0
    assert (np.diff(columns) > 0).all()
    assert (np.diff(rows) > 0).all()
    assert columns[-2] < grid.slide_size[0] <= columns[-1]
    assert rows[-2] < grid.slide_size[1] <= rows[-1]


@given(grids(), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_every_point_of_the_slide_lies_in_the_tile_that_is_named(grid: Grid, u: float, v: float) -> None:
    x, y = u * grid.slide_size[0], v * grid.slide_size[1]
    assume(x < grid.slide_size[0] and y < grid.slide_size[1])
    x0, y0, x1, y1 = grid.rectangle(*grid.cell_of(x, y))
    assert x0 <= x < x1
    assert y0 <= y < y1


def test_a_point_outside_the_slide_has_no_tile() -> None:
    grid = Grid.covering((1000, 500), 224.4)
    for point in ((-1, 0), (0, -0.5), (1000, 0), (0, 500)):
        with pytest.raises(ValueError, match="outside the slide"):
            grid.cell_of(*point)


def test_a_drawn_box_gives_the_tiles_it_touches() -> None:
    grid = Grid.covering((1000, 500), 100.0)
    assert grid.cells_in(150, 100, 300, 250) == (1, 1, 3, 3)
    assert grid.cells_in(300, 250, 150, 100) == (1, 1, 3, 3)
    assert grid.cells_in(-50, -50, 5000, 5000) == (0, 0, 10, 5)
    assert grid.cells_in(2000, 0, 3000, 10) == (0, 0, 0, 0)


@given(st.integers(0, 2**32 - 1), st.floats(3.0, 40.0), st.integers(1, 7))
def test_tissue_fractions_are_exact(seed: int, edge: float, factor: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((rng.integers(2, 20), rng.integers(2, 20))) < 0.5
    size = (mask.shape[1] * factor, mask.shape[0] * factor)
    grid = Grid.covering(size, edge)
    found = tissue_fractions(mask, grid)
    level0 = np.kron(mask, np.ones((factor, factor), bool))
    columns, rows = grid.column_edges(), grid.row_edges()
    for row in range(grid.rows):
        for column in range(grid.columns):
            inside = level0[rows[row] : rows[row + 1], columns[column] : columns[column + 1]].sum()
            area = (rows[row + 1] - rows[row]) * (columns[column + 1] - columns[column])
            assert found[row, column] == pytest.approx(inside / area, abs=1e-9)


@given(st.integers(0, 2**32 - 1), st.integers(3, 30))
def test_box_fractions_are_exact(seed: int, edge: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((12, 17)) < 0.5
    coords = rng.integers(0, 40, (5, 2))
    found = box_fractions(mask, (17 * 3, 12 * 3), coords, float(edge))
    level0 = np.kron(mask, np.ones((3, 3), bool))
    for (x, y), fraction in zip(coords, found, strict=True):
        assert fraction == pytest.approx(level0[y : y + edge, x : x + edge].sum() / edge**2, abs=1e-9)
