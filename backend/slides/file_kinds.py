"""What a file in a folder of slides is: by its first bytes, by its ending where those say nothing, and by its name
where it only accompanies a slide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum, auto
from pathlib import Path

import openslide

PICTURE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png"))
SLIDE_SUFFIXES = PICTURE_SUFFIXES | frozenset(
    [
        ".svs",
        ".tif",
        ".tiff",
        ".btf",
        ".tf2",
        ".tf8",
        ".qptiff",
        ".ndpi",
        ".vms",
        ".vmu",
        ".scn",
        ".mrxs",
        ".svslide",
        ".bif",
        ".czi",
        ".dcm",
    ]
)
"""What OpenSlide 4 reads by these endings, TIFFs of other names, and plain images."""

_PICTURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")  # JPEG, PNG
_SLIDES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"ZISRAWFILE")  # TIFF, BigTIFF, CZI
# Pictures that scanners, viewers and segmentation make of a slide: a word alone or after the slide's name, or their
# folder has such a name.
_WORD = re.compile(
    r"(?:(.+)[ ._-])?(thumbnail|thumb|label|macro|overview|preview|mask|tissue|heatmap|overlay|contour|stitch)(?:e?s)?"
)
_OWN_MASK = ".tissue.png"


class Kind(Enum):
    """Of a file: nothing that is read here; a slide; a plain JPEG or PNG, which may be a slide; DICOM of any kind; one
    that may not be read.
    """

    NONE = auto()
    SLIDE = auto()
    PICTURE = auto()
    DICOM = auto()
    UNREADABLE = auto()


def kind_of(path: Path) -> Kind:
    """The kind of a file. One with a slide's ending is a slide even if its content fits none or cannot be read: opening
    it says what is wrong.
    """
    suffix = path.suffix.lower()
    by_name = Kind.PICTURE if suffix in PICTURE_SUFFIXES else Kind.SLIDE if suffix in SLIDE_SUFFIXES else None
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except OSError:
        return by_name or Kind.UNREADABLE
    if head[128:] == b"DICM":
        return Kind.DICOM
    if suffix == ".mrxs" or head.startswith(_SLIDES):  # the first is a JPEG by its content
        return Kind.SLIDE
    if head.startswith(_PICTURES):
        return Kind.PICTURE
    return by_name or (Kind.SLIDE if openslide.OpenSlide.detect_format(str(path)) else Kind.NONE)


def accompanying(kinds: Mapping[Path, Kind], more_slides: Iterable[Path] = ()) -> Iterator[Path]:
    """Those of ``kinds`` that are no slides but pictures of one: thumbnail, label, mask and the like.

    These are ``slide_thumbnail.jpg``, ``slide_mask.tif`` and ``masks/slide.png`` where there is a slide of that name in
    any folder; ``slide.jpg`` or ``thumbnail.png`` in the folder of a slide that is no plain image itself; and
    ``….tissue.png``, which is a mask wherever it lies. ``more_slides``: of DICOM.
    """
    scans = [path for path, kind in kinds.items() if kind is Kind.SLIDE] + list(more_slides)
    names = {name.casefold() for path in (*kinds, *more_slides) for name in (path.stem, path.name)}
    folders = {path.parent for path in scans}
    stems = {(path.parent, path.stem.casefold()) for path in scans}
    scanned = {stem for _, stem in stems}
    for path, kind in kinds.items():
        stem, is_picture = path.stem.casefold(), kind is Kind.PICTURE
        beside = path.name.lower().endswith(_OWN_MASK) or (is_picture and (path.parent, stem) in stems)
        if is_picture and stem in scanned:
            beside |= _WORD.fullmatch(path.parent.name.casefold()) is not None
        if is_picture or path.suffix.lower() in (".tif", ".tiff"):
            # "slide_tissue_mask": words are taken off until the name of a slide is left.
            while not beside and (match := _WORD.fullmatch(stem)) is not None and (is_picture or match[2] == "mask"):
                stem = match[1] or ""
                beside = stem in names or (not stem and is_picture and path.parent in folders)
        if beside:
            yield path
