"""A slide without coarse levels is read piece by piece: exactly, within bounded memory, and not for hours."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image
from slide_makers import stroma, write_one_level

from backend.errors import SlideTooLarge, SlideUnreadable
from backend.results.bag import UInt8Array
from backend.settings import Settings
from backend.slides import levels
from backend.slides.images import DecodedImage
from backend.slides.levels import BLOCK_PX, ImageSlide, LevelSlide
from backend.slides.reader import open_slide
from backend.slides.resample import REDUCED_UP_TO

Make = Callable[..., Settings]
TESTS = Path(__file__).resolve().parents[1]


class OneLevel(ImageSlide):
    """A picture as a slide of one level that notes what is read of it.

    ``early``: each read starts so many pixels before what was asked for, as OpenSlide's do that cannot start where they should.
    """

    def __init__(self, picture: UInt8Array, early: int = 0) -> None:
        super().__init__(DecodedImage(Image.fromarray(picture), "png", None))
        self.level_downsamples = (1.0,)
        self.early = early
        self.reads: list[tuple[int, int, int, int]] = []

    def _read_level(self, level: int, x: int, y: int, w: int, h: int) -> tuple[Image.Image, float, float]:
        self.reads.append((x, y, w, h))
        return super()._read_level(level, x - self.early, y - self.early, w + self.early, h + self.early)


class Blank(LevelSlide):
    """``edge`` x ``edge`` pixels of one colour in levels of these downsamples, without memory of their own."""

    def __init__(self, edge: int, downsamples: tuple[float, ...] = (1.0,), broken: tuple[int, ...] = ()) -> None:
        super().__init__(
            size=(edge, edge),
            downsamples=downsamples,
            level_sizes=[(int(edge / ds), int(edge / ds)) for ds in downsamples],
            stated=None,
            reader="blank",
            properties={},
            name="blank.svs",
        )
        self._colour = np.full((BLOCK_PX + 200, BLOCK_PX + 200, 3), (200, 120, 160), np.uint8)
        self._broken = broken
        self.level_px = 0

    def _read_level(self, level: int, x: int, y: int, w: int, h: int) -> tuple[UInt8Array, float, float]:
        if level in self._broken:
            raise SlideUnreadable(f"level {level} is damaged")
        self.level_px += w * h
        return self._colour[:h, :w], x, y

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def picture() -> UInt8Array:
    """Four fields of different brightness, of sizes that divide by nothing."""
    dark, light = stroma(901, 733, seed=1) // 3, stroma(640, 733, seed=2)
    return np.vstack([np.hstack([dark, light]), np.hstack([light, dark])])


def area_average(picture: UInt8Array, x: float, y: float, size: float, out: int) -> np.ndarray:
    """float64 (out, out, 3): the mean of the picture over each cell, white beyond it."""

    def weights(start: float, length: int) -> np.ndarray:
        edges = start + size / out * np.arange(out + 1)
        low, high = np.maximum(edges[:-1, None], np.arange(length)), np.minimum(edges[1:, None], np.arange(length) + 1)
        return np.clip(high - low, 0, None) / (size / out)

    rows, columns = weights(y, picture.shape[0]), weights(x, picture.shape[1])
    darkness = np.tensordot(rows, 255 - picture.astype(np.float64), 1)
    average: np.ndarray = 255 - np.tensordot(darkness, columns, ((1,), (1,))).transpose(0, 2, 1)
    return average


REQUESTS = [
    (0, 0, 1466, 1),
    (0, 0, 1400, 7),
    (100.3, 50.7, 1111.1, 5),
    (-300, -20.5, 4096, 3),
    (1400, 1300, 2000, 9),
    (0, 0, 16384, 4),
    (13, 14, 90, 1),
]


@pytest.mark.parametrize("early", [0, 1])
@pytest.mark.parametrize("request_", REQUESTS)
def test_pixels_that_cover_very_many_are_their_exact_average(
    picture: UInt8Array, request_: tuple[float, float, float, int], early: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y, size, out = request_
    assert size / out > REDUCED_UP_TO
    monkeypatch.setattr(levels, "BLOCK_PX", 256)
    found = OneLevel(picture, early).read_region(x, y, size, out)
    assert np.abs(found - area_average(picture, x, y, size, out)).max() <= 0.5 + 1e-6, "rounded once"


@pytest.mark.parametrize("request_", [*REQUESTS, (0, 0, 1466, 100), (5.5, 0, 3000, 47), (0, 0, 1466, 1466)])
def test_no_read_of_a_level_is_larger_than_a_block_and_the_padding_of_a_filter(
    picture: UInt8Array, request_: tuple[float, float, float, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levels, "BLOCK_PX", 256)
    slide = OneLevel(picture)
    slide.read_region(*request_)
    assert slide.reads
    assert max(max(w, h) for _, _, w, h in slide.reads) <= 256 + 2 * (REDUCED_UP_TO + 1) + 1


def test_sums_read_each_pixel_of_the_slide_once_and_nothing_beyond_it(
    picture: UInt8Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levels, "BLOCK_PX", 256)
    slide = OneLevel(picture)
    slide.read_region(-1000, -1000, 40_000.5, 7)
    seen = np.zeros(picture.shape[:2], np.int64)
    for x, y, w, h in slide.reads:
        assert x >= 0 and y >= 0 and x + w <= picture.shape[1] and y + h <= picture.shape[0]
        seen[y : y + h, x : x + w] += 1
    assert (seen == 1).all()


def test_one_pixel_that_covers_a_whole_slide_takes_the_memory_of_a_block(tmp_path: Path) -> None:
    """16 bytes for each pixel of a block (OpenSlide's, Pillow's and NumPy's copies) and its cache: read at once it were 2.5 GiB."""
    path = write_one_level(tmp_path / "flat.tif", 8_500)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "import openslide\n"
        "from slide_makers import peak_bytes\n"
        "from backend.slides.openslide_reader import OpenSlideSlide\n"
        "with OpenSlideSlide(Path(sys.argv[1]), openslide.OpenSlideCache(2**24)) as slide:\n"
        "    before = peak_bytes()\n"
        "    pixel = slide.read_region(0, 0, 16_384, 1)\n"
        "    print(peak_bytes() - before, *pixel[0, 0])\n"
    )
    paths = os.pathsep.join((str(TESTS / "slides"), str(TESTS.parent)))
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    taken, *pixel = map(int, done.stdout.split())
    assert taken < 16 * BLOCK_PX**2 + 2**26
    part = (8_500 / 16_384) ** 2
    assert np.abs(np.array(pixel) - (255 - part * (255 - np.array([200, 120, 160])))).max() <= 2


def test_a_slide_of_40_000_x_40_000_pixels_in_one_level_has_its_views() -> None:
    assert (Blank(40_000).overview(500) == (200, 120, 160)).all()
    assert 40_000**2 < levels.REGION_MAX_LEVEL_PX < levels.OVERVIEW_MAX_LEVEL_PX


def test_a_view_that_would_take_minutes_is_refused_before_anything_is_read() -> None:
    slide = Blank(512_000)
    with pytest.raises(
        SlideTooLarge, match=r"blank\.svs has no level coarse enough.* 262,144 million pixels of level 0"
    ) as refused:
        slide.read_region(0, 0, 524_288, 8)
    assert "vips tiffsave" in refused.value.hint
    with pytest.raises(SlideTooLarge):
        slide.overview(2000)
    assert slide.level_px == 0
    assert slide.read_region(400_000, 400_000, 8_192, 64).shape == (64, 64, 3), "closer views are there"


def test_whoever_shows_an_overview_may_ask_for_a_tighter_limit_than_the_one_that_finds_tissue() -> None:
    slide = Blank(10_000)
    assert slide.overview(100, 10_000**2).shape == (100, 100, 3)
    with pytest.raises(SlideTooLarge):
        slide.overview(100, 10_000**2 - 1)


def test_a_slide_with_coarse_levels_may_be_of_any_size() -> None:
    slide = Blank(1_024_000, (1.0, 8.0, 64.0, 512.0))
    assert slide.overview(2000).shape == (2000, 2000, 3)
    assert slide.level_px <= 2_200**2


def test_a_broken_coarse_level_does_not_lead_around_the_limit() -> None:
    slide = Blank(512_000, (1.0, 256.0), broken=(1,))
    with pytest.raises(SlideTooLarge, match="of level 0"):
        slide.read_region(0, 0, 512_000, 256)
    assert slide.level_px == 0


def test_white_beyond_the_slide_does_not_count() -> None:
    slide = Blank(2_000)
    found = slide.read_region(-500_000, -500_000, 1_000_000, 4)
    assert (found[0] == 255).all() and slide.level_px <= 2_000**2


def test_a_file_with_tiles_larger_than_a_cache_of_them_is_refused(tmp_path: Path, settings: Make) -> None:
    path = write_one_level(tmp_path / "huge.tif", 65_536, tile=8_192)
    path.write_bytes(path.read_bytes() + bytes(100_000))
    with pytest.raises(SlideUnreadable, match="a tile has 8192 x 8192 pixels"):
        open_slide(path, settings())
    assert openslide.OpenSlide.detect_format(str(path)) == "generic-tiff", "OpenSlide would have read it"
