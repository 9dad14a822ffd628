"""Whether a slide of 64 000 tiles costs 64 times one of 1 000, and no more memory apart from its latents."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType

import torch
from typing_extensions import Self

from backend.bench.encoder import make_engine
from backend.bench.material import drawing, swin_checkpoint, write_big_pyramid
from backend.bench.measure import Figure, Plan, below
from backend.inference.blocks import NativeBlocks
from backend.inference.checkpoint import ensure_checkpoint
from backend.inference.engine import CUDA_BATCH_TILES, Engine
from backend.inference.pipeline import analyse_file
from backend.settings import Settings

_MIB = 2**20
_MPP = 0.5
SMALLEST_SIDES = (6, 12)
"""Tiles along a side of the slides of the smallest size."""


def run(plan: Plan) -> list[Figure]:
    """Seconds and peak memory of slides of growing size. On the CPU with the stand-in model, on CUDA with Swin-V2 in bfloat16."""
    sides = {"smallest": SMALLEST_SIDES, "quick": (32, 64), "full": (32, 64, 128, 256)}[plan.size]
    cuda = torch.device(plan.device).type == "cuda"
    blocks = NativeBlocks(swin_checkpoint(plan) if cuda else ensure_checkpoint(plan.settings), plan.device)
    engine = make_engine(blocks, "bfloat16" if cuda else "float32", CUDA_BATCH_TILES if cuda else 32)
    # All of the slide is analysed, glass too: the number of tiles is then known.
    settings = plan.settings.model_copy(update={"tissue_min_fraction": 0.0, "tile_mpp": _MPP})
    picture = drawing(plan.folder, _MPP, plan.pick(512, 1280, 2560))
    figures = []
    measured: list[tuple[int, float, float, float | None]] = []
    for side in (sides[0], *sides):  # the first is run twice: once to warm up
        path = write_big_pyramid(plan.folder / f"growth-{side}.tif", picture, side * settings.tile_px, _MPP)
        measured.append(_measure(path, engine, settings, cuda))
        path.unlink()
    for tiles, seconds, beside, on_device in measured[1:]:
        figures.append(Figure("growth", f"slide of {tiles} tiles", seconds, "s", note=f"{tiles / seconds:.0f} tiles/s"))
        figures.append(Figure("growth", f"host memory beside latents, {tiles} tiles", beside / _MIB, "MiB"))
        note = "peak of what torch had allocated, the model included" if cuda else "no CUDA device"
        figures.append(Figure("growth", f"device memory, {tiles} tiles", on_device, "MiB", note=note))
    per_tile = [seconds / tiles for tiles, seconds, _, _ in measured[1:]]
    bound = below("growth", "slowest size / fastest size, time a tile", max(per_tile) / min(per_tile), 1.5, "x")
    return [*figures, bound]


def _measure(path: Path, engine: Engine, settings: Settings, cuda: bool) -> tuple[int, float, float, float | None]:
    """Tiles, seconds, the peak of resident memory above what it was before less what latents and logits need (bytes), and that of the device (MiB)."""
    if cuda:
        torch.cuda.reset_peak_memory_stats(engine.device)
    with PeakMemory() as memory:
        started = time.perf_counter()
        result = analyse_file(path, settings, engine, lambda *_: None)
        if cuda:
            torch.cuda.synchronize(engine.device)
        seconds = time.perf_counter() - started
    n, dim = result.latents.shape
    # float32 while the slide runs, and float16 in the result
    needed = n * (dim * (4 + 2) + result.attention_logits.shape[1] * 4)
    on_device = torch.cuda.max_memory_allocated(engine.device) / _MIB if cuda else None
    return n, seconds, max(0.0, memory.peak - needed), on_device


class PeakMemory:
    """The largest resident memory of this process during a ``with`` block, above that at its start; looked at every 10 ms.

    Attributes
    ----------
    peak
        In bytes; 0 where the system has no ``/proc/self/statm``.
    """

    def __init__(self) -> None:
        self.peak = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> Self:
        self._before = resident_bytes()
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._end.wait(0.01):
            self.peak = max(self.peak, resident_bytes() - self._before)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        self.peak = max(self.peak, resident_bytes() - self._before)


def resident_bytes() -> float:
    """Memory of this process that is in RAM, in bytes."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    import resource

    return float(pages * resource.getpagesize())
