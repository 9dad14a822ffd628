"""Slides that OpenSlide reads, with what its handles need: replacement after errors, closing in time, and a look at DICOM's colours."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping
from pathlib import Path

import openslide
from PIL import Image

from backend.errors import SlideUnreadable
from backend.results.bag import UInt8Array
from backend.slides.colours import mislabelled
from backend.slides.levels import LevelSlide
from backend.slides.resample import WHITE
from backend.slides.scale import openslide_scale
from backend.slides.tiff_check import check_tiff

log = logging.getLogger(__name__)

_CACHE_BYTES = 128 * 2**20  # decoded tiles: two rows of them on a wide slide, so that neighbouring rows share


class _Handle:
    """An OpenSlide handle that is closed when its last reader is done with it: closing it under a reader would crash."""

    def __init__(self, path: Path, cache: openslide.OpenSlideCache | None) -> None:
        self.slide = openslide.OpenSlide(str(path))
        self.slide.set_cache(cache or openslide.OpenSlideCache(_CACHE_BYTES))
        self.readers = 0
        self.retired = False


class OpenSlideSlide(LevelSlide):
    """A slide that OpenSlide reads.

    An OpenSlide error latches: after it every read on that handle fails, also of sound tiles and in other threads. So after an error
    the handle is replaced, and the failed read is tried once more on a handle of its own.

    Parameters
    ----------
    path
        The slide.
    cache
        For decoded tiles, shared with other slides; without it the slide has 128 MiB of its own.
    """

    def __init__(self, path: Path, cache: openslide.OpenSlideCache | None = None) -> None:
        self._path = path
        self._cache = cache
        self._lock = threading.Lock()
        check_tiff(path)
        handle = _Handle(path, cache)
        try:
            slide = handle.slide
            if min(min(dims) for dims in slide.level_dimensions) < 1:
                raise SlideUnreadable(f"{path.name} is damaged: a level has {slide.level_dimensions} pixels.")
            super().__init__(
                size=slide.dimensions,
                downsamples=slide.level_downsamples,
                level_sizes=slide.level_dimensions,
                stated=openslide_scale(slide.properties, slide.dimensions),
                reader=f"openslide {slide.properties.get(openslide.PROPERTY_NAME_VENDOR, '')}".strip(),
                properties=_properties(slide),
                name=path.name,
                bounds=_bounds(slide.properties),
                tile_sizes=[_tile_size(slide.properties, level) for level in range(slide.level_count)],
            )
        except BaseException:
            handle.slide.close()
            raise
        self._addressing = tuple(slide.level_downsamples)
        self._handle: _Handle | None = handle
        try:
            self._check_odd_levels()
            if slide.properties.get(openslide.PROPERTY_NAME_VENDOR) == "dicom":
                self._check_colours()
        except BaseException:
            self.close()
            raise

    def _check_colours(self) -> None:
        """Refuse a slide whose colours are wrong in all of its levels."""
        if confusion := mislabelled(self.overview(256)):
            raise SlideUnreadable(
                f"The colours of {self._path.name} are {confusion} (PhotometricInterpretation).",
                hint="Convert the DICOM file again with the right PhotometricInterpretation.",
            )

    def _read_level(self, level: int, x: int, y: int, w: int, h: int) -> tuple[Image.Image | UInt8Array, float, float]:
        return self._read_openslide(level, x, y, w, h)

    def _read_openslide(self, level: int, x: int, y: int, w: int, h: int) -> tuple[Image.Image, float, float]:
        # OpenSlide takes level-0 integers and divides them by its own idea of the downsample; where that is no whole number the read
        # starts a fraction of a level pixel before x, so that fraction is told to the caller and one more pixel is read.
        factor = self._addressing[level]
        location = (math.floor(x * factor + 1e-6), math.floor(y * factor + 1e-6))
        at_x, at_y = location[0] / factor, location[1] / factor
        size = (w + (at_x < x - 1e-6), h + (at_y < y - 1e-6))
        rgba = self._read_rgba(location, level, size)
        alpha = rgba.getchannel("A")
        if alpha.getextrema() == (255, 255):
            return rgba.convert("RGB"), at_x, at_y
        rgb = Image.new("RGB", rgba.size, WHITE)
        rgb.paste(rgba, mask=alpha)
        return rgb, at_x, at_y

    def _read_rgba(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        handle = self._acquire()
        try:
            return _read(handle, location, level, size)
        except openslide.OpenSlideError:
            self._replace(handle)
        finally:
            self._release(handle)
        try:
            with openslide.OpenSlide(str(self._path)) as own:
                image: Image.Image = own.read_region(location, level, size)
                return image
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideUnreadable(
                f"{self._path.name} is damaged at x {location[0]}, y {location[1]} (level {level}): {error}.",
                hint="Copy the slide again; the rest of it may be sound.",
            ) from error

    def _acquire(self) -> _Handle:
        with self._lock:
            if self._handle is None:
                raise ValueError(f"{self._path.name} is closed")
            self._handle.readers += 1
            return self._handle

    def _release(self, handle: _Handle) -> None:
        with self._lock:
            handle.readers -= 1
            last = handle.retired and handle.readers == 0
        if last:
            handle.slide.close()

    def _replace(self, failed: _Handle) -> None:
        """Put a fresh handle in the place of ``failed``, which its last reader will close."""
        try:
            fresh = _Handle(self._path, self._cache)
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideUnreadable(f"{self._path.name} can no longer be opened: {error}.") from error
        with self._lock:
            if self._handle is failed:
                self._handle, failed.retired = fresh, True
                return
        fresh.slide.close()  # another thread was faster

    def close(self) -> None:
        with self._lock:
            handle, self._handle = self._handle, None
            if handle is None:
                return
            handle.retired = True
            idle = handle.readers == 0
        if idle:
            handle.slide.close()


def _read(handle: _Handle, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
    image: Image.Image = handle.slide.read_region(location, level, size)
    return image


def _properties(slide: openslide.OpenSlide) -> dict[str, str]:
    """What the file says of itself. A damaged one may list names that OpenSlide then does not find."""
    values = {name: slide.properties.get(name) for name in slide.properties}
    return {name: value for name, value in values.items() if value is not None}


def _tile_size(properties: Mapping[str, str], level: int) -> tuple[int, int] | None:
    """(width, height) of the file's tiles in a level, where OpenSlide tells it."""
    try:
        width, height = (int(properties[f"openslide.level[{level}].tile-{edge}"]) for edge in ("width", "height"))
    except (KeyError, ValueError):
        return None
    return width, height


def _bounds(properties: Mapping[str, str]) -> tuple[int, int, int, int] | None:
    """x, y, width, height of the scanned area, where the file states it in whole numbers."""
    names = (
        openslide.PROPERTY_NAME_BOUNDS_X,
        openslide.PROPERTY_NAME_BOUNDS_Y,
        openslide.PROPERTY_NAME_BOUNDS_WIDTH,
        openslide.PROPERTY_NAME_BOUNDS_HEIGHT,
    )
    try:
        x, y, width, height = (int(properties[name]) for name in names)
    except (KeyError, ValueError):
        return None
    return x, y, width, height
