"""Signals as the operating system delivers them, also while Python's own handlers have no turn."""

from __future__ import annotations

import os
import signal
import time


class SignalWatch:
    """Notes SIGTERM and SIGINT the moment they arrive.

    Python runs a signal's handler in the main thread, and only between two of its instructions: while that thread is in C code (a
    model's batch, a file system that does not answer) nothing happens. The byte that Python writes for each signal comes at once.
    """

    def __init__(self) -> None:
        self._read = self._write = -1
        self._heard = 0
        self._second_at: float | None = None

    def start(self) -> None:
        """To be called in the main thread."""
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def stop(self) -> None:
        """To be called in the main thread, when no other uses this any more."""
        if self._write >= 0:
            signal.set_wakeup_fd(-1)
            os.close(self._read)
            os.close(self._write)
            self._read = self._write = -1

    def since_second(self) -> float:
        """How long ago the second signal was first seen here, in seconds; 0.0 if there was none."""
        try:
            told = os.read(self._read, 4096) if self._read >= 0 else b""
        except BlockingIOError:
            told = b""
        self._heard += sum(number in (signal.SIGTERM, signal.SIGINT) for number in told)
        if self._heard < 2:
            return 0.0
        if self._second_at is None:
            self._second_at = time.monotonic()
        return time.monotonic() - self._second_at
