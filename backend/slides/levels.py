"""A slide as levels: from a request in level-0 pixels to one read of one level and one reduction.

Both kinds of slide share this; what differs is only how a piece of a level is read.
"""

from __future__ import annotations

import logging
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

import numpy as np
from PIL import Image
from typing_extensions import Self

from backend.errors import SlideTooLarge, SlideUnreadable
from backend.results.bag import UInt8Array
from backend.slides.images import DecodedImage
from backend.slides.level_check import LevelCheck, Verdict
from backend.slides.level_fit import LevelFit, Size, possible_fits
from backend.slides.mpp import Scale
from backend.slides.resample import REDUCED_UP_TO, WHITE, add_area, area_mean, best_level, is_aligned, padding, resample

log = logging.getLogger(__name__)

BLOCK_PX = 4096  # largest edge that is read from a level at once, but for the padding of filters (2 x 65 pixels)

# Most pixels of a level that are read for one region, and for one overview; white beyond the slide does not count. Memory is bounded by BLOCK_PX, so
# this bounds the time: a slide without coarse levels is decoded whole for a picture of it. Measured on one core of a Xeon (JPEG tiles of 512 pixels),
# OpenSlide, with which the panel reads, makes 36 million pixels a second, and the direct reader of the workers about 100 million. So a region
# takes a minute at worst (the whole of a 40 000 x 40 000 slide 45 s), and an overview, without which a worker cannot find the tissue, 3 to 8 minutes:
# one level of 131 072 x 131 072 has its own. Codecs slower than JPEG take longer.
REGION_MAX_LEVEL_PX = 2**31
OVERVIEW_MAX_LEVEL_PX = 2**34

_LATER_LEVELS_FROM_PX = 2048  # plain images with a shorter side get no reduced copies


class LevelSlide(ABC):
    """What both kinds share: from a request in level-0 pixels to one read of one level and one reduction.

    A reader states its levels as the file does and implements ``_read_level`` (and ``close``). Whether they are true is
    found out here: by their sizes when a slide is made, and by their pixels before any but level 0 is first read
    (:mod:`backend.slides.level_check`). A false level is not used and a filled-up one cropped, and ``notes`` say so.
    A reader calls ``_check_odd_levels`` at the end of its opening, when it can read.

    ``level_downsamples`` has the levels whose shape is that of the slide; one of them whose pixels turn out to be false
    or damaged stays in it and is not read.

    ``read_region`` and ``overview`` raise :class:`~backend.errors.SlideUnreadable` where the file is damaged, and
    :class:`~backend.errors.SlideTooLarge`, before anything is read, where no level is coarse enough to be read in time.
    """

    def __init__(
        self,
        *,
        size: tuple[int, int],
        downsamples: Sequence[float],
        level_sizes: Sequence[tuple[int, int]],
        stated: Scale | None,
        reader: str,
        properties: Mapping[str, str],
        name: str,
        bounds: tuple[int, int, int, int] | None = None,
        tile_sizes: Sequence[Size | None] | None = None,
    ) -> None:
        self.size = size
        self.bounds = bounds
        self.reader = reader
        self.properties = properties
        self.scale = stated or Scale()
        self.mpp = self.scale.mpp
        self.mpp_stated = self.scale.in_words
        self._name = name
        self._broken_levels: frozenset[int] = frozenset()
        self._notes = self.scale.notes
        self._file_sizes = tuple(level_sizes)
        self._stated_downsamples = tuple(downsamples)
        tiles = list(tile_sizes) if tile_sizes else [None] * len(level_sizes)
        self._fits: list[list[LevelFit]] = [[LevelFit(1.0, size, "whole")]]
        for level in range(1, len(level_sizes)):
            self._fits.append(possible_fits(size, level_sizes[level], downsamples[level], tiles[0], tiles[level]))
        self._level_check = LevelCheck(self._read_sample, self._fits, tiles)
        self._checked_levels = frozenset((0,))
        self._checking_levels = threading.Lock()
        self._set_levels({})

    @property
    def notes(self) -> tuple[str, ...]:
        return self._notes

    def _note(self, sentence: str) -> None:
        """Have ``sentence`` said wherever people look at this slide or at its result."""
        if sentence not in self._notes:
            self._notes += (sentence,)

    def _set_levels(self, verdicts: Mapping[int, Verdict]) -> None:
        """Take the levels for what was found, and those that were not looked at for what their sizes say."""
        believed = [
            verdicts[level].fit if level in verdicts else (fits[0] if fits else None)
            for level, fits in enumerate(self._fits)
        ]
        self._level_sizes = tuple(
            fit.size if fit else size for fit, size in zip(believed, self._file_sizes, strict=True)
        )
        self._downsamples = tuple(
            fit.downsample if fit else stated for fit, stated in zip(believed, self._stated_downsamples, strict=True)
        )
        self.level_downsamples = tuple(
            ds
            for level, ds in enumerate(self._downsamples)
            if believed[level] is not None or self._has_the_shape(level)
        )

    def _has_the_shape(self, level: int) -> bool:
        return bool(self._fits[level]) and self._fits[level][0].how == "whole"

    def _check_odd_levels(self) -> None:
        """Compare the levels whose sizes do not say what they are. Others are compared when they are first needed."""
        for level in range(len(self._fits)):
            if not self._has_the_shape(level):
                self._check_level(level)

    def _check_level(self, level: int) -> None:
        """Compare a level with level 0, once: a false one is not used, a filled-up one cropped, and ``notes`` say so."""
        with self._checking_levels:
            if level in self._checked_levels:
                return
            self._level_check.judge(level)
            verdicts = self._level_check.verdicts
            self._set_levels(verdicts)
            for new in sorted(set(verdicts) - self._checked_levels):
                self._take_verdict(new, verdicts[new])
            self._checked_levels = frozenset(verdicts)

    def _take_verdict(self, level: int, verdict: Verdict) -> None:
        width, height = self._file_sizes[level]
        if verdict.fit is None:
            log.info("%s: level %d is not used: %s", self._name, level, verdict.reason)
            self._note(f"Level {level} ({width} x {height} pixels) is not used: {verdict.reason}.")
            self._broken_levels |= {level}
        elif verdict.fit.how == "padded":
            own_w, own_h = verdict.fit.size
            self._note(
                f"Level {level} has {width} x {height} pixels, of which {own_w} x {own_h} belong to the slide and the rest "
                f"is filling: its downsample is {verdict.fit.downsample:g}, and not {self._stated_downsamples[level]:.4g}."
            )

    def _read_sample(self, level: int, x: float, y: float, w: float, h: float, size: Size) -> UInt8Array:
        """Part of a level of the file, in its pixels, scaled to ``size``: for the comparison of levels."""
        x0, y0 = math.floor(x + 1e-6), math.floor(y + 1e-6)
        x1, y1 = math.ceil(x + w - 1e-6), math.ceil(y + h - 1e-6)
        image, at_x, at_y = self._read_unchecked(level, x0, y0, x1 - x0, y1 - y0)
        return resample(image, (x - at_x, y - at_y, x + w - at_x, y + h - at_y), size)

    def _read_unchecked(
        self, level: int, x: int, y: int, w: int, h: int
    ) -> tuple[Image.Image | UInt8Array, float, float]:
        """As ``_read_level``, for few and small reads: not with what must be set up first for a level."""
        return self._read_level(level, x, y, w, h)

    @abstractmethod
    def _read_level(self, level: int, x: int, y: int, w: int, h: int) -> tuple[Image.Image | UInt8Array, float, float]:
        """At least w x h level pixels, RGB, as an image or as uint8 (h, w, 3), and the level coordinates that their corner really has."""

    def read_region(
        self, x: float, y: float, size_level0: float, out_px: int, out: UInt8Array | None = None
    ) -> UInt8Array:
        if not (
            size_level0 > 0 and out_px > 0 and math.isfinite(x) and math.isfinite(y) and math.isfinite(size_level0)
        ):
            raise ValueError(f"no region: x {x}, y {y}, size {size_level0}, out {out_px}")
        if out is None:
            out = np.empty((out_px, out_px, 3), np.uint8)
        elif out.shape != (out_px, out_px, 3) or out.dtype != np.uint8:
            raise ValueError(f"out is {out.dtype} {out.shape} for a region of {out_px} pixels")
        self._read(x, y, size_level0, size_level0, out, REGION_MAX_LEVEL_PX)
        return out

    def overview(self, max_px: int, max_level_px: int = OVERVIEW_MAX_LEVEL_PX) -> UInt8Array:
        """The whole slide, its long side at most ``max_px``; :class:`~backend.errors.SlideTooLarge` if that takes over ``max_level_px`` pixels of a level."""
        width, height = self.size
        scale = max(1.0, max(width, height) / max_px)
        out = np.empty((max(1, round(height / scale)), max(1, round(width / scale)), 3), np.uint8)
        self._read(0.0, 0.0, width, height, out, max_level_px)
        return out

    def _read(self, x: float, y: float, w: float, h: float, out: UInt8Array, limit: int) -> None:
        out_h, out_w = out.shape[:2]
        while True:
            level = best_level(self._downsamples, min(w / out_w, h / out_h), self._broken_levels)
            self._check_cost(level, x, y, w, h, limit)
            if level not in self._checked_levels:
                self._check_level(level)
                continue
            try:
                self._read_from(level, x, y, w, h, out)
                return
            except SlideUnreadable as error:
                if level == 0:
                    raise
                # A finer level holds the same picture: slower, and right.
                log.warning("level %d is not used any more: %s", level, error.message)
                self._note(f"Level {level} is not used: {error.message}")
                self._broken_levels = self._broken_levels | {level}

    def _check_cost(self, level: int, x: float, y: float, w: float, h: float, limit: int) -> None:
        inside_w = max(0.0, min(x + w, self.size[0]) - max(x, 0.0))
        inside_h = max(0.0, min(y + h, self.size[1]) - max(y, 0.0))
        level_px = inside_w * inside_h / self._downsamples[level] ** 2
        if level_px > limit:
            raise SlideTooLarge(
                f"{self._name} has no level coarse enough for this view: it would be made of {level_px / 1e6:,.0f} million pixels of level {level}, "
                f"over the limit of {limit / 1e6:,.0f} million.",
                hint="Convert the slide to a tiled pyramid (for example with `vips tiffsave --tile --pyramid --compression jpeg`). "
                "Closer views of it work as it is.",
            )

    def _read_from(self, level: int, x: float, y: float, w: float, h: float, out: UInt8Array) -> None:
        """The request from one level, in blocks where it is large: memory stays bounded even for a slide without coarse levels."""
        ds = self._downsamples[level]
        out_h, out_w = out.shape[:2]
        step_x, step_y = w / out_w, h / out_h
        if max(step_x, step_y) > REDUCED_UP_TO * ds:
            self._read_summed(level, x, y, w, h, out)
            return
        block = int(BLOCK_PX * ds / max(step_x, step_y))
        if out_w <= block and out_h <= block:
            self._read_block(level, x, y, w, h, out)
            return
        for top in range(0, out_h, block):
            for left in range(0, out_w, block):
                bw, bh = min(block, out_w - left), min(block, out_h - top)
                part = out[top : top + bh, left : left + bw]
                self._read_block(level, x + left * step_x, y + top * step_y, bw * step_x, bh * step_y, part)

    def _read_summed(self, level: int, x: float, y: float, w: float, h: float, out: UInt8Array) -> None:
        """The request as exact sums over a level that is far too fine for it: each pixel inside the slide is read once, the rest is white."""
        ds = self._downsamples[level]
        out_h, out_w = out.shape[:2]
        level_w, level_h = self._level_sizes[level]
        columns = np.clip(np.linspace(x / ds, (x + w) / ds, out_w + 1), 0, level_w)
        rows = np.clip(np.linspace(y / ds, (y + h) / ds, out_h + 1), 0, level_h)
        sums = np.zeros((out_h, out_w, 3))
        for y0, y1 in _pieces(rows[0], rows[-1]):
            for x0, x1 in _pieces(columns[0], columns[-1]):
                image, at_x, at_y = self._read_own(level, x0, y0, x1 - x0, y1 - y0)
                add_area(sums, np.asarray(image), np.clip(rows, y0, y1) - at_y, np.clip(columns, x0, x1) - at_x)
        area_mean(sums, np.outer(np.diff(rows), np.diff(columns)), w / ds / out_w * (h / ds / out_h), out)

    def _read_block(self, level: int, x: float, y: float, w: float, h: float, out: UInt8Array) -> None:
        ds = self._downsamples[level]
        out_h, out_w = out.shape[:2]
        left, top, right, bottom = x / ds, y / ds, (x + w) / ds, (y + h) / ds
        scale_x, scale_y = (right - left) / out_w, (bottom - top) / out_h
        aligned = is_aligned(left, top, scale_x, scale_y)
        filling = self._holds_filling(level, right, bottom)
        if (
            aligned
            and not filling
            and self._read_exactly(level, round(left), round(top), (round(scale_x), round(scale_y)), out)
        ):
            return
        pad = 0 if aligned else padding(max(scale_x, scale_y))
        level_w, level_h = self._level_sizes[level]
        x0, x1 = _span(left, right, pad, level_w)
        y0, y1 = _span(top, bottom, pad, level_h)
        image, at_x, at_y = self._read_own(level, x0, y0, x1 - x0, y1 - y0)
        resample(image, (left - at_x, top - at_y, right - at_x, bottom - at_y), (out_w, out_h), out)

    def _holds_filling(self, level: int, right: float, bottom: float) -> bool:
        """Whether a part of a level that ends at (right, bottom) holds pixels of the file that are not of the slide."""
        own_w, own_h = self._level_sizes[level]
        return self._level_sizes[level] != self._file_sizes[level] and (right > own_w or bottom > own_h)

    def _read_own(self, level: int, x: int, y: int, w: int, h: int) -> tuple[Image.Image | UInt8Array, float, float]:
        """As ``_read_level``, white where a level is filled up beyond the slide."""
        image, at_x, at_y = self._read_level(level, x, y, w, h)
        if self._holds_filling(level, x + w, y + h):
            image = np.array(image)
            own_w, own_h = self._level_sizes[level]
            image[max(0, math.ceil(own_h - at_y)) :] = WHITE
            image[:, max(0, math.ceil(own_w - at_x)) :] = WHITE
        return image, at_x, at_y

    def _read_exactly(self, level: int, x: int, y: int, factor: tuple[int, int], out: UInt8Array) -> bool:  # noqa: ARG002 - for readers that can
        """Fill ``out`` with the averages of ``factor`` pixels of a level from (x, y) on, as :func:`resample` would; whether that was done."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Give the file back. Reading from a closed slide is an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _span(start: float, end: float, pad: int, limit: int) -> tuple[int, int]:
    """Whole level pixels to read for [start, end): padded, but not over the slide's border unless the request itself goes there.

    White beyond the border must not bleed into a tile that ends at it.
    """
    # A start of 99.9999999 is 100 with a rounding error.
    first, last = math.floor(start + 1e-6), math.ceil(end - 1e-6)
    low = max(first - pad, 0) if first >= 0 else first - pad
    high = min(last + pad, limit) if last <= limit else last + pad
    return low, max(high, low + 1)


def _pieces(start: float, end: float) -> Iterator[tuple[int, int]]:
    """[start, end) in whole pixels, cut at the multiples of :data:`BLOCK_PX`, which are borders of the file's own tiles as a rule."""
    first, last = _span(start, end, 0, math.ceil(end))
    if end <= start:
        return
    while first < last:
        stop = min((first // BLOCK_PX + 1) * BLOCK_PX, last)
        yield first, stop
        first = stop


class ImageSlide(LevelSlide):
    """A plain image as a slide of which everything is in memory. Levels 4 and 16 are made by exact averaging if it is large."""

    def __init__(self, image: DecodedImage) -> None:
        levels, downsamples = [image.rgb], [1.0]
        stated = image.scale or Scale()
        while min(levels[-1].size) >= _LATER_LEVELS_FROM_PX and len(levels) < 3:
            levels.append(levels[-1].reduce(4))
            downsamples.append(downsamples[-1] * 4)
        super().__init__(
            size=image.rgb.size,
            downsamples=downsamples,
            level_sizes=[level.size for level in levels],
            stated=stated,
            reader=f"image {image.format}",
            properties={
                "format": image.format,
                **({"mpp-x": str(stated.xy[0]), "mpp-y": str(stated.xy[1])} if stated.xy else {}),
            },
            name="the image",
        )
        for note in image.notes:
            self._note(note)
        self._levels = levels
        self._checked_levels = frozenset(range(len(levels)))  # they were made here

    def _read_level(self, level: int, x: int, y: int, w: int, h: int) -> tuple[Image.Image, float, float]:
        source = self._levels[level]
        if x >= 0 and y >= 0 and x + w <= source.width and y + h <= source.height:
            return source.crop((x, y, x + w, y + h)), x, y
        canvas = Image.new("RGB", (w, h), WHITE)
        inside = (max(x, 0), max(y, 0), min(x + w, source.width), min(y + h, source.height))
        if inside[0] < inside[2] and inside[1] < inside[3]:
            canvas.paste(source.crop(inside), (inside[0] - x, inside[1] - y))
        return canvas, x, y

    def close(self) -> None:
        self._levels = []
