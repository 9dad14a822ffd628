"""How far each precision of the engine is from plain float32: what every speed has to be read with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import spearmanr

from backend.bench.encoder import make_engine
from backend.bench.material import some_tiles, swin_checkpoint
from backend.bench.measure import Figure, Plan, at_least
from backend.inference.blocks import NativeBlocks

Float64Array = npt.NDArray[np.float64]


def run(plan: Plan) -> list[Figure]:
    """Cosine of latents (smallest of the tiles) and slide vector, rank correlation of attention (smallest of the heads)."""
    blocks = NativeBlocks(swin_checkpoint(plan), plan.device)
    count = plan.pick(4, 24, 96)
    tiles = some_tiles(plan, count)
    plain = make_engine(blocks, "float32", 16, fast=False)
    # One tile's latent hardly differs from the next with random weights; centring shows what is left beside their mean.
    reference = plain.encode([tiles], count)
    logits, vector = plain.pool(reference)
    figures = []
    for precision in ("float32", "bfloat16") if torch.device(plan.device).type == "cuda" or count > 4 else ("float32",):
        latents = make_engine(blocks, precision, 16).encode([tiles], count)
        ours_logits, ours_vector = plain.pool(latents)
        tile = float(cosine(latents, reference).min())
        centred = float(cosine(latents - reference.mean(axis=0), reference - reference.mean(axis=0)).min())
        slide = float(cosine(ours_vector[None], vector[None])[0])
        ranks = min(float(spearmanr(a, b).statistic) for a, b in zip(ours_logits.T, logits.T, strict=True))
        figures += [
            at_least("numerics", f"tile cosine, {precision}", tile, 0.999, note=f"centred {centred:.5f}"),
            at_least("numerics", f"slide vector cosine, {precision}", slide, 0.9995),
            at_least("numerics", f"attention rank correlation, {precision}", ranks, 0.99, note=f"{count} tiles"),
        ]
    return figures


def cosine(a: npt.ArrayLike, b: npt.ArrayLike) -> Float64Array:
    """Cosine of the rows of two (n, D), in float64."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    values: Float64Array = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    return values
