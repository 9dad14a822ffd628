"""Small slides with one property each, for tests: blank, all pen, black border, a broken tile, no coarse levels."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from scipy import ndimage

from backend.results.bag import UInt8Array
from backend.slides.synthetic import write_pyramid


def glass(width: int, height: int, *, colour: tuple[int, int, int] = (242, 241, 244), seed: int = 0) -> UInt8Array:
    """Empty glass with a scanner's noise and uneven light."""
    rng = np.random.default_rng(seed)
    light = ndimage.zoom(rng.normal(0, 2, (4, 4)), (height / 4, width / 4), order=1)
    noise = rng.normal(0, 1.5, (height, width, 3))
    return np.clip(np.array(colour) + light[:height, :width, None] + noise, 0, 255).astype(np.uint8)


def scribble(picture: UInt8Array, colour: tuple[int, int, int], *, thickness: int) -> UInt8Array:
    """Pen strokes across the picture, a little transparent at their edges."""
    height, width = picture.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    cover = np.zeros((height, width), np.float32)
    for k in range(3):
        line = height * (0.25 + 0.25 * k) + height * 0.1 * np.sin(x / width * 9 + k)
        cover = np.maximum(cover, np.clip((thickness / 2 - np.abs(y - line)) / (0.08 * thickness) + 0.5, 0, 1))
    mixed = picture * (1 - 0.93 * cover[..., None]) + 0.93 * cover[..., None] * np.array(colour, np.float32)
    return mixed.astype(np.uint8)


def stroma(width: int, height: int, *, seed: int = 0) -> UInt8Array:
    """A full field of pink tissue without any glass."""
    rng = np.random.default_rng(seed)
    texture = ndimage.gaussian_filter(rng.normal(0, 1, (height, width)), 2)
    texture /= texture.std() + 1e-9
    return np.clip(np.array([214, 140, 176]) + 18 * texture[..., None], 0, 255).astype(np.uint8)


def write(path: Path, picture: UInt8Array, *, mpp: float | None = 0.5) -> Path:
    write_pyramid(path, picture, mpp=mpp)
    return path


def break_tile(path: Path, *, column: int, row: int) -> None:
    """Overwrite one tile of level 0 with zeros."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        across = -(-page.imagewidth // page.tilewidth)
        index = row * across + column
        offset, length = page.dataoffsets[index], page.databytecounts[index]
    with path.open("r+b") as raw:
        raw.seek(offset)
        raw.write(bytes(length))


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    error = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def write_one_level(path: Path, edge: int, *, tile: int = 512, colour: tuple[int, int, int] = (200, 120, 160)) -> Path:
    """A TIFF of ``edge`` x ``edge`` pixels in one level of one colour, all of whose JPEG tiles are the same bytes: gigapixels in some kilobytes."""
    picture = np.full((512, 512, 3), colour, np.uint8)
    jpeg = imagecodecs.jpeg8_encode(picture, level=90, colorspace="RGB", outcolorspace="YCBCR", subsampling="444")
    count = (-(-edge // tile)) ** 2
    bits, start = 8, 14
    lengths = start + len(jpeg) + len(jpeg) % 2
    offsets = lengths + 2 * count
    directory = offsets + 4 * count
    tags = [
        (256, 4, 1, edge),
        (257, 4, 1, edge),
        (258, 3, 3, bits),
        (259, 3, 1, 7),
        (262, 3, 1, 6),
        (277, 3, 1, 3),
        (284, 3, 1, 1),
        (322, 4, 1, tile),
        (323, 4, 1, tile),
        (324, 4, count, offsets),
        (325, 3, count, lengths),
    ]
    with path.open("wb") as file:
        file.write(struct.pack("<2sHI3H", b"II", 42, directory, 8, 8, 8))
        file.write(jpeg.ljust(lengths - start, b"\0"))
        file.write(np.full(count, len(jpeg), "<u2").tobytes() + np.full(count, start, "<u4").tobytes())
        file.write(struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4))
    return path


def peak_bytes() -> int:
    """The most memory that this process ever had (VmHWM). For processes started for it: what ran before counts as well."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
