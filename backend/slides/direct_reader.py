"""Tiled-JPEG slides read directly: the file's own tiles, decoded once each, with OpenSlide as judge and as the way out.

OpenSlide spends two thirds of its time on composing, not on JPEG. Where a file is a plain pyramid of JPEG tiles, this reader takes the tiles
themselves. A level is read so only after regions of it have agreed with OpenSlide: level 0 when the slide is opened, each other one when it is first
asked for. Where one does not agree, OpenSlide reads the whole file from then on; and whatever cannot be decoded here (missing or
damaged tiles) it reads after all, so that errors and the filling of holes are the same with both.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from backend.errors import SlideUnreadable
from backend.results.bag import UInt8Array
from backend.slides.jpeg_tiles import JpegLevel, JpegTiles, MissingTile, NotDirect, jpeg_levels
from backend.slides.openslide_reader import OpenSlideSlide
from backend.slides.resample import resample

log = logging.getLogger(__name__)

# Formats that OpenSlide opens as a plain grid of TIFF tiles. Others of its TIFFs overlap or shift theirs (ventana, leica, trestle).
VENDORS = frozenset(("aperio", "generic-tiff"))

# Largest difference of a sample, in 8-bit steps. The same libjpeg gives the same pixels and builds of it may differ by one. Where OpenSlide cannot
# start a read on a whole pixel of a level (see OpenSlideSlide) it interpolates linearly with coarse weights: so do we, to within 2.
MAX_DIFFERENCE = 3

_SAMPLE_PX = 96


class DirectSlide(OpenSlideSlide):
    """A slide that OpenSlide opens, whose pixels are read without it where that is proven to be the same.

    ``reader`` says which of both reads the pixels, as far as is known by then: ``"imagecodecs aperio"`` or ``"openslide aperio"``.
    """

    # Before the first read, which OpenSlideSlide may do while it opens.
    _tiles: JpegTiles | None = None
    _agreed: frozenset[int] = frozenset()

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._comparing = threading.Lock()
        try:
            self._accept(path)
        except NotDirect as reason:
            log.debug("%s is read by OpenSlide: %s", path.name, reason)
        except BaseException:
            self.close()
            raise

    def _accept(self, path: Path) -> None:
        vendor = self.properties.get(openslide.PROPERTY_NAME_VENDOR, "")
        if vendor not in VENDORS:
            raise NotDirect(f"the format {vendor or 'unknown'} is not one of {', '.join(sorted(VENDORS))}")
        levels = jpeg_levels(path, self._file_sizes)
        try:
            tiles = JpegTiles(path, levels)
        except OSError as error:
            raise NotDirect(f"it could not be opened: {error}") from error
        self._compare(tiles, 0)
        self._tiles = tiles
        self.reader = f"imagecodecs {vendor}"

    def _compare(self, tiles: JpegTiles, index: int) -> None:
        """:class:`NotDirect` if a level does not agree with OpenSlide."""
        compared = [self._agrees(tiles, index, *place) for place in _places(tiles.levels[index])]
        if not any(compared):
            raise NotDirect(f"level {index} has no place to compare: its tiles are missing")
        self._agreed |= {index}

    def _direct(self, level: int) -> JpegTiles | None:
        """The tiles, if this level of them may be read."""
        if self._tiles is None or level in self._agreed:
            return self._tiles
        with self._comparing:
            if self._tiles is not None and level not in self._agreed:
                try:
                    self._compare(self._tiles, level)
                except NotDirect as reason:
                    log.debug("%s is read by OpenSlide from now on: %s", self._path.name, reason)
                    self._tiles = None
                    self.reader = f"openslide {self.properties[openslide.PROPERTY_NAME_VENDOR]}"
            return self._tiles

    def _agrees(self, tiles: JpegTiles, level: int, x: int, y: int, w: int, h: int) -> bool:
        """Whether a sample could be compared; :class:`NotDirect` if the readers do not agree on it."""
        try:
            pixels = tiles.read(level, x, y, w, h)
        except MissingTile:
            return False  # OpenSlide will read it in any case
        try:
            image, at_x, at_y = self._read_openslide(level, x, y, w, h)
        except SlideUnreadable as error:
            raise NotDirect(error.message) from error
        # A border of one pixel is left out: where OpenSlide interpolates, it mixes that with pixels outside the sample.
        inner = (w - 2, h - 2)
        left, top = at_x - x + 1, at_y - y + 1
        theirs = np.asarray(image.crop((1, 1, w - 1, h - 1)))
        ours = resample(pixels, (left, top, left + inner[0], top + inner[1]), inner)
        difference = int(np.abs(theirs.astype(np.int16) - ours).max())
        if difference > MAX_DIFFERENCE:
            raise NotDirect(f"it differs from OpenSlide by up to {difference} steps at x {x}, y {y} of level {level}")
        return True

    def _read_exactly(self, level: int, x: int, y: int, factor: tuple[int, int], out: UInt8Array) -> bool:
        tiles = self._direct(level)
        if tiles is None or factor not in ((1, 1), (2, 2)):
            return False
        halved = factor == (2, 2)
        if halved and not tiles.halves(level, x, y, 2 * out.shape[1], 2 * out.shape[0]):
            return False
        try:
            tiles.fill(level, x, y, out, halved=halved)
        except NotDirect:
            return False  # _read_level meets the same, and says so
        return True

    def _read_level(self, level: int, x: int, y: int, w: int, h: int) -> tuple[Image.Image | UInt8Array, float, float]:
        tiles = self._direct(level)
        if tiles is not None:
            try:
                return tiles.read(level, x, y, w, h), x, y
            except NotDirect as reason:
                log.debug("%s: x %d, y %d of level %d is read by OpenSlide: %s", self._path.name, x, y, level, reason)
        return self._read_openslide(level, x, y, w, h)

    def _check_level(self, level: int) -> None:
        self._direct(level)  # what is asked for will be read so in any case, and then it is read faster here too
        super()._check_level(level)

    def _read_unchecked(
        self, level: int, x: int, y: int, w: int, h: int
    ) -> tuple[Image.Image | UInt8Array, float, float]:
        if level in self._agreed:
            return self._read_level(level, x, y, w, h)
        return self._read_openslide(level, x, y, w, h)

    def close(self) -> None:
        self._tiles = None
        super().close()


def _places(level: JpegLevel) -> list[tuple[int, int, int, int]]:
    """Samples (x, y, w, h) of a level: its first and last corner, its middle, and the seam of the tile with the most bytes, where the tissue is."""
    width, height = level.size
    heaviest = int(np.argmax(level.lengths))
    row, column = divmod(heaviest, level.columns)
    corners = (
        (0, 0),
        (width - _SAMPLE_PX, height - _SAMPLE_PX),
        (width // 2, height // 2),
        (column * level.tile_size[0] - _SAMPLE_PX // 2, row * level.tile_size[1] - _SAMPLE_PX // 2),
    )
    places = []
    for x, y in corners:
        x, y = max(0, x), max(0, y)
        places.append((x, y, min(_SAMPLE_PX, width - x), min(_SAMPLE_PX, height - y)))
    return [place for place in dict.fromkeys(places) if min(place[2:]) > 2]
