"""Plain images (JPEG, PNG, TIFF) decoded to RGB as a browser shows them. Nothing is decoded before its size is known.

Transparency is laid on white; 16-bit values are scaled from the type's whole range; CMYK is converted without a profile; the EXIF orientation
**is applied**, because browsers (and so Label Studio) apply it, and regions are drawn on what they show. Of a file
with several pages the first is taken.

Pixels are converted piece by piece: the file's own (1 to 4 bytes a pixel in Pillow, 3 or 4 here where tifffile decodes) and the RGB (4 bytes in Pillow) are
all that is held at once, 8 bytes a pixel at most. Only deep colour that lies in a TIFF as one piece has its own depth on top of that.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from backend.errors import CodecUnsupported, SlideError, SlideTooLarge, SlideTooSmall, SlideUnreadable
from backend.paths import StrPath
from backend.results.bag import UInt8Array
from backend.settings import Settings, get_settings
from backend.slides.mpp import Scale
from backend.slides.resample import WHITE
from backend.slides.scale import tiff_scale
from backend.slides.tiff_pages import TiffSurvey, codec_name, decodable, page_scale, survey_tiff

# Pillow's own guard against decompression bombs has one fixed limit for the process and only warns at first. Every image that
# this backend decodes passes `_check_pixels` instead, which has the limit of the settings and comes before decoding.
Image.MAX_IMAGE_PIXELS = None

_FORMATS = ("JPEG", "PNG", "TIFF")
_PILLOW_TIFF_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16")
# TIFF's numbers: none, CCITT, LZW, JPEG, Deflate, PackBits. Others depend on how Pillow's libtiff was built.
_PILLOW_COMPRESSIONS = frozenset((1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946))
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, LookupError, struct.error, zlib.error)
_ORIENTATION_TAG = 0x0112
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_IMAGE_DESCRIPTION, _X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 270, 282, 283, 296
_UM_PER_INCH = 25_400.0
_MAX_SAMPLES = 4  # of a pixel: colours and transparency
_PIECE_PX = 1024  # edge of what is converted at once


class DecodedImage:
    """A plain image as RGB.

    Attributes
    ----------
    rgb
        Mode ``RGB``, orientation applied.
    format
        ``"jpeg"``, ``"png"``, ``"tiff"``, or ``"tiff (tifffile)"``.
    scale
        What the file states of the size of its pixels, as displayed; ``None`` is nothing.
    notes
        What of the file is not shown, a sentence each.
    """

    def __init__(self, rgb: Image.Image, format_name: str, scale: Scale | None, notes: tuple[str, ...] = ()) -> None:
        self.rgb = rgb
        self.format = format_name
        self.scale = scale
        self.notes = notes


def load_image(path: StrPath, settings: Settings | None = None) -> DecodedImage:
    """Decode a JPEG, PNG or TIFF.

    Raises
    ------
    SlideTooLarge
        More pixels than ``IMAGE_MAX_PIXELS``; found in the header, before anything is decoded.
    SlideUnreadable
        Not such an image, or damaged, or of a kind without a plain meaning as RGB (floating point, LAB).
    """
    path = Path(path)
    limit = (settings or get_settings()).image_max_pixels
    _check_not_cut(path)
    survey = survey_tiff(path)
    if survey is not None and survey.compression not in _PILLOW_COMPRESSIONS:
        return _load_tiff(path, limit)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            _check_pixels(path, image.size, limit)
            if image.format == "TIFF" and image.mode not in _PILLOW_TIFF_MODES:
                raise UnidentifiedImageError(f"mode {image.mode}")
            scale = _stated_scale(image)
            turned = image.getexif().get(_ORIENTATION_TAG) in _TURNED
            ImageOps.exif_transpose(image, in_place=True)
            rgb = to_rgb(image)
            return DecodedImage(rgb, str(image.format).lower(), scale.turned() if turned else scale, _notes(survey))
    except UnidentifiedImageError as error:
        if _tiff_directory(path) is None:
            raise SlideUnreadable(
                f"{path.name} is neither a slide that OpenSlide reads nor a JPEG, PNG or TIFF image.",
                hint="Its first bytes fit no format that is known here.",
            ) from error
        return _load_tiff(path, limit)
    except _DECODING_ERRORS as error:
        raise SlideUnreadable(f"{path.name} is damaged: {error}.", hint="Copy or export it again.") from error
    except MemoryError as error:
        raise _no_memory(path) from error


def _notes(survey: TiffSurvey | None) -> tuple[str, ...]:
    return survey.notes if survey is not None else ()


def image_size(path: StrPath, settings: Settings | None = None) -> tuple[int, int]:
    """(width, height) in pixels as displayed, from the header where that is enough. Raises as :func:`load_image`."""
    path = Path(path)
    limit = (settings or get_settings()).image_max_pixels
    _check_not_cut(path)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            _check_pixels(path, image.size, limit)
            # Pillow turns the size of a TIFF by itself, and that of other formats only with the pixels.
            turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION_TAG) in _TURNED
            return (image.height, image.width) if turned else image.size
    except (UnidentifiedImageError, KeyError):  # Pillow looks up a TIFF's compression as it opens it
        return load_image(path, settings).rgb.size
    except _DECODING_ERRORS as error:
        raise SlideUnreadable(f"{path.name} is damaged: {error}.", hint="Copy or export it again.") from error
    except MemoryError as error:
        raise _no_memory(path) from error


def read_patch(path: StrPath, tile_px: int, settings: Settings | None = None) -> tuple[UInt8Array, tuple[int, int]]:
    """One image as one tile: scaled so that its long side fits, centred on white if it is not square (cells keep their shape).

    Returns
    -------
    uint8 (tile_px, tile_px, 3) RGB, and the image's own (width, height).

    Raises
    ------
    SlideTooSmall
        A side below an eighth of ``tile_px``: there is nothing to enlarge.
    SlideTooLarge, SlideUnreadable
        As :func:`load_image`.
    """
    image = load_image(path, settings).rgb
    check_patch_size(path, image.size, tile_px)
    if image.size == (tile_px, tile_px):
        return np.array(image, dtype=np.uint8, order="C"), image.size
    scale = tile_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    method = Image.Resampling.HAMMING if scale < 3 / 4 else Image.Resampling.BILINEAR
    tile = Image.new("RGB", (tile_px, tile_px), WHITE)
    tile.paste(image.resize(size, method), ((tile_px - size[0]) // 2, (tile_px - size[1]) // 2))
    return np.array(tile, dtype=np.uint8, order="C"), image.size


def check_patch_size(path: StrPath, size: tuple[int, int], tile_px: int) -> None:
    """Raise :class:`~backend.errors.SlideTooSmall` if a side of a patch is below an eighth of ``tile_px``."""
    if min(size) * 8 < tile_px:
        raise SlideTooSmall(
            f"The patch {Path(path).name} has {size[0]} x {size[1]} pixels; a tile has {tile_px}.",
            hint=f"A patch needs at least {-(-tile_px // 8)} pixels on each side.",
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode that Pillow decodes as RGB, transparency laid on white. Raises ``ValueError`` for modes without such a meaning."""
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode == "F":
        raise ValueError("floating-point pixels have no plain meaning as a picture")
    return _in_pieces(image.size, lambda box: piece_to_rgb(image.crop(box)))


def piece_to_rgb(image: Image.Image) -> Image.Image:
    """As :func:`to_rgb`, at once: for small images."""
    if image.mode.startswith("I"):
        # I;16 of PNG and TIFF, or I where Pillow widened it.
        return Image.fromarray(to_uint8(np.asarray(image))).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (*WHITE, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _in_pieces(size: tuple[int, int], piece: Callable[[tuple[int, int, int, int]], Image.Image]) -> Image.Image:
    """An RGB image of ``size`` (width, height) made of ``piece(box)`` for the boxes (left, top, right, bottom) that cover it."""
    width, height = size
    rgb = Image.new("RGB", size)
    for top in range(0, height, _PIECE_PX):
        for left in range(0, width, _PIECE_PX):
            box = (left, top, min(left + _PIECE_PX, width), min(top + _PIECE_PX, height))
            rgb.paste(piece(box), box)
    return rgb


def _check_pixels(path: Path, size: tuple[int, int], limit: int) -> None:
    if size[0] * size[1] > limit:
        raise SlideTooLarge(
            f"{path.name} would decode to {size[0]} x {size[1]} pixels, over the limit of {limit}.",
            hint="Plain images are decoded whole. Convert it to a tiled pyramid (for example with `vips tiffsave --tile "
            "--pyramid --compression jpeg`), or raise IMAGE_MAX_PIXELS.",
        )


def _no_memory(path: Path) -> SlideTooLarge:
    return SlideTooLarge(
        f"{path.name} does not fit into memory.",
        hint="It is damaged, or this machine is too small for it: convert it to a tiled pyramid.",
    )


def _stated_scale(image: Image.Image) -> Scale:
    if isinstance(image, TiffImageFile):
        tags = image.tag_v2
        try:
            per_unit = float(tags[_X_RESOLUTION]), float(tags[_Y_RESOLUTION])
        except (KeyError, TypeError, ValueError, ZeroDivisionError):  # none, or none that is a number
            per_unit = None
        unit = tags.get(_RESOLUTION_UNIT, 2)  # TIFF 6.0: inch where none is stated
        text = tags.get(_IMAGE_DESCRIPTION, "")
        return tiff_scale(
            _utf8(text) if isinstance(text, str) else "", per_unit, unit if isinstance(unit, int) else 1, image.size
        )
    dpi = image.info.get("dpi")
    if not isinstance(dpi, tuple) or len(dpi) != 2 or not all(float(v) > 0 for v in dpi):
        return Scale()
    return Scale((_UM_PER_INCH / float(dpi[0]), _UM_PER_INCH / float(dpi[1])))


def _utf8(text: str) -> str:
    """What Pillow takes for Latin-1 and is UTF-8, as in OME-XML."""
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:
        return text


def _tiff_directory(path: Path) -> int | None:
    """The byte at which a TIFF's or BigTIFF's first directory starts; ``None`` if the file is no TIFF."""
    with path.open("rb") as file:
        head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 16:
        return None
    version = struct.unpack(order + "H", head[2:4])[0]
    if version not in (42, 43):
        return None
    offset: int = struct.unpack(order + ("I" if version == 42 else "Q"), head[4:8] if version == 42 else head[8:16])[0]
    return offset


def _check_not_cut(path: Path) -> None:
    """A TIFF (so a svs, too) whose directory lies behind its end was cut short: say so, rather than "unknown format"."""
    directory, size = _tiff_directory(path), path.stat().st_size
    if directory is not None and directory + 2 > size:
        raise _cut_short(path, f"its directory should be at byte {directory}", size)


def _cut_short(path: Path, what: str, size: int) -> SlideUnreadable:
    return SlideUnreadable(
        f"{path.name} is cut short: {what}, and the file has {size}.",
        hint="Its copy or upload was probably interrupted.",
    )


def _load_tiff(path: Path, limit: int) -> DecodedImage:
    """What Pillow does not read: BigTIFF, planar or deep colour, unusual compressions."""
    survey = survey_tiff(path)
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            if not isinstance(page, tifffile.TiffPage):
                raise ValueError("its first page is incomplete")
            _check_pixels(path, (page.imagewidth, page.imagelength), limit)
            if not decodable(int(page.compression)):
                raise codec_unsupported(path.name, codec_name(int(page.compression)))
            if page.size > _MAX_SAMPLES * page.imagewidth * page.imagelength:
                raise ValueError(f"it has {page.samplesperpixel} samples a pixel, or depth")
            end = max((a + n for a, n in zip(page.dataoffsets, page.databytecounts, strict=False)), default=0)
            if end > (size := path.stat().st_size):
                raise _cut_short(path, f"its pixels should end at byte {end}", size)
            orientation = page.tags.get(_ORIENTATION_TAG)
            image = _tiff_to_rgb(page)
            move = _TRANSPOSE.get(int(orientation.value)) if orientation is not None else None
            turned = orientation is not None and int(orientation.value) in _TURNED
            scale = page_scale(page)
    except SlideError:
        raise
    except MemoryError as error:
        raise _no_memory(path) from error
    except Exception as error:  # a damaged tag may be of any type, and fails wherever tifffile first computes with it
        raise SlideUnreadable(
            f"{path.name} cannot be decoded: {error}.", hint="Export it as an 8-bit RGB TIFF or as a pyramid."
        ) from error
    image = image.transpose(move) if move is not None else image
    return DecodedImage(image, "tiff (tifffile)", scale.turned() if turned else scale, _notes(survey))


def codec_unsupported(name: str, codec: str) -> CodecUnsupported:
    """The error for pixels that nothing here decodes."""
    return CodecUnsupported(
        f"The pixels of {name} are compressed with {codec}, which is not supported.",
        hint="Convert it with a program that reads it, to JPEG tiles (for example "
        "`vips tiffsave --tile --pyramid --compression jpeg`, or QuPath).",
    )


def _tiff_to_rgb(page: tifffile.TiffPage) -> Image.Image:
    photometric, has_alpha = page.photometric.name, bool(page.extrasamples)
    if photometric not in ("RGB", "MINISBLACK", "MINISWHITE", "YCBCR"):
        raise ValueError(f"its colours are stored as {photometric}")
    values = _tiff_values(page)
    if page.planarconfig == 2 and values.ndim == 3:
        values = np.moveaxis(values, 0, -1)
    if values.ndim != 2 and (values.ndim != 3 or values.shape[2] not in (3, 4)):
        raise ValueError(f"its pixels have the shape {values.shape}")
    if values.ndim == 3 and not (values.shape[2] == 4 and has_alpha):
        values = values[..., :3]

    def piece(box: tuple[int, int, int, int]) -> Image.Image:
        part = np.ascontiguousarray(values[box[1] : box[3], box[0] : box[2]])
        return piece_to_rgb(Image.fromarray(np.bitwise_not(part) if photometric == "MINISWHITE" else part))

    return _in_pieces((values.shape[1], values.shape[0]), piece)


def _tiff_values(page: tifffile.TiffPage) -> UInt8Array:
    """The page's samples as 8 bits, shaped as tifffile has them. Deep ones are scaled strip by strip, as they are decoded."""
    if page.dtype is not None:
        check_type(page.dtype)
    # Of what is not compressed the file itself is as large as what is decoded.
    if page.dtype is None or page.dtype.itemsize == 1 or page.is_contiguous or not page.dataoffsets:
        return to_uint8(page.asarray())
    # As TiffPage.asarray puts a page together, in 8 bits.
    values = np.zeros(page.shaped, np.uint8)
    _, depth, length, width, _ = page.shaped

    def put(decoded: tuple[npt.NDArray[np.generic] | None, tuple[int, ...], tuple[int, ...]]) -> None:
        segment, (s, d, y, x, _), (segment_depth, segment_length, segment_width, _) = decoded
        place = values[s, d : d + segment_depth, y : y + segment_length, x : x + segment_width]
        if segment is None:
            place[:] = to_uint8(np.asarray(page.nodata, page.dtype))
        else:
            place[:] = to_uint8(segment[: depth - d, : length - y, : width - x])

    for _ in page.segments(func=put, sort=True, _fullsize=False):
        pass
    return values.reshape(page.shape)


def check_type(dtype: np.dtype[np.generic]) -> None:
    """Raise ``ValueError`` if samples of this type cannot be shown: only whole numbers of up to 16 bits can."""
    if dtype.kind not in "bui" or dtype.itemsize > 4:
        raise _no_picture(dtype)


def _no_picture(dtype: np.dtype[np.generic]) -> ValueError:
    return ValueError(f"pixels of type {dtype} have no plain meaning as a picture")


def to_uint8(array: npt.NDArray[np.generic]) -> UInt8Array:
    """Whole-range scaling to 8 bits: 65535 becomes 255, rounded. Takes another 8 bytes for each of a million values at a time."""
    if array.dtype == np.uint8:
        return np.asarray(array, dtype=np.uint8)
    if array.dtype == np.bool_:
        return np.asarray(array, dtype=np.uint8) * np.uint8(255)
    check_type(array.dtype)
    flat = array.reshape(-1)
    scaled = np.empty(flat.shape, np.uint8)
    for start in range(0, flat.size, _PIECE_PX**2):
        part = flat[start : start + _PIECE_PX**2]
        if array.dtype != np.uint16 and (part.min() < 0 or part.max() > 65535):
            raise _no_picture(array.dtype)
        scaled[start : start + _PIECE_PX**2] = (part.astype(np.uint32) + 128) // 257
    return scaled.reshape(array.shape)
