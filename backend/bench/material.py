"""What is measured on: slides, tiles, bags and models made here, never zeros and nobody's patients."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from backend.bench.measure import Plan
from backend.results.bag import Bag, BagResult, UInt8Array
from backend.settings import Settings
from backend.slides.grid import Grid
from backend.slides.reader import open_slide
from backend.slides.synthetic import write_synthetic_slide
from backend.slides.tiles import read_tiles

_TILE = 256
_DRAWING_PX = 2560


def drawing(folder: Path, mpp: float, edge: int = _DRAWING_PX) -> UInt8Array:
    """A square picture of synthetic tissue, uint8 (edge, edge, 3), from the middle of a synthetic slide."""
    made = write_synthetic_slide(folder / f"drawing-{mpp:g}-{edge}.tif", size=(2 * edge, 2 * edge), mpp=mpp, seed=11)
    level = np.asarray(tifffile.imread(made.path, key=0))
    made.path.unlink()
    half = edge // 2
    return np.ascontiguousarray(level[half : half + edge, half : half + edge])


def write_big_pyramid(path: Path, picture: UInt8Array, edge: int, mpp: float, *, quality: int = 85) -> Path:
    """A tiled-JPEG pyramid of ``edge`` x ``edge`` pixels, levels 1, 4, 16, … as scanners write them, filled with copies of ``picture``.

    Tiles repeat, so each different one is compressed once, and nothing large is held in memory.
    """
    level, downsample = Image.fromarray(picture), 1
    with tifffile.TiffWriter(path, bigtiff=edge > 40_000) as writer:
        while True:
            size = math.ceil(edge / downsample)
            writer.write(
                _encoded(np.asarray(level), size, quality),
                shape=(size, size, 3),
                dtype=np.uint8,
                photometric="ycbcr",
                subsampling=(2, 1),
                tile=(_TILE, _TILE),
                compression="jpeg",
                subfiletype=int(downsample > 1),
                resolution=(10_000 / (mpp * downsample),) * 2,
                resolutionunit="CENTIMETER",
                metadata=None,
            )
            if size < 1024:
                return path
            level, downsample = level.reduce(4), downsample * 4


def _encoded(picture: UInt8Array, size: int, quality: int) -> Iterator[bytes]:
    period = len(picture)
    known: dict[tuple[int, int], bytes] = {}
    for y in range(0, size, _TILE):
        for x in range(0, size, _TILE):
            place = (y % period, x % period)
            if place not in known:
                rows = (np.arange(_TILE) + place[0]) % period
                columns = (np.arange(_TILE) + place[1]) % period
                encoded = imagecodecs.jpeg8_encode(
                    np.ascontiguousarray(picture[rows][:, columns]),
                    level=quality,
                    colorspace="rgb",
                    outcolorspace="ycbcr",
                    subsampling="422",
                )
                known[place] = bytes(encoded)
            yield known[place]


def grid_bag(slide_size: tuple[int, int], mpp: float, settings: Settings, *, limit: int | None = None) -> Bag:
    """Every tile that lies whole on a slide, tissue or not, row by row; with ``limit``, a square block of about so many."""
    edge = settings.tile_px * settings.tile_mpp / mpp
    grid = Grid.covering(slide_size, edge)
    columns, rows = max(1, int(slide_size[0] / edge)), max(1, int(slide_size[1] / edge))
    if limit is not None:
        side = max(1, round(math.sqrt(limit)))
        columns, rows = min(columns, side), min(rows, side)
    y, x = np.divmod(np.arange(columns * rows, dtype=np.int64), columns)
    cells = np.stack([x, y], axis=1)
    return Bag(
        kind="slide",
        coords=grid.coords_of(cells),
        grid=cells,
        grid_size=(grid.columns, grid.rows),
        tile_size_level0=edge,
        slide_size=slide_size,
        tile_px=settings.tile_px,
        tile_mpp=settings.tile_mpp,
        mpp=mpp,
        mpp_source="slide",
    )


def some_result(bag: Bag, seed: int = 0) -> BagResult:
    """A made-up result for a bag, with a hot spot, as a model's looks."""
    rng = np.random.default_rng(seed)
    n = len(bag)
    distance = np.linalg.norm(bag.grid - bag.grid.mean(axis=0) * rng.uniform(0.6, 1.4, 2), axis=1)
    hot = 4 * np.exp(-distance / max(1.0, 0.15 * math.sqrt(n)))
    return BagResult(
        bag,
        rng.normal(size=(n, 768)).astype(np.float16),
        (rng.normal(size=(n, 8)) + hot[:, None]).astype(np.float32),
        rng.normal(size=768).astype(np.float32),
        {
            "model_version": "benchmark",
            "fingerprint": "0" * 40,
            "model_name": "benchmark",
            "stand_in": True,
            "precision": "float32",
            "mmm_release": "",
            "slide": "benchmark",
            "reader": "none",
        },
    )


def some_tiles(plan: Plan, count: int) -> UInt8Array:
    """``count`` tiles of synthetic tissue, uint8 (count, 224, 224, 3), all different where there are enough of them."""
    side = 448 if plan.size == "smallest" else 1792
    made = write_synthetic_slide(plan.folder / f"tiles-{side}.tif", size=(side, side), mpp=0.5, seed=5)
    with open_slide(made.path, plan.settings) as slide:
        bag = grid_bag(slide.size, 0.5, plan.settings)
        tiles = np.concatenate(list(read_tiles(slide, bag, chunk=32, threads=1)))
    repeats = -(-count // len(tiles))
    # Copies are mirrored or turned, so that a batch is never the same tile over and over.
    copies = [np.rot90(tiles, k % 4, axes=(1, 2)) for k in range(repeats)]
    return np.ascontiguousarray(np.concatenate(copies)[:count])


def swin_checkpoint(plan: Plan) -> Path:
    """The user's checkpoint, or one of Whole Slide Concepts' structure (Swin-V2 tiny) with random weights."""
    from backend.inference.checkpoint import ensure_checkpoint

    if plan.settings.model:
        return ensure_checkpoint(plan.settings)
    path = plan.folder / "random-swin.pt.zip"
    if not path.exists():
        _write_random_swin(path)
    return path


def _write_random_swin(path: Path) -> None:
    import torch
    from mmm.mtl_modules.shared_blocks.Grouper import AttentionPoolingReducer, Grouper
    from mmm.mtl_modules.shared_blocks.PyramidEncoder import PyramidEncoder
    from mmm.mtl_modules.shared_blocks.Squeezer import Squeezer
    from mmm.neural.modules.swinformer import TorchVisionSwinformer

    torch.manual_seed(0)
    encoder = PyramidEncoder(PyramidEncoder.Config(model=TorchVisionSwinformer.Config(variant="tiny")))
    squeezer = Squeezer(Squeezer.Config(), encoder.get_feature_pyramid_channels(), encoder.get_strides())
    reducer = AttentionPoolingReducer.Config(num_heads=8, reduction="linear")
    grouper = Grouper(Grouper.Config(reducer=reducer), 768)
    with torch.no_grad():
        for block in (encoder, squeezer, grouper):
            for parameter in block.parameters():
                if parameter.ndim == 1:  # biases start as zero, and zero is what mistakes hide behind
                    parameter.add_(0.05 * torch.randn_like(parameter))
    with zipfile.ZipFile(path, "w") as archive:
        for name, block in (("encoder", encoder), ("squeezer", squeezer), ("grouper", grouper)):
            buffer = io.BytesIO()
            torch.save(block, buffer)
            archive.writestr(f"{name}.pt", buffer.getvalue())
