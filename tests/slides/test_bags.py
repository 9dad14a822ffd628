"""From a slide to its bag, and from the bag to its tiles."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from slide_makers import break_tile, glass, scribble, stroma, write

from backend.errors import (
    MppUnknown,
    NoTissue,
    SettingsError,
    SlideNotFound,
    SlideTooCoarse,
    SlideTooSmall,
    SlideUnreadable,
    TaskFieldMissing,
)
from backend.settings import Settings
from backend.slides.reader import open_slide
from backend.slides.synthetic import SyntheticSlide
from backend.slides.tiles import patch_sizes, read_patches, read_tiles
from backend.slides.tiling import Grid, make_bag, patches_bag

Make = Callable[..., Settings]


def bag_of(path: Path, settings: Settings, mpp: float | None = None):
    with open_slide(path, settings) as slide:
        return make_bag(slide, settings, task_mpp=mpp)


def image(path: Path, picture: np.ndarray) -> Path:
    Image.fromarray(picture).save(path)
    return path


def test_the_real_slide_becomes_a_bag(test_data: Path, settings: Make) -> None:
    bag = bag_of(test_data / "slides" / "CMU-1-Small-Region.svs", settings())
    assert (bag.mpp, bag.mpp_source) == (pytest.approx(0.499), "slide")
    assert bag.tile_size_level0 == pytest.approx(224 * 0.5 / 0.499)
    assert bag.grid_size == (10, 14)
    assert 45 <= len(bag) <= 75
    assert np.array_equal(bag.coords, np.rint(bag.grid * bag.tile_size_level0))
    assert Grid.of_bag(bag).columns == 10


@pytest.mark.parametrize("name", ["cmu1-small-pyramid-20x.tif", "cmu1-dicom/03.dcm"])
def test_other_formats_of_the_same_slide_give_nearly_the_same_bag(test_data: Path, settings: Make, name: str) -> None:
    folder = test_data / "slides"
    bags = [bag_of(folder / n, settings()) for n in ("CMU-1-Small-Region.svs", name)]
    first, second = ({tuple(c) for c in bag.coords.tolist()} for bag in bags)
    assert len(first ^ second) <= 2


def test_tiles_lie_where_the_tissue_was_drawn(synthetic_slide: SyntheticSlide, settings: Make) -> None:
    bag = bag_of(synthetic_slide.path, settings())
    truth = synthetic_slide.tissue_mask
    scale = truth.shape[1] / synthetic_slide.size[0]
    chosen = set(map(tuple, bag.grid.tolist()))
    for column in range(bag.grid_size[0]):
        for row in range(bag.grid_size[1]):
            x0, y0, x1, y1 = (round(v * scale) for v in Grid.of_bag(bag).rectangle(column, row))
            part = truth[y0:y1, x0:x1].sum() / (bag.tile_size_level0 * scale) ** 2
            if part > 0.35:
                assert (column, row) in chosen
            if part < 0.15:
                assert (column, row) not in chosen


def test_the_scale_comes_from_the_slide_then_the_task_then_the_setting(tmp_path: Path, settings: Make) -> None:
    tissue = stroma(900, 900)
    stated, silent = write(tmp_path / "stated.tif", tissue), write(tmp_path / "silent.tif", tissue, mpp=None)
    defaults = settings(default_mpp=0.6)
    assert (bag_of(stated, defaults, 0.55).mpp_source, bag_of(stated, defaults, 0.55).mpp) == ("slide", 0.5)
    assert (bag_of(silent, defaults, 0.55).mpp_source, bag_of(silent, defaults, 0.55).mpp) == ("task", 0.55)
    assert (bag_of(silent, defaults).mpp_source, bag_of(silent, defaults).mpp) == ("default", 0.6)
    with pytest.raises(MppUnknown, match=r"the slide states no scale.*DEFAULT_MPP"):
        bag_of(silent, settings())


@pytest.mark.parametrize("mpp", [0.0, 1e6, -0.5, float("nan"), float("inf")])
def test_an_impossible_scale_in_the_task_is_an_error_with_its_value(tmp_path: Path, settings: Make, mpp: float) -> None:
    path = write(tmp_path / "slide.tif", stroma(900, 900))
    with pytest.raises(MppUnknown, match=f"The task says mpp = {mpp:g}".replace("+", r"\+")):
        bag_of(path, settings(), mpp)


@pytest.mark.parametrize(("stated", "words"), [(1e6, r"1e\+06 x 1e\+06"), (0.001, "0.001 x 0.001")])
def test_an_impossible_scale_in_the_slide_is_told(tmp_path: Path, settings: Make, stated: float, words: str) -> None:
    path = write(tmp_path / "slide.tif", stroma(900, 900), mpp=stated)
    with pytest.raises(MppUnknown, match=words):
        bag_of(path, settings())


def test_a_slide_that_is_too_coarse_is_an_error(test_data: Path, tmp_path: Path, settings: Make) -> None:
    with pytest.raises(SlideTooCoarse, match=r"2 µm per pixel \(by the slide\), and tiles need 0\.5"):
        bag_of(write(tmp_path / "coarse.tif", stroma(900, 900), mpp=2.0), settings())
    with pytest.raises(MppUnknown, match=r"28\.97"):
        bag_of(test_data / "slides" / "ezwsi_camelyon_multiframe.dcm", settings())


@pytest.mark.parametrize("size", [(1, 1), (100, 100), (5000, 60), (220, 224)])
def test_an_image_smaller_than_a_tile_is_too_small(tmp_path: Path, settings: Make, size: tuple[int, int]) -> None:
    path = image(tmp_path / "small.png", stroma(*size))
    with pytest.raises(SlideTooSmall, match=f"{size[0]} x {size[1]} pixels; one tile needs"):
        bag_of(path, settings(), 0.5)
    if min(size) < 140:  # said even where the scale is unknown
        with pytest.raises(SlideTooSmall):
            bag_of(path, settings())


def test_an_image_of_exactly_one_tile_is_a_bag_of_one(tmp_path: Path, settings: Make) -> None:
    assert len(bag_of(image(tmp_path / "one.png", stroma(224, 224)), settings(), 0.5)) == 1
    assert len(bag_of(image(tmp_path / "almost.png", stroma(224, 224)), settings(), 0.499)) == 1


def test_blank_and_all_pen_slides_have_no_tissue(tmp_path: Path, settings: Make) -> None:
    blank = glass(2400, 1600)
    pen = scribble(blank, (25, 50, 150), thickness=300)
    for name, picture in (("blank.tif", blank), ("pen.tif", pen), ("black.tif", np.zeros((900, 900, 3), np.uint8))):
        with pytest.raises(NoTissue, match=r"it covers 0\.\d % of the slide"):
            bag_of(write(tmp_path / name, picture), settings())


def test_a_tile_that_sticks_out_counts_with_its_whole_area(tmp_path: Path, settings: Make) -> None:
    # 2 x 2 whole tiles and a strip of 40 px: 18 % of a tile.
    path = image(tmp_path / "strip.png", stroma(448 + 40, 448))
    assert bag_of(path, settings(), 0.5).grid.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert len(bag_of(path, settings(tissue_min_fraction=0.1), 0.5)) == 6


def test_a_fraction_of_zero_takes_every_tile_and_of_one_only_full_ones(tmp_path: Path, settings: Make) -> None:
    picture = glass(224 * 4, 224 * 4)
    picture[:, : 224 * 2] = stroma(224 * 2, 224 * 4)
    path = image(tmp_path / "half.png", picture)
    assert len(bag_of(path, settings(tissue_min_fraction=0.0), 0.5)) == 16
    full = bag_of(path, settings(tissue_min_fraction=0.97), 0.5)
    assert set(full.grid[:, 0].tolist()) <= {0, 1}


def test_an_overview_that_would_be_huge_is_refused(tmp_path: Path, settings: Make) -> None:
    path = image(tmp_path / "long.png", stroma(22_000, 300))
    with pytest.raises(SettingsError, match=r"TISSUE_MPP = 0\.5"):
        bag_of(path, settings(tissue_mpp=0.5), 0.5)


def test_tiles_come_in_bag_order_and_are_the_slides_pixels(synthetic_slide: SyntheticSlide, settings: Make) -> None:
    with open_slide(synthetic_slide.path, settings()) as slide:
        bag = make_bag(slide, settings(), task_mpp=None)
        chunks = list(read_tiles(slide, bag, chunk=7, threads=3))
        assert [len(c) for c in chunks[:-1]] == [7] * (len(chunks) - 1)
        tiles = np.concatenate(chunks)
        assert tiles.shape == (len(bag), 224, 224, 3)
        for i in (0, len(bag) // 2, len(bag) - 1):
            x, y = bag.coords[i]
            assert np.array_equal(tiles[i], slide.read_region(x, y, bag.tile_size_level0, 224))
    with Image.open(synthetic_slide.path) as whole:
        x, y = (int(v) for v in bag.coords[len(bag) // 2])
        assert np.array_equal(tiles[len(bag) // 2], np.asarray(whole.convert("RGB").crop((x, y, x + 224, y + 224))))


@pytest.mark.parametrize(("chunk", "threads"), [(1, 1), (1000, 4), (3, 8)])
def test_chunks_and_threads_do_not_change_the_tiles(
    synthetic_slide: SyntheticSlide, settings: Make, chunk: int, threads: int
) -> None:
    with open_slide(synthetic_slide.path, settings()) as slide:
        bag = make_bag(slide, settings(tile_mpp=1.0), task_mpp=None)
        expected = np.concatenate(list(read_tiles(slide, bag, chunk=16, threads=2)))
        assert np.array_equal(np.concatenate(list(read_tiles(slide, bag, chunk=chunk, threads=threads))), expected)


def tile_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("tiles")]


def test_closing_early_stops_the_threads(synthetic_slide: SyntheticSlide, settings: Make) -> None:
    with open_slide(synthetic_slide.path, settings()) as slide:
        tiles = read_tiles(slide, make_bag(slide, settings(), task_mpp=None), chunk=4, threads=3)
        next(tiles)
        assert tile_threads()
        tiles.close()
        assert not tile_threads()


def test_no_more_than_a_few_chunks_are_read_ahead(synthetic_slide: SyntheticSlide, settings: Make) -> None:
    with open_slide(synthetic_slide.path, settings()) as slide:
        bag = make_bag(slide, settings(), task_mpp=None)
        started: list[float] = []
        read = slide.read_region

        class Counting:
            def read_region(self, *args: float) -> np.ndarray:
                started.append(args[0])
                return read(*args)

        tiles = read_tiles(Counting(), bag, chunk=4, threads=2)
        next(tiles)
        assert len(bag) > 24
        tiles.close()
        assert len(started) <= 4 * 4


def test_a_broken_tile_ends_the_reading_with_its_place(tmp_path: Path, settings: Make) -> None:
    path = write(tmp_path / "broken.tif", stroma(1536, 1024))
    break_tile(path, column=3, row=2)
    with open_slide(path, settings()) as slide:
        bag = make_bag(slide, settings(), task_mpp=None)
        with pytest.raises(SlideUnreadable, match=r"broken\.tif is damaged at x \d+, y \d+"):
            list(read_tiles(slide, bag, chunk=4, threads=2))
        assert not tile_threads()


def test_a_bag_of_patches_keeps_their_order_and_sizes(tmp_path: Path, settings: Make) -> None:
    sizes = [(300, 200), (224, 224), (512, 512), (100, 150)]
    paths = [image(tmp_path / f"{i}.png", np.full((h, w, 3), 40 * i + 20, np.uint8)) for i, (w, h) in enumerate(sizes)]
    bag = patches_bag(patch_sizes(paths, settings()), settings())
    assert bag.kind == "patches"
    assert bag.patch_sizes.tolist() == [list(s) for s in sizes]
    assert bag.grid.tolist() == [[0, 0], [1, 0], [2, 0], [3, 0]]
    assert (bag.slide_size, bag.mpp, bag.mpp_source) == ((0, 0), 0.0, "none")
    tiles = np.concatenate(list(read_patches(paths, bag, settings(), chunk=3, threads=2)))
    assert tiles[:, 112, 112, 0].tolist() == [20, 60, 100, 140]


def test_a_broken_patch_is_named(tmp_path: Path, settings: Make) -> None:
    good = image(tmp_path / "good.png", stroma(224, 224))
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture at all, only words")
    tiny = image(tmp_path / "tiny.png", stroma(3, 300))
    for bad, error in (
        (tmp_path / "empty.png", SlideUnreadable),
        (tmp_path / "text.png", SlideUnreadable),
        (tmp_path / "gone.png", SlideNotFound),
        (tiny, SlideTooSmall),
    ):
        with pytest.raises(error, match=bad.name):
            patch_sizes([good, bad], settings())
    with pytest.raises(TaskFieldMissing, match="list of patches is empty"):
        patches_bag([], settings())
