"""What a slide's metadata states of its scale, in the several places where programs write it. Pure functions.

Where one file states several, the one that the format's own reader takes holds: OME-XML (Bio-Formats and QuPath take it
before the tags), then the program's own text, then the resolution tags. A statement that cannot be (72 dpi) never holds
against one that can. What is overruled is said.

Sources: TIFF 6.0 (XResolution, ResolutionUnit); OME-TIFF (:mod:`backend.slides.ome`); Aperio's ``Key = value|…`` text
(*Digital Slides and Third-Party Data Interchange*); ImageJ's description (``unit``, with the tags as pixels per unit);
DICOM PS3.3 C.8.12.4 (Imaged Volume Width and Height).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import openslide

from backend.slides.mpp import Scale, same_mpp
from backend.slides.ome import is_ome, number, read_ome, um_per_unit

UM_PER_RESOLUTION_UNIT = {2: 25_400.0, 3: 10_000.0}  # TIFF's ResolutionUnit: inch, centimetre; 1 is none
_OPENSLIDE_UNITS = {"inch": 2, "centimeter": 3}
_APERIO = re.compile(r"(?:^|[|\r\n])\s*MPP\s*=\s*([^|\r\n\0]*)")
_IMAGEJ_UNIT = re.compile(r"^unit=(.*)$", re.MULTILINE)
# Formats whose scale may be stated by texts and tags that OpenSlide does not look at.
_WITH_OTHER_STATEMENTS = ("generic-tiff", "aperio", "")

Statement = tuple[str, Scale]


def tiff_scale(
    description: str,
    resolution: tuple[float, float] | None,
    unit: int,
    size: tuple[int, int],
    *,
    first: Sequence[Statement] = (),
) -> Scale:
    """The scale of a TIFF's first directory.

    Parameters
    ----------
    description
        ImageDescription, ``""`` if there is none.
    resolution
        XResolution and YResolution in pixels per unit.
    unit
        ResolutionUnit: 2 is inch, 3 is centimetre, others are none.
    size
        (width, height) in pixels.
    first
        Statements (where, what) from elsewhere, which go before the tags and after the texts.
    """
    statements: list[Statement] = []
    per_unit = UM_PER_RESOLUTION_UNIT.get(unit)
    if is_ome(description):
        try:
            statements.append(("OME-XML", read_ome(description, size).scale))
        except ValueError as error:
            statements.append(("OME-XML", Scale(unread=str(error))))
    elif description.startswith("ImageJ="):
        found = _IMAGEJ_UNIT.search(description)
        if found and per_unit is None:
            per_unit = um_per_unit(found[1])
    elif found := _APERIO.search(description):
        value = number(found[1])
        text = (
            Scale((value, value))
            if value is not None
            else Scale(unread=f"MPP = {found[1].strip()!r:.30} in the Aperio text")
        )
        statements.append(("Aperio text", text))
    statements += first
    if per_unit is not None and resolution is not None and all(math.isfinite(v) and v > 0 for v in resolution):
        statements.append(("resolution tags", Scale((per_unit / resolution[0], per_unit / resolution[1]))))
    return one_of(statements)


def openslide_scale(properties: Mapping[str, str], size: tuple[int, int]) -> Scale:
    """The scale of a slide that OpenSlide opens, by its properties."""
    vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "")
    read = _pair(properties, openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
    own: list[Statement] = [("format's own field", Scale(read))] if read else []
    if vendor == "dicom":
        # In mm, of all the pixels of level 0.
        imaged = _pair(properties, "dicom.ImagedVolumeWidth", "dicom.ImagedVolumeHeight")
        if imaged and all(v > 0 for v in imaged):
            own.append(("imaged volume", Scale((1000 * imaged[0] / size[0], 1000 * imaged[1] / size[1]))))
        return one_of(own)
    if vendor not in _WITH_OTHER_STATEMENTS:
        return one_of(own)
    return tiff_scale(
        properties.get("tiff.ImageDescription", "") or properties.get(openslide.PROPERTY_NAME_COMMENT, ""),
        _pair(properties, "tiff.XResolution", "tiff.YResolution"),
        _OPENSLIDE_UNITS.get(properties.get("tiff.ResolutionUnit", ""), 1),
        size,
        # OpenSlide's scale of a plain TIFF is that of the tags.
        first=own if vendor == "aperio" else (),
    )


def one_of(statements: Sequence[Statement]) -> Scale:
    """The first that can be, with a note for each later one that says something else; else the first that says
    anything.
    """
    plausible = [(where, scale) for where, scale in statements if scale.plausible]
    if not plausible:
        return next((s for _, s in statements if s.xy), None) or next((s for _, s in statements if s.unread), Scale())
    where, chosen = plausible[0]
    notes = [
        f"The {where} states {chosen.in_words} and the {other} {scale.in_words}: the first is used."
        for other, scale in plausible[1:]
        if scale.xy and chosen.xy and not all(same_mpp(a, b) for a, b in zip(scale.xy, chosen.xy, strict=True))
    ]
    notes += [
        f"The {other} states {scale.in_words}, which is not believed: that of the {where} is used."
        for other, scale in statements[: statements.index(plausible[0])]
        if scale.xy or scale.unread
    ]
    return Scale(chosen.xy, notes=tuple(dict.fromkeys(notes)))


def _pair(properties: Mapping[str, str], x: str, y: str) -> tuple[float, float] | None:
    try:
        return float(properties[x]), float(properties[y])
    except (KeyError, ValueError):
        return None
