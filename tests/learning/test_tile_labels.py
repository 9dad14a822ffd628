"""What people draw labels the tiles below it, by exact area."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from synthetic_bags import synthetic_patches

from backend.label_studio import rle
from backend.learning.labels import Annotation, Target
from backend.learning.tile_labels import tile_labels
from backend.results.bag import Bag

LABELS = ("tumour", "stroma")
BOXES = Target("boxes", "RectangleLabels", LABELS)
AREAS = Target("areas", "PolygonLabels", LABELS)
ROUND = Target("round", "EllipseLabels", LABELS)
BRUSH = Target("brush", "BrushLabels", LABELS)
SIZE = (2000, 1000)


def bag() -> Bag:
    """20 x 10 tiles of 100 px: a percent is 20 px across and 10 px down, a tile 5 % x 10 %."""
    column, row = (axis.ravel() for axis in np.meshgrid(np.arange(20), np.arange(10)))
    grid = np.stack([column, row], axis=1).astype(np.int64)
    return Bag("slide", grid * 100, grid, (20, 10), 100.0, SIZE, 224, 0.5, 1.12, "slide")


def drawn(target: Target, label: str, **more: Any) -> dict[str, Any]:
    top = {
        k: more.pop(k)
        for k in ("origin", "readonly", "image_rotation", "original_width", "original_height", "item_index")
        if k in more
    }
    return {"id": "r", "from_name": target.name, "value": {target.key: [label], **more}, "origin": "manual", **top}


def box(label: str, x: float, y: float, width: float, height: float, **more: Any) -> dict[str, Any]:
    return drawn(BOXES, label, x=x, y=y, width=width, height=height, **{"rotation": 0, **more})


def stroke(label: str, mask: np.ndarray) -> dict[str, Any]:
    height, width = mask.shape
    code = rle.encode_alpha(np.where(mask, 255, 0).astype(np.uint8))
    return drawn(BRUSH, label, format="rle", rle=code, original_width=width, original_height=height)


def labelled(
    *annotators: list[dict[str, Any]], overlap: float = 0.5, of: Bag | None = None
) -> tuple[dict[Any, str], list[str]]:
    """Label by (column, row), and the issue codes."""
    of = of or bag()
    annotations = [Annotation(i, 1, f"user {i}", "", tuple(regions)) for i, regions in enumerate(annotators)]
    found, issues = tile_labels(
        annotations, [BOXES, AREAS, ROUND, BRUSH], of, decode_rle=rle.decode, min_overlap=overlap
    )
    cells = {
        tuple(of.grid[t].tolist()): label for entry in found for t, label in zip(entry.tiles, entry.labels, strict=True)
    }
    return cells, [issue.code for issue in issues]


def test_a_rectangle_labels_the_tiles_that_it_covers_by_enough() -> None:
    # Tiles (2..3, 4) whole, 60 % of column 4.
    region = box("tumour", x=10, y=40, width=13, height=10)
    assert set(labelled([region])[0]) == {(2, 4), (3, 4), (4, 4)}
    assert set(labelled([region], overlap=0.61)[0]) == {(2, 4), (3, 4)}


def test_exactly_the_least_overlap_is_enough() -> None:
    assert set(labelled([box("tumour", x=10, y=40, width=2.5, height=10)], overlap=0.5)[0]) == {(2, 4)}


def test_a_rotated_rectangle_turns_clockwise_about_its_top_left_corner_in_pixels() -> None:
    # 300 px x 100 px from (1000, 500), turned by 90°: x 900..1000, y 500..800.
    assert set(labelled([box("tumour", x=50, y=50, width=15, height=10, rotation=90)])[0]) == {(9, 5), (9, 6), (9, 7)}


def test_a_polygon_labels_by_exact_area() -> None:
    # The half of tile (0, 0) above its diagonal, which is half of it.
    triangle = drawn(AREAS, "tumour", points=[[0, 0], [5, 0], [0, 10]])
    assert set(labelled([triangle], overlap=0.5)[0]) == {(0, 0)}
    assert labelled([triangle], overlap=0.501) == ({}, ["nothing_covered"])


def test_an_ellipse_covers_pi_quarters_of_the_tile_around_it() -> None:
    ellipse = drawn(ROUND, "tumour", x=12.5, y=45, radiusX=2.5, radiusY=5, rotation=30)
    assert set(labelled([ellipse], overlap=math.pi / 4 - 1e-3)[0]) == {(2, 4)}
    assert labelled([ellipse], overlap=math.pi / 4 + 1e-3)[0] == {}


def test_a_brush_stroke_labels_by_its_pixels_at_any_size_of_the_picture() -> None:
    mask = np.zeros((200, 400), dtype=bool)  # a tile is 20 x 20 px here
    mask[40:60, 40:72] = True  # tile (2, 2), and 60 % of (3, 2)
    assert set(labelled([stroke("stroma", mask)])[0]) == {(2, 2), (3, 2)}
    assert set(labelled([stroke("stroma", mask)], overlap=0.7)[0]) == {(2, 2)}


def test_regions_that_overlap_are_not_counted_twice() -> None:
    twice = [box("tumour", x=10, y=40, width=2, height=10)] * 2  # 40 % of tile (2, 4), drawn two times
    assert labelled(twice) == ({}, ["nothing_covered"])
    beside = [box("tumour", x=10, y=40, width=2, height=10), box("tumour", x=12, y=40, width=2, height=10)]
    assert set(labelled(beside)[0]) == {(2, 4)}


def test_the_label_that_covers_more_wins_and_an_even_cover_is_reported() -> None:
    more, less = box("tumour", x=10, y=40, width=5, height=10), box("stroma", x=10, y=40, width=4, height=10)
    assert labelled([less, more]) == ({(2, 4): "tumour"}, [])
    assert labelled([more, box("stroma", x=10, y=40, width=5, height=10)]) == ({}, ["conflict"])


def test_annotators_vote_on_each_tile() -> None:
    tumour, stroma = box("tumour", x=10, y=40, width=5, height=10), box("stroma", x=10, y=40, width=5, height=10)
    assert labelled([tumour], [stroma], [tumour]) == ({(2, 4): "tumour"}, ["disagreement"])
    assert labelled([tumour], [stroma]) == ({}, ["tie"])


@pytest.mark.parametrize("machine", [{"origin": "prediction"}, {"readonly": True}])
def test_machine_regions_teach_nothing(machine: dict[str, Any]) -> None:
    assert labelled([box("tumour", 10, 40, 5, 10, **machine)]) == ({}, [])


def test_a_machine_region_that_a_person_changed_teaches() -> None:
    assert set(labelled([box("tumour", 10, 40, 5, 10, origin="prediction-changed")])[0]) == {(2, 4)}


def test_regions_of_the_attention_control_teach_nothing_whoever_drew_them() -> None:
    annotations = [Annotation(1, 1, "user", "", (box("tumour", 10, 40, 5, 10),))]
    found = tile_labels(annotations, [BOXES], bag(), decode_rle=rle.decode, min_overlap=0.5, machine_controls={"boxes"})
    assert found == ([], [])


def test_a_label_removed_from_the_config_is_reported() -> None:
    assert labelled([box("necrosis", 10, 40, 5, 10)]) == ({}, ["label_removed"])


@pytest.mark.parametrize(
    "region",
    [
        box("tumour", 10, 40, -5, 10),
        box("tumour", float("nan"), 40, 5, 10),
        box("tumour", 10, 40, 5, 10, rotation="x"),
        drawn(BOXES, "tumour"),
        drawn(AREAS, "tumour", points=[[0, 0], [1, 1]]),
        drawn(AREAS, "tumour", points="everything"),
        drawn(ROUND, "tumour", x=1, y=1, radiusX=0, radiusY=1),
        drawn(BRUSH, "tumour", format="rle", rle=[1, 2, 3], original_width=10, original_height=10),
        drawn(
            BRUSH,
            "tumour",
            format="rle",
            rle=rle.encode_alpha(np.ones((4, 4), np.uint8)),
            original_width=9,
            original_height=4,
        ),
        drawn(BRUSH, "tumour", format="png"),
        {"id": "r", "from_name": "boxes", "origin": "manual", "value": None},
        {"id": "r", "from_name": "boxes", "origin": "manual", "value": {"rectanglelabels": 3}},
    ],
)
def test_a_region_that_cannot_be_read_is_reported_and_the_others_teach(region: dict[str, Any]) -> None:
    assert labelled([region, box("stroma", 50, 50, 5, 10)]) == ({(10, 5): "stroma"}, ["malformed"])


def test_a_region_on_a_turned_image_is_not_guessed_at() -> None:
    assert labelled([box("tumour", 10, 40, 5, 10, image_rotation=90)]) == ({}, ["image_rotated"])


def test_a_region_beyond_the_border_counts_only_within_it() -> None:
    assert set(labelled([box("tumour", x=95, y=90, width=50, height=50)])[0]) == {(19, 9)}


def test_a_polygon_that_crosses_itself_covers_both_lobes() -> None:
    bow = drawn(AREAS, "tumour", points=[[0, 0], [10, 20], [10, 0], [0, 20]])
    # Lobes: the left and right triangles meet in the middle of the 2 x 2 tiles and cover half of each.
    assert set(labelled([bow], overlap=0.5)[0]) == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_fractional_tile_edges_stay_exact() -> None:
    odd = replace(bag(), tile_size_level0=99.5, coords=np.round(bag().grid * 99.5).astype(np.int64))
    whole = box("stroma", x=0, y=0, width=100, height=100)
    assert len(labelled([whole], overlap=1.0, of=odd)[0]) == len(odd)


def test_pages_of_a_bag_of_patches_are_labelled_by_their_number() -> None:
    patches = synthetic_patches([(224, 224), (100, 50), (224, 200)], hot=0).bag
    on_page = box("tumour", 0, 0, 60, 100, item_index=1)
    assert labelled([on_page], of=patches)[0] == {(1, 0): "tumour"}
    assert labelled([box("tumour", 0, 0, 60, 100, item_index=7)], of=patches) == ({}, ["malformed"])


def test_strokes_made_on_pictures_of_different_sizes_are_united() -> None:
    large, small = np.zeros((200, 400), dtype=bool), np.zeros((100, 200), dtype=bool)
    large[80:100, 40:48] = True  # 40 % of tile (2, 4), from its left
    small[40:50, 24:27] = True  # the next 30 %
    assert labelled([stroke("tumour", large)], overlap=0.65) == ({}, ["nothing_covered"])
    assert set(labelled([stroke("tumour", large), stroke("tumour", small)], overlap=0.65)[0]) == {(2, 4)}
