"""Results in forms that other programs open: GeoJSON for QuPath, and files that are either whole or not there."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from backend.errors import ExportUnsupported
from backend.paths import StrPath
from backend.results.bag import SLIDE_REF, BagResult
from backend.results.ranks import percentile_ranks

ObjectType = Literal["tile", "annotation", "detection"]

_CLASSES: tuple[tuple[float, str, tuple[int, int, int]], ...] = (
    (0.9, "Attention: top 10 %", (253, 231, 37)),
    (0.75, "Attention: top 25 %", (94, 201, 98)),
    (0.5, "Attention: upper half", (33, 145, 140)),
    (0.0, "Attention: lower half", (59, 82, 139)),
)
"""Lowest percentile rank, name and RGB colour (from viridis) of each classification, highest first."""

_NAMESPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")  # RFC 4122's namespace for URLs


def to_geojson(result: BagResult, name: str, *, object_type: ObjectType = "tile") -> dict[str, Any]:
    """Every tile of a slide as a GeoJSON feature, as QuPath reads it (File → Import objects, QuPath 0.4 and newer).

    Parameters
    ----------
    result
        Of a bag of kind ``"slide"``.
    name
        Name of the slide; part of the collection and of the objects' ids.
    object_type
        QuPath's kind of object: tiles are light and take measurement maps; annotations can be edited.

    Returns
    -------
    A ``FeatureCollection`` (RFC 7946, in level-0 pixels instead of degrees, as QuPath does). Each ring is closed and starts at the
    tile's corner in ``coords``. The measurements are the attention weights themselves (mean of the heads, then each head), the
    percentile rank, column and row; ids are the same whenever the same slide and model are exported.

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
    edge = int(bag.tile_size_level0) if bag.tile_size_level0.is_integer() else bag.tile_size_level0
    attention = result.mean_attention
    ranks = percentile_ranks(attention)
    rows = zip(
        bag.coords.tolist(),
        bag.grid.tolist(),
        attention.tolist(),
        ranks.tolist(),
        result.attention.tolist(),
        strict=True,
    )
    seed = f"{name}/{result.provenance.get('fingerprint', '')}"
    features = []
    for index, ((x, y), (column, row), weight, rank, heads) in enumerate(rows):
        _, label, colour = next(entry for entry in _CLASSES if rank >= entry[0])
        measurements = {"Attention": weight, "Attention percentile": rank, "Column": column, "Row": row}
        measurements |= {f"Attention head {head}": value for head, value in enumerate(heads)}
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(_NAMESPACE, f"{seed}/{index}")),
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [[[x, y], [x + edge, y], [x + edge, y + edge], [x, y + edge], [x, y]]],
                },
                "properties": {
                    "objectType": object_type,
                    "classification": {"name": label, "color": list(colour)},
                    "isLocked": True,
                    "measurements": measurements,
                },
            }
        )
    provenance = {name: value for name, value in result.provenance.items() if name != SLIDE_REF}
    return {"type": "FeatureCollection", "name": name, "provenance": provenance, "features": features}


def write_bytes(path: StrPath, data: bytes) -> None:
    """Write a file so that it is whole or not there: under a temporary name beside it, then renamed. Makes the folder."""
    with whole_file(path) as temporary, temporary.open("xb") as file:
        file.write(data)


@contextmanager
def whole_file(path: StrPath) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to: on the disk and renamed to ``path`` at the end, gone after an error. Makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: StrPath, content: Any, *, indent: int | None = None) -> None:
    """Write JSON, whole or not at all.

    Raises
    ------
    ValueError
        A number is not finite: JSON has no word for it.
    """
    write_bytes(path, json.dumps(content, allow_nan=False, ensure_ascii=False, indent=indent).encode())


def write_geojson(path: StrPath, result: BagResult, name: str, *, object_type: ObjectType = "tile") -> None:
    """:func:`to_geojson` into a file, whole or not at all."""
    write_json(path, to_geojson(result, name, object_type=object_type))
