"""How a batch is computed on the CPU: in pieces of a few tiles, one thread of torch for each piece, as many at once as there are cores.

Two reasons, both measured. The activations of 32 tiles (150 MB for one layer of Swin-V2 tiny) stream through memory layer by layer,
those of two tiles stay in the cache. And torch's own threads meet after every operation, some hundred times a forward: where another thread needs a core
too (the tile readers do), each meeting waits for the one that lost it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

TILES_AT_ONCE = 2


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    # torch's number of threads is kept by thread: the caller's own is left as it is.
    return ThreadPoolExecutor(threads, "encoder", initializer=torch.set_num_threads, initargs=(1,))


def in_small_batches(encode: Callable[[Tensor], Tensor], pixels: Tensor, *, at_once: int = TILES_AT_ONCE) -> Tensor:
    """``encode`` applied to pieces of ``pixels`` (n, …) on the CPU and joined again, with as many threads as torch has.

    ``encode`` is called from several threads at once, with at most ``at_once`` tiles.
    """
    threads = torch.get_num_threads()
    size = max(1, min(at_once, len(pixels) // threads))
    if threads == 1 or len(pixels) <= size:
        return torch.cat([encode(piece) for piece in torch.split(pixels, size)])

    def run(piece: Tensor) -> Tensor:
        with torch.inference_mode():
            return encode(piece)

    return torch.cat(list(_pool(threads).map(run, torch.split(pixels, size))))


def in_one_thread(function: Callable[[], T]) -> T:
    """What ``function`` returns, called in a thread whose torch has no others. For work too short to be worth their meetings.

    Torch's threads wait for each other and for their next task by spinning: a pooling of 5 ms cost 40 ms of processor time beside the tile readers.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return function()

    def run() -> T:
        with torch.inference_mode():
            return function()

    return _pool(threads).submit(run).result()
