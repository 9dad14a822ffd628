"""Plain images of every kind look as a browser shows them; what cannot be shown is refused before it costs memory."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from backend.errors import SlideTooLarge, SlideTooSmall, SlideUnreadable
from backend.settings import Settings
from backend.slides.images import image_size, load_image, read_patch
from backend.slides.reader import open_slide

Make = Callable[..., Settings]
TESTS = Path(__file__).resolve().parents[1]
PINK = (220, 140, 180)


def rgb_of(path: Path, settings: Make) -> np.ndarray:
    return np.asarray(load_image(path, settings()).rgb)


def png(width: int, height: int, rows: bytes, *, depth: int = 8, colour: int = 0) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path, settings: Make) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(25_000, 25_000, bytes(25_000 * (1 + 3125)), depth=1))
    assert path.stat().st_size < 2_000_000
    with pytest.raises(SlideTooLarge, match=r"bomb\.png would decode to 25000 x 25000 pixels.*IMAGE_MAX_PIXELS"):
        open_slide(path, settings())
    with pytest.raises(SlideTooLarge):
        read_patch(path, 224, settings())
    with pytest.raises(SlideTooLarge):
        image_size(path, settings())


def test_a_bomb_of_a_tiff_that_only_tifffile_reads_is_refused_too(tmp_path: Path, settings: Make) -> None:
    path = tmp_path / "bomb.tif"
    tifffile.imwrite(path, np.zeros((2000, 2000, 3), np.float32), compression="zlib", photometric="rgb")
    with pytest.raises(SlideTooLarge, match="2000 x 2000"):
        load_image(path, settings(image_max_pixels=1_000_000))


def test_the_largest_image_that_is_allowed_opens(tmp_path: Path, settings: Make) -> None:
    path = tmp_path / "fits.png"
    Image.new("RGB", (1000, 1000), PINK).save(path)
    assert load_image(path, settings(image_max_pixels=1_000_000)).rgb.size == (1000, 1000)
    with pytest.raises(SlideTooLarge):
        load_image(path, settings(image_max_pixels=999_999))


@pytest.mark.parametrize(
    ("mode", "ending"),
    [(mode, "png") for mode in ("RGB", "L", "P", "RGBA", "LA", "1")]
    + [(mode, "jpg") for mode in ("RGB", "L", "CMYK")]
    + [(mode, "tif") for mode in ("RGB", "L", "P", "RGBA", "1", "CMYK")],
)
def test_every_mode_becomes_rgb(tmp_path: Path, settings: Make, mode: str, ending: str) -> None:
    expected = {"1": (255, 255, 255), "L": (180, 180, 180), "LA": (180, 180, 180)}.get(mode, PINK)
    image = Image.new("RGB", (300, 200), expected)
    path = tmp_path / f"image.{ending}"
    (image.quantize(4) if mode == "P" else image.convert(mode)).save(path)
    found = rgb_of(path, settings)
    assert found.shape == (200, 300, 3)
    assert np.abs(found.astype(int) - expected).max() <= 3


def test_transparency_is_laid_on_white(tmp_path: Path, settings: Make) -> None:
    picture = np.zeros((100, 300, 4), np.uint8)
    picture[:, :100], picture[:, 100:200], picture[:, 200:] = (200, 0, 0, 255), (200, 0, 0, 0), (0, 0, 0, 128)
    path = tmp_path / "alpha.png"
    Image.fromarray(picture).save(path)
    found = rgb_of(path, settings)
    assert found[50, 50].tolist() == [200, 0, 0]
    assert found[50, 150].tolist() == [255, 255, 255]
    assert np.abs(found[50, 250].astype(int) - 127).max() <= 1


def test_a_transparent_palette_entry_is_white(tmp_path: Path, settings: Make) -> None:
    image = Image.new("P", (50, 50), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (25, 0, 50, 50))
    image.save(tmp_path / "palette.png", transparency=0)
    found = rgb_of(tmp_path / "palette.png", settings)
    assert found[10, 10].tolist() == [255, 255, 255]
    assert found[10, 40].tolist() == [200, 100, 50]


def test_16_bit_values_are_scaled_from_their_whole_range(tmp_path: Path, settings: Make) -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16).repeat(40, 0).repeat(10, 1)
    Image.fromarray(values).save(tmp_path / "grey16.png")
    tifffile.imwrite(tmp_path / "grey16.tif", values)
    colour = np.stack([values, values[:, ::-1], values], axis=-1)
    tifffile.imwrite(tmp_path / "colour16.tif", colour, photometric="rgb")
    tifffile.imwrite(tmp_path / "zstd16.tif", colour, photometric="rgb", compression="zstd", predictor=True)
    tifffile.imwrite(tmp_path / "big16.tif", colour, photometric="rgb", bigtiff=True, planarconfig="contig")
    for name in ("grey16.png", "grey16.tif"):
        found = rgb_of(tmp_path / name, settings)
        assert found[0, ::10, 0].tolist() == [0, 1, 128, 255]
        assert (found[..., 0] == found[..., 2]).all()
    for name in ("colour16.tif", "zstd16.tif", "big16.tif"):
        found = rgb_of(tmp_path / name, settings)
        assert np.abs(found[0, ::10, 0].astype(int) - [0, 1, 128, 255]).max() <= 1
        assert np.abs(found[0, ::10, 1].astype(int) - [255, 128, 1, 0]).max() <= 1


def test_a_planar_tiff_has_its_colours(tmp_path: Path, settings: Make) -> None:
    planes = np.stack([np.full((300, 400), v, np.uint16) for v in (65535, 0, 32896)])
    tifffile.imwrite(tmp_path / "planar.tif", planes, photometric="rgb", planarconfig="separate")
    found = rgb_of(tmp_path / "planar.tif", settings)
    assert found.shape == (300, 400, 3)
    assert np.abs(found[5, 5].astype(int) - [255, 0, 128]).max() <= 1


def test_floating_point_pixels_are_refused_with_the_reason(tmp_path: Path, settings: Make) -> None:
    tifffile.imwrite(tmp_path / "float.tif", np.zeros((300, 300, 3), np.float32), photometric="rgb")
    with pytest.raises(SlideUnreadable, match=r"float\.tif cannot be decoded: pixels of type float32"):
        open_slide(tmp_path / "float.tif", settings())


def test_floating_point_pixels_are_refused_before_they_are_decoded(
    tmp_path: Path, settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile.imwrite(tmp_path / "float.tif", np.zeros((300, 300, 3), np.float32), photometric="rgb", compression="zlib")

    def decoded(*_: object, **__: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", decoded)
    monkeypatch.setattr(tifffile.TiffPage, "segments", decoded)
    with pytest.raises(SlideUnreadable, match="pixels of type float32"):
        load_image(tmp_path / "float.tif", settings())


def test_pieces_of_an_image_are_converted_as_the_whole_would_be(tmp_path: Path, settings: Make) -> None:
    """1300 x 1100 pixels are four pieces; the truth is Pillow's conversion of the whole, and for deep colour the scaling by 257."""
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (1100, 1300, 4), dtype=np.uint8))
    white = Image.new("RGBA", rgba.size, "white")
    grey, palette = rgba.convert("LA"), rgba.convert("RGB").quantize(200)
    palette.save(tmp_path / "palette.png", transparency=bytes(range(200)))
    with Image.open(tmp_path / "palette.png") as stored:
        shown = stored.convert("RGBA")
    rgba.save(tmp_path / "rgba.png")
    grey.save(tmp_path / "la.png")
    rgba.convert("CMYK").save(tmp_path / "cmyk.tif")
    rgba.convert("1").save(tmp_path / "bits.png")
    truth = {
        "rgba.png": Image.alpha_composite(white, rgba),
        "la.png": Image.alpha_composite(white, grey.convert("RGBA")),
        "palette.png": Image.alpha_composite(white, shown),
        "cmyk.tif": rgba.convert("CMYK"),
        "bits.png": rgba.convert("1"),
    }
    for name, whole in truth.items():
        assert np.array_equal(rgb_of(tmp_path / name, settings), np.asarray(whole.convert("RGB"))), name
    deep = rng.integers(0, 65536, (1100, 1300, 3), dtype=np.uint16)
    scaled = ((deep.astype(np.int64) + 128) // 257).astype(np.uint8)
    Image.fromarray(deep[..., 0]).save(tmp_path / "grey16.png")
    assert np.array_equal(rgb_of(tmp_path / "grey16.png", settings), scaled[..., :1].repeat(3, 2))
    for tile in (None, (256, 256)):
        for planar in (False, True):
            samples = np.moveaxis(deep, -1, 0) if planar else deep
            layout = {"planarconfig": "separate" if planar else "contig", "tile": tile}
            tifffile.imwrite(
                tmp_path / "deep.tif", samples.astype(np.uint32), photometric="rgb", compression="zlib", **layout
            )
            found = load_image(tmp_path / "deep.tif", settings())
            assert found.format == "tiff (tifffile)"
            assert np.array_equal(np.asarray(found.rgb), scaled), layout


def test_whole_numbers_over_16_bits_are_refused(tmp_path: Path, settings: Make) -> None:
    values = np.full((300, 300, 3), 65535, np.uint32)
    values[299, 299] = 65536
    tifffile.imwrite(tmp_path / "deep.tif", values, photometric="rgb", compression="zlib")
    with pytest.raises(SlideUnreadable, match="pixels of type uint32 have no plain meaning"):
        load_image(tmp_path / "deep.tif", settings())


@pytest.mark.parametrize("kind", ["grey16.png", "rgba.png", "rgb.jpg", "turned.png", "rgba16.tif", "rgb32.tif"])
def test_decoding_takes_eight_bytes_a_pixel_and_32_mib(tmp_path: Path, kind: str) -> None:
    edge = 4000
    path = tmp_path / kind
    grey = np.zeros((edge, edge), np.uint16)
    grey[:, ::2] = 40_000
    colour = Image.new("RGBA", (edge, edge), (200, 100, 150, 128))
    if kind == "grey16.png":
        Image.fromarray(grey).save(path, compress_level=1)
    elif kind == "rgba16.tif":
        samples = np.broadcast_to(grey[..., None], (edge, edge, 4))
        tifffile.imwrite(path, samples, photometric="rgb", extrasamples=["unassalpha"], compression="zlib")
    elif kind == "rgb32.tif":  # Pillow does not read it
        samples = np.broadcast_to(grey[..., None].astype(np.uint32), (edge, edge, 3))
        tifffile.imwrite(path, samples, photometric="rgb", compression="zlib")
    elif kind == "turned.png":
        exif = Image.Exif()
        exif[0x0112] = 6
        colour.convert("RGB").save(path, exif=exif, compress_level=1)
    else:
        colour.convert("RGB" if kind == "rgb.jpg" else "RGBA").save(path)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from slide_makers import peak_bytes\n"
        "from backend.settings import load_settings\n"
        "from backend.slides.images import load_image\n"
        "settings = load_settings(model_dir=Path(sys.argv[1]).parent)\n"
        "before = peak_bytes()\n"
        "image = load_image(Path(sys.argv[1]), settings)\n"
        "print(peak_bytes() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS / "slides"), str(TESTS.parent)))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 8 * edge**2 + 2**25


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_the_exif_orientation_is_applied_as_browsers_do(
    tmp_path: Path, settings: Make, orientation: int, ending: str
) -> None:
    shown = np.full(
        (80, 120, 3), 255, np.uint8
    )  # what a viewer must see: red top left, green top right, blue bottom left
    shown[:40, :40], shown[:40, -40:], shown[-40:, :40] = (220, 30, 30), (30, 200, 30), (30, 30, 220)
    image = Image.fromarray(shown)
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = image if undo is None else image.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{ending}"
    stored.save(path, exif=exif, **({"quality": 95} if ending == "jpg" else {}))
    found = rgb_of(path, settings)
    assert found.shape == shown.shape
    assert np.abs(found.astype(int) - shown)[5:35, 5:35].max() <= 12
    assert np.abs(found.astype(int) - shown)[5:35, -35:-5].max() <= 12
    assert np.abs(found.astype(int) - shown)[-35:-5, 5:35].max() <= 12
    assert image_size(path, settings()) == (120, 80)


def test_a_truncated_jpeg_is_damaged(tmp_path: Path, settings: Make) -> None:
    path = tmp_path / "cut.jpg"
    Image.effect_noise((800, 800), 60).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(SlideUnreadable, match=r"cut\.jpg is damaged: .*truncated"):
        open_slide(path, settings())


def test_a_resolution_in_the_file_gives_the_scale(tmp_path: Path, settings: Make) -> None:
    for name, dpi in (("a.jpg", 50_800), ("a.png", 50_800), ("a.tif", 50_800)):
        Image.new("RGB", (300, 200), PINK).save(tmp_path / name, dpi=(dpi, dpi))
        with open_slide(tmp_path / name, settings()) as slide:
            assert slide.mpp == pytest.approx(0.5, rel=1e-3)
    Image.new("RGB", (300, 200), PINK).save(tmp_path / "screen.jpg", dpi=(72, 72))
    with open_slide(tmp_path / "screen.jpg", settings()) as slide:
        assert slide.mpp is None


def test_a_patch_of_the_tiles_size_is_taken_as_it_is(tmp_path: Path, settings: Make) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "patch.png")
    tile, size = read_patch(tmp_path / "patch.png", 224, settings())
    assert np.array_equal(tile, pixels)
    assert size == (224, 224)


@pytest.mark.parametrize("size", [(448, 448), (1000, 500), (120, 240), (100, 100)])
def test_a_patch_keeps_its_shape_and_is_centred_on_white(tmp_path: Path, settings: Make, size: tuple[int, int]) -> None:
    Image.new("RGB", size, PINK).save(tmp_path / "patch.png")
    tile, found = read_patch(tmp_path / "patch.png", 224, settings())
    assert found == size
    assert tile.shape == (224, 224, 3)
    pink = (np.abs(tile.astype(int) - PINK).max(axis=2) <= 1).any
    wide, high = pink(axis=0).sum(), pink(axis=1).sum()
    assert (wide, high) == (round(224 * size[0] / max(size)), round(224 * size[1] / max(size)))
    assert np.array_equal(tile, tile[::-1, ::-1])


def test_a_patch_of_one_pixel_is_too_small(tmp_path: Path, settings: Make) -> None:
    Image.new("RGB", (1, 1), PINK).save(tmp_path / "dot.png")
    with pytest.raises(SlideTooSmall, match=r"dot\.png has 1 x 1 pixels; a tile has 224"):
        read_patch(tmp_path / "dot.png", 224, settings())
