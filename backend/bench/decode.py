"""Tiles per second from a slide: our reader against ``OpenSlide.read_region`` for each tile alone, with the same threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from backend.bench.material import drawing, grid_bag, write_big_pyramid
from backend.bench.measure import Figure, Plan, at_least, interleaved
from backend.results.bag import Bag, UInt8Array
from backend.slides.reader import open_slide
from backend.slides.tiles import read_tiles

SCALES = (("20x", 0.5, 3.0), ("40x", 0.25, 5.0))
"""Name, µm per pixel, and how many times faster than single reads it should be."""


def run(plan: Plan) -> list[Figure]:
    """Figures for a slide of 0.5 and one of 0.25 µm per pixel, by threads."""
    edge = plan.pick(2048, 10_240, 20_480)
    figures = []
    for name, mpp, target in SCALES:
        picture = drawing(plan.folder, mpp, plan.pick(512, 1280, 2560))
        path = write_big_pyramid(plan.folder / f"decode-{name}.tif", picture, edge, mpp)
        bag = grid_bag((edge, edge), mpp, plan.settings, limit=plan.pick(9, 256, 1024))
        for threads in _thread_counts(plan):
            ways = {"single": _singly(path, bag, threads), "ours": _ours(path, bag, plan, threads)}
            timings = interleaved(ways, plan.rounds)
            label = f"{name}, {threads} thread{'s' * (threads > 1)}"
            ratio = timings.speedup("ours", "single")
            with open_slide(path, plan.settings) as slide:
                reader = slide.reader
            figures += [
                Figure("decode", f"single read_region, {label}", len(bag) / timings.median("single"), "tiles/s"),
                Figure("decode", f"our reader, {label}", len(bag) / timings.median("ours"), "tiles/s", note=reader),
                at_least("decode", f"ours / single, {label}", ratio, target, "x"),
            ]
        path.unlink()
    return figures


def _thread_counts(plan: Plan) -> list[int]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({1, min(2, cores), min(8, cores)}) if plan.size == "full" else [min(2, cores)]


def _ours(path: Path, bag: Bag, plan: Plan, threads: int) -> Callable[[], object]:
    def read() -> int:
        # Opened anew each time: nothing decoded is left from the round before.
        with open_slide(path, plan.settings) as slide:
            return sum(len(chunk) for chunk in read_tiles(slide, bag, chunk=32, threads=threads))

    return read


def _singly(path: Path, bag: Bag, threads: int) -> Callable[[], object]:
    def read() -> None:
        with openslide.OpenSlide(str(path)) as slide, ThreadPoolExecutor(threads) as pool:
            parts = np.array_split(bag.coords, threads)
            list(pool.map(lambda coords: [single_tile(slide, x, y, bag) for x, y in coords.tolist()], parts))

    return read


def single_tile(slide: openslide.OpenSlide, x: int, y: int, bag: Bag) -> UInt8Array:
    """What a user writes: the best level's region, without its alpha, scaled to the tile's size. uint8 (224, 224, 3)."""
    level = slide.get_best_level_for_downsample(bag.tile_size_level0 / bag.tile_px * 1.001)
    edge = round(bag.tile_size_level0 / slide.level_downsamples[level])
    image = slide.read_region((x, y), level, (edge, edge)).convert("RGB")
    if edge != bag.tile_px:
        image = image.resize((bag.tile_px, bag.tile_px), Image.Resampling.BILINEAR)
    return np.asarray(image)
