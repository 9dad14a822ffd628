"""Tiles read ahead of the device by a few threads, in bag order, with bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np

from backend.errors import SlideNotFound, SlideUnreadable
from backend.paths import StrPath
from backend.results.bag import Bag, UInt8Array
from backend.settings import Settings
from backend.slides.images import check_patch_size, image_size, read_patch
from backend.slides.reader import Slide

_CHUNKS_AHEAD = 3


def read_tiles(slide: Slide, bag: Bag, *, chunk: int, threads: int) -> Generator[UInt8Array, None, None]:
    """Yield the tiles of a slide as uint8 (n, tile_px, tile_px, 3), n = ``chunk`` but for the last; row i of all of them is tile i of ``bag``.

    At most three chunks are held beside the one that was yielded. Closing the generator stops the threads; the slide may be closed then.
    Raises what :meth:`Slide.read_region` raises, when the broken tile's chunk is due.
    """
    if bag.kind != "slide":
        raise ValueError("read_tiles is for bags cut from a slide; use read_patches")

    def read(index: int, tile: UInt8Array) -> None:
        x, y = bag.coords[index]
        slide.read_region(float(x), float(y), bag.tile_size_level0, bag.tile_px, tile)

    return _read_ahead(read, len(bag), bag.tile_px, chunk, threads)


def patch_sizes(paths: Sequence[StrPath], settings: Settings) -> list[tuple[int, int]]:
    """(width, height) of each patch as displayed, from the headers. Raises as :func:`~backend.slides.images.read_patch`."""
    sizes = []
    for path in paths:
        _check_file(path)
        sizes.append(image_size(path, settings))
        check_patch_size(path, sizes[-1], settings.tile_px)
    return sizes


def read_patches(
    paths: Sequence[StrPath], bag: Bag, settings: Settings, *, chunk: int, threads: int
) -> Generator[UInt8Array, None, None]:
    """As :func:`read_tiles`, for a bag that is given as images: image i becomes tile i."""
    if bag.kind != "patches" or len(paths) != len(bag):
        raise ValueError(f"{len(paths)} patches do not make this bag of {len(bag)} ({bag.kind})")

    def read(index: int, tile: UInt8Array) -> None:
        _check_file(paths[index])
        tile[:] = read_patch(paths[index], bag.tile_px, settings)[0]

    return _read_ahead(read, len(bag), bag.tile_px, chunk, threads)


def _check_file(path: StrPath) -> None:
    path = Path(path)
    if not path.is_file():
        raise SlideNotFound(f"There is no file {path}.")
    if path.stat().st_size == 0:
        raise SlideUnreadable(f"{path.name} is empty (0 bytes).", hint="Its copy or upload was probably interrupted.")


def _read_ahead(
    read: Callable[[int, UInt8Array], None], count: int, tile_px: int, chunk: int, threads: int
) -> Generator[UInt8Array, None, None]:
    if chunk < 1 or threads < 1:
        raise ValueError(f"chunk {chunk} and threads {threads} must be at least 1")
    pool = ThreadPoolExecutor(threads, thread_name_prefix="tiles")
    waiting: deque[tuple[UInt8Array, list[Future[None]]]] = deque()

    def fill(target: UInt8Array, start: int, first: int, last: int) -> None:
        for row in range(first, last):
            read(start + row, target[row])

    def submit(start: int) -> None:
        size = min(chunk, count - start)
        target = np.empty((size, tile_px, tile_px, 3), np.uint8)
        # Each thread takes a run of neighbours, which share decoded tiles of the file.
        cuts = np.linspace(0, size, min(threads, size) + 1).round().astype(int)
        parts = [pool.submit(fill, target, start, int(a), int(b)) for a, b in pairwise(cuts) if b > a]
        waiting.append((target, parts))

    try:
        starts = iter(range(0, count, chunk))
        for start in starts:
            submit(start)
            if len(waiting) < _CHUNKS_AHEAD:
                continue
            yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    finally:
        # Waits for the reads under way: the caller closes the slide next.
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(target: UInt8Array, parts: list[Future[None]]) -> UInt8Array:
    for part in parts:
        part.result()
    return target
