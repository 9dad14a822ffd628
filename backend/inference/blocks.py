"""``NativeBlocks``: the encoder, squeezer and grouper of Whole Slide Concepts, loaded safely from one zip.

The interface is the one of the model card, so that its snippet runs with only the import line changed::

    from backend.inference.blocks import MMM_MODELS, WSC, NativeBlocks

    model = NativeBlocks(MMM_MODELS[WSC], device_identifier="cuda:0")
    _, latent = model["squeezer"](model["encoder"](tiles.to(model.device)))
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor, nn

from backend.errors import BlockBroken, CheckpointRefused, CheckpointUnreadable, DeviceUnavailable, LicenceNotAccepted
from backend.inference.bounded_zip import checked_zip, unpack
from backend.inference.checkpoint import MMM_MODELS, WSC, check_pin, file_sha256, locate
from backend.inference.pooling import AttentionGrouper
from backend.paths import StrPath
from backend.settings import licence_accepted

__all__ = ["BLOCKS", "MMM_MODELS", "WSC", "NativeBlocks"]

BLOCKS = ("encoder", "squeezer", "grouper")
_PROBE_TILE_PX = 224  # the tile size that the encoder was trained on


class NativeBlocks(Mapping[str, nn.Module]):
    """The three blocks as a mapping, in evaluation mode, on one device.

    Parameters
    ----------
    modules_path
        Path of a ``.zip`` or ``.pt.zip``, its URL, or an entry of :data:`MMM_MODELS`.
    device_identifier
        A torch device, such as ``"cuda:0"`` or ``"cpu"``.
    sha256
        If given, the file must have this SHA-256 (hexadecimal).

    Attributes
    ----------
    device
        The torch device that all blocks are on.
    sha256
        SHA-256 of the file.
    embedding_dim, num_heads
        Length of a latent (768 for WSC) and number of attention heads (8 for WSC).

    Raises
    ------
    LicenceNotAccepted
        mmm's licence variable is not set.
    CheckpointUnreadable
        No such file, no zip, or another SHA-256 than the pinned one.
    CheckpointRefused
        A pickle in it names what a model does not need, or the zip is put together as a bomb is: see
        :mod:`~backend.inference.bounded_zip` for the limits.
    BlockBroken
        A block is missing, cannot be rebuilt, or does not fit the others; the message names it.
    DeviceUnavailable
        torch cannot use the device.
    """

    def __init__(self, modules_path: StrPath, device_identifier: str = "cuda:0", *, sha256: str = "") -> None:
        if not licence_accepted():
            raise LicenceNotAccepted
        self.device = _checked_device(device_identifier)
        path = locate(str(modules_path))
        self.sha256 = file_sha256(path)
        check_pin(path, self.sha256, sha256.lower())
        blocks = _read_blocks(path)
        grouper = AttentionGrouper(blocks["grouper"])
        blocks["grouper"] = grouper
        for module in blocks.values():
            # float() as well: a block saved in half precision is computed as the precision setting says, not as the file does.
            module.float().eval().requires_grad_(False).to(self.device)
        self._blocks = blocks
        self.embedding_dim: int = grouper.embedding_dim
        self.num_heads: int = grouper.num_heads
        self._probe()

    @property
    def encoder(self) -> nn.Module:
        """Tiles (N, 3, 224, 224) float in [0, 1] → pyramid, a list whose last level is (N, C, 7, 7)."""
        return self._blocks["encoder"]

    @property
    def squeezer(self) -> nn.Module:
        """Pyramid → (feature map, pooled (N, D, 1, 1))."""
        return self._blocks["squeezer"]

    @property
    def grouper(self) -> AttentionGrouper:
        """Latents (N, D) and bag ids (N,) → slide vectors (B, D) and attention (N, H)."""
        grouper = self._blocks["grouper"]
        assert isinstance(grouper, AttentionGrouper)
        return grouper

    def latents(self, tiles: Tensor) -> Tensor:
        """Tiles (N, 3, H, W) float in [0, 1] on :attr:`device` → latents (N, D)."""
        _, pooled = self._blocks["squeezer"](self._blocks["encoder"](tiles))
        return torch.flatten(pooled, start_dim=1)

    def _probe(self) -> None:
        """Run one blank tile through, so that a wrong block is found now and named, not in the middle of a slide."""
        block = "encoder"
        try:
            with torch.inference_mode():
                pyramid = self._blocks["encoder"](
                    torch.full((1, 3, _PROBE_TILE_PX, _PROBE_TILE_PX), 0.5, device=self.device)
                )
                block = "squeezer"
                _, pooled = self._blocks["squeezer"](pyramid)
                latent = torch.flatten(pooled, start_dim=1)
                if latent.shape != (1, self.embedding_dim):
                    raise BlockBroken(
                        f"Block 'squeezer' gives latents of shape {tuple(latent.shape)}, but block 'grouper' takes (1, {self.embedding_dim})."
                    )
                block = "grouper"
                vector, attention = self._blocks["grouper"](
                    latent, torch.zeros(1, dtype=torch.long, device=self.device)
                )
                if vector.ndim != 2 or attention.shape != (1, self.num_heads) or not torch.isfinite(vector).all():
                    raise BlockBroken(f"Block 'grouper' gives slide vectors {tuple(vector.shape)} that are not finite.")
        except (RuntimeError, TypeError, AttributeError, ValueError, IndexError, KeyError) as error:
            raise BlockBroken(
                f"Block {block!r} fails on a blank tile: {type(error).__name__}: {error}.",
                hint="The checkpoint is not a Whole Slide Concepts model, or belongs to another release of mmm.",
            ) from error

    def __getitem__(self, name: str) -> nn.Module:
        return self._blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(BLOCKS)

    def __len__(self) -> int:
        return len(BLOCKS)

    def __repr__(self) -> str:
        return f"NativeBlocks({', '.join(BLOCKS)}; sha256={self.sha256[:12]}…, device={self.device})"


def _checked_device(identifier: str) -> torch.device:
    try:
        device = torch.device(identifier)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        # torch's own message for a missing CUDA device is several lines of build facts; its first line says it.
        raise DeviceUnavailable(
            f"Device {identifier!r} cannot be used: {str(error).splitlines()[0]}",
            hint='Use device_identifier="cpu" (DEVICES=cpu), or check the driver with nvidia-smi.',
        ) from error
    return device


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with checked_zip(path, path.name) as archive:
            yield archive
    except zipfile.BadZipFile as error:
        raise CheckpointUnreadable(
            f"{path.name} is not a zip file of blocks: {error}.",
            hint="MODEL must be the zip as published; download it again.",
        ) from error


def _read_blocks(path: Path) -> dict[str, nn.Module]:
    from backend.inference.unpickling import load_block

    with _opened(path) as archive:
        entries: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            name = PurePosixPath(info.filename).name
            if not info.is_dir() and entries.setdefault(name, info) is not info and name.removesuffix(".pt") in BLOCKS:
                raise CheckpointRefused(
                    f"Block {name.removesuffix('.pt')!r} is there twice, as {entries[name].filename!r:.60} and {info.filename!r:.60}.",
                    hint="A Whole Slide Concepts checkpoint has each block once; get it from its publisher again.",
                )
        missing = [block for block in BLOCKS if f"{block}.pt" not in entries]
        # Look at every block that is there before anything is said of what is not: a hostile file is named as such.
        blocks = {
            block: load_block(unpack(archive, entries[f"{block}.pt"], block), block)
            for block in BLOCKS
            if block not in missing
        }
    if missing:
        raise BlockBroken(
            f"Block {', '.join(map(repr, missing))} is missing in {path.name}, which holds: {', '.join(sorted(entries)) or 'nothing'}.",
            hint="A Whole Slide Concepts checkpoint has encoder.pt, squeezer.pt and grouper.pt.",
        )
    return blocks
