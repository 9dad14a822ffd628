"""From drawn regions to labels of tiles: rectangles, ellipses, polygons and brush strokes, by the exact area of each tile that they cover.

Label Studio gives coordinates in percent of the image; rotations turn clockwise in the image's own pixels, a rectangle about its top-left
corner, an ellipse about its centre. Everything is taken to level-0 pixels first. The part of a tile is always that of its whole square, also
where it sticks out of the slide.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from backend.learning.labels import Annotation, Issue, IssueCode, Target, human_regions
from backend.results.bag import Bag, Int64Array
from backend.slides.grid import box_fractions

Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
DecodeRle = Callable[[Sequence[int]], npt.NDArray[np.uint8]]

_ELLIPSE_POINTS = 256
_SAME = 1e-9
"""Covered parts of a tile that differ by less count as equal."""


@dataclass(frozen=True, eq=False)
class TileLabels:
    """The labelled tiles of one bag for one control: ``tiles`` int64 (M,) ascending rows of the bag, ``labels`` their M labels."""

    task_id: int
    control: str
    tiles: Int64Array
    labels: tuple[str, ...]


def tile_labels(
    annotations: Sequence[Annotation],
    targets: Sequence[Target],
    bag: Bag,
    *,
    decode_rle: DecodeRle,
    min_overlap: float,
    machine_controls: Collection[str] = (),
) -> tuple[list[TileLabels], list[Issue]]:
    """Labels of the tiles of one task that people drew on.

    A tile gets an annotator's label if the union of that annotator's regions of the label covers at least ``min_overlap`` of it, and more of it than
    those of any other label. Several annotators: majority of those who labelled the tile; ties teach nothing. A tile that nobody covered has no
    label: not drawn on does not mean negative.

    Parameters
    ----------
    annotations
        Of one task, one per annotator.
    targets
        Controls that may be learnt; those that label slides are passed over.
    bag
        The task's tiles.
    decode_rle
        Decodes ``value.rle`` to RGBA bytes, row by row; raises ``ValueError`` for what is not run-length code.
    min_overlap
        In (0, 1].
    machine_controls
        Names of controls whose regions are all a machine's.

    Returns
    -------
    One entry for each control with at least one labelled tile, and what could not be used.
    """
    if not 0 < min_overlap <= 1:
        raise ValueError(f"min_overlap {min_overlap} must lie in (0, 1]")
    if len({annotation.task_id for annotation in annotations}) > 1:
        raise ValueError("the annotations belong to several tasks")
    issues: list[Issue] = []
    frame = _Frame(bag, decode_rle)
    votes: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for annotation in annotations:
        drawn: dict[str, dict[str, list[_Shape]]] = defaultdict(lambda: defaultdict(list))
        for target, region in human_regions(annotation, targets, machine_controls=machine_controls):
            for label in _labels_of(annotation, target, region, issues):
                shape = _shape(annotation, target, region, frame, issues)
                if shape is not None:
                    drawn[target.name][label].append(shape)
        for control, by_label in drawn.items():
            for tile, label in _one_annotator(annotation, control, by_label, frame, min_overlap, issues):
                votes[control][tile].append(label)
    found = [
        entry
        for target in targets
        if target.name in votes
        and (entry := _majority(annotations[0].task_id, target.name, votes[target.name], issues))
    ]
    return found, issues


# --- shapes -----------------------------------------------------------------------------------------------------


class _BadRegion(Exception):
    def __init__(self, code: IssueCode, detail: str) -> None:
        super().__init__(detail)
        self.code: IssueCode = code


@dataclass(frozen=True, eq=False)
class _Shape:
    """A polygon in level-0 pixels (for patches: pixels of page ``item``), or a mask over the whole picture."""

    item: int
    geometry: Any = None
    mask: BoolArray | None = None


@dataclass(frozen=True, eq=False)
class _Frame:
    bag: Bag
    decode_rle: DecodeRle

    def size(self, item: int) -> tuple[int, int]:
        """Width and height in pixels of what percentages refer to."""
        if self.bag.patch_sizes is None:
            return self.bag.slide_size
        width, height = self.bag.patch_sizes[item].tolist()
        return width, height

    def fractions(self, shapes: Sequence[_Shape]) -> Float64Array:
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
        shapes: Sequence[_Shape], corners: Int64Array, size: tuple[int, int], width: float, height: float
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


def _labels_of(annotation: Annotation, target: Target, region: Mapping[str, Any], issues: list[Issue]) -> Sequence[str]:
    value = region.get("value")
    said = value.get(target.key) if isinstance(value, Mapping) else None
    if not isinstance(said, list) or not said or not all(isinstance(label, str) for label in said):
        detail = f"region {region.get('id')!r:.40} has the labels {said!r:.80}, not a list of names"
        issues.append(Issue("malformed", annotation.task_id, detail, target.name, annotation.id))
        return ()
    removed = [label for label in said if label not in target.labels]
    if removed:
        detail = f"the labelling config does not have {', '.join(map(repr, removed))}"
        issues.append(Issue("label_removed", annotation.task_id, detail, target.name, annotation.id))
    return [label for label in said if label in target.labels]


def _shape(
    annotation: Annotation, target: Target, region: Mapping[str, Any], frame: _Frame, issues: list[Issue]
) -> _Shape | None:
    try:
        item = _item(region, frame.bag)
        if region.get("image_rotation") not in (None, 0, 360):
            raise _BadRegion("image_rotated", f"it was drawn on an image turned by {region['image_rotation']!r}°")
        value = region["value"]
        if target.kind == "BrushLabels":
            return _Shape(item, mask=_mask(region, frame.decode_rle))
        return _Shape(item, geometry=_outline(target, value, frame.size(item)))
    except _BadRegion as bad:
        detail = f"region {region.get('id')!r:.40}: {bad}"
        issues.append(Issue(bad.code, annotation.task_id, detail, target.name, annotation.id))
        return None


def _item(region: Mapping[str, Any], bag: Bag) -> int:
    if bag.kind == "slide":
        return 0
    item = region.get("item_index", 0 if len(bag) == 1 else None)
    if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < len(bag):
        raise _BadRegion("malformed", f"item_index {item!r:.40} is none of the {len(bag)} patches")
    return item


def _number(value: Mapping[str, Any], name: str, *, least: float | None = None) -> float:
    number = value.get(name)
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise _BadRegion("malformed", f"{name} is {number!r:.40}, not a number")
    if least is not None and number <= least:
        raise _BadRegion("malformed", f"{name} is {number}, so it has no area")
    return float(number)


def _outline(target: Target, value: Mapping[str, Any], size: tuple[int, int]) -> Any:
    scale = np.array(size, dtype=np.float64) / 100
    if target.kind == "PolygonLabels":
        points = value.get("points")
        try:
            ring = np.array(points, dtype=np.float64)
        except (TypeError, ValueError):
            ring = np.zeros(0)
        if ring.ndim != 2 or ring.shape[1] != 2 or len(ring) < 3 or not np.isfinite(ring).all():
            raise _BadRegion("malformed", f"points are {points!r:.80}, not three or more pairs of numbers")
        # A ring that crosses itself has no area of its own: its lobes have (by the even-odd rule).
        return shapely.make_valid(shapely.polygons(ring * scale))
    turn = math.radians(_number({"rotation": value.get("rotation", 0)}, "rotation"))
    x, y = _number(value, "x") * scale[0], _number(value, "y") * scale[1]
    if target.kind == "RectangleLabels":
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
        raise _BadRegion("malformed", f"a brush stroke of format {value.get('format')!r:.40} without rle")
    if not (isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0):
        raise _BadRegion("malformed", f"its image has the size {width!r:.20} x {height!r:.20}")
    try:
        pixels = decode_rle(value["rle"])
    except ValueError as error:
        raise _BadRegion("malformed", str(error)) from None
    if len(pixels) != width * height * 4:
        raise _BadRegion("malformed", f"{len(pixels)} values are not the RGBA of {width} x {height} pixels")
    return np.asarray(pixels.reshape(height, width, 4)[..., 3] > 0)


# --- votes ------------------------------------------------------------------------------------------------------


def _one_annotator(
    annotation: Annotation,
    control: str,
    by_label: Mapping[str, Sequence[_Shape]],
    frame: _Frame,
    min_overlap: float,
    issues: list[Issue],
) -> list[tuple[int, str]]:
    labels = list(by_label)
    covered = np.stack([frame.fractions(by_label[label]) for label in labels])
    enough = covered >= min_overlap - _SAME
    for label, tiles in zip(labels, enough, strict=True):
        if not tiles.any():
            detail = f"its regions of {label!r} cover no tile by {min_overlap:.0%} or more"
            issues.append(Issue("nothing_covered", annotation.task_id, detail, control, annotation.id))
    best = covered.max(axis=0)
    tied = (enough & (covered >= best - _SAME)).sum(axis=0) > 1
    if tied.any():
        detail = f"{int(tied.sum())} tiles are covered equally with two labels"
        issues.append(Issue("conflict", annotation.task_id, detail, control, annotation.id))
    winner = covered.argmax(axis=0)
    return [(int(tile), labels[winner[tile]]) for tile in np.flatnonzero(enough.any(axis=0) & ~tied)]


def _majority(task_id: int, control: str, votes: Mapping[int, Sequence[str]], issues: list[Issue]) -> TileLabels | None:
    tiles: list[int] = []
    labels: list[str] = []
    ties = disputed = 0
    for tile in sorted(votes):
        counts = Counter(votes[tile]).most_common()
        disputed += len(counts) > 1
        if len(counts) > 1 and counts[0][1] == counts[1][1]:
            ties += 1
            continue
        tiles.append(tile)
        labels.append(counts[0][0])
    if disputed > ties:
        issues.append(Issue("disagreement", task_id, f"{disputed - ties} tiles, decided by the majority", control))
    if ties:
        issues.append(Issue("tie", task_id, f"{ties} tiles are labelled differently without a majority", control))
    return TileLabels(task_id, control, np.array(tiles, dtype=np.int64), tuple(labels)) if tiles else None
