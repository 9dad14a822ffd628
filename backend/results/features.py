"""A result as the files that CLAM and TRIDENT read: float32 features, and level-0 coordinates with sizes in whole
pixels.

Below the folder that is exported to, with NAME the slide's name and MODEL the model version:

``clam``
    ``patches/NAME.h5``, ``features_MODEL/h5_files/NAME.h5`` and ``features_MODEL/pt_files/NAME.pt``, as CLAM's
    ``create_patches_fp.py`` and ``extract_features_fp.py`` write them.
``trident``
    In ``20x_224px_0px_overlap`` (target magnification and tile size): ``patches/NAME_patches.h5``,
    ``features_MODEL/NAME.h5`` and ``slide_features_MODEL/NAME.h5``, as TRIDENT's ``run_batch_of_slides.py`` writes
    them.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import h5py
import numpy as np
import numpy.typing as npt

from backend.errors import ExportUnsupported
from backend.results.bag import SLIDE_REF, Bag, BagResult
from backend.results.export import readable

Layout = Literal["clam", "trident"]

# TRIDENT's magnification of a slide: that of the first of these that its µm per pixel lie below
# (WSI._fetch_magnification).
_NOMINAL = ((0.16, 80), (0.2, 60), (0.3, 40), (0.6, 20), (1.2, 10), (2.4, 5))
_OME_ENDINGS = (".ome.tiff", ".ome.tif", ".ome.zarr")


def layout_named(name: str) -> Layout:
    """The layout of this name; :class:`~backend.errors.ExportUnsupported` if there is none."""
    if name in get_args(Layout):
        return cast(Layout, name)
    raise ExportUnsupported(f"{name!r} is no layout of features.", hint="Say --layout clam or --layout trident.")


def slide_name(file_name: str, layout: Layout) -> str:
    """What the program calls a slide of this file name: without its ending, to TRIDENT all of ``.ome.tif``."""
    base = file_name.rsplit("/", 1)[-1]
    if layout == "trident":
        for ending in _OME_ENDINGS:
            if base.lower().endswith(ending):
                return base[: -len(ending)]
    return Path(base).stem


def magnifications(bag: Bag) -> tuple[int | float, int | float]:
    """``level0_magnification`` and ``target_magnification``, with which TRIDENT cuts the tiles of this bag and not
    those of another scale.

    To TRIDENT a pixel has 10 µm divided by the magnification, so that it reads ``patch_size * level0 / target`` level-0
    pixels. Its own magnification of a slide is one of 5, 10, 20, 40, 60 and 80 (0.25 µm/px: 40; 0.5: 20; 1.0: 10). That
    is given where it leads to this bag's tile size in whole pixels, else the exact 10 / mpp: at 0.2527 µm/px, 40 would
    cut 448 pixels where the tiles have 443. Whole numbers are ``int``.
    """
    target = _whole(10 / bag.tile_mpp)
    nominal = next((magnification for below, magnification in _NOMINAL if bag.mpp < below), None)
    if nominal is not None and round(bag.tile_px * nominal / target) == round(bag.tile_size_level0):
        return nominal, target
    return _whole(10 / bag.mpp), target


def _whole(value: float) -> int | float:
    return round(value) if abs(value - round(value)) < 1e-9 else value


def feature_files(result: BagResult, name: str, layout: Layout) -> dict[Path, Callable[[], memoryview]]:
    """The files of a result: the path of each below the folder that is exported to, and what makes its content, the
    same bytes each time.

    Each file of tiles' features is HDF5 with ``features`` float32 (N, D), ``coords`` int64 (N, 2), and, beyond what the
    two programs look for, ``attention`` float32 (N, H) (the softmax over the slide's tiles, a column a head),
    ``attention_scores`` float32 (N, 1) (the mean of the heads, by the name that CLAM's heatmaps read) and
    ``slide_embedding`` float32 (D,). TRIDENT's file of the slide holds that embedding as ``features``. A bag of patches
    has no coordinates: its files lack them, and it has none in ``patches``.

    ``coords`` are the tiles' corners in level 0. ``patch_size_level0`` (for CLAM also ``patch_size``) is the tile's
    edge rounded to whole pixels, so neighbours seem to overlap, or to leave a gap, by up to 1 pixel;
    ``tile_size_level0`` is the edge itself, a float. Further attributes of ``coords``: ``mpp`` and ``tile_mpp`` (µm per
    pixel of level 0 and of a tile as encoded), and ``bounds`` (x, y, width, height of what was scanned) where the slide
    states it.

    Parameters
    ----------
    name
        The slide's name, which the files get.
    """
    bag = result.bag
    model = re.sub(r"[^\w.-]+", "-", str(result.provenance.get("model_version", "unknown")))
    if layout == "clam":
        top = Path(f"features_{model}")
        about = {"features": {"name": readable(name), "encoder": model}, "coords": _clam_attributes(bag, name)}
        files = {
            Path("patches", f"{name}.h5"): lambda: _hdf5(result, _COORDS, about),
            top / "h5_files" / f"{name}.h5": lambda: _hdf5(result, _TILES | _COORDS, about),
            top / "pt_files" / f"{name}.pt": lambda: _torch(result),
        }
    else:
        top = _trident_folder(bag)
        about = {
            "features": {"name": readable(name), "encoder": model, "savetodir": f"{top}/features_{model}"},
            "coords": _trident_attributes(bag, name),
        }
        files = {
            top / "patches" / f"{name}_patches.h5": lambda: _hdf5(result, _COORDS, about),
            top / f"features_{model}" / f"{name}.h5": lambda: _hdf5(result, _TILES | _COORDS, about),
            top / f"slide_features_{model}" / f"{name}.h5": lambda: _hdf5(result, _SLIDE | _COORDS, about),
        }
    if bag.kind == "patches":
        files = {path: make for path, make in files.items() if path.parent.name != "patches"}
    return files


_Arrays = dict[str, Callable[[BagResult], npt.NDArray[Any]]]
_COORDS: _Arrays = {"coords": lambda result: result.bag.coords}
_SLIDE: _Arrays = {"features": lambda result: result.slide_embedding}
_TILES: _Arrays = {
    "features": lambda result: result.latents.astype(np.float32),
    "attention": lambda result: result.attention,
    "attention_scores": lambda result: result.mean_attention[:, None],
    "slide_embedding": lambda result: result.slide_embedding,
}


def _clam_attributes(bag: Bag, name: str) -> dict[str, Any]:
    if bag.kind == "patches":
        return {}
    return _common_attributes(bag, name) | {
        "patch_level": 0,
        "patch_size": round(bag.tile_size_level0),
        "patch_size_level0": round(bag.tile_size_level0),
        "downsample": (1.0, 1.0),
        "level_dim": bag.slide_size,
        "downsampled_level_dim": bag.slide_size,
        "save_path": "patches",
    }


def _trident_folder(bag: Bag) -> Path:
    if bag.kind == "patches":
        return Path(f"patches_of_{bag.tile_px}px")
    return Path(f"{magnifications(bag)[1]:g}x_{bag.tile_px}px_0px_overlap")


def _trident_attributes(bag: Bag, name: str) -> dict[str, Any]:
    if bag.kind == "patches":
        return {}
    level0, target = magnifications(bag)
    return _common_attributes(bag, name) | {
        "patch_size": bag.tile_px,
        "patch_size_level0": round(bag.tile_size_level0),
        "level0_magnification": level0,
        "target_magnification": target,
        "overlap": 0,
        "savetodir": str(_trident_folder(bag)),
        "level0_width": bag.slide_size[0],
        "level0_height": bag.slide_size[1],
    }


def _common_attributes(bag: Bag, name: str) -> dict[str, Any]:
    bounds = {} if bag.bounds is None else {"bounds": bag.bounds}
    sizes = {"tile_size_level0": bag.tile_size_level0, "mpp": bag.mpp, "tile_mpp": bag.tile_mpp}
    return {"name": readable(name), **sizes, **bounds}


def _hdf5(result: BagResult, arrays: _Arrays, attributes: Mapping[str, Mapping[str, Any]]) -> memoryview:
    """Made in memory: the HDF5 library ends the process when a disk fills up under it."""
    buffer = io.BytesIO()
    provenance = {name: value for name, value in result.provenance.items() if name != SLIDE_REF}
    with h5py.File(buffer, "w") as h5:
        h5.attrs["provenance"] = json.dumps(provenance, sort_keys=True)
        for name, make in arrays.items():
            if name == "coords" and result.bag.kind == "patches":
                continue
            dataset = h5.create_dataset(name, data=make(result))
            for key, value in attributes.get(name, {}).items():
                dataset.attrs[key] = value
    return buffer.getbuffer()


def _torch(result: BagResult) -> memoryview:
    import torch  # of all exports, this alone needs it

    buffer = io.BytesIO()
    torch.save(torch.from_numpy(result.latents.astype(np.float32)), buffer)
    return buffer.getbuffer()
