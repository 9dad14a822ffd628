"""How batches get to the device and latents back: at once on the CPU, two batches under way on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from backend.results.bag import Float32Array, UInt8Array

Latents = Callable[[Tensor], Tensor]
"""uint8 (n, H, W, 3) on the device → float32 (n, D) there."""


class Runner(Protocol):
    """Runs batches in the order in which they are given."""

    def submit(self, batch: UInt8Array, out: Float32Array, batch_tiles: int) -> int:
        """Have the latents of ``batch`` written into the rows ``out``, now or later; how many rows have been written since the last call.

        ``batch_tiles``: the size that all batches have, but for the last. Raises ``torch.OutOfMemoryError``; the batch counts as not given then.
        """
        ...

    def finish(self) -> int:
        """Wait for all that is under way; how many rows were written."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class HostRunner:
    """The CPU: each batch is done when :meth:`submit` returns."""

    def __init__(self, latents: Latents) -> None:
        self._latents = latents

    def submit(self, batch: UInt8Array, out: Float32Array, batch_tiles: int) -> int:  # noqa: ARG002 - there is no buffer to size
        out[:] = self._latents(torch.from_numpy(np.ascontiguousarray(batch))).numpy()
        return len(batch)

    def finish(self) -> int:
        return 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


@dataclass(eq=False)
class _Slot:
    """Page-locked memory for one batch on its way there, and for its latents on their way back."""

    pixels: Tensor
    latents: Tensor | None = None
    done: torch.cuda.Event | None = None
    out: Float32Array | None = None

    def collect(self) -> int:
        """Wait for what was sent with this slot, hand it over, and be free again."""
        if self.out is None or self.done is None or self.latents is None:
            return 0
        self.done.synchronize()
        out, self.out = self.out, None
        out[:] = self.latents[: len(out)].numpy()
        return len(out)


class CudaRunner:
    """CUDA: while one batch is computed, the next is copied by a stream of its own, from page-locked memory.

    Every batch has the same size (the last is filled up with what the memory held before), so that kernels, algorithms and a compiled
    encoder see one shape. Written after CUDA's and torch's documentation of streams; see ``benchmarks/RESULTS.md`` for where it was run.
    """

    def __init__(self, latents: Latents, device: torch.device) -> None:
        self._latents = latents
        self._device = device
        self._upload = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._slots: list[_Slot | None] = [None, None]
        self._turn = 0

    def submit(self, batch: UInt8Array, out: Float32Array, batch_tiles: int) -> int:
        slot, written = self._free_slot((max(batch_tiles, len(batch)), *batch.shape[1:]))
        slot.pixels[: len(batch)].numpy()[:] = batch
        compute = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._upload):
            pixels = slot.pixels.to(self._device, non_blocking=True)
        compute.wait_stream(self._upload)
        pixels.record_stream(compute)  # its memory belongs to the upload's stream, and is still read by this one
        latents = self._latents(pixels)
        if slot.latents is None:
            slot.latents = torch.empty(latents.shape, dtype=torch.float32, pin_memory=True)
        slot.latents.copy_(latents, non_blocking=True)
        slot.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        slot.done.record(compute)
        slot.out = out
        self._turn = 1 - self._turn
        return written

    def _free_slot(self, shape: tuple[int, ...]) -> tuple[_Slot, int]:
        """The slot whose turn it is, after what it held has come back; new memory if the batch has another shape."""
        slot = self._slots[self._turn]
        written = slot.collect() if slot is not None else 0
        if slot is None or slot.pixels.shape != shape:
            slot = self._slots[self._turn] = _Slot(torch.zeros(shape, dtype=torch.uint8, pin_memory=True))
        return slot, written

    def finish(self) -> int:
        written = 0
        for turn in (self._turn, 1 - self._turn):  # the older first
            slot = self._slots[turn]
            written += slot.collect() if slot is not None else 0
        return written

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error copies may still be under way into memory that is about to be freed.
        torch.cuda.synchronize(self._device)
