"""Colours that a wrong label has turned into others: YCbCr shown as RGB, or RGB shown as YCbCr. Pure functions.

Seen in DICOM files whose PhotometricInterpretation does not say how the frames are stored; OpenSlide then opens the slide in salmon.
"""

from __future__ import annotations

import numpy as np

from backend.results.bag import UInt8Array

_SAME_PICTURE = 24.0  # mean difference of two levels of one slide, in 8-bit steps; resampling and JPEG stay below 10
_GLASS_PART = 0.05


def same_picture(first: UInt8Array, second: UInt8Array) -> bool:
    """Whether two readings (h, w, 3) of one region from different levels agree in colour."""
    return float(np.abs(first.astype(np.int16) - second.astype(np.int16)).mean()) <= _SAME_PICTURE


def mislabelled(rgb: UInt8Array) -> str:
    """How the colours of a slide (h, w, 3) were confused, in words; empty if they were not.

    White glass gives it away: Y, Cb, Cr = 255, 128, 128 shown as RGB is salmon, and R, G, B = 255, 255, 255 taken for YCbCr becomes
    (255, 120, 255) (ITU-T T.871). Neither occurs over large parts of a stained slide.
    """
    values = rgb.astype(np.int16)
    red, green, blue = values[..., 0], values[..., 1], values[..., 2]
    salmon = (red >= 215) & (np.abs(green - 128) <= 14) & (np.abs(blue - 128) <= 14)
    magenta = (red >= 240) & (np.abs(green - 120) <= 14) & (blue >= 240)
    if salmon.mean() > _GLASS_PART:
        return "stored as YCbCr and labelled RGB"
    if magenta.mean() > _GLASS_PART:
        return "stored as RGB and labelled YCbCr"
    return ""
