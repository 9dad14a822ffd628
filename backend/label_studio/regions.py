"""From a bag's result to the regions of a prediction. Pure functions, no I/O.

All geometry is in percent of the slide, computed from level-0 coordinates; the brush mask alone is made of pixels, those of the
picture that Label Studio shows. Labels: a control's first label is used, except that bands take all, lowest attention first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from backend.errors import LabelConfigUnsupported
from backend.label_studio import rle
from backend.label_studio.drawn_area import DrawnArea
from backend.label_studio.hotspots import hot_areas, peaks
from backend.label_studio.labeling_config import EXAMPLE, GEOMETRY_KINDS, HEAD_KINDS, Control, LabelingConfig
from backend.label_studio.learnt import NOTHING_LEARNT, Learnt, TileClasses, suggested
from backend.label_studio.summary import summary_text
from backend.results.bag import Bag, BagResult, Float32Array, Int64Array, UInt8Array
from backend.results.ranks import hottest_first, percentile_ranks
from backend.slides.render import shown_size, tile_edges_px

ALPHA_LEVELS = 16
"""Steps of the alpha heatmap: few enough for short run-length codes, enough to look continuous."""

ALPHA_GAMMA = 1.5
"""Exponent from percentile rank to alpha: the lower half stays faint, so that tissue is seen where attention is low."""

BAND_ALPHA = 170
"""Alpha of a band. The editor draws the brush layer at 0.6 on top of this, so tissue stays visible."""

Region = dict[str, Any]


def predict_regions(
    result: BagResult,
    config: LabelingConfig,
    *,
    image_size: tuple[int, int] | None,
    model_version: str,
    settings_top_k: int,
    learnt: Learnt = NOTHING_LEARNT,
    area: DrawnArea | None = None,
) -> dict[str, Any]:
    """One prediction for one task.

    Parameters
    ----------
    result
        Of the task's bag.
    config
        Of the task's project.
    image_size
        Natural (width, height) in pixels of the picture shown for the slide. It must be exact: the editor copies the brush mask into
        a canvas of that size. ``None``: the picture has the size of :func:`backend.slides.render.shown_size`. Not used for a bag
        of patches, whose pages are the patches.
    model_version
        The string that Label Studio shows and compares.
    settings_top_k
        Regions of a control without ``model_top_k``.
    learnt
        What trained heads say. Without a head for the slide the prediction has no ``score``.
    area
        Interactive: attention is pooled anew over the tiles of a drawn area, and only these are shown, without summary and
        embedding. No tile inside: an empty list of regions.

    Returns
    -------
    ``{"model_version", "result", "score"}``, the last only with a head.

    Raises
    ------
    LabelConfigUnsupported
        There would be nothing to show, or the config cannot show a bag of this kind.
    RequestInvalid
        The drawn area has no place.
    """
    learnt.check(config)
    view = _View.of(result, config, image_size, area)
    prediction: dict[str, Any] = {"model_version": model_version, "result": []}
    regions: list[Region] = prediction["result"]
    if len(view.tiles) == 0:
        return prediction
    for control in config.active(*GEOMETRY_KINDS, *HEAD_KINDS, "TextArea"):
        classes = learnt.classes_for(control) if control.kind == "BrushLabels" else None
        if classes is not None:
            made = list(_class_maps(view, control, classes))
        elif control.kind in GEOMETRY_KINDS:
            top_k = settings_top_k if control.top_k is None else control.top_k
            made = list(_GEOMETRY[control.kind](view, control, top_k))
        elif area is not None or not _is_shown(control, learnt):
            continue
        elif control.kind == "TextArea":
            text = summary_text(result, model_version, learnt.similar, learnt.suggestions)
            made = [{"value": {"text": [text]}, "readonly": True}]
        else:
            made = suggested(control, learnt)
        seed = f"{view.digest}/{model_version}/{control.name}/{area and area.key}"
        for index, region in enumerate(made):
            regions.append(_complete(region, control, hashlib.sha256(f"{seed}/{index}".encode()).hexdigest()[:12]))
    if area is not None:
        return prediction
    if not regions:
        raise _nothing_to_show(result.bag, config)
    if learnt.confidence is not None:
        prediction["score"] = learnt.confidence
    carrier = next((region for region in regions if region["type"] == "choices"), regions[0])
    carrier.setdefault("meta", {})["embedding"] = [float(f"{value:.6g}") for value in result.slide_embedding.tolist()]
    return prediction


def _is_shown(control: Control, learnt: Learnt) -> bool:
    """Whether the editor shows a control as long as only our own suggestions stand: an answer that it hides is none."""
    said = {s.control: s.value for s in learnt.suggestions}
    for condition in control.conditions:
        value = said.get(condition.tag)
        chosen = set(value) if isinstance(value, tuple) else {value} - {None}
        if condition.chosen != bool(chosen & set(condition.choices) if condition.choices else chosen):
            return False
    return True


def _complete(region: Region, control: Control, region_id: str) -> Region:
    return {
        "id": region_id,
        "from_name": control.name,
        "to_name": control.to_name,
        "type": control.region_type,
        "origin": "prediction",
        **region,
    }


def _nothing_to_show(bag: Bag, config: LabelingConfig) -> LabelConfigUnsupported:
    if config.active(*GEOMETRY_KINDS):
        what = "patches" if bag.kind == "patches" else "this slide, with no regions allowed (TOP_K is 0)"
        return LabelConfigUnsupported(
            f"The labelling config's controls show nothing of {what}.",
            hint=f"Add BrushLabels or RectangleLabels, for example:\n{EXAMPLE}",
        )
    return LabelConfigUnsupported(
        "The labelling config has only Choices, Number or Rating for us, which stay empty until a head has been trained.",
        hint=f"Add a control that shows attention, for example:\n{EXAMPLE}",
    )


# --- what is shown ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _View:
    """The tiles that are shown, all of them or those of a drawn area, and their attention among themselves (row i is tile ``tiles[i]``)."""

    bag: Bag
    image_size: tuple[int, int]
    pages: bool
    tiles: Int64Array
    attention: Float32Array
    digest: str

    @classmethod
    def of(
        cls, result: BagResult, config: LabelingConfig, image_size: tuple[int, int] | None, area: DrawnArea | None
    ) -> _View:
        bag = result.bag
        if bag.kind == "patches":
            if config.active(*GEOMETRY_KINDS) and not config.image.pages:
                raise LabelConfigUnsupported(
                    f"The task is a bag of patches, and the image '{config.image.name}' shows a single picture.",
                    hint=f'Show the patches as pages: <Image name="{config.image.name}" valueList="$patches"/>.',
                )
            size = (0, 0)
        else:
            size = image_size or shown_size(bag.slide_size)
            if size[0] < 1 or size[1] < 1:
                raise ValueError(f"an image of {size[0]}×{size[1]} px cannot be shown")
        content = hashlib.sha256(bag.coords.tobytes() + result.attention_logits.tobytes())
        content.update(repr((bag.slide_size, size)).encode())
        tiles: Int64Array = np.arange(len(bag), dtype=np.int64)
        attention = result.mean_attention
        if area is not None:
            tiles = area.tiles(bag)
            attention = _pooled_again(result, tiles)
        return cls(bag, size, config.image.pages, tiles, attention, content.hexdigest())

    @cached_property
    def ranks(self) -> Float32Array:
        return percentile_ranks(self.attention)

    @cached_property
    def relative(self) -> npt.NDArray[np.float64]:
        """Attention relative to the highest shown, in [0, 1]: the score of a tile."""
        return self.attention.astype(np.float64) / float(self.attention.max())

    @cached_property
    def order(self) -> Int64Array:
        return hottest_first(self.attention)

    def frame(self, item: int = 0) -> Region:
        """What every drawn region says of its image."""
        if self.bag.patch_sizes is not None:
            width, height = self.bag.patch_sizes[item].tolist()
        else:
            width, height = self.image_size
        frame: Region = {
            "original_width": int(width),
            "original_height": int(height),
            "image_rotation": 0,
            "readonly": True,
        }
        if self.pages:
            frame["item_index"] = item
        return frame

    def percent(self, points: npt.NDArray[np.floating] | npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
        """Level-0 (…, 2) to percent of the slide, clipped to it."""
        return np.clip(points / np.array(self.bag.slide_size, dtype=np.float64) * 100, 0, 100)

    def tile_meta(self, i: int, rank: int) -> dict[str, Any]:
        tile = int(self.tiles[i])
        weight = float(self.attention[i])
        if self.bag.kind == "patches":
            place: dict[str, Any] = {"patch": tile}
        else:
            x, y = self.bag.coords[tile].tolist()
            place = {"x": x, "y": y, "size": self.bag.tile_size_level0}
        text = f"rank {rank} of {len(self.tiles)}, attention {weight:.3g}"
        return {"rank": rank, "attention": weight, "percentile": float(self.ranks[i]), **place, "text": [text]}


def _pooled_again(result: BagResult, tiles: Int64Array) -> Float32Array:
    """Mean over the heads of the softmax over these tiles only."""
    if len(tiles) == 0:
        return np.zeros(0, dtype=np.float32)
    logits = result.attention_logits[tiles].astype(np.float64)
    weights = np.exp(logits - logits.max(axis=0, keepdims=True))
    return np.asarray((weights / weights.sum(axis=0, keepdims=True)).mean(axis=1), dtype=np.float32)


# --- one function a kind of control ------------------------------------------------------------------------------


def _brush(view: _View, control: Control, top_k: int) -> Iterator[Region]:
    del top_k  # the whole map is shown
    if control.heatmap == "classes":
        return  # nothing until a tile head knows its labels
    shown = view.relative >= (control.score_threshold or 0)
    heatmap = control.heatmap or ("bands" if len(control.labels) > 1 else "alpha")
    if heatmap == "alpha":
        level = 1 + np.minimum((view.ranks * ALPHA_LEVELS).astype(np.int64), ALPHA_LEVELS - 1)
        alpha = np.round(255 * (level / ALPHA_LEVELS) ** ALPHA_GAMMA).astype(np.uint8)
        yield from _painted(view, control, control.labels[0], np.where(shown, alpha, 0).astype(np.uint8))
        return
    cuts = 1 - 0.5 ** np.arange(len(control.labels))  # each band holds half of what lies above the band before
    band = np.searchsorted(cuts, view.ranks, side="right") - 1
    for index, label in enumerate(control.labels):
        inside = shown & (band == index)
        if inside.any():
            yield from _painted(view, control, label, np.where(inside, BAND_ALPHA, 0).astype(np.uint8))


def _class_maps(view: _View, control: Control, classes: TileClasses) -> Iterator[Region]:
    """One region for each class of a tile head: the tiles whose most probable class it is, the stronger the more probable."""
    p = classes.probabilities[view.tiles]
    best, sure = p.argmax(axis=1), p.max(axis=1)
    level = 1 + np.minimum((sure * ALPHA_LEVELS).astype(np.int64), ALPHA_LEVELS - 1)
    alpha = np.round(255 * level / ALPHA_LEVELS).astype(np.uint8)
    shown = sure >= (control.score_threshold or 0)
    for index, label in enumerate(classes.classes):
        inside = shown & (best == index)
        if inside.any():
            yield from _painted(view, control, label, np.where(inside, alpha, 0).astype(np.uint8))


def _painted(view: _View, control: Control, label: str, alpha: UInt8Array) -> Iterator[Region]:
    """One region over the slide; for a bag of patches one on the page of each patch that is not transparent."""
    value = {"format": "rle", control.region_type: [label]}
    if view.bag.patch_sizes is not None:
        for i in np.flatnonzero(alpha):
            width, height = view.bag.patch_sizes[view.tiles[i]]
            code = rle.encode_runs(np.array([width * height]), alpha[i : i + 1])
            score = float(view.relative[i])
            yield {"value": {**value, "rle": code}, "score": score, **view.frame(int(view.tiles[i]))}
        return
    columns, rows = view.bag.grid_size
    grid = np.zeros((rows, columns), dtype=np.uint8)
    cells = view.bag.grid[view.tiles]
    grid[cells[:, 1], cells[:, 0]] = alpha
    code = rle.encode_grid(grid, *tile_edges_px(view.bag, view.image_size), view.image_size)
    yield {"value": {**value, "rle": code}, **view.frame()}


def _rectangles(view: _View, control: Control, top_k: int) -> Iterator[Region]:
    for rank, i in enumerate(view.order[:top_k].tolist(), start=1):
        score = float(view.relative[i])
        if score < (control.score_threshold or 0):
            return
        tile = int(view.tiles[i])
        if view.bag.kind == "patches":
            x, y, right, bottom = 0.0, 0.0, 100.0, 100.0
        else:
            corner = view.bag.coords[tile]
            x, y = view.percent(corner).tolist()
            right, bottom = view.percent(corner + view.bag.tile_size_level0).tolist()
        yield {
            "value": {
                "x": x,
                "y": y,
                "width": right - x,
                "height": bottom - y,
                "rotation": 0,
                control.region_type: [control.labels[0]],
            },
            "score": score,
            "meta": view.tile_meta(i, rank),
            **view.frame(tile if view.bag.kind == "patches" else 0),
        }


def _polygons(view: _View, control: Control, top_k: int) -> Iterator[Region]:
    if view.bag.kind == "patches":
        return
    bag, edge = view.bag, view.bag.tile_size_level0
    for rank, area in enumerate(hot_areas(bag.grid[view.tiles], view.attention, edge, bag.slide_size, top_k), start=1):
        score = float(view.relative[area.tiles].max())
        if score < (control.score_threshold or 0):
            return
        share = float(view.attention[area.tiles].sum(dtype=np.float64))
        mm2 = len(area.tiles) * (edge * bag.mpp / 1000) ** 2
        yield {
            "value": {"points": view.percent(area.outline).tolist(), control.region_type: [control.labels[0]]},
            "score": score,
            "meta": {
                "rank": rank,
                "tiles": len(area.tiles),
                "attention_share": share,
                "area_mm2": mm2,
                "text": [f"{len(area.tiles)} tiles ({mm2:.3g} mm²) with {share:.1%} of the attention"],
            },
            **view.frame(),
        }


def _keypoints(view: _View, control: Control, top_k: int) -> Iterator[Region]:
    if view.bag.kind == "patches":
        return
    bag, edge = view.bag, view.bag.tile_size_level0
    radius = min(1.5, max(0.4, 50 * edge / bag.slide_size[0]))  # percent of the width; the editor needs one
    for rank, i in enumerate(peaks(bag.grid[view.tiles], view.attention, top_k).tolist(), start=1):
        score = float(view.relative[i])
        if score < (control.score_threshold or 0):
            return
        x, y = view.percent(bag.coords[view.tiles[i]] + edge / 2).tolist()
        yield {
            "value": {"x": x, "y": y, "width": radius, control.region_type: [control.labels[0]]},
            "score": score,
            "meta": view.tile_meta(i, rank),
            **view.frame(),
        }


_GEOMETRY = {
    "BrushLabels": _brush,
    "RectangleLabels": _rectangles,
    "PolygonLabels": _polygons,
    "KeyPointLabels": _keypoints,
}
