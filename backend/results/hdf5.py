"""A bag's result as one HDF5 file, with the names that the field's tools use.

====================  =======  ========  ==================================================
dataset               dtype    shape     meaning
====================  =======  ========  ==================================================
``features``          float16  (N, D)    latent of each tile
``coords``            int64    (N, 2)    level-0 x, y of each tile's top-left corner; attributes ``patch_size`` (pixels
                                         as encoded) and ``patch_size_level0`` (level-0 pixels), as in CLAM's files
``grid``              int64    (N, 2)    column, row of each tile
``attention_logits``  float32  (N, H)    attention before the softmax
``slide_embedding``   float32  (D,)      the slide vector
``patch_sizes``       int64    (N, 2)    width, height of each patch; only in a bag of patches
====================  =======  ========  ==================================================

The root attribute ``bag`` holds the bag's scalars and ``provenance`` how the result came about, both as JSON, with their SHA-256 in
``attributes_sha256``; the datasets carry HDF5's own Fletcher-32 checksums. A flipped byte is therefore an error when it is read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import numpy.typing as npt

from backend.errors import ResultDamaged, StoreUnavailable
from backend.results.bag import Bag, BagResult, Float32Array

FORMAT_VERSION = 1
_BAG_SCALARS = ("kind", "grid_size", "tile_size_level0", "slide_size", "tile_px", "tile_mpp", "mpp", "mpp_source")


def write_hdf5(result: BagResult, file: Path | BinaryIO) -> None:
    """Write ``result`` into ``file`` (a path that is overwritten, or a writable and seekable binary file)."""
    bag = result.bag
    bag_json = json.dumps({name: getattr(bag, name) for name in _BAG_SCALARS}, sort_keys=True)
    provenance_json = json.dumps(dict(result.provenance), sort_keys=True)
    with h5py.File(file, "w") as h5:
        h5.attrs["format_version"] = FORMAT_VERSION
        h5.attrs["bag"] = bag_json
        h5.attrs["provenance"] = provenance_json
        h5.attrs["attributes_sha256"] = _attributes_sha256(bag_json, provenance_json)
        arrays: dict[str, npt.NDArray[Any]] = {
            "features": result.latents,
            "coords": bag.coords,
            "grid": bag.grid,
            "attention_logits": result.attention_logits,
            "slide_embedding": result.slide_embedding,
        }
        if bag.patch_sizes is not None:
            arrays["patch_sizes"] = bag.patch_sizes
        for name, array in arrays.items():
            # Checksums need chunks; a chunk of about 1 MB is read and checked at disk speed.
            rows = max(1, min(len(array), 1_000_000 // max(1, array.nbytes // max(1, len(array)))))
            chunks = (rows, *array.shape[1:])
            h5.create_dataset(name, data=array, chunks=chunks, fletcher32=True)
        h5["coords"].attrs["patch_size"] = bag.tile_px
        h5["coords"].attrs["patch_size_level0"] = bag.tile_size_level0


def read_hdf5(file: Path | BinaryIO, *, latents: bool = True) -> BagResult:
    """Read a result back.

    Parameters
    ----------
    file
        A path or a readable, seekable binary file.
    latents
        Whether the latents are read. If not, ``result.latents`` has shape (N, 0): all that pictures and regions need is small.

    Raises
    ------
    ResultDamaged
        The file is not what :func:`write_hdf5` wrote.
    StoreUnavailable
        It cannot be opened, for a reason that is not the file's: too many open files, no permission.
    FileNotFoundError
        There is no such file.
    """
    try:
        with h5py.File(file, "r") as h5:
            version = int(h5.attrs["format_version"])
            if version != FORMAT_VERSION:
                raise ValueError(f"format version {version}, this release reads {FORMAT_VERSION}")
            bag_json, provenance_json = str(h5.attrs["bag"]), str(h5.attrs["provenance"])
            if h5.attrs["attributes_sha256"] != _attributes_sha256(bag_json, provenance_json):
                raise ValueError("the attributes do not match their checksum")
            scalars: dict[str, Any] = json.loads(bag_json)
            for name in ("grid_size", "slide_size"):
                scalars[name] = tuple(scalars[name])
            bag = Bag(
                coords=h5["coords"][:],
                grid=h5["grid"][:],
                patch_sizes=h5["patch_sizes"][:] if "patch_sizes" in h5 else None,
                **scalars,
            )
            features = h5["features"][:] if latents else np.empty((len(bag), 0), np.float16)
            return BagResult(
                bag, features, h5["attention_logits"][:], h5["slide_embedding"][:], json.loads(provenance_json)
            )
    except FileNotFoundError:
        raise
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise _damaged_or_unavailable(error) from error


# What says nothing about the file: HDF5 hands on the system's number for these, and has none for contents that are wrong.
_NOT_THE_FILE = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
)


def _damaged_or_unavailable(error: Exception) -> ResultDamaged | StoreUnavailable:
    if isinstance(error, OSError) and error.errno in _NOT_THE_FILE:
        return StoreUnavailable(
            f"A stored result cannot be opened now: {os.strerror(error.errno)}.",
            hint="Check the permissions of RESULTS_URL and the limit of open files (`ulimit -n`).",
        )
    return ResultDamaged(f"The stored result cannot be read: {error}")


def read_slide_embedding(file: Path | BinaryIO) -> Float32Array:
    """Only the slide embedding of a result, float32 (D,); errors as :func:`read_hdf5`."""
    try:
        with h5py.File(file, "r") as h5:
            embedding: Float32Array = h5["slide_embedding"][:]
            return embedding
    except FileNotFoundError:
        raise
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise _damaged_or_unavailable(error) from error


def _attributes_sha256(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
