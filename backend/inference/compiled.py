"""The encoder compiled by ``torch.compile`` while slides are already being analysed the uncompiled way."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

Encode = Callable[[Tensor], Tensor]
MIN_COSINE = 0.9999
"""Smallest cosine between a latent of the compiled and one of the uncompiled way, in the same precision."""


class CompiledInBackground:
    """Calls ``encode``, and from some moment on its compiled form.

    The first batch of each shape starts a compilation in a thread. Until that is done, and for good if it fails or the compiled form does
    not agree, ``encode`` itself answers. One shape is kept: the engine's batches all have one.

    Parameters
    ----------
    encode
        uint8 (n, H, W, 3) → float32 (n, D).
    compiler
        ``torch.compile`` with fixed shapes, unless a test gives a quicker one.
    """

    def __init__(self, encode: Encode, compiler: Callable[[Encode], Encode] | None = None) -> None:
        self._encode = encode
        self._compiler: Any = compiler or (lambda function: torch.compile(function, dynamic=False))
        self._ready: dict[torch.Size, Encode] = {}
        self._tried: set[torch.Size] = set()
        self._thread: threading.Thread | None = None

    def __call__(self, pixels: Tensor) -> Tensor:
        """The latents of a batch."""
        if pixels.shape not in self._tried and (self._thread is None or not self._thread.is_alive()):
            self._tried.add(pixels.shape)
            self._thread = threading.Thread(
                target=self._compile, args=(pixels.clone(),), name="compile-encoder", daemon=True
            )
            self._thread.start()
        return self._ready.get(pixels.shape, self._encode)(pixels)

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the compilation that is under way."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _compile(self, pixels: Tensor) -> None:
        started = time.monotonic()
        try:
            with torch.inference_mode():
                compiled: Encode = self._compiler(self._encode)
                cosine = float(F.cosine_similarity(compiled(pixels), self._encode(pixels)).min())
        except Exception as error:  # noqa: BLE001 - whatever a compiler fails of, slides go on uncompiled, and the log says so
            log.warning("the encoder could not be compiled, going on without: %s: %s", type(error).__name__, error)
            return
        seconds = time.monotonic() - started
        if not cosine >= MIN_COSINE:
            log.warning("the compiled encoder disagrees (cosine %.6f), going on without", cosine)
            return
        self._ready = {pixels.shape: compiled}
        log.info("encoder compiled for batches of %d in %.0f s (cosine %.6f)", len(pixels), seconds, cosine)
