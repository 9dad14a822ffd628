"""A table of slides with their embeddings, written as AnnData (h5ad), Parquet or CSV: one row a slide, the same columns in each.

What is missing in a row is ``None`` here, and what each format has for that in the file: an empty cell in CSV, null in Parquet, NaN,
a missing category or a masked value in h5ad.
"""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from backend.errors import ExportUnsupported, ExtraMissing, FileExists
from backend.paths import StrPath
from backend.results.bag import Float32Array
from backend.results.export import whole_file

ColumnKind = Literal["text", "integer", "number", "yes_no"]
Cell = str | int | float | bool | None


@dataclass(frozen=True, eq=False)
class Column:
    """N cells of one kind; ``None`` where a row has none."""

    kind: ColumnKind
    cells: Sequence[Cell]


@dataclass(frozen=True, eq=False)
class SlideTable:
    """N slides.

    Attributes
    ----------
    columns
        By name, N cells each; the first is a whole number that is another in every row.
    embeddings
        float32 (N, D).
    about
        What holds for the whole table, JSON values: ``uns`` in h5ad, metadata of the schema in Parquet; CSV has no place for it.
    """

    columns: Mapping[str, Column]
    embeddings: Float32Array
    about: Mapping[str, Any]

    def __post_init__(self) -> None:
        lengths = {len(column.cells) for column in self.columns.values()} | {len(self.embeddings)}
        if len(lengths) != 1:
            raise ValueError(f"the columns and embeddings of a table have {sorted(lengths)} rows")


def write_table(table: SlideTable, path: StrPath, kind: str = "", *, overwrite: bool = False) -> None:
    """Write ``table`` so that the file is whole or not there.

    Parameters
    ----------
    kind
        ``h5ad``, ``parquet`` or ``csv``; by the ending of ``path`` if empty.

    Raises
    ------
    ExportUnsupported
        There is no such format.
    FileExists
        ``path`` is there already, and ``overwrite`` is not given.
    ExtraMissing
        The packages that write the format are not installed.
    """
    write = writer(path, kind, overwrite=overwrite)
    with whole_file(path) as temporary:
        write(table, temporary)
        _refuse_existing(path, overwrite)


def writer(path: StrPath, kind: str = "", *, overwrite: bool = False) -> Callable[[SlideTable, Path], None]:
    """What writes such a file; raises all that :func:`write_table` refuses, before anything is computed."""
    path = Path(path)
    kind = kind or path.suffix.removeprefix(".").lower()
    if kind not in _WRITERS:
        raise ExportUnsupported(
            f"{kind!r} is no format that slides can be exported to.",
            hint=f"Say --format {', '.join(_WRITERS)}, or give the file such an ending.",
        )
    packages, write = _WRITERS[kind]
    _refuse_existing(path, overwrite)
    for package in packages:
        _load(package, kind)
    return write


def _refuse_existing(path: StrPath, overwrite: bool) -> None:
    path = Path(path)
    if path.is_dir():
        raise FileExists(f"{path} is a folder.", hint="Give the name of a file in it.")
    if path.exists() and not overwrite:
        raise FileExists(f"{path} is there already.", hint="Give another name, or --force to replace it.")


def _load(package: str, kind: str) -> Any:
    try:
        with warnings.catch_warnings():
            # anndata warns of the zarr that the slide readers of mmm pin; nothing here reads or writes zarr.
            warnings.filterwarnings("ignore", "anndata will no longer support zarr v2", DeprecationWarning)
            return import_module(package)
    except ImportError as error:
        raise ExtraMissing(
            f"Writing {kind} needs the package {package}, which cannot be imported ({error}).",
            hint="pip install 'wsc-label-studio-backend[export]'; CSV needs none.",
        ) from error


# --- the formats ----------------------------------------------------------------------------------------------------


def _write_h5ad(table: SlideTable, path: Path) -> None:
    anndata, pandas = _load("anndata", "h5ad"), _load("pandas", "h5ad")

    def series(column: Column) -> Any:
        if column.kind == "number":
            return pandas.array([float("nan") if cell is None else cell for cell in column.cells], dtype="float64")
        if None not in column.cells:
            kinds = {"text": "object", "integer": "int64", "yes_no": "bool"}
            return pandas.Series(list(column.cells), dtype=kinds[column.kind]).to_numpy()
        if column.kind == "text":
            return pandas.Categorical(list(column.cells), categories=sorted(_known(column)))
        return pandas.array(list(column.cells), dtype="Int64" if column.kind == "integer" else "boolean")

    first = next(iter(table.columns.values()))
    rows = pandas.Index([str(cell) for cell in first.cells], dtype="object")
    named: dict[str, Any] = {}
    for name, column in table.columns.items():
        name = name.replace("/", "_")  # in HDF5 a slash would be a group
        while name in named:
            name += "_"
        named[name] = series(column)
    obs = pandas.DataFrame(named, index=rows)
    dims = pandas.Index([f"e{i}" for i in range(table.embeddings.shape[1])], dtype="object")
    uns = {name: _plain(value) for name, value in table.about.items()}
    found = anndata.AnnData(X=table.embeddings, obs=obs, var=pandas.DataFrame(index=dims), uns=uns)
    found.write_h5ad(path)


def _known(column: Column) -> set[str]:
    return {str(cell) for cell in column.cells if cell is not None}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) else json.dumps(value)


def _write_parquet(table: SlideTable, path: Path) -> None:
    pa, parquet = _load("pyarrow", "parquet"), _load("pyarrow.parquet", "parquet")
    kinds = {"text": pa.string(), "integer": pa.int64(), "number": pa.float64(), "yes_no": pa.bool_()}
    arrays = {name: pa.array(list(column.cells), type=kinds[column.kind]) for name, column in table.columns.items()}
    n, dim = table.embeddings.shape
    arrays["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(table.embeddings.reshape(n * dim)), dim)
    about = {name: value if isinstance(value, str) else json.dumps(value) for name, value in table.about.items()}
    parquet.write_table(pa.table(arrays).replace_schema_metadata(about), path)


def _write_csv(table: SlideTable, path: Path) -> None:
    with path.open("x", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow([*table.columns, *(f"e{i}" for i in range(table.embeddings.shape[1]))])
        rows = zip(*(column.cells for column in table.columns.values()), strict=True)
        for row, embedding in zip(rows, table.embeddings, strict=True):
            # As text, a float32 has the fewest digits that name it and no other.
            out.writerow([*map(_cell, row), *embedding.astype(str).tolist()])


def _cell(cell: Cell) -> str:
    if cell is None:
        return ""
    return str(cell).lower() if isinstance(cell, bool) else str(cell)


_WRITERS: dict[str, tuple[tuple[str, ...], Callable[[SlideTable, Path], None]]] = {
    "h5ad": (("anndata", "pandas"), _write_h5ad),
    "parquet": (("pyarrow", "pyarrow.parquet"), _write_parquet),
    "csv": ((), _write_csv),
}
