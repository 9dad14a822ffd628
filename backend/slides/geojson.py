"""The tiles of a result as GeoJSON for QuPath, in QuPath's frame.

Where a slide states the area that was scanned (``openslide.bounds-x, -y, -width, -height``: MIRAX, Leica SCN, Zeiss
CZI, Ventana BIF), QuPath shows that area alone, and its (0, 0) is the area's corner (``OpenslideImageServer`` in
qupath-extension-openslide). Level 0, which every other file of ours uses, begins before it."""

from __future__ import annotations

import math
import uuid
from typing import Any, Literal

from backend.errors import ExportUnsupported
from backend.results.bag import SLIDE_REF, Bag, BagResult
from backend.results.export import readable
from backend.results.ranks import percentile_ranks
from backend.slides.grid import Grid

ObjectType = Literal["tile", "annotation", "detection"]

_CLASSES: tuple[tuple[float, str, tuple[int, int, int]], ...] = (
    (0.9, "Attention: top 10 %", (253, 231, 37)),
    (0.75, "Attention: top 25 %", (94, 201, 98)),
    (0.5, "Attention: upper half", (33, 145, 140)),
    (0.0, "Attention: lower half", (59, 82, 139)),
)
"""Lowest percentile rank, name and RGB colour (from viridis) of each classification, highest first."""

_NAMESPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")  # RFC 4122's namespace for URLs


def to_geojson(
    result: BagResult, name: str, *, object_type: ObjectType = "tile", level0: bool = False
) -> dict[str, Any]:
    """Every tile of a slide as a GeoJSON feature, as QuPath reads it (File → Import objects, QuPath 0.4 and newer).

    Parameters
    ----------
    result
        Of a bag of kind ``"slide"``.
    name
        Name of the slide; part of the collection and of the objects' ids.
    object_type
        QuPath's kind of object: tiles are light and take measurement maps; annotations can be edited.
    level0
        Coordinates are those of level 0 instead of QuPath's. The two differ only on slides that state bounds.

    Returns
    -------
    A ``FeatureCollection`` (RFC 7946, in pixels instead of degrees, as QuPath does). Its member ``frame`` is
    ``"qupath"`` or ``"level0"``, its ``origin`` the level-0 x and y of that frame's (0, 0).

    Each tile is a closed ring of whole pixels that begins at its top-left corner and ends where the next tile begins,
    cut at the edge of the slide and, in QuPath's frame, of the bounds, so that tiles neither overlap nor leave a gap. A
    tile that lies outside the bounds altogether is kept whole, outside QuPath's picture. The measurements are the
    attention weights themselves (mean of the heads, then each head), the percentile rank, column and row; a value that
    is not finite is left out, which QuPath shows as NaN. Ids are the same whenever the same slide and model are
    exported.

    Raises
    ------
    ExportUnsupported
        The bag is a bag of patches, which have no place on a slide.
    """
    bag = result.bag
    if bag.kind != "slide":
        raise ExportUnsupported(
            "A bag of patches has no coordinates on a slide, so it cannot be written as GeoJSON.",
            hint="Export the HDF5 instead: it holds the attention of each patch.",
        )
    name = readable(name)
    attention = result.mean_attention
    ranks = percentile_ranks(attention)
    rows = zip(
        _rings(bag, level0=level0),
        bag.grid.tolist(),
        attention.tolist(),
        ranks.tolist(),
        result.attention.tolist(),
        strict=True,
    )
    seed = f"{name}/{result.provenance.get('fingerprint', '')}"
    features = []
    for index, (ring, (column, row), weight, rank, heads) in enumerate(rows):
        measurements = {"Column": column, "Row": row}
        properties: dict[str, Any] = {"objectType": object_type, "isLocked": True, "measurements": measurements}
        if math.isfinite(weight):
            _, label, colour = next(entry for entry in _CLASSES if rank >= entry[0])
            properties["classification"] = {"name": label, "color": list(colour)}
            measurements |= {"Attention": weight, "Attention percentile": rank}
        measurements |= {f"Attention head {head}": value for head, value in enumerate(heads) if math.isfinite(value)}
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(_NAMESPACE, f"{seed}/{index}")),
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": properties,
            }
        )
    return {
        "type": "FeatureCollection",
        "name": name,
        "frame": "level0" if level0 else "qupath",
        "origin": list(_origin(bag, level0=level0)),
        "provenance": {name: value for name, value in result.provenance.items() if name != SLIDE_REF},
        "features": features,
    }


def _origin(bag: Bag, *, level0: bool) -> tuple[int, int]:
    return (0, 0) if level0 or bag.bounds is None else bag.bounds[:2]


def _rings(bag: Bag, *, level0: bool) -> list[list[list[int]]]:
    """The outer ring of each tile, in the frame."""
    grid = Grid.of_bag(bag)
    left, top = _origin(bag, level0=level0)
    width, height = bag.slide_size if level0 or bag.bounds is None else bag.bounds[2:]
    rings = []
    for column, row in bag.grid.tolist():
        x0, y0, x1, y1 = grid.rectangle(column, row)
        x0, y0, x1, y1 = x0 - left, y0 - top, x1 - left, y1 - top
        if x0 < width and y0 < height and x1 > 0 and y1 > 0:
            x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
        rings.append([[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]])
    return rings
