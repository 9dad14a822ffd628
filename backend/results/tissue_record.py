"""What was taken for tissue on a slide, in small form: for pictures of it, and to say what was left out."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from PIL import Image

UInt8Array = npt.NDArray[np.uint8]

GLASS, TISSUE, INK = 0, 1, 2
TISSUE_COLOUR, INK_COLOUR = (0, 150, 255), (255, 0, 140)
KEPT_MAX_PX = 1024
_MAX_BYTES = 2**22
# Colours and opacities of the three labels, so that browsers show the picture as it is.
_PALETTE = bytes((0, 0, 0, *TISSUE_COLOUR, *INK_COLOUR))
_ALPHA = bytes((0, 90, 190))


@dataclass(frozen=True)
class TissueRecord:
    """The tissue of one slide.

    Attributes
    ----------
    png
        A PNG with a palette, over the slide's rectangle, at most 1024 pixels long: 0 glass (transparent), 1 tissue, 2
        taken as ink.
    source
        ``"found"``, or the name of the file that it was taken from.
    share
        Part of the slide that is tissue, in [0, 1].
    ink_share
        Part of all that is not glass that was taken as ink, in [0, 1].
    """

    png: bytes
    source: str
    share: float
    ink_share: float

    @classmethod
    def of_labels(cls, labels: UInt8Array, source: str, share: float, ink_share: float) -> TissueRecord:
        """From labels (H, W) of any size."""
        step = max(1, -(-max(labels.shape) // KEPT_MAX_PX))
        small = Image.fromarray(labels)
        if step > 1:
            size = tuple(max(1, round(length / step)) for length in small.size)
            small = small.resize((size[0], size[1]), Image.Resampling.NEAREST)
        small = small.convert("P")
        small.putpalette(_PALETTE)
        file = io.BytesIO()
        small.save(file, "PNG", transparency=_ALPHA, optimize=True)
        return cls(file.getvalue(), source, share, ink_share)

    @classmethod
    def kept(cls, png: bytes, source: str, share: float, ink_share: float) -> TissueRecord:
        """As it was stored. ``ValueError`` if that is no such picture; it is not decoded for this."""
        if not (
            png.startswith(b"\x89PNG\r\n\x1a\n") and len(png) <= _MAX_BYTES and 0 <= share <= 1 and 0 <= ink_share <= 1
        ):
            raise ValueError("the tissue is not kept as a small PNG with its shares")
        return cls(png, source, share, ink_share)

    @cached_property
    def labels(self) -> UInt8Array:
        """uint8 (h, w): 0 glass, 1 tissue, 2 taken as ink. ``ValueError``: the PNG is damaged."""
        try:
            with Image.open(io.BytesIO(self.png)) as image:
                if image.mode != "P" or max(image.size) > KEPT_MAX_PX:
                    raise ValueError(f"{image.mode} {image.size}")
                return np.asarray(image, np.uint8)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"the picture of the tissue is damaged: {error}") from error
