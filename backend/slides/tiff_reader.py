"""TIFF pyramids that OpenSlide does not read, or not as pyramids: levels in SubIFDs (OME-TIFF), WebP, JPEG XL, JPEG XR,
JPEG 2000, LERC, LZMA, PNG.

tifffile finds the tiles and imagecodecs decodes them, one at a time, when they are asked for; decoded ones are kept up
to a bound. A codec is given memory for the tile that the directory speaks of, so that a stream of another size is
refused before it is decoded. Tiles that are missing are white.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from backend.errors import SlideTooLarge, SlideUnreadable
from backend.results.bag import UInt8Array
from backend.slides.images import check_type, codec_unsupported, piece_to_rgb, to_uint8
from backend.slides.jpeg_tiles import JpegLevel, JpegTiles, NotDirect, OpenFile, TileCache, doubtful
from backend.slides.levels import LevelSlide
from backend.slides.resample import WHITE
from backend.slides.tiff_pages import TiffLevel, TiffSurvey, codec_name, decodable

_BAND_ROWS = 2  # of tiles that are kept, of the widest level: neighbouring rows of an analysis share one
_CACHE_MIN_BYTES, _CACHE_MAX_BYTES = 2**25, 2**27
_SHARED_CACHE_BYTES = 2**24  # where many slides are open at once
_ZERO_RUN_DOUBT = "it holds a run of zeros"  # flat tiles may: without a second reader there is nobody to ask

_JPEG = frozenset((7, 33007))
_JPEG_2000 = frozenset((33003, 33005, 34712))
_APERIO_YCBCR = 33003
Decode = Callable[..., npt.NDArray[np.generic]]
_IMAGE_CODECS: dict[int, Decode] = {
    **dict.fromkeys((34927, 50001), imagecodecs.webp_decode),
    **dict.fromkeys((50002, 52546), imagecodecs.jpegxl_decode),
    **dict.fromkeys((22610, 34934), imagecodecs.jpegxr_decode),
    **dict.fromkeys(_JPEG_2000, imagecodecs.jpeg2k_decode),
    34887: imagecodecs.lerc_decode,
    34933: imagecodecs.png_decode,
}
_MINISWHITE, _MINISBLACK, _RGB, _PALETTE, _SEPARATED, _YCBCR = 0, 1, 2, 3, 5, 6
_SAMPLES = {_MINISWHITE: (1, 2), _MINISBLACK: (1, 2), _RGB: (3, 4), _PALETTE: (1,), _SEPARATED: (4,), _YCBCR: (3,)}
_JPEG_COLOURS = {_RGB: "RGB", _YCBCR: "YCBCR"}
_COLOUR_NAMES = {4: "a mask", 8: "CIELAB", 9: "ICCLAB", 10: "ITULAB", 32803: "a camera's raw data", 32845: "LogLuv"}
_COLOUR_NAMES |= {0: "grey", 1: "grey", 2: "RGB", 3: "a palette", 5: "inks", 6: "YCbCr"}
_ASSOCIATED_ALPHA = 1


class TiffSlide(LevelSlide):
    """A TIFF whose tiles are decoded by imagecodecs.

    Parameters
    ----------
    path
        The file.
    survey
        As :func:`~backend.slides.tiff_pages.survey_tiff` found it, with at least one level.
    shared
        Whether many slides are open at once: few decoded tiles are kept then.

    Raises
    ------
    CodecUnsupported
        There is no decoder for its compression or its colours.
    SlideUnreadable
        A tile of level 0 cannot be decoded.
    """

    def __init__(self, path: Path, survey: TiffSurvey, *, shared: bool = False) -> None:
        levels = survey.levels
        self._path = path
        self._tiff_levels = levels
        for level in levels:
            _check_kind(path, level)
        full = levels[0].size
        super().__init__(
            size=full,
            downsamples=[downsample(full, level.size) for level in levels],
            level_sizes=[level.size for level in levels],
            stated=survey.scale,
            reader=f"tifffile {survey.codec}",
            properties={"format": "tiff", "codec": survey.codec, "tiff.ImageDescription": survey.description[: 2**16]},
            name=path.name,
            tile_sizes=[level.tile_size if level.tiled else None for level in levels],
        )
        for note in survey.notes:
            self._note(note)
        band = _BAND_ROWS * max(level.columns * level.tile_size[0] * level.tile_size[1] * 3 for level in levels)
        limit = _SHARED_CACHE_BYTES if shared else min(max(band, _CACHE_MIN_BYTES), _CACHE_MAX_BYTES)
        self._cache = TileCache(limit)
        self._file: OpenFile | None = OpenFile(path)
        self._jpeg = self._plain_jpeg(limit if shared else None)
        self._try_a_tile()
        self._check_odd_levels()

    def _plain_jpeg(self, cache_bytes: int | None) -> JpegTiles | None:
        """The fast reader of tiled 8-bit JPEG in colour, where all levels are that."""
        levels: list[JpegLevel] = []
        for level in self._tiff_levels:
            colour_space = _JPEG_COLOURS.get(level.photometric)
            plain = (level.compression, level.samples, level.planes) == (7, 3, 1) and level.dtype == np.uint8
            if not plain or not level.tiled or colour_space is None:
                return None
            tables = level.jpeg_tables
            levels.append(
                JpegLevel(level.size, level.tile_size, level.offsets[0], level.lengths[0], tables, colour_space)
            )
        return JpegTiles(self._path, levels, cache_bytes=cache_bytes)

    def _try_a_tile(self) -> None:
        """Decode one tile, or another, so that a codec that fails with all of them is not taken for damage at a place."""
        lengths = self._tiff_levels[0].lengths[0]
        present = np.flatnonzero(lengths[: self._tiff_levels[0].columns * self._tiff_levels[0].rows])
        if not len(present):
            return
        try:
            self._tile(0, int(present[len(present) // 2]))
        except SlideUnreadable:
            try:
                self._tile(0, int(present[0]))
            except SlideUnreadable as error:
                codec = codec_name(self._tiff_levels[0].compression)
                raise SlideUnreadable(
                    f"No tile of {self._path.name} could be decoded: {error.message}",
                    hint=f"It is damaged, or in a kind of {codec} that is not read here.",
                ) from error

    def _read_exactly(self, level: int, x: int, y: int, factor: tuple[int, int], out: UInt8Array) -> bool:
        if self._jpeg is None or factor not in ((1, 1), (2, 2)):
            return False
        halved = factor == (2, 2)
        if halved and not self._jpeg.halves(level, x, y, 2 * out.shape[1], 2 * out.shape[0]):
            return False
        try:
            self._jpeg.fill(level, x, y, out, halved=halved)
        except NotDirect:
            return False
        return True

    def _read_level(self, level: int, x: int, y: int, w: int, h: int) -> tuple[UInt8Array, float, float]:
        if self._jpeg is not None:
            try:
                return self._jpeg.read(level, x, y, w, h), x, y
            except NotDirect:
                pass  # below it is white where tiles are missing, or damaged
        out = np.full((h, w, 3), WHITE[0], np.uint8)
        of = self._tiff_levels[level]
        tile_w, tile_h = of.tile_size
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + w, of.size[0]), min(y + h, of.size[1])
        if left >= right or top >= bottom:
            return out, x, y
        for row in range(top // tile_h, (bottom - 1) // tile_h + 1):
            y0, y1 = max(top, row * tile_h), min(bottom, (row + 1) * tile_h)
            for column in range(left // tile_w, (right - 1) // tile_w + 1):
                x0, x1 = max(left, column * tile_w), min(right, (column + 1) * tile_w)
                tile = self._tile(level, row * of.columns + column)
                out[y0 - y : y1 - y, x0 - x : x1 - x] = tile[
                    y0 - row * tile_h : y1 - row * tile_h, x0 - column * tile_w : x1 - column * tile_w
                ]
        return out, x, y

    def _tile(self, level: int, number: int) -> UInt8Array:
        """Tile ``number`` (row by row) of a level as uint8 (h, w, 3) RGB, shared: not to be written to. At the border
        it may be cut.
        """
        return self._cache.get((level, number), lambda: self._decoded(level, number))

    def _decoded(self, index: int, number: int) -> UInt8Array:
        level = self._tiff_levels[index]
        places = level.columns * level.rows
        samples = []
        for which, page in enumerate(level.pages):
            for plane in range(level.planes):
                at = plane * places + number
                data = self._bytes(index, number, int(level.offsets[which][at]), int(level.lengths[which][at]))
                if data is None:
                    return np.full((level.tile_size[1], level.tile_size[0], 3), WHITE[0], np.uint8)
                samples.append(self._samples(index, number, page, at, data))
        try:
            values = samples[0] if len(samples) == 1 else np.concatenate(samples, axis=2)
            return np.ascontiguousarray(_to_rgb(values, level))
        except ValueError as error:
            raise SlideUnreadable(f"{self._path.name} cannot be shown: {error}.") from error

    def _bytes(self, index: int, number: int, offset: int, length: int) -> bytes | None:
        if offset <= 0 or length <= 0:
            return None  # left out by the scanner
        file = self._file
        if file is None:
            raise ValueError(f"{self._path.name} is closed")
        try:
            data = file.read(offset, length)
        except OSError as error:
            raise self._damaged(index, number, str(error)) from error
        if len(data) < length:
            raise self._damaged(index, number, "the file ends before it")
        return data

    def _samples(
        self, index: int, number: int, page: tifffile.TiffPage, at: int, data: bytes
    ) -> npt.NDArray[np.generic]:
        """A tile's samples, (h, w, samples of this plane)."""
        level = self._tiff_levels[index]
        compression = level.compression
        count = 1 if level.planes > 1 else level.samples
        (width, height), left_over = level.tile_size, level.size[1] - number // level.columns * level.tile_size[1]
        if not level.tiled:
            height = min(height, left_over)
        if compression in _JPEG and (doubt := doubtful(data)) and doubt != _ZERO_RUN_DOUBT:
            raise self._damaged(index, number, doubt)
        # Some writers cut the tiles at the border.
        cut = (min(height, left_over), min(width, level.size[0] - number % level.columns * width))
        try:
            if compression not in _IMAGE_CODECS and compression not in _JPEG:
                decoded, _, _ = page.decode(data, at, jpegtables=level.jpeg_tables)
                return np.asarray(decoded).reshape(-1, width, count)
            decode = _jpeg_decoder(level) if compression in _JPEG else _IMAGE_CODECS[compression]
            shapes = dict.fromkeys(((height, width), cut))
            for shape in shapes:
                out = np.empty((*shape, count) if count > 1 else shape, level.dtype)
                try:
                    kind = {"hasalpha": True} if decode is imagecodecs.webp_decode and count == 4 else {}
                    decoded = decode(data, out=out, **kind).reshape(*shape, count)
                    return _from_ycbcr(decoded) if _holds_ycbcr(level, data) else decoded
                except ValueError:
                    if shape == list(shapes)[-1]:
                        raise
            raise AssertionError("unreachable")
        except MemoryError as error:
            raise SlideTooLarge(f"A tile of {self._path.name} does not fit into memory.") from error
        except Exception as error:  # each codec has errors of its own
            raise self._damaged(index, number, f"{codec_name(compression)}: {error}") from error

    def _damaged(self, index: int, number: int, reason: str) -> SlideUnreadable:
        level = self._tiff_levels[index]
        factor = self._downsamples[index]
        x, y = (
            round(n * edge * factor)
            for n, edge in zip(divmod(number, level.columns)[::-1], level.tile_size, strict=True)
        )
        return SlideUnreadable(
            f"{self._path.name} is damaged at x {x}, y {y} (level {index}): {reason}.",
            hint="Copy the slide again; the rest of it may be sound.",
        )

    def close(self) -> None:
        self._file = self._jpeg = None


def downsample(full: tuple[int, int], level: tuple[int, int]) -> float:
    """How much coarser a level is: the whole number that it was made with, if its size is that of level 0 divided by it
    and cut or filled up to whole pixels.
    """
    ratio = (full[0] / level[0] + full[1] / level[1]) / 2
    whole = round(ratio)
    return float(whole) if all(abs(f / whole - n) < 1 for f, n in zip(full, level, strict=True)) else ratio


def _check_kind(path: Path, level: TiffLevel) -> None:
    """:class:`CodecUnsupported` or :class:`SlideUnreadable` if such pixels cannot be decoded, or have no plain meaning
    as a picture.
    """
    compression, photometric, samples = level.compression, level.photometric, level.samples
    if not _decodes(level):
        kind = f" of {samples} samples a pixel" if compression in _JPEG else ""
        raise codec_unsupported(path.name, codec_name(compression) + kind)
    reason = ""
    if len(level.pages) == 1 and samples not in _SAMPLES.get(photometric, ()):
        colours = _COLOUR_NAMES.get(photometric, f"TIFF photometric {photometric}")
        reason = f"its colours are stored as {colours} of {samples} samples a pixel"
    if photometric == _PALETTE and level.colour_map is None:
        reason = "its palette is missing"
    try:
        check_type(level.dtype)
    except ValueError as error:
        reason = str(error)
    if reason:
        raise SlideUnreadable(
            f"{path.name} cannot be shown: {reason}.", hint="Export it as an 8-bit RGB TIFF or as a pyramid."
        )


def _decodes(level: TiffLevel) -> bool:
    """Whether its codec is one that can be given memory for a tile of the size that the directory says, and no more."""
    if level.compression in _JPEG:
        return level.samples in (1, 3) and level.dtype == np.uint8
    bounded = level.compression in _IMAGE_CODECS or level.compression not in tifffile.TIFF.IMAGE_COMPRESSIONS
    return bounded and decodable(level.compression)


def _jpeg_decoder(level: TiffLevel) -> Decode:
    colour_space = _JPEG_COLOURS.get(level.photometric) if level.planes == 1 and level.samples == 3 else None

    def decode(data: bytes, out: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        decoded: npt.NDArray[np.generic] = imagecodecs.jpeg8_decode(
            data, tables=level.jpeg_tables, colorspace=colour_space, outcolorspace=colour_space and "RGB", out=out
        )
        return decoded

    return decode


def _holds_ycbcr(level: TiffLevel, data: bytes) -> bool:
    """Whether the samples that JPEG 2000 decodes to are YCbCr: Aperio says so by its codec; others are if the stream
    has no colour transform of its own.
    """
    if level.compression == _APERIO_YCBCR:
        return True
    if level.compression not in _JPEG_2000 or level.photometric != _YCBCR:
        return False
    # ISO/IEC 15444-1, A.6.1: COD is FF52, length (2), style (1), progression (1), layers (2), multiple component
    # transform (1).
    at = data.find(b"\xff\x52")
    return not (0 <= at < len(data) - 8 and data[at + 8])


def _from_ycbcr(values: npt.NDArray[np.generic]) -> UInt8Array:
    return _converted("YCbCr", to_uint8(values))


def _converted(mode: str, pixels: UInt8Array) -> UInt8Array:
    """RGB of what Pillow knows as ``mode``, uint8 (h, w, samples)."""
    size = (pixels.shape[1], pixels.shape[0])
    return np.asarray(Image.frombytes(mode, size, np.ascontiguousarray(pixels).tobytes()).convert("RGB"))


def _to_rgb(values: npt.NDArray[np.generic], level: TiffLevel) -> UInt8Array:
    """Samples (h, w, s) as uint8 (h, w, 3) RGB, transparency laid on white."""
    photometric = level.photometric
    if len(level.pages) == 3:
        return to_uint8(values)
    if photometric == _PALETTE and level.colour_map is not None:
        colours: UInt8Array = level.colour_map[values[..., 0]]
        return colours
    pixels = to_uint8(values)
    if photometric == _SEPARATED:
        return _converted("CMYK", pixels)
    if photometric == _YCBCR:
        return pixels if level.compression in _JPEG | _JPEG_2000 else _from_ycbcr(pixels)
    if photometric in (_MINISWHITE, _MINISBLACK):
        grey = np.bitwise_not(pixels[..., :1]) if photometric == _MINISWHITE else pixels[..., :1]
        pixels = np.concatenate([grey, grey, grey, pixels[..., 1:]], axis=2)
    if pixels.shape[2] == 3 or level.alpha is None:
        return pixels[..., :3]
    if level.alpha == _ASSOCIATED_ALPHA:  # multiplied already
        on_white = pixels[..., :3].astype(np.uint16) + (255 - pixels[..., 3:])
        return np.asarray(np.minimum(on_white, 255), np.uint8)
    return np.asarray(piece_to_rgb(Image.fromarray(np.ascontiguousarray(pixels))))
