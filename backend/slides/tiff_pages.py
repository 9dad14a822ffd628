"""What a TIFF holds, by its directories: levels (also those in SubIFDs), codec, scale, and channels that are no
colours. No pixels are decoded.

Sources: TIFF 6.0; OME-TIFF (levels in SubIFDs, channels in the OME-XML); ImageJ's description; Akoya's QPTIFF (a Name
in the XML of each directory).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile

from backend.errors import ChannelsUnsupported, SlideError
from backend.results.bag import Int64Array, UInt8Array
from backend.slides.level_fit import possible_fits
from backend.slides.mpp import Scale
from backend.slides.ome import OmeImage, is_ome, read_ome
from backend.slides.scale import tiff_scale
from backend.slides.tiff_check import TILE_MAX_PIXELS

log = logging.getLogger(__name__)

CODEC_NAMES = {
    1: "no compression",
    2: "CCITT RLE",
    3: "CCITT Group 3",
    4: "CCITT Group 4",
    5: "LZW",
    6: "old-style JPEG",
    7: "JPEG",
    8: "Deflate",
    22610: "JPEG XR",
    32773: "PackBits",
    32946: "Deflate",
    33003: "JPEG 2000 (YCbCr)",
    33005: "JPEG 2000",
    33007: "JPEG",
    34661: "JBIG",
    34712: "JPEG 2000",
    34887: "LERC",
    34892: "lossy JPEG",
    34925: "LZMA",
    34926: "Zstandard",
    34927: "WebP",
    34933: "PNG",
    34934: "JPEG XR",
    50000: "Zstandard",
    50001: "WebP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
MINISWHITE, MINISBLACK, RGB = 0, 1, 2
_MAX_PAGES = 200
_IMAGEJ_COUNT = re.compile(r"^(channels|slices|frames)=(\d{1,9})\s*$", re.MULTILINE)
_QPI_NAME = re.compile(r"<Name>([^<]{1,80})</Name>")


@dataclass(frozen=True, eq=False)
class TiffLevel:
    """One level: tiles or strips of one page, or of one page for each colour.

    Attributes
    ----------
    size, tile_size
        (width, height) in pixels of the level, and of a tile; a strip is a tile as wide as the level.
    pages
        One, or three for red, green and blue.
    compression, photometric, samples
        TIFF's numbers of the codec and of the colours, and samples a pixel.
    alpha
        How the fourth sample (of grey: the second) is transparency: 1 multiplied, 2 not, 0 unspecified; ``None`` if
        there is none.
    tiled, dtype
        Whether it is in tiles, and the type of its samples.
    planes
        Tiles that make one place of a page: one for each sample where samples are stored apart.
    offsets, lengths
        int64 (tiles of all planes,) of each page: where the bytes of a tile start and how many they are; 0 for one that
        is missing.
    jpeg_tables
        The JPEG tables that the tiles share, or ``None``.
    colour_map
        uint8 (colours, 3) of a palette, or ``None``.
    """

    size: tuple[int, int]
    tile_size: tuple[int, int]
    pages: tuple[tifffile.TiffPage, ...]
    compression: int
    photometric: int
    samples: int
    alpha: int | None
    tiled: bool
    dtype: np.dtype[np.generic]
    planes: int
    offsets: tuple[Int64Array, ...]
    lengths: tuple[Int64Array, ...]
    jpeg_tables: bytes | None
    colour_map: UInt8Array | None

    @property
    def columns(self) -> int:
        return -(-self.size[0] // self.tile_size[0])

    @property
    def rows(self) -> int:
        return -(-self.size[1] // self.tile_size[1])


@dataclass(frozen=True, eq=False)
class TiffSurvey:
    """What a TIFF holds.

    Attributes
    ----------
    levels
        From fine to coarse; empty if the first page cannot be read tile by tile.
    in_sub_ifds
        Whether the levels are those of SubIFDs, which OpenSlide does not look at, or planes of colours.
    compression
        TIFF's number of the codec of level 0.
    scale
        As stated.
    description
        ImageDescription of the first page.
    notes
        What of the file is not used, a sentence each.
    """

    levels: tuple[TiffLevel, ...]
    in_sub_ifds: bool
    compression: int
    scale: Scale
    description: str
    notes: tuple[str, ...]

    @property
    def codec(self) -> str:
        return codec_name(self.compression)


def codec_name(compression: int) -> str:
    """``"WebP"``; a number where it is not a known one."""
    return CODEC_NAMES.get(compression, f"TIFF compression {compression}")


def decodable(compression: int) -> bool:
    """Whether tifffile has a decoder for a TIFF's compression."""
    try:
        return compression == 1 or tifffile.TIFF.DECOMPRESSORS[compression] is not None
    except KeyError:
        return False


def is_tiff(path: Path) -> bool:
    """Whether a file starts as a TIFF or BigTIFF does."""
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def survey_tiff(path: Path) -> TiffSurvey | None:
    """What a TIFF holds; ``None`` if the file is none, or its directories cannot be read (whoever reads the pixels says
    what is wrong then).

    Raises
    ------
    ChannelsUnsupported
        Its samples are channels, not colours.
    """
    if not is_tiff(path):
        return None
    try:
        with tifffile.TiffFile(path) as file:
            return _survey(file, path.name)
    except SlideError:
        raise
    except Exception as error:  # noqa: BLE001  # a damaged tag may be of any type, and fails wherever it is first used
        log.debug("the directories of %s could not be read: %s", path.name, error)
        return None


def page_scale(page: tifffile.TiffPage) -> Scale:
    """What a page states of its scale."""
    try:
        resolution = page.get_resolution()  # in pixels per its own unit
    except (ValueError, ZeroDivisionError, TypeError):
        resolution = None
    unit = page.tags.valueof(296, 2)  # TIFF 6.0: inch where none is stated
    return tiff_scale(
        page.description,
        resolution if 282 in page.tags and 283 in page.tags else None,
        int(unit) if isinstance(unit, int) else 1,
        (page.imagewidth, page.imagelength),
    )


def _survey(file: tifffile.TiffFile, name: str) -> TiffSurvey:
    first = _page(file.pages[0])
    size = (first.imagewidth, first.imagelength)
    chain = list(_following(file))
    twins = [first] + [p for p in chain if not p.is_reduced and (p.imagewidth, p.imagelength) == size]
    description = str(first.description)
    ome: OmeImage | None = None
    if is_ome(description):
        try:
            ome = read_ome(description, size)
        except ValueError as error:
            log.debug("%s: %s", name, error)  # the scale says so
    colours = twins[:3] if ome is not None and ome.is_rgb_in_planes and len(twins) >= 3 and _is_grey(first) else [first]
    if len(colours) == 1:
        _check_channels(name, first, twins, ome, description)
    subs = [_sub_pages(page) for page in colours]
    reduced = [p for p in chain if p.is_reduced]
    in_sub_ifds = bool(subs[0]) and not reduced
    notes: list[str] = []
    groups = [colours]
    if in_sub_ifds:
        groups += [list(group) for group in zip(*subs, strict=False)]
    elif len(colours) == 1:
        groups += [[page] for page in reduced]
    levels: list[TiffLevel] = []
    for group in groups:
        try:
            level = _level(group)
        except ValueError as reason:
            if not levels:
                log.debug("%s is not read tile by tile: %s", name, reason)
                break
            notes.append(f"A level of {group[0].imagewidth} x {group[0].imagelength} pixels is not used: {reason}.")
            continue
        if not levels or _fits(levels, level):
            levels.append(level)
    if len(colours) == 1:
        notes += _not_shown(ome, description, len(twins))
    return TiffSurvey(
        levels=tuple(levels),
        in_sub_ifds=in_sub_ifds or len(colours) == 3,
        compression=int(first.compression),
        scale=page_scale(first),
        description=description,
        notes=tuple(notes),
    )


def _page(page: object) -> tifffile.TiffPage:
    if not isinstance(page, tifffile.TiffPage):
        raise ValueError("a page is incomplete")
    return page


def _following(file: tifffile.TiffFile) -> Iterator[tifffile.TiffPage]:
    """The pages after the first, as far as they go."""
    for number in range(1, _MAX_PAGES):
        try:
            yield _page(file.pages[number])
        except IndexError:
            return


def _sub_pages(page: tifffile.TiffPage) -> list[tifffile.TiffPage]:
    if not page.subifds:
        return []
    return [_page(page.pages[number]) for number in range(min(len(page.subifds), _MAX_PAGES))]


def _is_grey(page: tifffile.TiffPage) -> bool:
    return int(page.photometric) in (MINISBLACK, MINISWHITE)


def _check_channels(
    name: str, first: tifffile.TiffPage, twins: Sequence[tifffile.TiffPage], ome: OmeImage | None, description: str
) -> None:
    """:class:`ChannelsUnsupported` if the samples of the first page are channels."""
    samples, alpha = first.samplesperpixel, sum(1 for e in first.extrasamples if int(e) in (1, 2))
    count, names = 1, []
    if _is_grey(first):
        count = samples - alpha
        if ome is not None and (ome.channel_count > 1 or ome.fluorescence):
            count, names = max(count, ome.channel_count), [channel for channel in ome.channels if channel]
        elif description.startswith("ImageJ="):
            count = max(count, dict(_counts(description)).get("channels", 1))
        elif "<PerkinElmer-QPI-ImageDescription" in description and len(twins) > 1:
            found = [_QPI_NAME.search(str(page.description)) for page in twins]
            count, names = len(twins), [match[1] for match in found if match]
    elif int(first.photometric) == RGB and samples > 4:
        count = samples
    if count < 2 and not (ome is not None and ome.fluorescence and _is_grey(first)):
        return
    listed = f" ({', '.join(names[:8])}{', …' if len(names) > 8 else ''})" if names else ""
    kind = "fluorescence" if ome is not None and ome.fluorescence else "fluorescence or another image of channels"
    raise ChannelsUnsupported(
        f"{name} has {count} {'channel' if count == 1 else 'channels'}{listed} of {first.dtype}: it is {kind}, "
        "which is not supported.",
        hint="The model knows brightfield images in colour. If this is one whose colours are stored as channels, "
        "export it as 8-bit RGB (for example with `raw2ometiff --rgb`, or from QuPath or Fiji).",
    )


def _not_shown(ome: OmeImage | None, description: str, twins: int) -> list[str]:
    """Sentences about planes, times and further pictures of which only the first is used."""
    counts = dict(_counts(description)) if description.startswith("ImageJ=") else {}
    planes, times = (ome.planes, ome.times) if ome is not None else (counts.get("slices", 1), counts.get("frames", 1))
    notes = [
        f"The file has {count} {what}: the first is used."
        for count, what in ((planes, "focal planes"), (times, "points in time"))
        if count > 1
    ]
    if not notes and ome is None and twins > 1:
        notes.append(f"The file has {twins} pictures of the same size: the first is used.")
    return notes


def _counts(description: str) -> list[tuple[str, int]]:
    return [(name, int(count)) for name, count in _IMAGEJ_COUNT.findall(description)]


def _level(pages: Sequence[tifffile.TiffPage]) -> TiffLevel:
    """A level of these pages; ``ValueError`` with a reason if it cannot be read tile by tile."""
    first = pages[0]
    size = (first.imagewidth, first.imagelength)
    tile = (first.tilewidth, first.tilelength) if first.is_tiled else (size[0], min(first.rowsperstrip, size[1]))
    if min(*size, *tile) < 1:
        raise ValueError(f"it has {size[0]} x {size[1]} pixels in tiles of {tile[0]} x {tile[1]}")
    if tile[0] * tile[1] > TILE_MAX_PIXELS:
        raise ValueError(f"a piece of it has {tile[0]} x {tile[1]} pixels")
    if first.imagedepth != 1 or (first.is_tiled and first.tiledepth != 1):
        raise ValueError("it is a volume")
    if first.dtype is None:
        raise ValueError("its samples have no known type")
    planes = first.samplesperpixel if first.planarconfig == 2 else 1
    expected = math.ceil(size[0] / tile[0]) * math.ceil(size[1] / tile[1]) * planes
    for page in pages:
        listed = (len(page.dataoffsets), len(page.databytecounts))
        if listed != (expected, expected):
            raise ValueError(f"it lists {listed[0]} pieces and should have {expected}")
        if page.hash != first.hash:
            raise ValueError("its colours are stored in different ways")
        page.decode  # noqa: B018  # made now, while the file is open
    tables = first.jpegtables
    return TiffLevel(
        size=size,
        tile_size=tile,
        pages=tuple(pages),
        compression=int(first.compression),
        photometric=int(first.photometric),
        samples=int(first.samplesperpixel),
        alpha=int(first.extrasamples[0]) if first.extrasamples else None,
        tiled=bool(first.is_tiled),
        dtype=np.dtype(first.dtype),
        planes=planes,
        offsets=tuple(np.asarray(page.dataoffsets, np.int64) for page in pages),
        lengths=tuple(np.asarray(page.databytecounts, np.int64) for page in pages),
        jpeg_tables=bytes(tables) if tables else None,
        colour_map=_colour_map(first),
    )


def _colour_map(page: tifffile.TiffPage) -> UInt8Array | None:
    if page.colormap is None:
        return None
    colours = np.asarray(page.colormap)
    # As libtiff: 16 bits by the standard, 8 where no value needs more.
    return np.ascontiguousarray((colours >> 8 if colours.max() > 255 else colours).astype(np.uint8).T)


def _fits(levels: Sequence[TiffLevel], level: TiffLevel) -> bool:
    """Whether a page can be the next level: smaller, of a shape that may be the slide's, and of the same kind of pixels.

    Whether it is true, its pixels will tell (:mod:`backend.slides.level_check`).
    """
    (width, height), (w, h) = levels[0].size, level.size
    tiles = [of.tile_size if of.tiled else None for of in (levels[0], level)]
    same_shape = bool(possible_fits(levels[0].size, level.size, (width / w + height / h) / 2, *tiles))
    same_kind = (level.samples, level.dtype) == (levels[0].samples, levels[0].dtype)
    return w < levels[-1].size[0] and same_shape and same_kind
