"""A value that takes long to make, for many who ask for it again and again: one thread makes it, and nobody who waits holds another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import anyio.to_thread

T = TypeVar("T")

ANSWER_WITHIN_S = 10.0
"""So long a poll waits for Label Studio, or for a store of results, that does not answer."""


class Latest(Generic[T]):
    """The value as it was made last. Lives in one event loop.

    Parameters
    ----------
    make
        Called in a thread, once at a time.
    kept_s
        A value is made anew for who asks so long after it was made, in seconds.
    """

    def __init__(self, make: Callable[[], T], kept_s: float = 0.0) -> None:
        self._make = make
        self._kept_s = kept_s
        self._made: tuple[float, T] | None = None
        self._making: asyncio.Task[None] | None = None

    async def get(self, within_s: float = ANSWER_WITHIN_S) -> T | None:
        """A new one if it is made within ``within_s``, else the one before; ``None`` if there is none yet. Raises what ``make`` does."""
        if self._making is None and (self._made is None or time.monotonic() - self._made[0] > self._kept_s):
            self._making = asyncio.create_task(self._run())
        if self._making is not None:
            done, _ = await asyncio.wait([self._making], timeout=within_s)
            for made in done:
                made.result()
        return None if self._made is None else self._made[1]

    async def _run(self) -> None:
        try:
            value = await anyio.to_thread.run_sync(self._make)
            self._made = (time.monotonic(), value)  # when it was made, not when it was asked for
        finally:
            self._making = None
