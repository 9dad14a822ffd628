"""A tissue mask that somebody gives with a slide: a GeoJSON of polygons or a PNG, in place of what would be found.

GeoJSON (RFC 7946 but for its coordinates, which are level-0 pixels): a geometry, a feature, a collection of either,
or a list of features. Polygons and multipolygons count, holes are holes; points and lines are passed over. QuPath
counts from the corner of the scanned area where a slide states one (``openslide.bounds-x``, ``-y``); its objects have
an ``objectType``, and are moved there.

A PNG covers the slide's rectangle, at any size of the same shape. Tissue is what is neither black nor transparent.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import shapely
import shapely.geometry
from PIL import Image, ImageDraw

from backend.errors import TissueMaskInvalid
from backend.paths import StrPath
from backend.results.bag import BoolArray

ENDINGS = (".tissue.geojson", ".tissue.png")
MAX_BYTES = 2**26
MAX_PIXELS = 2**26
_PNG = b"\x89PNG\r\n\x1a\n"
_ASPECT = 0.01
_OVERHANG = 0.1
_DEGREES = (180.0, 90.0)
_NO_JSON = (ValueError, RecursionError)
_NO_GEOMETRY = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
    shapely.errors.ShapelyError,
)


class GivenTissue(NamedTuple):
    """A mask, bool (h, w), over the slide's rectangle, and a sentence of what was made of the file."""

    mask: BoolArray
    note: str


def places_beside(slide: Path) -> list[Path]:
    """Where a mask may lie beside a slide, the first that exists counts: ``slide.svs.tissue.geojson``,
    ``slide.svs.tissue.png``, ``slide.tissue.geojson``, ``slide.tissue.png``."""
    return [slide.with_name(stem + ending) for stem in (slide.name, slide.stem) for ending in ENDINGS]


def tissue_file_beside(slide: StrPath) -> Path | None:
    """The mask that lies beside a slide's file (not beside a link to it), if one does."""
    return next((place for place in places_beside(Path(os.path.realpath(slide))) if _exists(place)), None)


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # as the ending may make it
            raise
        return False


def read_tissue_file(
    path: StrPath, slide_size: tuple[int, int], shape: tuple[int, int], bounds: tuple[int, int, int, int] | None = None
) -> GivenTissue:
    """The mask in a file.

    Parameters
    ----------
    slide_size
        (width, height) of level 0 in pixels.
    shape
        (h, w) at which polygons are drawn, and to which larger pictures are reduced.
    bounds
        The slide's scanned area, for files of QuPath.

    Raises
    ------
    TissueMaskInvalid
        It cannot be read, is too large, holds no tissue, or was not made for a slide of this size.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise _invalid(
                path,
                f"has {size / 1e6:.0f} MB, and {MAX_BYTES / 1e6:.0f} are the most",
                "Simplify its outlines, or give a smaller PNG.",
            )
        data = path.read_bytes()
    except OSError as error:
        raise _invalid(path, f"cannot be read: {error.strerror}", "Check its permissions.") from error
    if data.startswith(_PNG):
        mask, note = _from_png(path, slide_size, shape), ""
    else:
        mask, note = _from_geojson(path, data, slide_size, shape, bounds)
    if not mask.any():
        raise _invalid(
            path, "marks no pixel of the slide as tissue", "Draw what is to be analysed, or remove the file."
        )
    return GivenTissue(
        mask, f"Tissue was taken from {path.name} as it is: no ink, specks or holes were looked for.{note}"
    )


def _invalid(path: Path, what: str, hint: str) -> TissueMaskInvalid:
    return TissueMaskInvalid(f"The tissue mask {path.name} {what}.", hint=hint)


# --- pictures -----------------------------------------------------------------------------------------------------


def _from_png(path: Path, slide_size: tuple[int, int], shape: tuple[int, int]) -> BoolArray:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise _too_many_pixels(path, f"{width} x {height}")
            expected = width * slide_size[1] / slide_size[0]
            if abs(height - expected) > max(1.5, _ASPECT * max(expected, height)):
                raise _invalid(
                    path,
                    f"has {width} x {height} pixels, another shape than the slide's {slide_size[0]} x {slide_size[1]}",
                    f"It must cover the whole slide: {width} x {max(1, round(expected))} would.",
                )
            return _reduced(_is_marked(image), shape)
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(path, "far too many") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise _invalid(path, f"cannot be decoded: {error}", "Save it as an 8-bit PNG.") from error


def _too_many_pixels(path: Path, size: str) -> TissueMaskInvalid:
    what = f"has {size} pixels, and {MAX_PIXELS / 1e6:.0f} million are the most"
    return _invalid(path, what, "Save it smaller: 8 µm per pixel is enough.")


def _is_marked(image: Image.Image) -> BoolArray:
    if image.mode == "P" or "transparency" in image.info:
        image = image.convert("RGBA")
    values = np.asarray(image)
    if values.ndim == 2:
        marked: BoolArray = values != 0
        return marked
    colours = values[..., :-1] if image.mode in ("RGBA", "LA") else values
    marked = (colours != 0).any(axis=2)
    return marked & (values[..., -1] != 0) if image.mode in ("RGBA", "LA") else marked


def _reduced(mask: BoolArray, shape: tuple[int, int]) -> BoolArray:
    if mask.shape[0] <= shape[0] or mask.shape[1] <= shape[1]:
        return mask
    covered = Image.fromarray(mask.astype(np.uint8) * 255).resize(shape[::-1], Image.Resampling.BOX)
    small: BoolArray = np.asarray(covered) >= 128
    return small


# --- polygons -----------------------------------------------------------------------------------------------------


def _from_geojson(
    path: Path,
    data: bytes,
    slide_size: tuple[int, int],
    shape: tuple[int, int],
    bounds: tuple[int, int, int, int] | None,
) -> tuple[BoolArray, str]:
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except _NO_JSON as error:
        raise _invalid(
            path,
            f"is neither a PNG nor GeoJSON ({error!s:.80})",
            "Export annotations as GeoJSON, or save a mask as PNG.",
        ) from error
    polygons = []
    of_qupath = False
    for geometry, properties in _geometries(content):
        try:
            made = shapely.geometry.shape(geometry)
            found = [part for part in _parts(made) if part.geom_type == "Polygon" and not part.is_empty]
        except _NO_GEOMETRY as error:
            raise _invalid(
                path, f"holds a {geometry.get('type')!r} that is none ({error!s:.80})", "Export it again."
            ) from error
        polygons += found
        of_qupath |= bool(found) and "objectType" in properties
    if not polygons:
        raise _invalid(path, "holds no polygon", "Outline tissue with polygons; points and lines have no area.")
    extent = shapely.total_bounds(polygons)
    if not np.isfinite(extent).all():
        raise _invalid(path, "has coordinates that are no numbers", "Export it again.")
    x, y = bounds[:2] if bounds is not None and of_qupath else (0, 0)
    _check_extent(path, extent.tolist(), (x, y), slide_size)
    note = (
        f" Its coordinates count from the scanned area's corner ({x}, {y}), as QuPath has them."
        if (x, y) != (0, 0)
        else ""
    )
    return _drawn(polygons, (x, y), slide_size, shape), note


def _geometries(content: Any) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Each geometry of a file with its feature's properties."""
    stack = [content]
    while stack:
        part = stack.pop()
        if isinstance(part, list):
            stack += part
        elif isinstance(part, Mapping):
            kind = part.get("type")
            if kind == "FeatureCollection":
                stack.append(part.get("features") or [])
            elif kind == "Feature":
                geometry, properties = part.get("geometry"), part.get("properties")
                if isinstance(geometry, Mapping):
                    yield geometry, properties if isinstance(properties, Mapping) else {}
            elif "coordinates" in part or kind == "GeometryCollection":
                yield part, {}


def _parts(geometry: shapely.Geometry) -> Iterator[Any]:
    if hasattr(geometry, "geoms"):
        for part in geometry.geoms:
            yield from _parts(part)
    else:
        yield geometry


def _check_extent(path: Path, extent: Sequence[float], origin: tuple[int, int], slide_size: tuple[int, int]) -> None:
    x0, y0, x1, y1 = extent
    width, height = slide_size
    said = f"reaches from ({x0:.6g}, {y0:.6g}) to ({x1:.6g}, {y1:.6g})"
    if (
        max(abs(x0), abs(x1)) <= _DEGREES[0]
        and max(abs(y0), abs(y1)) <= _DEGREES[1]
        and min(slide_size) > 4 * _DEGREES[0]
    ):
        raise _invalid(
            path,
            f"{said}: these look like degrees of longitude and latitude, not like pixels of a slide of {width} x {height}",
            "Coordinates must be level-0 pixels, x before y, from the top-left corner.",
        )
    x0, y0, x1, y1 = x0 + origin[0], y0 + origin[1], x1 + origin[0], y1 + origin[1]
    beyond = max(-x0 / width, x1 / width - 1, -y0 / height, y1 / height - 1)
    if beyond > _OVERHANG:
        raise _invalid(
            path,
            f"{said}, far beyond the slide of {width} x {height}",
            "Is it of another slide, or drawn at another scale? Coordinates must be level-0 pixels.",
        )


def _drawn(
    polygons: list[Any], origin: tuple[int, int], slide_size: tuple[int, int], shape: tuple[int, int]
) -> BoolArray:
    mask = Image.new("L", shape[::-1])
    scale = np.array((shape[1] / slide_size[0], shape[0] / slide_size[1]))
    for polygon in polygons:
        outline, *holes = (
            (np.asarray(ring.coords)[:, :2] + origin) * scale - 0.5 for ring in (polygon.exterior, *polygon.interiors)
        )
        left, top = (max(0, math.floor(v)) for v in outline.min(axis=0))
        right, bottom = (min(limit, math.ceil(v) + 1) for v, limit in zip(outline.max(axis=0), mask.size, strict=True))
        if left >= right or top >= bottom:
            continue
        part = Image.new("1", (right - left, bottom - top))
        draw = ImageDraw.Draw(part)
        for ring, value in ((outline, 1), *((hole, 0) for hole in holes)):
            draw.polygon([tuple(point) for point in (ring - (left, top)).tolist()], fill=value)
        mask.paste(1, (left, top), part)
    drawn: BoolArray = np.asarray(mask) != 0
    return drawn
