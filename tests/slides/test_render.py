"""Heatmaps that a pathologist can be shown: right place, right colours, nothing painted on glass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from synthetic_bags import synthetic_patches, synthetic_result

from backend.errors import ExportUnsupported
from backend.slides.render import (
    attention_grid,
    colormap_lut,
    heatmap_image,
    overlay,
    rank_grid,
    shown_size,
    tile_edges_px,
)


def test_the_attention_grid_holds_the_weights_of_the_tiles_and_nan_elsewhere():
    result = synthetic_result(tissue=0.4)
    grid = attention_grid(result)
    columns, rows = result.bag.grid_size
    assert grid.shape == (rows, columns)
    assert np.isfinite(grid).sum() == len(result.bag)
    assert np.array_equal(grid[result.bag.grid[:, 1], result.bag.grid[:, 0]], result.mean_attention)
    one = attention_grid(result, head=3)
    assert np.array_equal(one[result.bag.grid[:, 1], result.bag.grid[:, 0]], result.attention[:, 3])
    with pytest.raises(ValueError, match="head 8 does not exist"):
        attention_grid(result, head=8)


def test_the_heatmap_has_one_pixel_a_tile_and_its_brightest_where_attention_was_planted():
    result = synthetic_result(tissue=0.4, planted=(5, 7, 8, 9))
    image = heatmap_image(result)
    assert (image.mode, image.size) == ("RGBA", result.bag.grid_size)
    pixels = np.asarray(image)
    assert np.array_equal(pixels[..., 3] > 0, np.isfinite(rank_grid(result)))
    brightness = np.where(pixels[..., 3] > 0, pixels[..., :3].sum(axis=2, dtype=int), -1)
    rows, columns = np.unravel_index(np.argsort(brightness.ravel())[-6:], brightness.shape)
    assert {*zip(columns.tolist(), rows.tolist(), strict=True)} == {(c, r) for c in (5, 6, 7) for r in (7, 8)}


@pytest.mark.parametrize("colormap", ["viridis", "magma"])
def test_colour_maps_get_lighter_from_low_to_high(colormap):
    lut = colormap_lut(colormap).astype(float)
    assert lut.shape == (256, 3)
    lightness = lut @ [0.2126, 0.7152, 0.0722]
    assert np.diff(lightness).min() > -1.0
    assert lightness[-1] - lightness[0] > 150


def test_viridis_has_its_published_ends():
    assert colormap_lut("viridis")[[0, 255]].tolist() == [[0x44, 0x01, 0x54], [0xFD, 0xE7, 0x25]]


def test_the_overlay_tints_the_tiles_leaves_the_glass_and_adds_a_legend_below():
    result = synthetic_result((4_480, 4_480), 0.25, tissue=0.5, planted=(2, 2, 4, 4), stand_in=True)
    overview = Image.new("RGB", (1000, 1000), (200, 120, 160))
    picture = overlay(overview, result, alpha=0.5)
    assert picture.mode == "RGB"
    assert picture.width == 1000
    assert picture.height > 1000
    pixels = np.asarray(picture)
    ranks = rank_grid(result)
    for row in range(10):
        for column in range(10):
            centre = pixels[row * 100 + 50, column * 100 + 50].astype(float)
            if np.isfinite(ranks[row, column]):
                colour = colormap_lut()[round(float(ranks[row, column]) * 255)]
                assert np.allclose(centre, (np.array([200, 120, 160]) + colour) / 2, atol=1)
            else:
                assert centre.tolist() == [200, 120, 160]
    legend = pixels[1000:]
    assert (legend < 100).all(axis=2).any(), "text is written"
    for end in (0, -1):
        assert (legend == colormap_lut()[end]).all(axis=2).any(), "the bar has both ends of the colour map"
    real = replace(result, provenance={**result.provenance, "stand_in": False})
    assert not np.array_equal(np.asarray(overlay(overview, real))[1000:], legend), "a stand-in is called so"


@settings(deadline=None, max_examples=60)
@given(st.floats(0.05, 5), st.integers(1, 60), st.integers(1, 60), st.integers(1, 500), st.integers(1, 500))
def test_tile_edges_tile_the_picture_without_gaps_and_never_leave_it(mpp, columns, rows, width, height):
    edge = 224 * 0.5 / mpp
    bag = synthetic_result((int(np.ceil((columns + 0.5) * edge)), int(np.ceil((rows + 0.5) * edge))), mpp, tissue=0).bag
    both = zip(tile_edges_px(bag, (width, height)), bag.grid_size, (width, height), bag.slide_size, strict=True)
    for edges, tiles, pixels, level0 in both:
        assert len(edges) == tiles + 1
        assert edges[0] == 0
        assert edges[-1] <= pixels
        assert (np.diff(edges) >= 0).all()
        assert np.abs(edges - np.arange(tiles + 1) * edge * pixels / level0).max() <= 0.5 + 1e-6


def test_the_shown_picture_keeps_the_slides_aspect_and_is_never_enlarged():
    assert shown_size((40_000, 30_000)) == (2000, 1500)
    assert shown_size((30_000, 40_000)) == (1500, 2000)
    assert shown_size((300, 200)) == (300, 200)
    assert shown_size((1_000_000, 10)) == (2000, 1)
    with pytest.raises(ValueError, match="cannot be shown"):
        shown_size((0, 10))


def test_patches_have_no_slide_to_lay_a_heatmap_over():
    with pytest.raises(ExportUnsupported, match="bag of patches"):
        overlay(Image.new("RGB", (10, 10)), synthetic_patches([(5, 5)], hot=0))


def test_a_narrow_slide_still_has_a_legend_that_can_be_read():
    picture = overlay(Image.new("RGB", (40, 900), "white"), synthetic_result((1_000, 22_400), 0.5))
    assert picture.width > 250
