"""A picture of what was taken for tissue on a slide, for people to check."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from backend.results.bag import BoolArray
from backend.results.tissue_record import INK, INK_COLOUR, TISSUE, TISSUE_COLOUR, TissueRecord

_INK_ALPHA = 0.6


def draw_tissue(overview: Image.Image, record: TissueRecord) -> Image.Image:
    """The slide with its tissue outlined, what was taken as ink coloured, and a legend below.

    ``overview`` is the whole slide at any scale, RGB; the picture is as wide, or wider where the legend needs it.
    """
    labels = np.asarray(Image.fromarray(record.labels).resize(overview.size, Image.Resampling.NEAREST))
    painted = np.array(overview.convert("RGB"))
    ink = labels == INK
    painted[ink] = np.round((1 - _INK_ALPHA) * painted[ink] + _INK_ALPHA * np.array(INK_COLOUR)).astype(np.uint8)
    painted[_outline(labels == TISSUE, max(1, max(overview.size) // 500))] = TISSUE_COLOUR
    return _with_legend(Image.fromarray(painted), record)


def _outline(mask: BoolArray, thickness: int) -> BoolArray:
    """The pixels of ``mask`` next to others, ``thickness`` wide; the picture's edge is no border."""
    inside = np.pad(mask, thickness, mode="edge")
    height, width = mask.shape
    kept = mask.copy()
    for shift in range(2 * thickness + 1):
        kept &= inside[shift : shift + height, thickness : thickness + width]
        kept &= inside[thickness : thickness + height, shift : shift + width]
    return mask & ~kept


def _with_legend(picture: Image.Image, record: TissueRecord) -> Image.Image:
    size = min(28, max(12, picture.width // 70))
    font = ImageFont.load_default(size)
    source = "as found" if record.source == "found" else f"as given by {record.source}"
    lines = [
        (TISSUE_COLOUR, f"tissue, {source}: {record.share:.1%} of the slide"),
        (INK_COLOUR, f"taken as ink: {record.ink_share:.1%} of what is not glass"),
    ]
    width = max(picture.width, *(round(font.getlength(text)) + 3 * size for _, text in lines))
    step = size + size // 2
    canvas = Image.new("RGB", (width, picture.height + len(lines) * step + size), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for number, (colour, text) in enumerate(lines):
        top = picture.height + size // 2 + number * step
        draw.rectangle((size // 2, top + size // 6, size // 2 + size, top + size // 6 + size), fill=colour)
        draw.text((2 * size, top), text, fill=(40, 40, 40), font=font)
    return canvas
