"""The stand-in model: built from mmm's own blocks in under a minute, so that everything works before the weights are there.

A small convolutional encoder, 768-dimensional latents, 8 heads of gated attention. It is trained here, on synthetic slides, to attend to
dense dark nuclei; what it marks has no medical meaning, and wherever its version is shown it is called a stand-in.

``python -m backend.inference.standin PATH`` builds it.
"""

from __future__ import annotations

import io
import logging
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from backend.errors import LicenceNotAccepted
from backend.inference.checkpoint import STAND_IN_MARKER
from backend.paths import StrPath
from backend.results.bag import BoolArray, UInt8Array
from backend.settings import Settings, licence_accepted
from backend.slides.reader import open_slide
from backend.slides.synthetic import write_synthetic_slide
from backend.slides.tiles import read_tiles
from backend.slides.tiling import make_bag

log = logging.getLogger(__name__)

EMBEDDING_DIM = 768
NUM_HEADS = 8
_SEED = 20_251
_STEPS = 90
_BATCH = 32


def build_blocks() -> nn.ModuleDict:
    """Untrained encoder, squeezer and grouper, from mmm's classes. Weights are random, reproducibly."""
    from mmm.mtl_modules.shared_blocks.Grouper import AttentionPoolingReducer, Grouper
    from mmm.mtl_modules.shared_blocks.PyramidEncoder import PyramidEncoder
    from mmm.mtl_modules.shared_blocks.Squeezer import Squeezer
    from mmm.neural.modules.simple_cnn import MiniConvNet

    torch.manual_seed(_SEED)
    # No normalisation: how dark a tile is must survive, and layer normalisation would take it out.
    encoder = PyramidEncoder(
        PyramidEncoder.Config(
            model=MiniConvNet.Config(num_filters=24, conv_stride=4, depth=3, norm=False),
            norm_layer="nonorm",
            pyramid_channels={3: EMBEDDING_DIM},
        )
    )
    squeezer = Squeezer(
        Squeezer.Config(norm_layer="nonorm"), encoder.get_feature_pyramid_channels(), encoder.get_strides()
    )
    grouper = Grouper(
        Grouper.Config(reducer=AttentionPoolingReducer.Config(num_heads=NUM_HEADS, reduction="linear")), EMBEDDING_DIM
    )
    return nn.ModuleDict({"encoder": encoder, "squeezer": squeezer, "grouper": grouper})


def training_tiles(seeds: tuple[int, ...] = (101, 102, 103, 104)) -> tuple[UInt8Array, BoolArray]:
    """Tiles of synthetic slides, uint8 (N, 224, 224, 3), and whether most of each lies in the planted region, bool (N,)."""
    settings = Settings(read_threads=1)
    tiles, labels = [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            made = write_synthetic_slide(Path(folder) / f"{seed}.tif", size=(2048, 2048), mpp=0.5, seed=seed)
            with open_slide(made.path, settings) as slide:
                bag = make_bag(slide, settings, task_mpp=None)
                tiles.append(np.concatenate(list(read_tiles(slide, bag, chunk=64, threads=1))))
            labels.append(made.planted_fraction(bag.coords, bag.tile_size_level0) > 0.5)
    return np.concatenate(tiles), np.concatenate(labels)


def train(blocks: nn.ModuleDict, tiles: UInt8Array, planted: BoolArray) -> None:
    """Train all three blocks in place so that every head's attention logit separates planted tiles from the rest.

    The heads get targets of different distance (2 to 9 between the two kinds), so that some spread their attention and some
    concentrate it. Brightness and colour are varied, as between scanners and stains.
    """
    from backend.inference.pooling import AttentionGrouper

    grouper = AttentionGrouper(blocks["grouper"])
    generator = torch.Generator().manual_seed(_SEED)
    half_distance = torch.linspace(1.0, 4.5, NUM_HEADS)
    pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2)
    kinds = [np.flatnonzero(planted), np.flatnonzero(~planted)]
    optimiser = torch.optim.Adam(blocks.parameters(), lr=3e-3)
    blocks.train()
    for _ in range(_STEPS):
        rows = torch.cat(
            [torch.from_numpy(k)[torch.randint(len(k), (_BATCH // 2,), generator=generator)] for k in kinds]
        )
        batch = _vary(pixels[rows].float() / 255.0, generator)
        _, pooled = blocks["squeezer"](blocks["encoder"](batch))
        logits = grouper.logits(torch.flatten(pooled, 1))
        sign = torch.cat([torch.ones(_BATCH // 2), -torch.ones(_BATCH // 2)])
        loss = nn.functional.smooth_l1_loss(logits, sign[:, None] * half_distance)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    blocks.eval()


def _vary(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Scale the optical density of each tile and channel by 0.75 to 1.25, and flip half of the tiles."""
    scale = 0.75 + 0.5 * torch.rand((len(batch), 1, 1, 1), generator=generator)
    scale = scale * (0.94 + 0.12 * torch.rand((len(batch), 3, 1, 1), generator=generator))
    varied = batch.clamp(min=1 / 255).pow(scale)
    flipped = torch.rand(len(batch), generator=generator) < 0.5
    return torch.where(flipped[:, None, None, None], varied.flip(-1), varied)


def build_stand_in(path: StrPath) -> None:
    """Build the stand-in and write it to ``path``, in the format that :class:`~backend.inference.blocks.NativeBlocks` loads.

    Raises
    ------
    LicenceNotAccepted
        It consists of mmm's classes, so mmm's licence has to be accepted.
    """
    if not licence_accepted():
        raise LicenceNotAccepted
    path = Path(path)
    started = time.monotonic()
    blocks = build_blocks()
    train(blocks, *training_tiles())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with zipfile.ZipFile(temporary, "w") as archive:
        archive.writestr(
            STAND_IN_MARKER, "A stand-in model for trying things out: its output has no medical meaning.\n"
        )
        for name, block in blocks.items():
            buffer = io.BytesIO()
            torch.save(block, buffer)
            archive.writestr(f"{name}.pt", buffer.getvalue())
    temporary.replace(path)
    log.info("stand-in model built in %.0f s", time.monotonic() - started)


if __name__ == "__main__":
    from backend.errors import BackendError
    from backend.logs import configure_logging

    configure_logging("INFO", "stand-in")
    try:
        build_stand_in(Path(sys.argv[1]))
    except BackendError as refused:
        sys.exit(str(refused))
