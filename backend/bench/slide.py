"""A whole slide, file to result, against its two halves alone and against the loop that a user would write."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import openslide
import torch

from backend.bench.decode import single_tile
from backend.bench.encoder import make_engine
from backend.bench.material import drawing, swin_checkpoint, write_big_pyramid
from backend.bench.measure import Figure, Plan, at_least, below, interleaved
from backend.inference.blocks import NativeBlocks
from backend.inference.checkpoint import ensure_checkpoint
from backend.inference.engine import CUDA_BATCH_TILES, Engine
from backend.inference.pipeline import analyse_file
from backend.slides.openslide_reader import OpenSlideSlide
from backend.slides.reader import open_slide
from backend.slides.tiles import read_tiles
from backend.slides.tiling import make_bag

_LOOP_BATCH = 32


def run(plan: Plan) -> list[Figure]:
    """Figures for a slide of 0.5 and one of 0.25 µm per pixel. On the CPU with the stand-in model, on CUDA with Swin-V2 in bfloat16.

    Without ``MODEL``, the CPU reads a small slide with Swin-V2 as well: its encoder takes the time that the stand-in's does not.
    """
    cuda = torch.device(plan.device).type == "cuda"
    checkpoint = swin_checkpoint(plan) if cuda else ensure_checkpoint(plan.settings)
    blocks = NativeBlocks(checkpoint, plan.device)
    engine = make_engine(blocks, "bfloat16" if cuda else "float32", CUDA_BATCH_TILES if cuda else 32)
    figures = []
    for name, mpp in (("20x", 0.5), ("40x", 0.25)):
        edge = plan.pick(1024, 4096, 8192)
        figures += _one_scale(plan, engine, name, mpp, edge, loop_target=5.0 if cuda else 3.0)
    if not cuda and not plan.settings.model:
        swin = make_engine(NativeBlocks(swin_checkpoint(plan), plan.device), "float32", 32)
        figures += _one_scale(plan, swin, "20x, Swin-V2", 0.5, plan.pick(448, 1792, 1792), loop_target=None)
    return figures


def _one_scale(
    plan: Plan, engine: Engine, name: str, mpp: float, edge_half_um: int, *, loop_target: float | None
) -> list[Figure]:
    """Figures of a slide of ``edge_half_um`` pixels of 0.5 µm; without a target for it, the loop of a user is left out."""
    edge = round(edge_half_um * 0.5 / mpp)
    picture = drawing(plan.folder, mpp, plan.pick(512, 1280, 2560))
    path = write_big_pyramid(plan.folder / f"slide-{name}.tif", picture, edge, mpp)
    settings = plan.settings
    threads = settings.read_threads
    with open_slide(path, settings) as slide:
        bag = make_bag(slide, settings, task_mpp=None)
        held = np.concatenate(list(read_tiles(slide, bag, chunk=32, threads=threads))[: -(-1024 // 32)])
    check_ms = 1000 * median(_level_check_s(path) for _ in range(plan.rounds))

    def encoder_only() -> None:
        whole, rest = divmod(len(bag), len(held))
        engine.encode([held] * whole + ([held[:rest]] if rest else []), len(bag))

    def decode_only() -> None:
        with open_slide(path, settings) as opened:
            for _ in read_tiles(opened, bag, chunk=engine.batch_tiles, threads=threads):
                pass

    def plain_loop() -> None:
        latents = []
        with openslide.OpenSlide(str(path)) as opened, torch.inference_mode():
            for start in range(0, len(bag), _LOOP_BATCH):
                corners = bag.coords[start : start + _LOOP_BATCH].tolist()
                batch = torch.stack([_to_tensor(single_tile(opened, x, y, bag)) for x, y in corners])
                latents.append(engine.blocks.latents(batch.to(engine.device)).cpu())
        engine.pool(torch.cat(latents).numpy())

    ways: dict[str, Callable[[], object]] = {
        "slide": lambda: analyse_file(path, settings, engine, lambda *_: None),
        "encoder": encoder_only,
        "decode": decode_only,
    }
    if loop_target is not None:
        ways["loop"] = plain_loop
    timings = interleaved(ways, plan.rounds)
    n = len(bag)
    slide_s, encoder_s, decode_s = (timings.median(way) for way in ("slide", "encoder", "decode"))
    path.unlink()
    figures = [
        Figure("slide", f"file to result, {name}", n / slide_s, "tiles/s", note=f"{n} tiles, {threads} read threads"),
        Figure("slide", f"encoder only, {name}", n / encoder_s, "tiles/s"),
        Figure("slide", f"decode only, {name}", n / decode_s, "tiles/s"),
        at_least(
            "slide",
            f"slide / slower half, {name}",
            100 * max(encoder_s, decode_s) / slide_s,
            90,
            "%",
            note="" if engine.device.type == "cuda" else "on the CPU both halves want the same cores",
        ),
        Figure(
            "slide",
            f"slide / halves one after the other, {name}",
            100 * (encoder_s + decode_s) / slide_s,
            "%",
            note="on the CPU 100 % is what the cores give, reading being in parallel",
        ),
        Figure(
            "slide",
            f"slower half / both halves, {name}",
            100 * max(encoder_s, decode_s) / (encoder_s + decode_s),
            "%",
            note="what slide / slower half can reach where both halves want the same cores, as on the CPU",
        ),
        below(
            "slide", f"comparing levels with level 0, {name}", check_ms, 30, "ms", note="CPU, OpenSlide, once a slide"
        ),
        Figure("slide", f"device busy, {name}", 100 * min(1.0, encoder_s / slide_s), "%", note="encoder-only / slide"),
    ]
    if loop_target is not None:
        rate = n / timings.median("loop")
        figures += [
            Figure("slide", f"plain loop, {name}", rate, "tiles/s", note=f"batch {_LOOP_BATCH}"),
            at_least("slide", f"slide / plain loop, {name}", timings.speedup("slide", "loop"), loop_target, "x"),
        ]
    return figures


def _level_check_s(path: Path) -> float:
    """CPU seconds to compare the coarsest level with level 0 on a slide that was just opened."""
    with OpenSlideSlide(path) as slide:
        started = time.process_time()
        slide._check_level(len(slide.level_downsamples) - 1)
        return time.process_time() - started


def _to_tensor(tile: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> torch.Tensor:
    """torchvision's ``ToTensor``: (H, W, 3) in 0–255 → (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(tile)).permute(2, 0, 1).float().div(255.0)
