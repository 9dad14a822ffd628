"""One protocol for every slide: what OpenSlide 4 reads (tiled JPEG without its help, once proven equal), TIFF pyramids
that it does not read, and plain images.

Coordinates are level-0 pixels, x before y, from the top-left corner. Outside the slide, and where a scanner left holes, pixels are white.
No ICC profile is applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol

import openslide
from typing_extensions import Self

from backend.errors import ChannelsUnsupported, CodecUnsupported, FormatUnsupported, SlideNotFound, SlideUnreadable
from backend.paths import StrPath
from backend.results.bag import UInt8Array
from backend.settings import Settings
from backend.slides.dicom_series import is_dicom
from backend.slides.direct_reader import DirectSlide
from backend.slides.formats import check_dicom, check_format, check_not_foreign
from backend.slides.images import codec_unsupported, load_image, read_patch
from backend.slides.levels import OVERVIEW_MAX_LEVEL_PX, ImageSlide
from backend.slides.mpp import Scale
from backend.slides.openslide_reader import OpenSlideSlide
from backend.slides.tiff_pages import TiffSurvey, survey_tiff
from backend.slides.tiff_reader import TiffSlide

__all__ = ["DirectSlide", "ImageSlide", "OpenSlideSlide", "Slide", "open_slide", "read_patch"]


class Slide(Protocol):
    """A slide that is open. ``read_region`` and ``overview`` may be called from several threads at once.

    Attributes
    ----------
    size
        (width, height) of level 0 in pixels.
    scale
        What the file states of the size of its pixels, believed or not.
    mpp
        µm per level-0 pixel, mean of x and y; ``None`` if the file states none, one outside 0.05–5, or pixels that are
        not square.
    mpp_stated
        What the file states, in words, for messages: ``"no scale"``, ``"28.97 x 28.97 µm per pixel"``.
    reader
        Who reads its pixels: ``"imagecodecs aperio"``, ``"openslide dicom"``, ``"tifffile WebP"``, ``"image jpeg"``.
    properties
        What the file says of itself.
    level_downsamples
        One number a level, the first is 1.0.
    notes
        What was found false in the file and is not used, a sentence each, for people. More may come while it is read.
    bounds
        x, y, width, height of the scanned area in level-0 pixels, where the file states one.
    """

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def scale(self) -> Scale: ...
    @property
    def mpp(self) -> float | None: ...
    @property
    def mpp_stated(self) -> str: ...
    @property
    def reader(self) -> str: ...
    @property
    def properties(self) -> Mapping[str, str]: ...
    @property
    def level_downsamples(self) -> tuple[float, ...]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def bounds(self) -> tuple[int, int, int, int] | None: ...

    def read_region(
        self, x: float, y: float, size_level0: float, out_px: int, out: UInt8Array | None = None
    ) -> UInt8Array:
        """The square with top-left corner (x, y) and edge ``size_level0`` (level-0 pixels) as uint8 (out_px, out_px, 3) RGB.

        ``out``: an array of this kind to write it into, which is returned then; what it holds after an error is undefined.
        """
        ...

    def overview(self, max_px: int, max_level_px: int = OVERVIEW_MAX_LEVEL_PX) -> UInt8Array:
        """The whole slide as uint8 (h, w, 3) RGB, its long side at most ``max_px`` and never enlarged.

        The array covers the slide's rectangle exactly: column j spans level-0 x from ``j * size[0] / w`` to ``(j + 1) * size[0] / w``.

        Raises
        ------
        SlideTooLarge
            More than ``max_level_px`` pixels of its coarsest fitting level would have to be read.
        """
        ...

    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_slide(path: StrPath, settings: Settings, *, cache: openslide.OpenSlideCache | None = None) -> Slide:
    """Open a slide: by OpenSlide if it reads the format, by tifffile if it is a TIFF pyramid, else as a plain image.

    ``cache`` is for whoever keeps many slides open: OpenSlide then reads with it and nothing else is kept. Without it a slide has caches of
    its own, and tiled JPEG is read directly (:mod:`backend.slides.direct_reader`).

    Raises
    ------
    SlideNotFound
        There is no such file.
    SlideUnreadable
        It is empty, damaged, may not be read, or is of no known format.
    FormatUnsupported, CodecUnsupported, ChannelsUnsupported, DicomUnsupported
        It is sound, and of a kind that is not read; the message says which.
    SlideTooLarge
        A plain image over ``IMAGE_MAX_PIXELS``.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise SlideNotFound(f"There is no file {path}.")
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:  # what the system refuses is no damage
        raise SlideUnreadable(
            f"{path.name} cannot be read: {error.strerror}.",
            hint="Check its permissions, and that its disk or share is there.",
        ) from error
    if empty:
        raise SlideUnreadable(f"{path.name} is empty (0 bytes).", hint="Its copy or upload was probably interrupted.")
    check_format(path)
    vendor = openslide.OpenSlide.detect_format(str(path))
    survey = survey_tiff(path) if vendor in (None, "generic-tiff") else None
    if survey is not None and survey.in_sub_ifds and survey.levels:
        return TiffSlide(path, survey, shared=cache is not None)
    reason = ""
    if vendor is not None:
        try:
            slide = DirectSlide(path) if cache is None else OpenSlideSlide(path, cache)
            return _noting(slide, survey)
        except openslide.OpenSlideError as error:
            reason = f"{path.name} was recognised as {vendor}, and OpenSlide refuses it: {error}."
            if vendor != "generic-tiff":
                return _refused(path, vendor, str(error), reason, shared=cache is not None)
    if survey is not None and _by_tiles(survey, settings):
        return TiffSlide(path, survey, shared=cache is not None)
    if vendor is None:
        check_not_foreign(path)
        if is_dicom(path):
            check_dicom(path)
            raise SlideUnreadable(
                f"{path.name} is a DICOM slide that OpenSlide does not recognise.",
                hint="The file is probably damaged: copy it again.",
            )
    try:
        return ImageSlide(load_image(path, settings))
    except SlideUnreadable as error:
        raise SlideUnreadable(f"{reason} {error.message}".strip(), hint=error.hint) from error


def _by_tiles(survey: TiffSurvey, settings: Settings) -> bool:
    """Whether a TIFF that OpenSlide does not read is read tile by tile: a pyramid, or one that is too large to be
    decoded whole.
    """
    if not survey.levels:
        return False
    width, height = survey.levels[0].size
    return len(survey.levels) > 1 or width * height > settings.image_max_pixels


def _noting(slide: OpenSlideSlide, survey: TiffSurvey | None) -> OpenSlideSlide:
    for note in survey.notes if survey is not None else ():
        slide._note(note)
    return slide


def _refused(path: Path, vendor: str, error: str, reason: str, *, shared: bool) -> Slide:
    """What OpenSlide recognises and does not read: by another reader, or an error that says what it is."""
    if vendor == "aperio" and (survey := survey_tiff(path)) is not None and survey.levels and "compression" in error:
        return TiffSlide(path, survey, shared=shared)
    if vendor == "dicom":
        header = check_dicom(path)
        if "transfer syntax" in error:
            raise codec_unsupported(
                path.name, f"{header.transfer_syntax_name} (transfer syntax {header.transfer_syntax})"
            )
    if "compression" in error.lower():
        raise CodecUnsupported(
            reason,
            hint="It is not damaged. Convert it with a program that reads it, such as QuPath, to OME-TIFF with JPEG.",
        )
    if "pixel type" in error.lower():
        raise ChannelsUnsupported(
            reason, hint="It is not damaged. The model knows brightfield images in colour, of 8 bits."
        )
    if "support" in error.lower() or "dissimilar" in error:
        raise FormatUnsupported(
            reason, hint="It is not damaged. Convert it with a program that reads it, such as QuPath, to OME-TIFF."
        )
    raise SlideUnreadable(reason, hint="The file is probably damaged: copy it again.")
