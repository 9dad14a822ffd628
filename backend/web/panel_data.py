"""What the panel is told of a slide and of its result: JSON of a few hundred bytes, and one block of numbers for the overlay."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from backend.errors import MppUnknown, SlideUnreadable
from backend.label_studio.services import Services
from backend.results.bag import BagResult
from backend.slides import names
from backend.slides.levels import REGION_MAX_LEVEL_PX
from backend.slides.reader import Slide
from backend.slides.render import overlay
from backend.slides.source import SlideRef
from backend.slides.tiling import slide_mpp
from backend.web.deepzoom import OVERLAP_PX, TILE_PX

HEATMAP_PX = 1600
_KEPT_RESULTS = 16

Extras = Callable[[int | None, str, BagResult | None], Mapping[str, Any]]
"""From the address's project, a bag key and its result, if there is one, to more members of the panel's JSON.

``suggestion``: ``model_version``, and ``controls``, one for each trained control: ``control``, ``kind`` (``choice``, ``choices``, ``number``,
``rating``), ``value``, ``confidence`` in [0, 1], ``choices`` (``{"label", "confidence", "figures"}``, the most
confident first; empty for numbers; ``figures`` as of :class:`~backend.learning.figures.ClassFigures`, ``None`` where
nothing was measured), ``notes`` (sentences on how often it is right),
``tolerance`` (of a number: the confidence is that of being so near), ``calibrated``, and ``labels``, how many it learnt from.
``similar_page``: where the labelled slides most like this one are listed, behind the password. ``learning``: lines that say what training needs. The page shows what is there and
nothing in place of what is not.
"""


class ShownResults:
    """The results that panels show, without latents; the last few are remembered."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._kept: OrderedDict[str, BagResult] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> BagResult | None:
        """The stored result, ``None`` if there is none."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
        found = self._services.store.get(key, latents=False)
        if found is not None:
            with self._lock:
                self._kept[key] = found
                while len(self._kept) > _KEPT_RESULTS:
                    self._kept.popitem(last=False)
        return found


def slide_name(ref: SlideRef) -> str:
    """The file name of a slide, for people."""
    return names.slide_name(ref.locations[0])


def slide_json(ref: SlideRef, slide: Slide, services: Services) -> dict[str, Any]:
    """Size and scale of an open slide: ``name``, ``width`` and ``height`` (level-0 pixels), ``mpp`` (µm per pixel or ``None``), ``mpp_source``,
    and how it is cut."""
    try:
        mpp, source = slide_mpp(slide, services.settings, task_mpp=ref.mpp, mpp_override=ref.mpp_override)
    except (MppUnknown, SlideUnreadable):
        # It can be looked at all the same, without a scale bar; that it cannot be analysed is said by its job.
        mpp, source = None, None
    return {
        "name": slide_name(ref),
        "width": slide.size[0],
        "height": slide.size[1],
        "mpp": mpp,
        "mpp_source": source,
        "tile_px": TILE_PX,
        "overlap_px": OVERLAP_PX,
    }


def result_json(result: BagResult) -> dict[str, Any]:
    """What the overlay needs beside :func:`weights_block`: ``tiles``, ``heads``, ``columns``, ``rows``, ``tile_size``
    (level-0 px), model; ``notes`` (what a rule took away or overruled), and ``tissue``: ``source``, ``share``,
    ``ink_share``; ``null`` in earlier results."""
    provenance, tissue = result.provenance, result.bag.tissue
    return {
        "tiles": len(result.bag),
        "heads": int(result.attention_logits.shape[1]),
        "columns": result.bag.grid_size[0],
        "rows": result.bag.grid_size[1],
        "tile_size": result.bag.tile_size_level0,
        "tile_um": result.bag.tile_size_level0 * result.bag.mpp,
        "model_version": provenance.get("model_version"),
        "stand_in": bool(provenance.get("stand_in")),
        "notes": list(result.bag.notes),
        "tissue": tissue and {"source": tissue.source, "share": tissue.share, "ink_share": tissue.ink_share},
    }


def weights_block(result: BagResult) -> bytes:
    """Tiles and weights for the overlay, little-endian.

    int32 (N,) columns, int32 (N,) rows, then float32 (1 + H, N): the mean over the heads, and each head; the attention weights
    themselves (they sum to 1 in each row).
    """
    grid = np.ascontiguousarray(result.bag.grid.T.astype("<i4"))
    weights = np.concatenate([result.mean_attention[None], result.attention.T]).astype("<f4")
    return grid.tobytes() + weights.tobytes()


def heatmap_picture(slide: Slide, result: BagResult | None) -> bytes:
    """The whole slide with its heatmap and legend, JPEG; without a result the slide and a line that says so.

    For labelling configs that show it as a second image: one that cannot be loaded would keep their whole task from opening.

    Raises
    ------
    SlideTooLarge
        The slide has no coarse level, and is too large to be read whole for one picture.
    """
    picture = Image.fromarray(slide.overview(HEATMAP_PX, REGION_MAX_LEVEL_PX))
    shown = (
        overlay(picture, result)
        if result is not None
        else _with_caption(picture, "Not analysed yet: reload the task later.")
    )
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _with_caption(picture: Image.Image, text: str) -> Image.Image:
    size = max(12, picture.width // 50)
    canvas = Image.new("RGB", (picture.width, picture.height + 2 * size), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    draw.text((size // 2, picture.height + size // 2), text, fill=(40, 40, 40), font=ImageFont.load_default(size))
    return canvas
