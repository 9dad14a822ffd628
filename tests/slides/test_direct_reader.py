"""Tiled JPEG is read without OpenSlide, and nobody can tell by the pixels, the errors or the holes."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image
from slide_makers import break_tile, psnr, stroma, write

from backend.errors import SlideUnreadable
from backend.results.bag import UInt8Array
from backend.settings import Settings
from backend.slides.direct_reader import MAX_DIFFERENCE, DirectSlide
from backend.slides.jpeg_tiles import JpegTiles, NotDirect, TileCache, doubtful, jpeg_levels
from backend.slides.openslide_reader import OpenSlideSlide
from backend.slides.reader import open_slide
from backend.slides.synthetic import SyntheticSlide, write_synthetic_slide
from backend.slides.tiles import read_tiles
from backend.slides.tiling import make_bag

Make = Callable[..., Settings]


def difference(first: UInt8Array, second: UInt8Array) -> int:
    return int(np.abs(first.astype(int) - second).max())


def places(size: tuple[int, int], edge: float) -> list[tuple[float, float]]:
    """Corners, the middle, odd places, and squares that stick out."""
    width, height = size
    return [(0, 0), (width // 2, height // 2), (width - edge, height - edge), (101, 203), (width - 60, 10), (-30, -40)]


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "cmu1-small-pyramid-20x.tif"])
@pytest.mark.parametrize("edge", [224.0, 224 * 0.5 / 0.499, 224 * 0.25 / 0.2528])
def test_tiles_of_real_slides_are_those_of_openslide(test_data: Path, name: str, edge: float) -> None:
    path = test_data / "slides" / name
    with DirectSlide(path) as direct, OpenSlideSlide(path) as reference:
        assert direct.reader.startswith("imagecodecs")
        for x, y in places(direct.size, edge):
            assert np.array_equal(direct.read_region(x, y, edge, 224), reference.read_region(x, y, edge, 224))
        assert psnr(direct.overview(300), reference.overview(300)) > 45


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.2528, 0.4973])
def test_tiles_of_synthetic_slides_are_those_of_openslide(tmp_path: Path, settings: Make, mpp: float) -> None:
    path = write_synthetic_slide(tmp_path / "slide.tif", size=(1501, 1103), mpp=mpp, seed=3).path
    with DirectSlide(path) as direct, OpenSlideSlide(path) as reference:
        assert direct.reader == "imagecodecs generic-tiff"
        bag = make_bag(direct, settings(), task_mpp=None)
        for x, y in bag.coords:
            ours, theirs = (slide.read_region(x, y, bag.tile_size_level0, 224) for slide in (direct, reference))
            # From 0.25 the level 2 of odd size is read, on which OpenSlide interpolates: see the test below.
            assert np.array_equal(ours, theirs) or (mpp == 0.25 and psnr(ours, theirs) > 30)


def test_a_level_of_odd_size_is_read_on_whole_pixels(tmp_path: Path) -> None:
    """OpenSlide takes 1501 / 750 for the downsample and interpolates between pixels, further off the further right; the file's pixels are right."""
    path = write_synthetic_slide(tmp_path / "odd.tif", size=(1501, 1103), mpp=0.25, seed=3).path
    with tifffile.TiffFile(path) as file:
        truth = file.pages[1].asarray()
    with DirectSlide(path) as direct, OpenSlideSlide(path) as reference:
        x, y = 500, 300
        expected = truth[y : y + 224, x : x + 224]
        assert np.array_equal(direct.read_region(2 * x, 2 * y, 448, 224), expected)
        assert difference(reference.read_region(2 * x, 2 * y, 448, 224), expected) > 0


def pyramid(path: Path, size: tuple[int, int], tile: int = 256) -> Path:
    """Levels 1 and 4 at 0.25 µm per pixel, as scanners write them: tiles at 0.5 are halved from level 0. Noise, on which each rounding shows."""
    noise = np.random.default_rng(5).integers(0, 256, (size[1], size[0], 3), np.uint8)
    with tifffile.TiffWriter(path) as writer:
        for level, mpp in ((noise, 0.25), (noise[::4, ::4], 1.0)):
            writer.write(
                level,
                photometric="ycbcr",
                tile=(tile, tile),
                compression="jpeg",
                compressionargs={"level": 90},
                subfiletype=int(mpp > 0.25),
                resolution=(10_000 / mpp,) * 2,
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    return path


@pytest.mark.parametrize("size", [(1600, 1200), (1503, 1101)], ids=["even", "odd"])
@pytest.mark.parametrize("tile", [256, 240, 1024])
def test_halved_tiles_are_the_exact_average_of_the_files_pixels(
    tmp_path: Path, size: tuple[int, int], tile: int
) -> None:
    path = pyramid(tmp_path / "slide.tif", size, tile)
    with tifffile.TiffFile(path) as file:
        truth = file.pages[0].asarray()
    inside = np.full((size[1] + 1000, size[0] + 1000, 3), 255, np.uint16)
    inside[500 : 500 + size[1], 500 : 500 + size[0]] = truth
    with DirectSlide(path) as direct, OpenSlideSlide(path) as reference:
        assert direct.reader == "imagecodecs generic-tiff"
        for x, y in [(0, 0), (448, 448), (202, 406), (101, 203), (-30, -40), (size[0] - 200, size[1] - 300)]:
            found = direct.read_region(x, y, 448, 224)
            box = inside[y + 500 : y + 948, x + 500 : x + 948]
            average = (box[::2, ::2] + box[1::2, ::2] + box[::2, 1::2] + box[1::2, 1::2] + 2) >> 2
            assert np.array_equal(found, average)
            assert np.array_equal(found, reference.read_region(x, y, 448, 224))


def test_each_file_tile_is_decoded_once_where_it_is_halved(
    tmp_path: Path, settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pyramid(tmp_path / "slide.tif", (2048, 2048))
    decoded: list[int] = []
    decode = imagecodecs.jpeg8_decode

    def counting(data: bytes, **options: object) -> UInt8Array:
        decoded.append(hash(data))
        return decode(data, **options)

    with DirectSlide(path) as slide:
        monkeypatch.setattr(imagecodecs, "jpeg8_decode", counting)
        for y in range(0, 2048 - 448, 448):
            for x in range(0, 2048 - 448, 448):
                slide.read_region(x, y, 448, 224)
    assert len(decoded) == len(set(decoded)) == 7 * 7
    assert slide.reader.startswith("imagecodecs")


def test_a_coarser_level_that_differs_leaves_the_slide_to_openslide_when_it_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = pyramid(tmp_path / "slide.tif", (1600, 1200))
    decode = imagecodecs.jpeg8_decode

    def darker(data: bytes, **options: object) -> UInt8Array:
        tile = decode(data, **options)
        tile //= 2
        return tile

    with DirectSlide(path) as direct, OpenSlideSlide(path) as reference:
        before = direct.read_region(0, 0, 448, 224)
        assert direct.reader == "imagecodecs generic-tiff"
        with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.DEBUG, logger="backend.slides"):
            patch.setattr(imagecodecs, "jpeg8_decode", darker)
            coarse = direct.read_region(0, 0, 896, 224)
        assert np.array_equal(coarse, reference.read_region(0, 0, 896, 224))
        assert direct.reader == "openslide generic-tiff"
        assert "is read by OpenSlide from now on: it differs" in caplog.text
        assert np.array_equal(direct.read_region(0, 0, 448, 224), before)


def test_a_region_can_be_read_into_an_array_that_is_there(synthetic_slide: SyntheticSlide) -> None:
    held = np.zeros((3, 224, 224, 3), np.uint8)
    for kind in (DirectSlide, OpenSlideSlide):
        with kind(synthetic_slide.path) as slide:
            for edge in (224.0, 448.0, 300.7):
                held[:] = 7
                assert np.shares_memory(slide.read_region(100.3, 200, edge, 224, held[1]), held)
                assert np.array_equal(held[1], slide.read_region(100.3, 200, edge, 224))
                assert (held[::2] == 7).all()
            with pytest.raises(ValueError, match="out is uint8"):
                slide.read_region(0, 0, 224, 200, held[1])


def test_a_bag_is_the_same_by_both_readers(synthetic_slide: SyntheticSlide, settings: Make) -> None:
    made = []
    for kind in (DirectSlide, OpenSlideSlide):
        with kind(synthetic_slide.path) as slide:
            bag = make_bag(slide, settings(), task_mpp=None)
            made.append((bag.coords, np.concatenate(list(read_tiles(slide, bag, chunk=16, threads=3)))))
    assert np.array_equal(made[0][0], made[1][0])
    assert np.array_equal(made[0][1], made[1][1])


def test_shared_tables_and_rgb_stored_as_such_are_understood(test_data: Path) -> None:
    """An Aperio file keeps its tables apart (tag 347) and its JPEG in RGB without a marker that says so."""
    path = test_data / "slides" / "CMU-1-Small-Region.svs"
    (level,) = jpeg_levels(path, [(2220, 2967)])
    assert (level.tile_size, level.colour_space) == ((240, 240), "RGB")
    assert level.tables is not None
    tile = JpegTiles(path, [level]).tile(0, 6 * level.columns + 5)
    with openslide.OpenSlide(str(path)) as raw:
        assert np.array_equal(tile, np.asarray(raw.read_region((1200, 1440), 0, (240, 240)).convert("RGB")))


def test_every_file_tile_is_decoded_once_though_it_serves_many(
    synthetic_slide: SyntheticSlide, settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    decode = imagecodecs.jpeg8_decode

    def counting(data: bytes, **options: object) -> UInt8Array:
        decoded.append(hash(data))
        return decode(data, **options)

    with DirectSlide(synthetic_slide.path) as slide:
        bag = make_bag(slide, settings(), task_mpp=None)
        slide._tiles = JpegTiles(synthetic_slide.path, slide._tiles.levels)  # nothing decoded yet
        monkeypatch.setattr(imagecodecs, "jpeg8_decode", counting)
        for _ in read_tiles(slide, bag, chunk=8, threads=4):
            pass
    assert len(bag) > 40
    assert len(decoded) == len(set(decoded)) <= 64


def test_the_cache_keeps_within_its_bound_and_gives_the_same_pixels(synthetic_slide: SyntheticSlide) -> None:
    levels = jpeg_levels(synthetic_slide.path, [(2048, 2048)])
    small = JpegTiles(synthetic_slide.path, levels, cache_bytes=3 * levels[0].tile_bytes)
    large = JpegTiles(synthetic_slide.path, levels)
    for x in (0, 300, 900, 1500, 0):
        assert np.array_equal(small.read(0, x, 100, 500, 500), large.read(0, x, 100, 500, 500))
        assert small.cache.held_bytes <= 3 * levels[0].tile_bytes
    assert large.cache.held_bytes > small.cache.held_bytes


def test_threads_that_want_one_tile_wait_for_it_and_hear_of_its_failure() -> None:
    cache, made, gate = TileCache(10**6), [], threading.Event()

    def make() -> UInt8Array:
        made.append(1)
        gate.wait(10)
        return np.zeros((4, 4, 3), np.uint8)

    def fail() -> UInt8Array:
        raise NotDirect("broken")

    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(cache.get, (0, 1), make) for _ in range(4)]
        gate.set()
        assert all(future.result() is waiting[0].result() for future in waiting)
        assert len(made) == 1
        failing = [pool.submit(cache.get, (0, 2), fail) for _ in range(4)]
        assert all("broken" in str(future.exception()) for future in failing)
    assert cache.get((0, 2), make).shape == (4, 4, 3)  # a failure is not remembered


def far_from_the_samples(path: Path) -> tuple[int, int, int]:
    """Number, column and row of a tile with tissue that is not looked at when the slide is opened."""
    (level,) = jpeg_levels(path, [(2048, 2048)])
    heaviest = divmod(int(level.lengths.argmax()), 8)
    for number in np.argsort(level.lengths)[::-1]:
        row, column = divmod(int(number), 8)
        if (
            max(abs(row - heaviest[0]), abs(column - heaviest[1])) > 1
            and 0 < min(row, column) <= 6
            and (row, column) != (4, 4)
        ):
            return int(number), column, row
    raise AssertionError("no such tile")


@pytest.fixture
def copy(synthetic_slide: SyntheticSlide, tmp_path: Path) -> Path:
    return Path(shutil.copy(synthetic_slide.path, tmp_path / "slide.tif"))


def damage(path: Path, number: int, change: Callable[[bytes], bytes]) -> None:
    """Rewrite the bytes of one tile of level 0."""
    with tifffile.TiffFile(path) as file:
        offset, length = file.pages[0].dataoffsets[number], file.pages[0].databytecounts[number]
    with path.open("r+b") as raw:
        raw.seek(offset)
        data = raw.read(length)
        changed = change(data)
        assert len(changed) == length
        assert changed != data
        raw.seek(offset)
        raw.write(changed)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: bytes(len(data)),
        lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
        lambda data: data[:-3000] + bytes(1500) + data[-1500:],
        lambda data: data[: len(data) // 2] + b"\xff\xd9" + data[len(data) // 2 + 2 :],
        lambda data: data[: len(data) // 2] + b"\xff" * (len(data) - len(data) // 2),
        lambda data: data[: len(data) // 2] + b"\xff\xd8" + data[len(data) // 2 + 2 :],
    ],
    ids=["all zeros", "cut", "a lost block", "early end", "erased", "a marker inside"],
)
def test_a_damaged_tile_is_the_same_error_by_both_readers(copy: Path, change: Callable[[bytes], bytes]) -> None:
    number, column, row = far_from_the_samples(copy)
    x, y = column * 256 + 8, row * 256 + 8
    elsewhere = ((column + 4) % 8 * 256, (row + 4) % 8 * 256, 256, 256)
    with DirectSlide(copy) as slide:
        sound = slide.read_region(*elsewhere)
    damage(copy, number, change)
    with DirectSlide(copy) as direct, OpenSlideSlide(copy) as reference:
        assert direct.reader.startswith("imagecodecs")
        messages = []
        for slide in (direct, reference):
            with pytest.raises(SlideUnreadable, match=f"is damaged at x {x}, y {y}") as error:
                slide.read_region(x, y, 224, 224)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
        assert np.array_equal(direct.read_region(*elsewhere), sound)


def test_a_slide_damaged_where_it_is_sampled_is_left_to_openslide(tmp_path: Path, settings: Make) -> None:
    path = write(tmp_path / "broken.tif", stroma(1536, 1024))
    break_tile(path, column=0, row=0)
    with open_slide(path, settings()) as slide:
        assert slide.reader == "openslide generic-tiff"


def remove(path: Path, numbers: list[int]) -> None:
    """Say that tiles of level 0 have no bytes."""
    with tifffile.TiffFile(path, mode="r+b") as file:
        tag = file.pages[0].tags["TileByteCounts"]
        tag.overwrite([0 if i in numbers else count for i, count in enumerate(tag.value)])


def test_missing_tiles_are_filled_as_openslide_fills_them(copy: Path) -> None:
    number, column, row = far_from_the_samples(copy)
    remove(copy, [0, number])
    with DirectSlide(copy) as direct, OpenSlideSlide(copy) as reference:
        assert direct.reader.startswith("imagecodecs")
        for x, y in ((100, 100), (column * 256 - 100, row * 256 - 100)):
            assert np.array_equal(direct.read_region(x, y, 448, 448), reference.read_region(x, y, 448, 448))
        assert (direct.read_region(column * 256, row * 256, 256, 256) == 255).all()


def test_a_level_without_any_tile_is_left_to_openslide(copy: Path) -> None:
    remove(copy, list(range(64)))
    with DirectSlide(copy) as slide:
        assert slide.reader == "openslide generic-tiff"


def test_flat_tiles_with_zeros_in_their_code_are_read_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "flat.tif"
    picture = np.full((1024, 1024, 3), (250, 240, 245), np.uint8)
    picture[:300, :300] = stroma(300, 300)
    with tifffile.TiffWriter(path) as writer:
        writer.write(
            picture,
            photometric="rgb",
            tile=(256, 256),
            compression="jpeg",
            compressionargs={"level": 80, "optimize": True},
            metadata=None,
        )
    with DirectSlide(path) as direct, OpenSlideSlide(path) as reference:
        for x in (0, 200, 600):
            assert np.array_equal(direct.read_region(x, x, 300, 300), reference.read_region(x, x, 300, 300))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compression": "deflate", "tile": (256, 256)}, "not tiled 8-bit JPEG"),
        ({"compression": "lzw", "tile": (256, 256)}, "not tiled 8-bit JPEG"),
    ],
)
def test_other_compressions_are_left_to_openslide_and_the_log_says_why(
    tmp_path: Path, settings: Make, caplog: pytest.LogCaptureFixture, options: dict[str, object], words: str
) -> None:
    path = tmp_path / "other.tif"
    picture = stroma(800, 600)
    tifffile.imwrite(path, picture, photometric="rgb", metadata=None, **options)
    with caplog.at_level(logging.DEBUG, logger="backend.slides"), open_slide(path, settings()) as slide:
        assert slide.reader == "openslide generic-tiff"
        assert np.array_equal(slide.read_region(0, 0, 512, 512), picture[:512, :512])
    assert "other.tif is read by OpenSlide" in caplog.text
    assert words in caplog.text


def test_a_file_whose_colours_openslide_sees_otherwise_is_left_to_it(
    synthetic_slide: SyntheticSlide, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decode = imagecodecs.jpeg8_decode

    def off_by_a_little(data: bytes, **options: object) -> UInt8Array:
        return np.minimum(decode(data, **options), 255 - MAX_DIFFERENCE - 1) + np.uint8(MAX_DIFFERENCE + 1)

    monkeypatch.setattr(imagecodecs, "jpeg8_decode", off_by_a_little)
    with caplog.at_level(logging.DEBUG, logger="backend.slides"), DirectSlide(synthetic_slide.path) as slide:
        assert slide.reader == "openslide generic-tiff"
        assert slide.read_region(0, 0, 224, 224).shape == (224, 224, 3)
    assert f"differs from OpenSlide by up to {MAX_DIFFERENCE + 1} steps at x 0, y 0 of level 0" in caplog.text


def test_a_slide_opened_with_a_shared_cache_keeps_nothing_of_its_own(
    synthetic_slide: SyntheticSlide, settings: Make
) -> None:
    with open_slide(synthetic_slide.path, settings(), cache=openslide.OpenSlideCache(2**20)) as slide:
        assert slide.reader == "openslide generic-tiff"


def test_a_closed_slide_reads_no_more_and_leaves_no_file_open(synthetic_slide: SyntheticSlide, tmp_path: Path) -> None:
    path = Path(shutil.copy(synthetic_slide.path, tmp_path / "closed.tif"))  # nobody else has it open
    slide = DirectSlide(path)
    slide.read_region(0, 0, 224, 224)
    descriptors = Path("/proc/self/fd")
    assert not descriptors.is_dir() or times_open(path) > 0
    slide.close()
    slide.close()
    with pytest.raises(ValueError, match="is closed"):
        slide.read_region(0, 0, 224, 224)
    assert not descriptors.is_dir() or times_open(path) == 0


def times_open(path: Path) -> int:
    """How many of this process's descriptors are of this file; those of others come and go."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the listing itself
            found += descriptor.readlink() == path
    return found


def test_a_stream_is_doubted_only_if_it_does_not_end_as_it_should() -> None:
    picture = stroma(64, 64)
    sound = imagecodecs.jpeg8_encode(picture, level=90)
    assert doubtful(sound) == ""
    assert doubtful(sound + bytes(8)) == ""
    assert "end" in doubtful(sound[:-2])
    assert "ends before its data" in doubtful(sound + b"\x01" * 40)
    assert "no scan" in doubtful(b"\xff\xd8\xff\xd9")
    restarts = Image.fromarray(picture)
    stream = BytesIO()
    restarts.save(stream, "JPEG", quality=90, restart_marker_blocks=2)
    assert b"\xff\xd0" in stream.getvalue()
    assert doubtful(stream.getvalue()) == ""
