"""The last look at a prediction before it leaves. What fails here would break the editor or be kept by Label Studio for good."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from label_studio_sdk.label_interface import LabelInterface

from backend.errors import InvalidPrediction
from backend.label_studio import rle
from backend.label_studio.labeling_config import HEAD_KINDS, Control, LabelingConfig, parse_config

_PERCENT_SLACK = 1e-9  # of arithmetic in float64: 100 - x + x may differ from 100 in the last bit


@lru_cache(maxsize=8)
def _interface(config_xml: str) -> tuple[LabelingConfig, LabelInterface]:
    config = parse_config(config_xml)  # first, because it refuses XML that the SDK's parser would expand
    return config, LabelInterface(config_xml)


def check_prediction(
    prediction: Mapping[str, Any], config_xml: str, image_size: tuple[int, int] | None, *, may_be_empty: bool = False
) -> None:
    """Refuse a prediction that Label Studio or its editor could not digest.

    Parameters
    ----------
    prediction
        ``{"model_version", "result"}`` and, if a head made it, ``"score"``.
    config_xml
        The project's labelling config.
    image_size
        (width, height) in pixels of the picture shown, which every drawn region must state; ``None`` for a bag of patches, whose
        pages differ.
    may_be_empty
        An answer to a smart tool may hold no region; a stored prediction may not, because it would never be asked for again.

    Raises
    ------
    InvalidPrediction
        With every fault found, by region.
    LabelConfigUnsupported
        The labelling config cannot be read.
    """
    config, interface = _interface(config_xml)
    faults = list(_prediction_faults(prediction, may_be_empty))
    if not faults:
        faults += [
            f"region {i}: {fault}"
            for i, region in enumerate(prediction["result"])
            for fault in _region_faults(region, config, image_size)
        ]
    if not faults:  # the SDK's messages repeat whole values, so ours come first
        faults = [str(error)[:300] for error in interface.validate_prediction(dict(prediction), return_errors=True)]
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise InvalidPrediction(
            f"A prediction failed its check and was not sent: {shown}.", hint="This is a defect; please report it."
        )


def _prediction_faults(prediction: Mapping[str, Any], may_be_empty: bool) -> Iterator[str]:
    version = prediction.get("model_version")
    if not isinstance(version, str) or not version.strip():
        yield f"model_version is {version!r}, not a name"
    if "score" in prediction and not _is_share(prediction["score"]):
        yield f"score is {prediction['score']!r}, not a number from 0 to 1 (leave it out where there is none)"
    result = prediction.get("result")
    if not isinstance(result, list) or not all(isinstance(region, Mapping) for region in result):
        yield "result is not a list of regions"
        return
    if not result and not may_be_empty:
        yield "result is empty"
    ids = [region.get("id") for region in result]
    if not all(isinstance(name, str) and name for name in ids) or len(set(ids)) != len(ids):
        yield "region ids are missing or not unique"


def _region_faults(region: Mapping[str, Any], config: LabelingConfig, size: tuple[int, int] | None) -> Iterator[str]:
    control = config.control(str(region.get("from_name")))
    if control is None or region.get("to_name") != control.to_name:
        yield f"from_name {region.get('from_name')!r} and to_name {region.get('to_name')!r} are no control and its image"
        return
    if region.get("type") != control.region_type:
        yield f"type {region.get('type')!r} does not fit the control '{control.name}' ({control.kind})"
        return
    value = region.get("value")
    if not isinstance(value, Mapping):
        yield "value is missing"
        return
    bad = next(_unusable({key: item for key, item in region.items() if key != "value"}, ""), None) or next(
        _unusable({key: item for key, item in value.items() if key != "rle"}, "value"), None
    )
    if bad is not None:
        yield bad
        return
    if "score" in region and not _is_share(region["score"]):
        yield f"score is {region['score']!r}, not a number from 0 to 1"
    if control.labels:
        labels = value.get(control.region_type)
        if not isinstance(labels, list) or not labels or not set(labels) <= set(control.labels):
            yield f"labels {labels!r} are not among those of '{control.name}'"
    yield from _geometry_faults(region, value, control, config, size)


def _geometry_faults(
    region: Mapping[str, Any],
    value: Mapping[str, Any],
    control: Control,
    config: LabelingConfig,
    size: tuple[int, int] | None,
) -> Iterator[str]:
    if control.kind == "Rating" and not (isinstance(value.get("rating"), int) and value["rating"] > 0):
        yield f"rating is {value.get('rating')!r}, not a number of stars"
    if control.kind in (*HEAD_KINDS, "TextArea"):
        return
    width, height = region.get("original_width"), region.get("original_height")
    if not isinstance(width, int) or not isinstance(height, int) or width < 1 or height < 1:
        yield f"original_width {width!r} and original_height {height!r} are not pixels"
        return
    if size is not None and (width, height) != tuple(size):
        yield f"it states an image of {width}×{height} px, and {size[0]}×{size[1]} px is shown"
    if config.image.pages and not isinstance(region.get("item_index"), int):
        yield "item_index is missing, and the image has pages"
    if control.kind == "BrushLabels":
        try:
            length = len(rle.decode(value.get("rle", ())))
        except (ValueError, TypeError) as error:
            yield f"rle: {error}"
        else:
            wanted = 4 * width * height
            if length != wanted:
                yield f"rle decodes to {length} bytes, not to {wanted} for {width}×{height} px"
    elif control.kind == "PolygonLabels":
        points = value.get("points")
        if not isinstance(points, list) or len(points) < 3 or any(len(point) != 2 for point in points):
            yield "points are not three or more pairs"
        elif not all(_is_percent(number) for point in points for number in point):
            yield "points lie outside 0 to 100 percent"
    elif control.kind == "KeyPointLabels":
        if not all(_is_percent(value.get(key)) for key in ("x", "y", "width")):
            yield "x, y, width are not percentages"
    else:
        x, y, across, down = (value.get(key, "") for key in ("x", "y", "width", "height"))
        if not all(map(_is_percent, (x, y, across, down))):
            yield "x, y, width, height are not percentages"
        elif not across or not down or not _is_percent(x + across) or not _is_percent(y + down):
            yield f"the rectangle {x}, {y}, {across}, {down} is empty or leaves the image"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_percent(value: Any) -> bool:
    return _is_number(value) and -_PERCENT_SLACK <= value <= 100 + _PERCENT_SLACK


def _unusable(item: object, path: str) -> Iterator[str]:
    """What JSON or the editor cannot carry: infinities, NaN, null, types that are not JSON's."""
    if isinstance(item, Mapping):
        for key, part in item.items():
            yield from _unusable(part, f"{path}.{key}" if path else str(key))
    elif isinstance(item, list | tuple):
        for part in item:
            yield from _unusable(part, path)
    elif not isinstance(item, str | bool) and not _is_number(item):
        yield f"{path} holds {item!r}, which is not text, true, false or a finite number"
