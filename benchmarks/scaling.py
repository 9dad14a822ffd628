"""What one slide costs the parts that all workers share, and what that means for many: the figures of docs/SCALING.md.

    MMM_LICENSE_ACCEPTED="i accept" .venv/bin/python benchmarks/scaling.py

Measured: commands that Redis gets for a slide (a real pool with the stand-in model analyses small slides), commands of an idle worker, commands that
this machine's Redis answers a second, and bytes of a stored result by its number of tiles. The table is arithmetic on these.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from backend.bench.material import grid_bag, some_result
from backend.inference.checkpoint import model_identity
from backend.inference.key import bag_key
from backend.jobs.pool import WorkerPool
from backend.jobs.queue import BagQueue, BagRequest
from backend.jobs.redis_server import EmbeddedRedis, connect
from backend.results.hdf5 import write_hdf5
from backend.settings import Settings, load_settings
from backend.slides.source import SourceResolver
from backend.slides.synthetic import write_synthetic_slide

SLIDES = 40
IDLE_S = 10.0
TILES_A_SLIDE = 10_000
TILES_PER_S_AND_GPU = 10_000  # the target for one H100, not a measurement
LABEL_STUDIO_PUSH_S = 0.24  # one push into Label Studio 1.23.2 with SQLite, end-to-end tests on two cores


def commands(redis: Any) -> int:
    """Commands that Redis has processed, scripts counted with what they do."""
    return sum(int(entry["calls"]) for entry in redis.info("commandstats").values())


def analyse_slides(settings: Settings, queue: BagQueue, root: Path) -> tuple[float, float, int]:
    """Commands a slide, commands a second of an idle pool, workers in it."""
    first = write_synthetic_slide(root / "slide-0.tif", size=(1400, 1200), seed=1).path
    paths = [first]
    for i in range(1, SLIDES):
        os.link(first, root / f"slide-{i}.tif")
        paths.append(root / f"slide-{i}.tif")
    resolver, identity = SourceResolver(settings), model_identity(settings)
    refs = [resolver.resolve(str(path)) for path in paths]
    requests = [BagRequest(bag_key(ref, identity, settings), ref.to_json()) for ref in refs]
    redis = queue.redis
    with WorkerPool(settings) as pool:
        while len(queue.workers()) < len(pool.status()):
            time.sleep(0.2)
        time.sleep(3)
        before, started = commands(redis), time.monotonic()
        time.sleep(IDLE_S)
        idle = (commands(redis) - before) / (time.monotonic() - started)
        before, started = commands(redis), time.monotonic()
        queue.submit_many([(request, None) for request in requests], "batch")
        while not all(state.settled for state in queue.states([r.key for r in requests]).values()):
            time.sleep(1)  # each look costs a command a slide, taken off below
            before += len(requests)
        seconds = time.monotonic() - started
        failed = [s for s in queue.states([r.key for r in requests]).values() if s.status != "finished"]
        if failed:
            raise RuntimeError(f"{len(failed)} slides failed: {failed[0].error}")
        return (commands(redis) - before - idle * seconds) / len(requests), idle, len(pool.status())


def redis_rate(settings: Settings) -> float:
    """Commands a second that four connections get out of this Redis, one at a time each."""
    stop = time.monotonic() + 5
    counts = [0] * 4

    def ask(i: int) -> None:
        with connect(settings) as redis:
            while time.monotonic() < stop:
                redis.hset("wsc:benchmark", str(i), "x")
                counts[i] += 1

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / 5


def bytes_of_a_result(settings: Settings, folder: Path, tiles: int) -> int:
    """Of the file that the store would hold."""
    edge = int(tiles**0.5 * settings.tile_px)
    path = folder / f"{tiles}.h5"
    write_hdf5(some_result(grid_bag((edge, edge), settings.tile_mpp, settings)), path)
    return path.stat().st_size


def main() -> None:
    """Measure, and print."""
    with tempfile.TemporaryDirectory(prefix="wsc-scaling-") as name:
        folder = Path(name)
        (folder / "slides").mkdir()
        settings = load_settings(model_dir=folder / "state", slide_roots=(folder / "slides",), devices="cpu")
        with EmbeddedRedis(settings.model_dir):
            queue = BagQueue(settings, connect(settings))
            slide, idle, workers = analyse_slides(settings, queue, folder / "slides")
            rate = redis_rate(settings)
        sizes = {tiles: bytes_of_a_result(settings, folder, tiles) for tiles in (1_000, 10_000)}
    print(f"Redis commands a slide (small slides, without pushes): {slide:.0f}")
    print(f"Redis commands a second, {workers} idle workers: {idle:.0f}")
    print(f"Redis answers a second here, 4 connections, one command at a time: {rate:.0f}")
    for tiles, size in sizes.items():
        print(f"stored result, {tiles} tiles: {size / 1e6:.2f} MB")
    print(
        f"\n| GPUs | slides/s | Redis commands/s | store MB/s | pushes/s | Label Studios at {LABEL_STUDIO_PUSH_S} s a push |"
    )
    print("|---:|---:|---:|---:|---:|---:|")
    for gpus in (10, 100, 1000):
        slides = gpus * TILES_PER_S_AND_GPU / TILES_A_SLIDE
        # Progress is written four times a second, two commands each, while a slide is analysed.
        busy = gpus * (idle / workers + 8) + slides * slide
        print(
            f"| {gpus} | {slides:.0f} | {busy:.0f} | {slides * sizes[10_000] / 1e6:.0f} | {slides:.0f} | "
            f"{slides * LABEL_STUDIO_PUSH_S:.0f} |"
        )


if __name__ == "__main__":
    main()
