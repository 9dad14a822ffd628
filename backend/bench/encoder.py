"""Tiles per second of the engine, of the model card's snippet, and of the device's matrix units if nothing else cost time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from backend.bench.material import some_tiles, swin_checkpoint
from backend.bench.measure import Figure, Plan, at_least, interleaved
from backend.inference.blocks import NativeBlocks
from backend.inference.checkpoint import ModelIdentity
from backend.inference.engine import CUDA_BATCH_TILES, Engine
from backend.results.bag import UInt8Array

GFLOP_A_TILE = 9.84
"""Swin-V2 tiny at 224 px, counted with two operations for a multiply-add."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run(plan: Plan) -> list[Figure]:
    """Figures of the encoder on ``plan.device``."""
    blocks = NativeBlocks(swin_checkpoint(plan), plan.device)
    cuda = blocks.device.type == "cuda"
    batch = CUDA_BATCH_TILES if cuda else plan.pick(2, 8, 32)
    tiles = some_tiles(plan, batch)
    precisions = ("float32", "bfloat16") if cuda or plan.size != "smallest" else ("float32",)
    ways: dict[str, Callable[[], object]] = {"snippet": lambda: _snippet(blocks, tiles)}
    repeats = 8 if cuda else 1  # the engine keeps two batches under way; one alone would show nothing of that
    for precision in precisions:
        ways[precision] = _engine_way(make_engine(blocks, precision, batch), tiles, repeats)
    for precision in precisions:
        ways[f"matrix {precision}"] = _matrix_way(blocks.device, _DTYPES[precision], plan)
    timings = interleaved(ways, plan.rounds)
    snippet = batch / timings.median("snippet")
    figures = [Figure("encoder", "model card's snippet, float32", snippet, "tiles/s", note=f"batch {batch}")]
    for precision in precisions:
        rate = repeats * batch / timings.median(precision)
        ratio = repeats * timings.speedup(precision, "snippet")
        flops = _matrix_flop(blocks.device, plan) / timings.median(f"matrix {precision}")
        floor = flops / (GFLOP_A_TILE * 1e9)
        if cuda and precision == "bfloat16":
            figures += [
                at_least("encoder", f"engine, {precision}", rate, 10_000, "tiles/s"),
                at_least("encoder", f"engine / snippet, {precision}", ratio, 6, "x"),
            ]
        else:
            figures.append(Figure("encoder", f"engine, {precision}", rate, "tiles/s"))
            of_cpu = not cuda and precision == "float32"
            name = f"engine / snippet, {precision}"
            figures.append(
                at_least("encoder", name, ratio, 1.3, "x") if of_cpu else Figure("encoder", name, ratio, "x")
            )
        note = f"{flops / 1e9:.0f} GFLOP/s in a matrix product"
        figures.append(Figure("encoder", f"floor, {precision}", floor, "tiles/s", note=note))
        figures.append(Figure("encoder", f"engine / floor, {precision}", 100 * rate / floor, "%"))
    return figures


def make_engine(blocks: NativeBlocks, precision: str, batch: int, *, fast: bool = True) -> Engine:
    """An engine around blocks that are loaded."""
    identity = ModelIdentity("benchmark", blocks.sha256, "", precision, stand_in=False)
    return Engine(blocks, identity, batch_tiles=batch, fast=fast)


def _engine_way(engine: Engine, tiles: UInt8Array, repeats: int) -> Callable[[], object]:
    return lambda: engine.encode([tiles] * repeats, repeats * len(tiles))


def _snippet(blocks: NativeBlocks, tiles: UInt8Array) -> object:
    """The model card's usage, line by line, from the tiles as they come from a slide to latents on the host."""
    scaled = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255.0
    with torch.inference_mode():
        pyramid = blocks["encoder"](scaled.to(blocks.device))
        _, latent = blocks["squeezer"](pyramid)
        return torch.nn.Flatten(start_dim=1)(latent).cpu()


def _matrix_edge(device: torch.device, plan: Plan) -> int:
    return 8192 if device.type == "cuda" else plan.pick(128, 1024, 2048)


def _matrix_flop(device: torch.device, plan: Plan) -> float:
    return 2.0 * _matrix_edge(device, plan) ** 3


def _matrix_way(device: torch.device, dtype: torch.dtype, plan: Plan) -> Callable[[], object]:
    edge = _matrix_edge(device, plan)
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((edge, edge), np.float32)).to(device, dtype)

    def multiply() -> None:
        values @ values
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return multiply
