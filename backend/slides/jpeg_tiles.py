"""The JPEG tiles of a TIFF pyramid, decoded one by one and kept for their neighbours. Knows nothing of OpenSlide.

A 224-pixel tile of a bag rarely lies on the file's own grid of 240, 256 or 512 pixels, so one tile of the file serves up to four of the bag
and those of the next row again: decoded tiles are kept, up to a bound in bytes, and shared by the threads. Decoding leaves the interpreter's
lock, so threads scale.

At an exact 2:1 (slides of 0.25 µm per pixel) each tile of the file is halved once, as it is decoded, and only the half is kept. That is the same average
of 2 x 2 pixels, rounded once, that Pillow's ``reduce`` takes of the finished region, without the region: OpenCV does it in 0.01 ms for a 256-pixel
tile while that lies in the cache. A half-size decode (libjpeg's scaled DCT) would save another fifth, for other pixels than OpenSlide's:
it is not used. The figures are in ``benchmarks/RESULTS.md``.

Sources: TIFF 6.0; JPEG in TIFF by Adobe's Technical Note 2 (JPEGTables, tag 347); ITU-T T.81 for the markers.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import tifffile

from backend.results.bag import Int64Array, UInt8Array
from backend.slides.resample import WHITE

_JPEG, _RGB, _YCBCR = 7, 2, 6  # Compression, PhotometricInterpretation
_COLOUR_SPACES = {_RGB: "RGB", _YCBCR: "YCBCR"}

# A bag is read row by row, so what one row decoded must last until the next passes the same column: a band as high as a tile of the bag, which
# touches two rows of file tiles at 1:1 and three at 2:1. More would only push the band out of the processor's cache; above the cap (very
# wide slides) some tiles are decoded twice.
_BAND_ROWS = 4
_CACHE_MIN_BYTES, _CACHE_MAX_BYTES = 32 * 2**20, 256 * 2**20

_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")  # a marker that is neither a stuffed FF nor a restart (T.81, B.1.1)
_END_OF_IMAGE = 0xD9
_START_OF_SCAN = b"\xff\xda"
_SLACK_BYTES = 16
_FF = 0xFF
_LINE = 32  # bytes
_SLAB_BYTES = 4 * 2**20
_ZERO_RUN = bytes(64)

_SCRATCH_BYTES = 4 * 2**20
_HALVED_MAX_PIXELS = 2**18  # OpenCV halves larger tiles in threads of its own, which would compete with the readers
_WHITE = WHITE[0]  # all three channels


class NotDirect(Exception):
    """These tiles cannot be decoded here; the message says why. Never leaves this room: OpenSlide reads instead."""


class MissingTile(NotDirect):
    """The file has no bytes for a tile: scanners leave out what is empty."""


@dataclass(frozen=True, eq=False)
class JpegLevel:
    """One level of a pyramid: a TIFF page of JPEG tiles.

    Attributes
    ----------
    size
        (width, height) in pixels.
    tile_size
        (width, height) of a tile of the file; those at the right and bottom edge are filled up to it.
    offsets, lengths
        int64 (tiles,), row by row: where the bytes of each tile start and how many they are; 0 for a tile that is missing.
    tables
        The JPEG tables that the tiles share (tag 347), or ``None``.
    colour_space
        How the tiles are stored, by the page's PhotometricInterpretation: ``"RGB"`` or ``"YCBCR"``.
    """

    size: tuple[int, int]
    tile_size: tuple[int, int]
    offsets: Int64Array
    lengths: Int64Array
    tables: bytes | None
    colour_space: str

    @property
    def columns(self) -> int:
        return -(-self.size[0] // self.tile_size[0])

    @property
    def tile_bytes(self) -> int:
        return self.tile_size[0] * self.tile_size[1] * 3


def jpeg_levels(path: Path, sizes: Sequence[tuple[int, int]]) -> tuple[JpegLevel, ...]:
    """The pages of a TIFF that hold the levels of ``sizes`` (width, height), in this order. Raises :class:`NotDirect` if one is none of ours."""
    try:
        with tifffile.TiffFile(path) as file:
            pages: dict[tuple[int, int], tifffile.TiffPage] = {}
            for page in file.pages:
                if page.is_tiled:
                    pages.setdefault((page.imagewidth, page.imagelength), page)
            return tuple(_level(pages[size]) if size in pages else _none(size) for size in sizes)
    except NotDirect:
        raise
    except Exception as error:  # a damaged tag may be of any type, and fails wherever it is first used
        raise NotDirect(f"its structure could not be read: {error}") from error


def _none(size: tuple[int, int]) -> JpegLevel:
    raise NotDirect(f"no tiled page has the {size[0]} x {size[1]} pixels of a level")


def _level(page: tifffile.TiffPage) -> JpegLevel:
    kind = (int(page.compression), page.bitspersample, page.samplesperpixel, int(page.planarconfig or 1))
    if kind != (_JPEG, 8, 3, 1) or int(page.photometric) not in _COLOUR_SPACES:
        raise NotDirect(f"a level is not tiled 8-bit JPEG in colour ({page.compression!r}, {page.photometric!r})")
    level = JpegLevel(
        size=(page.imagewidth, page.imagelength),
        tile_size=(page.tilewidth, page.tilelength),
        offsets=np.asarray(page.dataoffsets, np.int64),
        lengths=np.asarray(page.databytecounts, np.int64),
        tables=bytes(page.jpegtables) if page.jpegtables else None,
        colour_space=_COLOUR_SPACES[int(page.photometric)],
    )
    expected = level.columns * -(-level.size[1] // level.tile_size[1])
    if not len(level.offsets) == len(level.lengths) == expected:
        raise NotDirect(f"a level lists {len(level.offsets)} tiles and should have {expected}")
    return level


class OpenFile:
    """A file descriptor that is closed when its last reader is done with it: a number closed under a reader may become another file's."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        # Room is made for `length` bytes before any is read, and a damaged file may speak of terabytes.
        return os.pread(self._descriptor, min(length, self._size), offset)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class TileCache:
    """Decoded tiles, least recently used ones dropped first. Threads that want the same tile wait for one of them to make it."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._held = 0
        self._tiles: OrderedDict[tuple[int, ...], UInt8Array] = OrderedDict()
        self._making: dict[tuple[int, ...], Future[UInt8Array]] = {}
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        return self._held

    def get(self, key: tuple[int, ...], make: Callable[[], UInt8Array]) -> UInt8Array:
        """The tile of ``key``, made by ``make`` if it is not there. What ``make`` raises, every waiting thread is told; nothing is kept then."""
        with self._lock:
            tile = self._tiles.get(key)
            if tile is not None:
                self._tiles.move_to_end(key)
                return tile
            making = self._making.get(key)
            if making is None:
                promise = self._making[key] = Future()
        if making is not None:
            return making.result()
        try:
            tile = make()
        except BaseException as error:
            with self._lock:
                del self._making[key]
            promise.set_exception(error)
            raise
        with self._lock:
            del self._making[key]
            self._tiles[key] = tile
            self._held += tile.nbytes
            while self._held > self._limit and len(self._tiles) > 1:
                self._held -= self._tiles.popitem(last=False)[1].nbytes
        promise.set_result(tile)
        return tile


class _Slabs:
    """Memory for tiles, cut from pieces of 4 MiB, which the system gives in large pages where it can.

    Tile by tile, a slide's first tiles cost a page fault for every 4 KiB: a quarter of the time of a short bag. A piece is given back with its last tile.
    """

    def __init__(self) -> None:
        self._rest: dict[tuple[int, ...], list[UInt8Array]] = {}
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, int, int]) -> UInt8Array:
        """uint8 of this shape, with what the memory held before."""
        with self._lock:
            rest = self._rest.setdefault(shape, [])
            if not rest:
                size = -(-math.prod(shape) // _LINE) * _LINE
                count = -(-_SLAB_BYTES // size)
                slab = _decoding_memory(count * size).reshape(count, size)
                rest += [row[: math.prod(shape)].reshape(shape) for row in slab[::-1]]
            return rest.pop()


class JpegTiles:
    """The levels of one file, read by pixel. May be used from several threads at once.

    Parameters
    ----------
    path
        The TIFF.
    levels
        As :func:`jpeg_levels` found them.
    cache_bytes
        Bound of the decoded tiles kept. By default four rows of tiles of the widest level, within 32 to 256 MiB.
    """

    def __init__(self, path: Path, levels: Sequence[JpegLevel], *, cache_bytes: int | None = None) -> None:
        self.levels = tuple(levels)
        band = _BAND_ROWS * max(level.columns * level.tile_bytes for level in levels)
        self.cache = TileCache(cache_bytes or min(max(band, _CACHE_MIN_BYTES), _CACHE_MAX_BYTES))
        self._file = OpenFile(path)
        self._scratch = threading.local()
        self._memory = _Slabs()

    def read(self, index: int, x: int, y: int, w: int, h: int) -> UInt8Array:
        """Pixels x to x + w, y to y + h of a level as uint8 (h, w, 3) RGB; white beyond its border.

        The array is the thread's own and valid until its next read: memory fresh from the system costs more than filling it.

        Raises
        ------
        NotDirect
            A tile in it is missing (then :class:`MissingTile`), damaged, or looks as if it were.
        """
        pixels = self._scratch_array("canvas", (h, w, 3))
        self.fill(index, x, y, pixels)
        return pixels

    def halves(self, index: int, x: int, y: int, w: int, h: int) -> bool:
        """Whether the averages of 2 x 2 pixels of a region are those of whole tiles: none of them may cross a tile's border or the level's."""
        level = self.levels[index]
        (width, height), (tile_w, tile_h) = level.size, level.tile_size
        if tile_w * tile_h > _HALVED_MAX_PIXELS or x % 2 or y % 2 or w % 2 or h % 2 or tile_w % 2 or tile_h % 2:
            return False
        return (x + w <= width or width % 2 == 0) and (y + h <= height or height % 2 == 0)

    def fill(self, index: int, x: int, y: int, out: UInt8Array, *, halved: bool = False) -> None:
        """Fill ``out``, uint8 (h, w, 3), with the pixels of a level from x, y on, white beyond its border.

        ``halved``: with the averages of 2 x 2 pixels, rounded to the nearest (halves up); :meth:`halves` must be so. ``x``, ``y`` are level pixels in any case.
        Raises as :meth:`read`; ``out`` may be written to by then.
        """
        level, by = self.levels[index], 1 + halved
        x, y, (h, w) = x // by, y // by, out.shape[:2]
        tile_w, tile_h = level.tile_size[0] // by, level.tile_size[1] // by
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + w, level.size[0] // by), min(y + h, level.size[1] // by)
        if (left, top, right, bottom) != (x, y, x + w, y + h):
            out.fill(_WHITE)
            if left >= right or top >= bottom:
                return
        rows = range(top // tile_h, (bottom - 1) // tile_h + 1)
        columns = range(left // tile_w, (right - 1) // tile_w + 1)
        # Said before any is decoded: with one missing, the others would be decoded for nothing.
        if not level.lengths.reshape(-1, level.columns)[rows.start : rows.stop, columns.start : columns.stop].all():
            raise MissingTile("a tile is missing")
        for row in rows:
            y0, y1 = max(top, row * tile_h), min(bottom, (row + 1) * tile_h)
            for column in columns:
                x0, x1 = max(left, column * tile_w), min(right, (column + 1) * tile_w)
                tile = self.tile(index, row * level.columns + column, halved=halved)
                inside = tile[y0 - row * tile_h : y1 - row * tile_h, x0 - column * tile_w : x1 - column * tile_w]
                out[y0 - y : y1 - y, x0 - x : x1 - x] = inside

    def _scratch_array(self, name: str, shape: tuple[int, int, int]) -> UInt8Array:
        """Memory of this thread, which keeps it: fresh memory from the system costs more than filling it."""
        size = math.prod(shape)
        if size > _SCRATCH_BYTES:
            return _decoding_memory(size).reshape(shape)
        flat: UInt8Array | None = getattr(self._scratch, name, None)
        if flat is None or len(flat) < size:
            flat = _decoding_memory(size)
            setattr(self._scratch, name, flat)
        return flat[:size].reshape(shape)

    def tile(self, index: int, number: int, *, halved: bool = False) -> UInt8Array:
        """Tile ``number`` (row by row) of a level as uint8 (tile height, tile width, 3) RGB, shared: not to be written to.

        ``halved``: half as high and wide, of averages of 2 x 2 pixels.
        """
        if halved:
            return self.cache.get((index, number, 2), lambda: self._halved(self.levels[index], number))
        return self.cache.get((index, number), lambda: self._whole(self.levels[index], number))

    def _whole(self, level: JpegLevel, number: int) -> UInt8Array:
        width, height = level.tile_size
        return self._decode(level, number, self._memory.take((height, width, 3)))

    def _halved(self, level: JpegLevel, number: int) -> UInt8Array:
        width, height = level.tile_size
        whole = self._decode(level, number, self._scratch_array("whole", (height, width, 3)))
        half = self._memory.take((height // 2, width // 2, 3))
        cv2.resize(whole, (width // 2, height // 2), dst=half, interpolation=cv2.INTER_AREA)
        return half

    def _decode(self, level: JpegLevel, number: int, out: UInt8Array) -> UInt8Array:
        offset, length = int(level.offsets[number]), int(level.lengths[number])
        if offset <= 0 or length <= 0:
            raise MissingTile(f"tile {number} is missing")
        try:
            data = self._file.read(offset, length)
        except OSError as error:
            raise NotDirect(f"tile {number} could not be read: {error}") from error
        if len(data) < length or (doubt := doubtful(data)):
            raise NotDirect(f"tile {number}: {doubt if len(data) == length else 'the file ends before it'}")
        try:
            tile: UInt8Array = imagecodecs.jpeg8_decode(
                data, tables=level.tables, colorspace=level.colour_space, outcolorspace="RGB", out=out
            )
        except (imagecodecs.Jpeg8Error, ValueError, RuntimeError) as error:
            raise NotDirect(f"tile {number}: {error}") from error
        if tile.shape != (level.tile_size[1], level.tile_size[0], 3) or tile.dtype != np.uint8:
            raise NotDirect(f"tile {number} has the shape {tile.shape} of {tile.dtype}")
        return tile


def _decoding_memory(size: int) -> UInt8Array:
    """uint8 (size,) that starts half-way between two multiples of 32 bytes.

    Where a row of pixels starts on one, libjpeg-turbo writes it past the processor's caches, out of which it is read a moment later: a tile
    then took 0.23 ms in place of 0.19.
    """
    memory = np.empty(size + _LINE, np.uint8)
    start = (_LINE // 2 - memory.__array_interface__["data"][0]) % _LINE
    return memory[start : start + size]


def doubtful(data: bytes) -> str:
    """Why a JPEG stream may be damaged, in words; empty if it looks sound.

    libjpeg only *warns* of data that end early, and decodes grey; OpenSlide takes its warnings for errors, and imagecodecs does not show them.
    So the stream is looked at: its first marker after the scan's start must be the end of the image and lie at the end of the
    data, and there must be no run of 64 zero bytes, which is what a lost block of a file leaves. (Sound streams of flat
    tiles may have one: then OpenSlide decides.)
    """
    start = data.find(_START_OF_SCAN)
    if start < 0:
        return "it has no scan"
    start += len(_START_OF_SCAN)
    if _ZERO_RUN in data:
        return "it holds a run of zeros"
    # Every FF in the scan is stuffed with 00 but that of the end: a fast look. The search is for the rest (restart markers, damage).
    scan = np.frombuffer(data, np.uint8, offset=start)
    marks = np.flatnonzero(scan == _FF)
    if data.endswith(b"\xff\xd9") and len(marks) and marks[-1] == len(scan) - 2 and not scan[marks[:-1] + 1].any():
        return ""
    end = _MARKER.search(data, start)
    if end is None or data[end.end() - 1] != _END_OF_IMAGE:
        return "its scan does not end with the end of the image"
    return "" if len(data) - end.end() <= _SLACK_BYTES else "the image ends before its data"
