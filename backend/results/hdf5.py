"""A bag's result as one HDF5 file. Other programs' files are made of it by :mod:`backend.results.features`.

====================  =======  ========  ==================================================
dataset               dtype    shape     meaning
====================  =======  ========  ==================================================
``features``          float16  (N, D)    latent of each tile
``coords``            int64    (N, 2)    level-0 x, y of each tile's top-left corner; attributes ``patch_size`` (pixels
                                         as encoded), ``patch_size_level0`` (level-0 pixels, a float) and, where the
                                         slide states what was scanned, ``bounds`` (level-0 x, y, width, height)
``grid``              int64    (N, 2)    column, row of each tile
``attention_logits``  float32  (N, H)    attention before the softmax
``slide_embedding``   float32  (D,)      the slide vector
``patch_sizes``       int64    (N, 2)    width, height of each patch; only in a bag of patches
``tissue``            uint8    (B,)      the bytes of a PNG over the slide's rectangle: 0 glass, 1 tissue, 2 taken as
                                         ink; attributes ``source``, ``share`` (of the slide), ``ink_share`` (of what
                                         is not glass); not in earlier files
====================  =======  ========  ==================================================

The root attribute ``bag`` holds the bag's scalars and ``provenance`` how the result came about, both as JSON. The datasets carry HDF5's own Fletcher-32
checksums, and the file ends with a seal (:mod:`backend.results.seal`) over everything but the features' numbers. A flipped byte is therefore an error when it is read.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import numpy.typing as npt

from backend.errors import ResultDamaged, StoreUnavailable
from backend.paths import StrPath
from backend.results.bag import Bag, BagResult, Float32Array
from backend.results.seal import Range, Seal, make_seal, read_seal
from backend.results.tissue_record import TissueRecord

FORMAT_VERSION = 2
_SUMMARY_MAX_CHARS = 30_000
_BAG_SCALARS = (
    "kind",
    "grid_size",
    "tile_size_level0",
    "slide_size",
    "tile_px",
    "tile_mpp",
    "mpp",
    "mpp_source",
    "bounds",
    "notes",
)


def write_hdf5(result: BagResult, file: StrPath | BinaryIO) -> None:
    """Write ``result`` into ``file`` (a path that is overwritten, or an empty, readable, writable and seekable binary file)."""
    if isinstance(file, str | os.PathLike):
        # Made in memory: the HDF5 library ends the process when a disk fills up under it.
        made = io.BytesIO()
        write_hdf5(result, made)
        Path(file).write_bytes(made.getbuffer())
        return
    bag = result.bag
    with h5py.File(file, "w") as h5:
        h5.attrs["format_version"] = FORMAT_VERSION
        h5.attrs["bag"] = json.dumps({name: getattr(bag, name) for name in _BAG_SCALARS}, sort_keys=True)
        h5.attrs["provenance"] = json.dumps(dict(result.provenance), sort_keys=True)
        arrays: dict[str, npt.NDArray[Any]] = {
            "features": result.latents,
            "coords": bag.coords,
            "grid": bag.grid,
            "attention_logits": result.attention_logits,
            "slide_embedding": result.slide_embedding,
        }
        if bag.patch_sizes is not None:
            arrays["patch_sizes"] = bag.patch_sizes
        if bag.tissue is not None:
            arrays["tissue"] = np.frombuffer(bag.tissue.png, np.uint8)
        for name, array in arrays.items():
            # Checksums need chunks; a chunk of about 1 MB is read and checked at disk speed.
            rows = max(1, min(len(array), 1_000_000 // max(1, array.nbytes // max(1, len(array)))))
            chunks = (rows, *array.shape[1:])
            h5.create_dataset(name, data=array, chunks=chunks, fletcher32=True)
        h5["coords"].attrs["patch_size"] = bag.tile_px
        h5["coords"].attrs["patch_size_level0"] = bag.tile_size_level0
        if bag.bounds is not None:
            h5["coords"].attrs["bounds"] = bag.bounds
        if bag.tissue is not None:
            for name in _TISSUE_SCALARS:
                h5["tissue"].attrs[name] = getattr(bag.tissue, name)
        features = _chunks(h5["features"])
    summary: dict[str, Any] | None = {"tiles": len(bag), "provenance": dict(result.provenance)}
    if len(json.dumps(summary)) > _SUMMARY_MAX_CHARS:  # it is then read from the file itself
        summary = None
    seal = make_seal(file, result.slide_embedding, features, summary)
    file.seek(0, os.SEEK_END)
    file.write(seal)


def _chunks(dataset: h5py.Dataset) -> list[Range]:
    """Where the numbers of a dataset lie in its file."""
    found = [dataset.id.get_chunk_info(i) for i in range(dataset.id.get_num_chunks())]
    return [(chunk.byte_offset, chunk.byte_offset + chunk.size) for chunk in found]


def read_hdf5(file: StrPath | BinaryIO, *, latents: bool = True) -> BagResult:
    """Read a result back.

    Parameters
    ----------
    file
        A path or a readable, seekable binary file.
    latents
        Whether the latents are read. If not, ``result.latents`` has shape (N, 0): all that pictures and regions need is small,
        and neither read nor checked is what is large.

    Raises
    ------
    ResultDamaged
        The file is not what :func:`write_hdf5` wrote.
    StoreUnavailable
        It cannot be read, for a reason that is the system's: too many open files, no permission, a disk or network that fails.
    FileNotFoundError
        There is no such file.
    """
    try:
        with _opened(file) as plain:
            read_seal(plain).check(plain)
        with h5py.File(file, "r") as h5:
            version = int(h5.attrs["format_version"])
            if version != FORMAT_VERSION:
                raise ValueError(f"format version {version}, this release reads {FORMAT_VERSION}")
            scalars: dict[str, Any] = json.loads(str(h5.attrs["bag"]))
            provenance = json.loads(str(h5.attrs["provenance"]))
            for name in ("grid_size", "slide_size", "bounds", "notes"):
                if scalars.get(name) is not None:  # earlier results have neither bounds nor notes
                    scalars[name] = tuple(scalars[name])
            size = _size_of(file)
            bag = Bag(
                coords=_array(h5, "coords", size),
                grid=_array(h5, "grid", size),
                patch_sizes=_array(h5, "patch_sizes", size) if "patch_sizes" in h5 else None,
                tissue=_tissue(h5, size) if "tissue" in h5 else None,
                **scalars,
            )
            features = _array(h5, "features", size) if latents else np.empty((len(bag), 0), np.float16)
            logits, embedding = _array(h5, "attention_logits", size), _array(h5, "slide_embedding", size)
            return BagResult(bag, features, logits, embedding, provenance)
    except FileNotFoundError:
        raise
    except _UNREADABLE as error:
        raise _damaged_or_unavailable(error) from error


# Kind of number and dimensions of each dataset.
_DATASETS = {
    "features": ("f", 2),
    "coords": ("i", 2),
    "grid": ("i", 2),
    "attention_logits": ("f", 2),
    "slide_embedding": ("f", 1),
    "patch_sizes": ("i", 2),
    "tissue": ("u", 1),
}
_TISSUE_SCALARS = ("source", "share", "ink_share")


def _array(h5: h5py.File, name: str, file_bytes: int) -> npt.NDArray[Any]:
    """A dataset, read whole, if its numbers lie in this file as :func:`write_hdf5` writes them.

    HDF5 lets a dataset lie in any other file of the machine, unpack to terabytes or be made up on reading; a result that somebody else put into the
    store must do none of it.
    """
    kind, dimensions = _DATASETS[name]
    if not isinstance(h5.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} is not in the file itself")
    dataset = h5[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind != kind or dataset.ndim != dimensions:
        raise ValueError(f"{name} is not what it should be")
    made = dataset.id.get_create_plist()
    filters = {made.get_filter(i)[0] for i in range(made.get_nfilters())}
    if dataset.external is not None or dataset.is_virtual or not filters <= {h5py.h5z.FILTER_FLETCHER32}:
        raise ValueError(f"{name} is kept in a way that no result is")
    if not dataset.nbytes <= dataset.id.get_storage_size() <= file_bytes:
        raise ValueError(f"{name} is {dataset.nbytes} bytes long, which the file does not hold")
    array: npt.NDArray[Any] = dataset[:]
    return array


def _tissue(h5: h5py.File, file_bytes: int) -> TissueRecord:
    png = _array(h5, "tissue", file_bytes).astype(np.uint8).tobytes()
    source, share, ink_share = (h5["tissue"].attrs[name] for name in _TISSUE_SCALARS)
    return TissueRecord.kept(png, str(source), float(share), float(ink_share))


def _size_of(file: StrPath | BinaryIO) -> int:
    with _opened(file) as plain:
        return plain.seek(0, os.SEEK_END)


@contextlib.contextmanager
def _opened(file: StrPath | BinaryIO) -> Iterator[BinaryIO]:
    if isinstance(file, str | os.PathLike):
        with Path(file).open("rb") as opened:
            yield opened
    else:
        yield file


# Whatever h5py, NumPy and JSON find wrong with a file, sizes that fit into no memory included.
_UNREADABLE = (OSError, KeyError, ValueError, TypeError, RuntimeError, MemoryError, OverflowError)


def _damaged_or_unavailable(error: Exception) -> ResultDamaged | StoreUnavailable:
    # The system has a number for everything that goes wrong with it. Contents that are wrong have none.
    if isinstance(error, OSError) and error.errno:
        return StoreUnavailable(
            f"A stored result cannot be read now: {os.strerror(error.errno)}.",
            hint="Check the disk and the permissions of RESULTS_URL, and the limit of open files (`ulimit -n`).",
        )
    return ResultDamaged(f"The stored result cannot be read: {error}")


@dataclass(frozen=True)
class Summary:
    """Of a result what is shown of many at once: float32 (D,) slide embedding, number of tiles, provenance."""

    embedding: Float32Array
    tiles: int
    provenance: Mapping[str, Any]


def read_end(file: StrPath | BinaryIO, *, before: int = 0) -> Seal:
    """The seal of a result, which holds its slide embedding and mostly a summary: HDF5 is not asked. Errors as :func:`read_hdf5`.

    ``before``: see :func:`backend.results.seal.read_seal`.
    """
    try:
        with _opened(file) as plain:
            return read_seal(plain, before=before)
    except FileNotFoundError:
        raise
    except _UNREADABLE as error:
        raise _damaged_or_unavailable(error) from error


def summary_of(seal: Seal) -> Summary | None:
    """What a seal says of its result; ``None`` if it lacks that."""
    found = seal.summary or {}
    tiles, provenance = found.get("tiles"), found.get("provenance")
    if not isinstance(tiles, int) or not isinstance(provenance, dict):
        return None
    return Summary(seal.embedding, tiles, provenance)
