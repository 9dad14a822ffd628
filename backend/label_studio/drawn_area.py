"""What an annotator drew with a smart tool, as an area over whose tiles attention is pooled anew. Pure, no I/O.

Label Studio sends what was drawn as the ``context`` of a /predict request: regions of any type, the newest last, also of
controls and images that are not ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import shapely

from backend.errors import RequestInvalid
from backend.label_studio import rle
from backend.label_studio.labeling_config import LabelingConfig
from backend.learning.drawn_shapes import BadRegion, DrawnKind, Frame, Shape, drawn_kind, shape_of
from backend.results.bag import Bag, Int64Array, digest

_MASK_MAX_PX = 2**26  # of a brush stroke's picture: Label Studio's canvas holds far less


@dataclass(frozen=True, eq=False)
class DrawnArea:
    """One drawn region. ``key`` tells it from every other one."""

    kind: DrawnKind
    region: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        return digest({"kind": self.kind, "region": json.dumps(self.region, sort_keys=True, default=str)})

    def tiles(self, bag: Bag) -> Int64Array:
        """int64 (M,): the rows of the bag whose tiles' centres lie in the area; if there are none (a point, a thin stroke, an
        outline within one tile), those of the tiles that it touches. A bag of patches has no tiles in any area.

        Raises
        ------
        RequestInvalid
            The region's numbers are missing, not finite or without an area.
        """
        if bag.kind == "patches":
            return np.zeros(0, dtype=np.int64)
        frame = Frame(bag, rle.decode)
        try:
            shape = shape_of(self.kind, self.region, frame)
        except BadRegion as error:
            raise RequestInvalid(
                f"The drawn {self.kind} cannot be used: {error}.", hint="Draw it again, on the picture as it is."
            ) from None
        held: Int64Array = np.flatnonzero(_centres_in(shape, bag))
        return held if len(held) else np.flatnonzero(_touched(shape, bag, frame))


def area_from_context(context: Mapping[str, Any], config: LabelingConfig) -> DrawnArea | None:
    """The newest region of a context, if it can be pooled over: drawn on our image, of a kind that covers tiles.

    ``None`` for everything else: answers to questions, regions of other images, nothing at all.
    """
    drawn = context.get("result")
    newest = drawn[-1] if isinstance(drawn, list) and drawn else None
    if not isinstance(newest, Mapping):
        return None
    kind, image = drawn_kind(newest.get("type")), newest.get("to_name", config.image.name)
    if kind is None or image not in {config.image.name, *(control.to_name for control in config.controls)}:
        return None
    if kind == "brush" and not _is_small_mask(newest):
        return None
    return DrawnArea(kind, newest)


def _is_small_mask(region: Mapping[str, Any]) -> bool:
    """Whether a brush stroke is as long as its picture says, and that no larger than a picture can be. It is decoded only then."""
    width, height, value = region.get("original_width"), region.get("original_height"), region.get("value")
    code = value.get("rle") if isinstance(value, Mapping) else None
    if not (isinstance(width, int) and isinstance(height, int) and isinstance(code, list) and len(code) > 4):
        return False
    if not all(type(number) is int and 0 <= number < 256 for number in code[:4]):
        return False
    return int.from_bytes(bytes(code[:4]), "big") == 4 * width * height and 0 < width * height <= _MASK_MAX_PX


def _centres_in(shape: Shape, bag: Bag) -> Any:
    centres = bag.coords + bag.tile_size_level0 / 2
    if shape.mask is None:
        return shapely.intersects_xy(shape.geometry, centres[:, 0], centres[:, 1])
    height, width = shape.mask.shape
    x = np.floor(centres[:, 0] * width / bag.slide_size[0]).astype(np.int64)
    y = np.floor(centres[:, 1] * height / bag.slide_size[1]).astype(np.int64)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)  # the centre of a tile at the border may lie beyond it
    return inside & shape.mask[np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)]


def _touched(shape: Shape, bag: Bag, frame: Frame) -> Any:
    if shape.mask is not None:
        return frame.fractions([shape]) > 0
    x, y, edge = bag.coords[:, 0], bag.coords[:, 1], bag.tile_size_level0
    return shapely.intersects(shape.geometry, shapely.box(x, y, x + edge, y + edge))
