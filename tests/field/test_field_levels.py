"""A slide's levels show what level 0 shows, or they are not used: by both readers, and said to people."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
from field_slides import Maker, Picture, cropped_twin, levels, macro_level, padded_levels, plain, write_tiff
from PIL import Image, ImageFilter

from backend.settings import Settings
from backend.slides.direct_reader import DirectSlide
from backend.slides.openslide_reader import OpenSlideSlide
from backend.slides.reader import Slide, open_slide
from backend.slides.tiling import make_bag

Case = Callable[[Maker], Path]
READERS = [DirectSlide, OpenSlideSlide]
both = pytest.mark.parametrize("reader", READERS, ids=["direct", "openslide"])


@pytest.fixture(scope="module")
def small(picture: Picture) -> Picture:
    """A part of the picture, of sizes that divide by little."""
    return np.ascontiguousarray(picture[900:2380, 700:1810])


def images(rgb: Picture, *factors: int) -> list[Image.Image]:
    return [Image.fromarray(level) for level in levels(rgb, *factors)]


def shown_wrong(slide: Slide, truth: Picture) -> float:
    """Of some regions at downsamples 2 to 16 the worst mean difference from level 0, in grey values."""
    differences = []
    height, width = truth.shape[:2]
    for ds in (2, 4, 8, 16):
        edge = min(128 * ds, min(width, height) // (16 * ds) * 16 * ds)
        for x, y in (
            (width - edge, height - edge),
            (width - edge, 0),
            (0, height - edge),
            (min(width // 3, width - edge), (height - edge) // 2),
        ):
            found = Image.fromarray(slide.read_region(x, y, edge, edge // ds)).reduce(4)
            right = Image.fromarray(truth[y : y + edge, x : x + edge]).reduce(4 * ds)
            differences.append(np.abs(np.asarray(found).astype(int) - np.asarray(right)).mean())
    return float(max(differences))


# --- levels that are filled up --------------------------------------------------------------------------------------


@both
def test_filled_up_levels_have_their_true_downsamples_and_show_what_level_0_shows(
    case: Case, reader: type[OpenSlideSlide]
) -> None:
    truth = tifffile.imread(case(padded_levels), key=0)
    with reader(case(padded_levels)) as slide:
        assert slide.level_downsamples == (1, 2, 4, 8, 16)
        assert shown_wrong(slide, truth) < 6
        assert "Level 1 has 4608 x 4608 pixels, of which 4352 x 4352 belong to the slide" in slide.notes[0]
        assert len(slide.notes) == 4
        # Beyond the slide there is no filling, but white.
        assert (slide.read_region(slide.size[0], 1000, 4096, 64) == 255).all()


@both
def test_a_slide_with_filled_up_levels_has_the_tiles_of_its_twin(
    case: Case, anywhere: Settings, reader: type[OpenSlideSlide]
) -> None:
    bags = []
    for maker in (padded_levels, cropped_twin):
        with reader(case(maker)) as slide:
            bags.append(make_bag(slide, anywhere, task_mpp=None))
    assert len(bags[0]) > 400
    assert np.array_equal(bags[0].coords, bags[1].coords)
    assert any("belong to the slide" in note for note in bags[0].notes), "provenance says it"
    assert bags[1].notes == ()


def filled_up(picture: Picture, folder: Path, axes: str, colour: tuple[int, int, int]) -> Path:
    """Levels 1, 2 and 4 of which 2 and 4 are filled up to whole tiles of 256 px, in x, y or both."""
    made = levels(picture, 1, 2, 4)
    for number in (1, 2):
        h, w = made[number].shape[:2]
        canvas = np.full((h + (-h % 256) * ("y" in axes), w + (-w % 256) * ("x" in axes), 3), colour, np.uint8)
        canvas[:h, :w] = made[number]
        made[number] = canvas
    return write_tiff(folder / f"filled-{axes}-{colour[0]}.tif", made)


@both
@pytest.mark.parametrize("axes", ["x", "y", "xy"])
@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (90, 200, 40)], ids=["white", "black", "green"])
def test_levels_are_filled_up_in_one_direction_or_both_and_with_anything(
    small: Picture, tmp_path: Path, axes: str, colour: tuple[int, int, int], reader: type[OpenSlideSlide]
) -> None:
    with reader(filled_up(small, tmp_path, axes, colour)) as slide:
        assert slide.level_downsamples == (1, 2, 4)
        assert shown_wrong(slide, small) < 6
        assert slide._broken_levels == frozenset(), "they are used"
        assert len(slide.notes) == 2


@both
def test_only_level_0_is_filled_up(small: Picture, tmp_path: Path, reader: type[OpenSlideSlide]) -> None:
    made = levels(small, 1, 2, 4)
    h, w = small.shape[:2]
    made[0] = np.pad(small, ((0, -h % 512), (0, -w % 512), (0, 0)), constant_values=255)
    with reader(write_tiff(tmp_path / "first.tif", made, tile=(512, 512))) as slide:
        assert slide.level_downsamples == (1, 2, 4)
        assert shown_wrong(slide, small) < 6


# --- levels that are none -------------------------------------------------------------------------------------------


@both
def test_a_macro_picture_is_no_level(
    case: Case, anywhere: Settings, picture: Picture, reader: type[OpenSlideSlide]
) -> None:
    with reader(case(macro_level)) as slide, reader(case(plain)) as twin:
        assert slide.level_downsamples == (1, 2)
        bag, right = make_bag(slide, anywhere, task_mpp=None), make_bag(twin, anywhere, task_mpp=None)
        assert np.abs(slide.overview(300).astype(int) - twin.overview(300)).mean() < 3
    assert len(bag) == pytest.approx(len(right), abs=2)
    assert bag.notes == (
        "Level 2 (640 x 256 pixels) is not used: its shape is not that of the slide: it may be a macro picture or a "
        "label.",
    )


Change = Callable[[list[Image.Image], Picture], Image.Image]


def _glued(made: list[Image.Image], rgb: Picture) -> Image.Image:
    """A thumbnail scaled to two thirds with a label beside it."""
    w, h = made[2].size
    canvas = Image.new("RGB", (w, h), (235, 235, 235))
    canvas.paste(Image.new("RGB", (w // 3, h), (250, 250, 250)), (0, 0))
    canvas.paste((20, 20, 20), (10, 40, w // 4, 60))  # print on the label
    canvas.paste(made[2].resize((2 * w // 3, h)), (w // 3, 0))
    return canvas


def _half(made: list[Image.Image], rgb: Picture, colour: int = 255) -> Image.Image:
    w, h = made[2].size
    canvas = made[2].copy()
    canvas.paste((colour,) * 3, (w // 2, 0, w, h))
    return canvas


def _shifted(made: list[Image.Image], rgb: Picture) -> Image.Image:
    return Image.fromarray(np.roll(np.asarray(made[2]), (0, 12), (0, 1)))


def _drifted(made: list[Image.Image], rgb: Picture) -> Image.Image:
    """Scaled by 5 % more than its size says."""
    w, h = made[2].size
    return made[2].resize((w, h), Image.Resampling.BICUBIC, box=(0, 0, w * 0.95, h * 0.95))


FALSE: dict[str, tuple[Change, str]] = {
    "upside down": (lambda made, _: made[2].transpose(Image.Transpose.FLIP_TOP_BOTTOM), "does not show what"),
    "mirrored": (lambda made, _: made[2].transpose(Image.Transpose.FLIP_LEFT_RIGHT), "does not show what"),
    "turned": (lambda made, _: made[2].transpose(Image.Transpose.ROTATE_180), ""),
    "another order of colours": (lambda made, _: Image.fromarray(np.asarray(made[2])[..., ::-1]), "another order"),
    "negative": (lambda made, _: Image.eval(made[2], lambda v: 255 - v), "does not show what"),
    "grey": (lambda made, _: made[2].convert("L").convert("RGB"), "colours"),
    "salmon": (
        lambda made, _: Image.frombytes("RGB", made[2].size, made[2].convert("YCbCr").tobytes()),
        "colours",
    ),
    "white": (lambda made, _: Image.new("RGB", made[2].size, "white"), "is empty"),
    "black": (lambda made, _: Image.new("RGB", made[2].size, "black"), ""),
    "half of it white": (_half, ""),
    "half of it black": (lambda made, rgb: _half(made, rgb, 0), ""),
    "shifted": (_shifted, "does not show what"),
    "drifted": (_drifted, "does not show what"),
    "a thumbnail with its label": (_glued, ""),
    "the finer level's corner": (lambda made, _: made[1].crop((0, 0, *made[2].size)), "does not show what"),
    "another slide": (
        lambda made, rgb: Image.fromarray(np.roll(rgb, (700, 900), (0, 1))).resize(made[2].size),
        "does not show what",
    ),
}


@pytest.fixture(scope="module")
def altered(small: Picture, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Change, str], Path]]:
    """A pyramid of levels 1, 2, 4 and 8 whose level 4 was changed."""
    folder = tmp_path_factory.mktemp("altered")
    made = images(small, 1, 2, 4, 8)

    def get(change: Change, name: str) -> Path:
        path = folder / f"{name.replace(' ', '-')}.tif"
        if not path.exists():
            parts = [*made]
            parts[2] = change(made, small)
            assert parts[2].size == made[2].size
            write_tiff(path, [np.asarray(part) for part in parts])
        return path

    yield get
    shutil.rmtree(folder)


@both
@pytest.mark.parametrize("name", FALSE)
def test_a_false_level_is_not_used_and_said(
    altered: Callable[[Change, str], Path], small: Picture, name: str, reader: type[OpenSlideSlide]
) -> None:
    change, words = FALSE[name]
    with reader(altered(change, name)) as slide:
        assert shown_wrong(slide, small) < 6
        assert [
            note for note in slide.notes if note.startswith("Level 2 (278 x 370 pixels) is not used") and words in note
        ]
        assert len(slide.notes) == 1, "the others are believed"


def test_levels_that_tifffile_reads_are_judged_too(small: Picture, tmp_path: Path, anywhere: Settings) -> None:
    """WebP, which OpenSlide does not read: one level is mirrored, one filled up."""
    made = levels(small, 1, 2, 4)
    h, w = made[2].shape[:2]
    parts = [made[0], made[1][:, ::-1], np.pad(made[2], ((0, -h % 256), (0, -w % 256), (0, 0)), constant_values=255)]
    kind = {"compression": "webp", "compressionargs": {"level": 80, "lossless": False}}
    path = write_tiff(tmp_path / "webp.tif", [np.ascontiguousarray(part) for part in parts], **kind)
    with open_slide(path, anywhere) as slide:
        assert slide.reader.startswith("tifffile")
        assert slide.level_downsamples == (1, 2, 4)
        assert shown_wrong(slide, small) < 6
        assert sorted(note.split("(")[0][:12] for note in slide.notes) == ["Level 1 ", "Level 2 has "]


@both
def test_a_false_last_level_does_not_lead_to_the_wrong_places(
    picture: Picture, tmp_path: Path, case: Case, anywhere: Settings, reader: type[OpenSlideSlide]
) -> None:
    """The coarsest level is where places are chosen, and it is a picture of something else, of the right shape."""
    made = levels(picture, 1, 2, 4, 8)
    label = np.full_like(made[3], 240)
    label[20:60, 20:200], label[200:300:7, 30:120] = (10, 10, 10), (200, 30, 30)
    with reader(write_tiff(tmp_path / "label.tif", [*made[:3], label])) as slide, reader(case(plain)) as twin:
        bag, right = (make_bag(opened, anywhere, task_mpp=None) for opened in (slide, twin))
        assert len(bag) == pytest.approx(len(right), abs=2)
        assert shown_wrong(slide, picture) < 6
    assert [note.split(":")[0] for note in bag.notes] == ["Level 3 (278 x 371 pixels) is not used"]


@both
@pytest.mark.parametrize("squeezed", [(2, 4), (2, 3)])
def test_a_level_of_another_shape_is_none(
    small: Picture, tmp_path: Path, squeezed: tuple[int, int], reader: type[OpenSlideSlide]
) -> None:
    made = levels(small, 1, 4)
    w, h = small.shape[1] // squeezed[0], small.shape[0] // squeezed[1]
    odd = np.asarray(Image.fromarray(small).resize((w, h)))
    with reader(write_tiff(tmp_path / "odd.tif", [made[0], odd, made[1]])) as slide:
        assert slide.level_downsamples == (1, 4)
        assert shown_wrong(slide, small) < 6
        assert f"({w} x {h} pixels) is not used: its shape is not that of the slide" in slide.notes[0]


# --- levels that are true -------------------------------------------------------------------------------------------


def _nearest(rgb: Picture, factor: int, first: int = 0) -> Image.Image:
    h, w = rgb.shape[:2]
    return Image.fromarray(rgb[: h // factor * factor, : w // factor * factor][first::factor, first::factor])


TRUE: dict[str, Callable[[list[Image.Image], Picture], list[Image.Image]]] = {
    "as they are": lambda made, _: made,
    "cut to whole pixels": lambda made, rgb: [
        made[0],
        *(made[0].resize((rgb.shape[1] // f, rgb.shape[0] // f)) for f in (2, 4, 8)),
    ],
    "nearest neighbour": lambda made, rgb: [made[0], *(_nearest(rgb, f) for f in (2, 4, 8, 16))],
    "nearest neighbour, last of each": lambda made, rgb: [made[0], *(_nearest(rgb, f, f - 1) for f in (2, 4, 8, 16))],
    "sharpened": lambda made, _: [made[0], *(m.filter(ImageFilter.UnsharpMask(2, 150, 0)) for m in made[1:])],
    "Lanczos": lambda made, _: [made[0], *(made[0].resize(m.size, Image.Resampling.LANCZOS) for m in made[1:])],
    "other focal plane": lambda made, _: [made[0], *(m.filter(ImageFilter.GaussianBlur(2)) for m in made[1:])],
    "half a pixel beside": lambda made, _: [
        made[0],
        *(
            m.transform(m.size, Image.Transform.AFFINE, (1, 0, 0.5, 0, 1, 0.5), Image.Resampling.BILINEAR)
            for m in made[1:]
        ),
    ],
    "odd factors": lambda made, rgb: [made[0], *images(rgb, 3, 9)],
    "factor 4": lambda made, rgb: [made[0], *images(rgb, 4, 16)],
    "one far level": lambda made, rgb: [made[0], *images(rgb, 32)],
    "a level twice": lambda made, _: [made[0], made[1], made[1], made[2]],
    "in another order": lambda made, _: [made[0], made[3], made[1], made[2]],
}


@pytest.mark.parametrize("quality", [30, 95])
@pytest.mark.parametrize("name", TRUE)
def test_true_levels_are_kept_however_they_were_made(small: Picture, tmp_path: Path, name: str, quality: int) -> None:
    made = TRUE[name](images(small, 1, 2, 4, 8), small)
    path = write_tiff(tmp_path / "true.tif", [np.asarray(m) for m in made], compressionargs={"level": quality})
    for reader in READERS:
        with reader(path) as slide:
            for ds in slide.level_downsamples:
                slide.read_region(500, 500, 64 * ds, 64)
            assert slide.notes == ()
            assert slide._broken_levels == frozenset()
            factors = sorted(round(small.shape[1] / m.width) for m in made)
            assert sorted(slide.level_downsamples) == factors


@both
@pytest.mark.parametrize("value", [243, 255, 0])
def test_an_empty_slide_keeps_levels_whose_sizes_fit(tmp_path: Path, value: int, reader: type[OpenSlideSlide]) -> None:
    empty = np.full((1600, 1200, 3), value, np.uint8)
    path = write_tiff(tmp_path / "empty.tif", [*levels(empty, 1, 2, 4), np.full((380, 200, 3), value, np.uint8)])
    with reader(path) as slide:
        assert slide.overview(300).shape == (300, 225, 3)
        assert slide.level_downsamples == (1, 2, 4)
        assert len(slide.notes) == 1


@both
def test_a_place_that_cannot_be_read_proves_nothing(
    small: Picture, tmp_path: Path, reader: type[OpenSlideSlide]
) -> None:
    """Half of the tiles of level 0 are damaged: the levels are true all the same."""
    path = write_tiff(tmp_path / "damaged.tif", levels(small, 1, 2, 4))
    with tifffile.TiffFile(path) as tiff:
        places = list(zip(tiff.pages[0].dataoffsets, tiff.pages[0].databytecounts, strict=True))
    with path.open("r+b") as file:
        for number, (offset, length) in enumerate(places):
            if number % 2 == 0:
                file.seek(offset)
                file.write(bytes(length))
    with reader(path) as slide:
        assert slide.overview(300).shape == (300, 225, 3)
        assert slide.notes == ()


@both
def test_levels_of_dicom_with_wrong_colours_are_not_used_and_said(
    test_data: Path, reader: type[OpenSlideSlide]
) -> None:
    folder = test_data / "slides"
    with reader(folder / "cmu1-dicom" / "03.dcm") as slide, reader(folder / "CMU-1-Small-Region.svs") as svs:
        assert np.abs(slide.overview(200).astype(int) - svs.overview(200)).mean() < 1
        assert slide.notes
        assert all("its colours are not those of level 0" in note for note in slide.notes)
