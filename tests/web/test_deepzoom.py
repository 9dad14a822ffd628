"""Tiles of the pyramid are the slide's own pixels, they fit together, and slides are kept open within limits."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from slides.slide_makers import write_one_level

from backend.errors import SlideNotFound, SlideTooLarge, SourceError, TileOutside
from backend.settings import Settings
from backend.slides.reader import open_slide
from backend.slides.source import SlideRef, SourceResolver
from backend.slides.synthetic import SyntheticSlide
from backend.web.deepzoom import OVERLAP_PX, TILE_PX, DeepZoom, Pyramid
from backend.web.slide_cache import SlideCache


def pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).astype(int)


@pytest.fixture
def zoomed(synthetic_slide: SyntheticSlide, settings: Callable[..., Settings]) -> tuple[DeepZoom, SlideRef, Settings]:
    made = settings(slide_roots=(synthetic_slide.path.parent,))
    resolver = SourceResolver(made)
    return DeepZoom(SlideCache(made, resolver)), resolver.resolve(str(synthetic_slide.path)), made


@given(st.integers(1, 300_000), st.integers(1, 300_000), st.data())
def test_the_tiles_of_a_level_cover_it_exactly_and_share_one_pixel_with_each_neighbour(
    width: int, height: int, data: st.DataObject
) -> None:
    pyramid = Pyramid((width, height))
    assert pyramid.level_size(pyramid.last_level) == (width, height)
    assert pyramid.level_size(0) == (1, 1)
    level = data.draw(st.integers(0, pyramid.last_level))
    columns, rows = pyramid.tiles(level)
    row = data.draw(st.integers(0, rows - 1))
    column = data.draw(st.integers(0, columns - 1))
    x, y, w, h = pyramid.tile_box(level, column, row)
    assert x == max(0, column * TILE_PX - OVERLAP_PX) and y == max(0, row * TILE_PX - OVERLAP_PX)
    level_width, level_height = pyramid.level_size(level)
    assert 1 <= w <= TILE_PX + 2 * OVERLAP_PX and 1 <= h <= TILE_PX + 2 * OVERLAP_PX
    assert (x + w == level_width) == (column == columns - 1)
    assert (y + h == level_height) == (row == rows - 1)


def test_a_tile_of_the_last_level_is_the_slide_at_its_place(zoomed: tuple[DeepZoom, SlideRef, Settings]) -> None:
    deepzoom, ref, settings = zoomed
    last = deepzoom.pyramid(ref).last_level
    tile = pixels(deepzoom.tile(ref, last, 2, 1).jpeg)
    with open_slide(Path(ref.locations[0]), settings) as slide:
        truth = slide.read_region(2 * TILE_PX - 1, TILE_PX - 1, 256, 256).astype(int)
    assert tile.shape == truth.shape
    assert np.abs(tile - truth).mean() < 4, "JPEG loses a little, and nothing is shifted"
    shifted = np.roll(truth, 2, axis=1)
    assert np.abs(tile - shifted).mean() > 2 * np.abs(tile - truth).mean()


def test_a_coarse_tile_is_the_whole_slide_small(zoomed: tuple[DeepZoom, SlideRef, Settings]) -> None:
    deepzoom, ref, settings = zoomed
    pyramid = deepzoom.pyramid(ref)
    level = next(n for n in range(pyramid.last_level, -1, -1) if pyramid.tiles(n) == (1, 1))
    tile = pixels(deepzoom.tile(ref, level, 0, 0).jpeg)
    with open_slide(Path(ref.locations[0]), settings) as slide:
        truth = slide.overview(max(pyramid.level_size(level))).astype(int)
    assert tile.shape == truth.shape
    assert np.abs(tile - truth).mean() < 5


@pytest.mark.parametrize(("level", "column", "row"), [(99, 0, 0), (-1, 0, 0), (11, 9, 0), (11, 0, 9), (11, -1, 0)])
def test_a_tile_outside_its_level_is_refused(
    level: int, column: int, row: int, zoomed: tuple[DeepZoom, SlideRef, Settings]
) -> None:
    deepzoom, ref, _ = zoomed
    with pytest.raises(TileOutside, match="There is no"):
        deepzoom.tile(ref, level, column, row)


@pytest.mark.parametrize(
    ("x", "y", "size", "px"),
    [(5000, 0, 224, 100), (-300, 0, 224, 100), (0, 0, 0, 100), (0, 0, 224, 5000), (0, 0, 10**9, 100)],
)
def test_a_region_beside_the_slide_or_of_no_sensible_size_is_refused(
    x: int, y: int, size: int, px: int, zoomed: tuple[DeepZoom, SlideRef, Settings]
) -> None:
    deepzoom, ref, _ = zoomed
    with pytest.raises(TileOutside):
        deepzoom.region(ref, x, y, size, px)


def test_a_slide_without_coarse_levels_has_its_fine_tiles_and_says_why_it_has_no_coarse_ones(
    tmp_path: Path, settings: Callable[..., Settings]
) -> None:
    write_one_level(tmp_path / "one.tif", 120_000)
    made = settings(slide_roots=(tmp_path,))
    resolver = SourceResolver(made)
    deepzoom, ref = DeepZoom(SlideCache(made, resolver)), resolver.resolve(str(tmp_path / "one.tif"))
    last = deepzoom.pyramid(ref).last_level
    for level in (0, 3, 8):
        with pytest.raises(SlideTooLarge, match=r"one\.tif has no level coarse enough"):
            deepzoom.tile(ref, level, 0, 0)
    with pytest.raises(SlideTooLarge):
        deepzoom.region(ref, 0, 0, 120_000, 512)
    assert pixels(deepzoom.tile(ref, last, 100, 100).jpeg).shape == (256, 256, 3)
    assert pixels(deepzoom.region(ref, 60_000, 60_000, 4_000, 224).jpeg).shape == (224, 224, 3)


def test_many_threads_get_the_pixels_that_one_gets(zoomed: tuple[DeepZoom, SlideRef, Settings]) -> None:
    deepzoom, ref, settings = zoomed
    places = [(11, column, row) for column in range(8) for row in range(8)]
    alone = DeepZoom(SlideCache(settings, SourceResolver(settings)))
    truth = {place: alone.tile(ref, *place).jpeg for place in places}
    seen: list[bool] = []

    def look(order: list[tuple[int, int, int]]) -> None:
        seen.extend(deepzoom.tile(ref, *place).jpeg == truth[place] for place in order)

    threads = [threading.Thread(target=look, args=(places[i:] + places[:i],)) for i in (0, 16, 32, 48)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 4 * len(places) and all(seen)


def test_the_memory_of_tiles_stays_within_its_limit_and_the_last_one_is_kept(
    zoomed: tuple[DeepZoom, SlideRef, Settings],
) -> None:
    _, ref, settings = zoomed
    small = DeepZoom(SlideCache(settings, SourceResolver(settings)), cache_bytes=60_000)
    for column in range(8):
        small.tile(ref, 11, column, 3)
    assert small.cached_tile(ref, 11, 7, 3) is not None
    assert small.cached_tile(ref, 11, 0, 3) is None


def test_only_so_many_slides_stay_open_and_one_in_use_is_not_closed(
    tmp_path: Path, settings: Callable[..., Settings]
) -> None:
    made = settings(slide_roots=(tmp_path,))
    resolver = SourceResolver(made)
    refs = []
    for i in range(4):
        Image.new("RGB", (300, 300), (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
        refs.append(resolver.resolve(str(tmp_path / f"{i}.png")))
    cache = SlideCache(made, resolver, max_open=2)
    with cache.slide(refs[0]) as first:
        for ref in refs[1:]:
            with cache.slide(ref) as slide:
                assert slide.size == (300, 300)
        assert len(cache) == 2
        assert first.read_region(0, 0, 10, 10).mean() == 0, "still open for its reader"
    with pytest.raises(IndexError):
        first.read_region(0, 0, 10, 10)
    # By memory: decoded, each of these holds 0.29 MB.
    tight = SlideCache(made, resolver, max_image_bytes=300_000)
    for ref in refs:
        with tight.slide(ref):
            pass
    assert len(tight) == 1


def test_a_slide_that_was_deleted_or_replaced_is_noticed(tmp_path: Path, settings: Callable[..., Settings]) -> None:
    made = settings(slide_roots=(tmp_path,))
    resolver = SourceResolver(made)
    Image.new("RGB", (300, 300)).save(tmp_path / "a.png")
    ref = resolver.resolve(str(tmp_path / "a.png"))
    cache = SlideCache(made, resolver)
    with cache.slide(ref):
        pass
    cache.check(ref)
    Image.new("RGB", (301, 300)).save(tmp_path / "a.png")
    with pytest.raises(SourceError, match="has changed"):
        cache.check(ref)
    assert len(cache) == 0
    (tmp_path / "a.png").unlink()
    with pytest.raises(SlideNotFound, match="There is no file"), cache.slide(ref):
        pass
    assert len(cache) == 0
