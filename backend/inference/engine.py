"""The engine: tiles in, :class:`~backend.results.bag.BagResult` out. The same code on the CPU and on CUDA.

Tiles travel as uint8 in batches of one size and become [0, 1] on the device. Latents stay on the host, so that the device's memory
does not grow with the bag; pooling runs over the whole bag at the end, in float32. Swin-V2 encoders take the fast way of
:mod:`~backend.inference.fast_swin` once that has been seen to agree with the plain one; every other encoder is called as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from backend.errors import OutOfDeviceMemory, SlideError
from backend.inference.blocks import NativeBlocks
from backend.inference.checkpoint import ModelIdentity, ensure_checkpoint, model_identity
from backend.inference.compiled import CompiledInBackground
from backend.inference.fast_swin import FastLatents, NotSwin, hooked
from backend.inference.host_threads import in_one_thread, in_small_batches
from backend.inference.runners import CudaRunner, HostRunner, Runner
from backend.results.bag import Bag, BagResult, Float32Array, UInt8Array
from backend.settings import Settings

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

CUDA_BATCH_TILES = 256
"""Batch on CUDA where ``BATCH_TILES`` is not set: smaller ones leave a data-centre GPU waiting for kernels to be launched."""

_PLAIN_TILES_AT_ONCE = 4
_POOLED_AT_ONCE = 4096
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Engine:
    """A loaded model on one device.

    Parameters
    ----------
    blocks
        The model, on its device.
    identity
        What the model is called in results.
    batch_tiles
        Tiles in a batch. Halved, and kept so, when the device's memory runs out.
    fast
        Whether the fast way may be taken. ``False`` is for comparisons.
    compiled
        On CUDA: compile the fast way in the background, and go over to it when it is ready and agrees.
    """

    def __init__(
        self,
        blocks: NativeBlocks,
        identity: ModelIdentity,
        *,
        batch_tiles: int = 32,
        fast: bool = True,
        compiled: bool = False,
    ) -> None:
        self.blocks = blocks
        self.identity = identity
        self.batch_tiles = batch_tiles
        self.device = blocks.device
        self._dtype = _DTYPES[identity.precision]
        self._cuda = self.device.type == "cuda"
        # Hooks keep what they see in their module, which threads would share.
        self._in_pieces = self.device.type == "cpu" and not (hooked(blocks.encoder) or hooked(blocks.squeezer))
        self._fast = _fast_latents(blocks, self._dtype) if fast else None
        self._compiled = CompiledInBackground(self._fast.encode) if compiled and self._fast and self._cuda else None

    def analyse(
        self,
        bag: Bag,
        tiles: Iterable[UInt8Array],
        *,
        progress: Progress | None = None,
        provenance: Mapping[str, str | int | float | bool] | None = None,
    ) -> BagResult:
        """Run a whole bag.

        Parameters
        ----------
        bag
            The bag that the tiles belong to.
        tiles
            uint8 arrays (n, tile_px, tile_px, 3), RGB, n ≥ 1 each, together the bag's tiles in its order.
        progress
            Called with (tiles done, tiles in the bag) after each batch.
        provenance
            Facts to record beside the model's own.

        Raises
        ------
        OutOfDeviceMemory
            Not even one tile fits.
        SlideError
            The tiles are not as many as the bag has, or not finite once encoded.
        """
        latents = self.encode(tiles, len(bag), progress=progress)
        logits, vector = self.pool(latents)
        if not (np.isfinite(logits).all() and np.isfinite(vector).all()):
            raise SlideError(
                f"The model's output for this slide is not finite in {self.identity.precision}.",
                hint="Set PRECISION=float32 (or bfloat16) and analyse it again.",
            )
        return BagResult(
            bag,
            latents.astype(np.float16),
            logits,
            vector,
            {
                "model_version": self.identity.model_version,
                "fingerprint": self.identity.fingerprint,
                "model_name": self.identity.name,
                "checkpoint_sha256": self.identity.sha256,
                "mmm_release": self.identity.mmm_release,
                "precision": self.identity.precision,
                "stand_in": self.identity.stand_in,
                "device": str(self.device),
                **(provenance or {}),
            },
        )

    def encode(self, tiles: Iterable[UInt8Array], count: int, *, progress: Progress | None = None) -> Float32Array:
        """Latents of ``count`` tiles, float32 (count, D) on the host, in their order. ``tiles`` as in :meth:`analyse`."""
        latents = np.empty((count, self.blocks.embedding_dim), np.float32)
        sent = done = 0

        def came_back(tiles: int) -> None:
            nonlocal done
            done += tiles
            if tiles and progress is not None:
                progress(done, count)

        with self._runner() as runner:
            for batch in _rebatch(tiles, lambda: self.batch_tiles):
                if sent + len(batch) > count:
                    raise SlideError(f"More tiles were read than the bag of {count} has.")
                rest = batch
                while len(rest):
                    piece = rest[: self.batch_tiles]
                    try:
                        came_back(runner.submit(piece, latents[sent : sent + len(piece)], self.batch_tiles))
                    except torch.OutOfMemoryError as error:
                        came_back(runner.finish())
                        self._smaller_batches(len(piece), error)
                        continue
                    sent += len(piece)
                    rest = rest[len(piece) :]
            came_back(runner.finish())
        if done != count:
            raise SlideError(f"Only {done} of the bag's {count} tiles were read.")
        return latents

    def _runner(self) -> Runner:
        return CudaRunner(self.latents, self.device) if self._cuda else HostRunner(self.latents)

    def _smaller_batches(self, tried: int, error: torch.OutOfMemoryError) -> None:
        if self.batch_tiles == 1:
            raise OutOfDeviceMemory(
                f"Not even one tile fits into the memory of {self.device}.",
                hint="Free memory on the device, use another one (DEVICES), or a lower PRECISION.",
            ) from error
        self.batch_tiles = max(1, min(self.batch_tiles, tried) // 2)
        log.warning("%s is out of memory; going on with batches of %d tiles", self.device, self.batch_tiles)
        if self._cuda:
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def latents(self, pixels: Tensor) -> Tensor:
        """uint8 (n, H, W, 3) on :attr:`device` → latents float32 (n, D) there: one batch, the fast way where that is sound."""
        if self._fast is not None and self._fast.agrees(pixels.shape[1], pixels.shape[2]):
            if self._compiled is not None:
                return self._compiled(pixels)
            return self._fast.latents(pixels)
        return self.plain_latents(pixels)

    @torch.inference_mode()
    def plain_latents(self, pixels: Tensor) -> Tensor:
        """As :meth:`latents`, by the checkpoint's own modules, in this engine's precision."""
        if self._in_pieces:
            return in_small_batches(self._by_own_modules, pixels, at_once=_PLAIN_TILES_AT_ONCE)
        return self._by_own_modules(pixels)

    def _by_own_modules(self, pixels: Tensor) -> Tensor:
        scaled = pixels.permute(0, 3, 1, 2).to(torch.float32).div_(255.0).contiguous()
        with self._autocast():
            return self.blocks.latents(scaled).float()

    def _autocast(self) -> AbstractContextManager[object]:
        if self._dtype is torch.float32:
            return nullcontext()
        return torch.autocast(device_type=self.device.type, dtype=self._dtype)

    @torch.inference_mode()
    def pool(self, latents: Float32Array) -> tuple[Float32Array, Float32Array]:
        """Latents (N, D) of one bag → attention logits float32 (N, H) and slide vector float32 (D,)."""
        on_device = torch.from_numpy(latents).to(self.device)
        ids = torch.zeros(len(latents), dtype=torch.long, device=self.device)
        grouper = self.blocks.grouper
        if self._cuda:
            pooled = grouper.pool(on_device, ids)
        else:
            logits = in_small_batches(grouper.logits, on_device, at_once=_POOLED_AT_ONCE)
            pooled = in_one_thread(lambda: grouper.pool(on_device, ids, logits))
        return _to_host(pooled.logits), _to_host(pooled.slide_vectors[0])


def load_engine(settings: Settings, device: str) -> Engine:
    """Load the configured model onto ``device`` (``"cpu"``, ``"cuda:0"``). Errors as :class:`NativeBlocks` has them."""
    path = ensure_checkpoint(settings)
    blocks = NativeBlocks(path, device, sha256=settings.model_sha256)
    batch_tiles = settings.batch_tiles
    if blocks.device.type == "cuda" and "batch_tiles" not in settings.model_fields_set:
        batch_tiles = CUDA_BATCH_TILES
    return Engine(blocks, model_identity(settings), batch_tiles=batch_tiles, compiled=settings.compile_encoder)


def _fast_latents(blocks: NativeBlocks, dtype: torch.dtype) -> FastLatents | None:
    try:
        return FastLatents(blocks, dtype)
    except NotSwin as difference:
        log.info("fast encoder: not used, %s", difference)
        return None


def _to_host(tensor: Tensor) -> Float32Array:
    return np.asarray(tensor.float().cpu().numpy(), dtype=np.float32)


def _rebatch(chunks: Iterable[UInt8Array], size: Callable[[], int]) -> Iterator[UInt8Array]:
    """Regroup arrays of any length into arrays of ``size()`` rows (the last may be shorter), keeping the order."""
    held: list[UInt8Array] = []
    rows = 0
    for chunk in chunks:
        held.append(chunk)
        rows += len(chunk)
        while rows >= size():
            joined = held[0] if len(held) == 1 else np.concatenate(held)
            wanted = size()
            yield joined[:wanted]
            held = [joined[wanted:]] if len(joined) > wanted else []
            rows = len(joined) - wanted
    if rows:
        yield held[0] if len(held) == 1 else np.concatenate(held)
