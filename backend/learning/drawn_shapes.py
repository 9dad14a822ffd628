"""What a drawn region covers: rectangles, ellipses, polygons, points and brush strokes in level-0 pixels, and the tiles under them.

Label Studio gives coordinates in percent of the image; rotations turn clockwise in the image's own pixels, a rectangle
about its top-left corner, an ellipse about its centre. Everything is taken to level-0 pixels first. The part of a tile is
always that of its whole square, also where it sticks out of the slide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import shapely

from backend.results.bag import Bag, Int64Array
from backend.slides.grid import box_fractions

Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
DecodeRle = Callable[[Sequence[int]], npt.NDArray[np.uint8]]
DrawnKind = Literal["rectangle", "ellipse", "polygon", "keypoint", "brush"]
Fault = Literal["malformed", "image_rotated"]

_ELLIPSE_POINTS = 256


class BadRegion(Exception):
    """A region that cannot be used, and why."""

    def __init__(self, code: Fault, detail: str) -> None:
        super().__init__(detail)
        self.code: Fault = code


@dataclass(frozen=True, eq=False)
class Shape:
    """A polygon in level-0 pixels (for patches: pixels of page ``item``), or a mask over the whole picture."""

    item: int
    geometry: Any = None
    mask: BoolArray | None = None


@dataclass(frozen=True, eq=False)
class Frame:
    """What percentages refer to: the slide of a bag, or the pages of a bag of patches."""

    bag: Bag
    decode_rle: DecodeRle

    def size(self, item: int) -> tuple[int, int]:
        """Width and height in pixels of what percentages refer to."""
        if self.bag.patch_sizes is None:
            return self.bag.slide_size
        width, height = self.bag.patch_sizes[item].tolist()
        return width, height

    def fractions(self, shapes: Sequence[Shape]) -> Float64Array:
        """float64 (N,): the part of each tile that the union of the shapes covers."""
        if self.bag.patch_sizes is not None:
            covered = np.zeros(len(self.bag))
            for item in {shape.item for shape in shapes}:
                width, height = self.size(item)
                here = [shape for shape in shapes if shape.item == item]
                covered[item] = self._union(here, np.array([[0, 0]]), (width, height), float(width), float(height))[0]
            return covered
        edge = self.bag.tile_size_level0
        return self._union(shapes, self.bag.coords, self.bag.slide_size, edge, edge)

    @staticmethod
    def _union(
        shapes: Sequence[Shape], corners: Int64Array, size: tuple[int, int], width: float, height: float
    ) -> Float64Array:
        masks = [shape.mask for shape in shapes if shape.mask is not None]
        if masks:
            brushed = _united(masks)
            if width != height:  # a page of patches, which is its own tile
                return np.array([brushed.mean()])
            return box_fractions(brushed, size, corners, width)
        outlines = shapely.union_all([shape.geometry for shape in shapes])
        union = shapely.intersection(outlines, shapely.box(0, 0, *size))
        boxes = shapely.box(corners[:, 0], corners[:, 1], corners[:, 0] + width, corners[:, 1] + height)
        shapely.prepare(union)
        touched = np.flatnonzero(shapely.intersects(union, boxes))
        covered = np.zeros(len(corners))
        covered[touched] = shapely.area(shapely.intersection(boxes[touched], union)) / (width * height)
        return covered


def _united(masks: Sequence[BoolArray]) -> BoolArray:
    """Where any of the masks is set; those of a smaller picture are enlarged to the largest, pixel by pixel."""
    height, width = max(mask.shape[0] for mask in masks), max(mask.shape[1] for mask in masks)
    united: BoolArray = np.zeros((height, width), dtype=np.bool_)
    for mask in masks:
        rows = np.arange(height) * mask.shape[0] // height
        columns = np.arange(width) * mask.shape[1] // width
        united |= mask[np.ix_(rows, columns)]
    return united


def drawn_kind(region_type: object) -> DrawnKind | None:
    """The kind of a region by its ``type`` (``rectanglelabels``, ``rectangle``, …); ``None`` for what is not drawn, or not known here."""
    text = str(region_type)
    kinds: tuple[DrawnKind, ...] = ("rectangle", "ellipse", "polygon", "keypoint", "brush")
    return next((kind for kind in kinds if text in (kind, f"{kind}labels")), None)


def shape_of(kind: DrawnKind, region: Mapping[str, Any], frame: Frame) -> Shape:
    """The shape of a region of Label Studio. Raises :class:`BadRegion`."""
    item = _item(region, frame.bag)
    if region.get("image_rotation") not in (None, 0, 360):
        raise BadRegion("image_rotated", f"it was drawn on an image turned by {region['image_rotation']!r}°")
    value = region.get("value")
    if not isinstance(value, Mapping):
        raise BadRegion("malformed", f"its value is {value!r:.40}")
    if kind == "brush":
        return Shape(item, mask=_mask(region, frame.decode_rle))
    return Shape(item, geometry=_outline(kind, value, frame.size(item)))


def _item(region: Mapping[str, Any], bag: Bag) -> int:
    if bag.kind == "slide":
        return 0
    item = region.get("item_index", 0 if len(bag) == 1 else None)
    if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < len(bag):
        raise BadRegion("malformed", f"item_index {item!r:.40} is none of the {len(bag)} patches")
    return item


def _number(value: Mapping[str, Any], name: str, *, least: float | None = None) -> float:
    number = value.get(name)
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise BadRegion("malformed", f"{name} is {number!r:.40}, not a number")
    if least is not None and number <= least:
        raise BadRegion("malformed", f"{name} is {number}, so it has no area")
    return float(number)


def _outline(kind: DrawnKind, value: Mapping[str, Any], size: tuple[int, int]) -> Any:
    scale = np.array(size, dtype=np.float64) / 100
    if kind == "polygon":
        points = value.get("points")
        try:
            ring = np.array(points, dtype=np.float64)
        except (TypeError, ValueError):
            ring = np.zeros(0)
        if ring.ndim != 2 or ring.shape[1] != 2 or len(ring) < 3 or not np.isfinite(ring).all():
            raise BadRegion("malformed", f"points are {points!r:.80}, not three or more pairs of numbers")
        # A ring that crosses itself has no area of its own: its lobes have (by the even-odd rule).
        return shapely.make_valid(shapely.polygons(ring * scale))
    if kind == "keypoint":
        return shapely.Point(_number(value, "x") * scale[0], _number(value, "y") * scale[1])
    turn = math.radians(_number({"rotation": value.get("rotation", 0)}, "rotation"))
    x, y = _number(value, "x") * scale[0], _number(value, "y") * scale[1]
    if kind == "rectangle":
        width = _number(value, "width", least=0) * scale[0]
        height = _number(value, "height", least=0) * scale[1]
        corners = np.array([[0, 0], [width, 0], [width, height], [0, height]])
    else:
        radii = np.array([_number(value, "radiusX", least=0), _number(value, "radiusY", least=0)]) * scale
        angle = np.arange(_ELLIPSE_POINTS) * (2 * np.pi / _ELLIPSE_POINTS)
        # A regular n-gon of this radius has the area of the circle.
        grow = math.sqrt(2 * math.pi / (_ELLIPSE_POINTS * math.sin(2 * math.pi / _ELLIPSE_POINTS)))
        corners = np.stack([np.cos(angle), np.sin(angle)], axis=1) * radii * grow
    # y points down, so this matrix turns clockwise as seen.
    matrix = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    return shapely.polygons(corners @ matrix + (x, y))


def _mask(region: Mapping[str, Any], decode_rle: DecodeRle) -> BoolArray:
    value = region["value"]
    width, height = region.get("original_width"), region.get("original_height")
    if value.get("format") != "rle" or not isinstance(value.get("rle"), list):
        raise BadRegion("malformed", f"a brush stroke of format {value.get('format')!r:.40} without rle")
    if not (isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0):
        raise BadRegion("malformed", f"its image has the size {width!r:.20} x {height!r:.20}")
    try:
        pixels = decode_rle(value["rle"])
    except ValueError as error:
        raise BadRegion("malformed", str(error)) from None
    if len(pixels) != width * height * 4:
        raise BadRegion("malformed", f"{len(pixels)} values are not the RGBA of {width} x {height} pixels")
    return np.asarray(pixels.reshape(height, width, 4)[..., 3] > 0)
