"""A slide cut into Deep Zoom tiles: the pyramid's geometry, pure, and the JPEGs, cached.

The format is Microsoft's Deep Zoom Image as OpenSeadragon reads it (https://openseadragon.github.io/examples/tilesource-dzi/): level
``n`` is the slide divided by ``2 ** (last - n)`` and rounded up, the last level is the slide itself; tiles are squares of
:data:`TILE_PX` that share :data:`OVERLAP_PX` with each neighbour, so that no seams show where a viewer scales them.
"""

from __future__ import annotations

import hashlib
import io
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from backend.errors import TileOutside
from backend.results.bag import UInt8Array
from backend.slides.source import SlideRef
from backend.web.slide_cache import SlideCache

TILE_PX = 254
OVERLAP_PX = 1
JPEG_QUALITY = 87
REGION_MAX_PX = 512
CACHE_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Pyramid:
    """The levels of a slide of ``size`` (width, height) in level-0 pixels."""

    size: tuple[int, int]

    @property
    def last_level(self) -> int:
        """Number of the level that is the slide itself; level 0 is one pixel."""
        return math.ceil(math.log2(max(self.size))) if max(self.size) > 1 else 0

    def scale(self, level: int) -> int:
        """Level-0 pixels for one pixel of ``level``, along an edge."""
        if not 0 <= level <= self.last_level:
            raise TileOutside(f"There is no level {level}: the slide has levels 0 to {self.last_level}.")
        return 1 << (self.last_level - level)

    def level_size(self, level: int) -> tuple[int, int]:
        """(width, height) of a level in its own pixels."""
        scale = self.scale(level)
        return -(-self.size[0] // scale), -(-self.size[1] // scale)

    def tiles(self, level: int) -> tuple[int, int]:
        """(columns, rows) of a level."""
        width, height = self.level_size(level)
        return -(-width // TILE_PX), -(-height // TILE_PX)

    def tile_box(self, level: int, column: int, row: int) -> tuple[int, int, int, int]:
        """x, y, width, height of a tile in the level's pixels, with its overlap, cut at the level's border.

        Raises
        ------
        TileOutside
            There is no such level, or no such tile on it.
        """
        columns, rows = self.tiles(level)
        if not (0 <= column < columns and 0 <= row < rows):
            raise TileOutside(f"There is no tile ({column}, {row}) on level {level}: it has {columns} x {rows}.")
        width, height = self.level_size(level)
        left, top = max(0, column * TILE_PX - OVERLAP_PX), max(0, row * TILE_PX - OVERLAP_PX)
        right = min(width, (column + 1) * TILE_PX + OVERLAP_PX)
        bottom = min(height, (row + 1) * TILE_PX + OVERLAP_PX)
        return left, top, right - left, bottom - top

    def descriptor(self) -> str:
        """The ``.dzi`` file, XML."""
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f'<Image xmlns="http://schemas.microsoft.com/deepzoom/2008" Format="jpg" Overlap="{OVERLAP_PX}" '
            f'TileSize="{TILE_PX}"><Size Width="{self.size[0]}" Height="{self.size[1]}"/></Image>\n'
        )


@dataclass(frozen=True)
class Picture:
    """A JPEG and its entity tag, quoted as HTTP wants it."""

    jpeg: bytes
    etag: str


class DeepZoom:
    """Cuts tiles and regions out of slides. Threads may share one."""

    def __init__(self, slides: SlideCache, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._slides = slides
        self._limit = cache_bytes
        self._cached: OrderedDict[str, Picture] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def pyramid(self, ref: SlideRef) -> Pyramid:
        """The levels of a slide; errors as :meth:`SlideCache.slide <backend.web.slide_cache.SlideCache.slide>`."""
        with self._slides.slide(ref) as slide:
            return Pyramid(slide.size)

    def cached_tile(self, ref: SlideRef, level: int, column: int, row: int) -> Picture | None:
        """A tile that was cut before, if it is still remembered. Never waits."""
        return self._remembered(_etag(ref, "tile", level, column, row))

    def tile(self, ref: SlideRef, level: int, column: int, row: int) -> Picture:
        """One Deep Zoom tile.

        Raises
        ------
        TileOutside
            As :meth:`Pyramid.tile_box`.
        SlideTooLarge
            The slide has no level that is coarse enough: see :data:`~backend.slides.levels.REGION_MAX_LEVEL_PX`. Finer tiles are there.
        SourceError, SlideError
            The slide is gone or cannot be read.
        """

        def cut() -> UInt8Array:
            with self._slides.slide(ref) as slide:
                pyramid = Pyramid(slide.size)
                x, y, width, height = pyramid.tile_box(level, column, row)
                scale, edge = pyramid.scale(level), max(width, height)
                square = slide.read_region(x * scale, y * scale, edge * scale, edge)
                return square[:height, :width]

        return self._picture(_etag(ref, "tile", level, column, row), cut)

    def region(self, ref: SlideRef, x: int, y: int, size: int, px: int) -> Picture:
        """The square at level-0 (x, y) with an edge of ``size`` level-0 pixels, as a picture of ``px`` pixels.

        Raises
        ------
        TileOutside
            It does not touch the slide, or ``px`` is not within 16 to :data:`REGION_MAX_PX`.
        SlideTooLarge
            As :meth:`tile`.
        SourceError, SlideError
            The slide is gone or cannot be read.
        """

        def cut() -> UInt8Array:
            with self._slides.slide(ref) as slide:
                width, height = slide.size
                inside = x < width and y < height and x + size > 0 and y + size > 0
                if not inside or not 1 <= size <= 2 * max(width, height) or not 16 <= px <= REGION_MAX_PX:
                    raise TileOutside(
                        f"No picture of {px} px of the square at ({x}, {y}) of {size} px: the slide has {width} x {height}, "
                        f"and pictures 16 to {REGION_MAX_PX} px."
                    )
                return slide.read_region(x, y, size, px)

        return self._picture(_etag(ref, "region", x, y, size, px), cut)

    def _picture(self, etag: str, cut: Callable[[], UInt8Array]) -> Picture:
        found = self._remembered(etag)
        if found is not None:
            return found
        buffer = io.BytesIO()
        Image.fromarray(cut()).save(buffer, "JPEG", quality=JPEG_QUALITY)
        made = Picture(buffer.getvalue(), etag)
        with self._lock:
            if etag not in self._cached:
                self._bytes += len(made.jpeg)
            self._cached[etag] = made
            while self._bytes > self._limit and len(self._cached) > 1:
                self._bytes -= len(self._cached.popitem(last=False)[1].jpeg)
        return made

    def _remembered(self, etag: str) -> Picture | None:
        with self._lock:
            found = self._cached.get(etag)
            if found is not None:
                self._cached.move_to_end(etag)
            return found


def _etag(ref: SlideRef, *what: object) -> str:
    # The identity changes with the slide's content, so the tag may be known before anything is read.
    text = "\0".join(map(str, (ref.kind, ref.locations, ref.identity, JPEG_QUALITY, *what)))
    return f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'
