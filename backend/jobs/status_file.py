"""What a worker says of itself to the pool that runs it: which job it is at since when, in a small file."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Busy:
    """A job that runs: for how long, and how long it may by its own limit, in seconds."""

    job: str
    seconds: float
    limit_s: float


class StatusFile:
    """Written by the worker, read by the pool's watchdog; without a path nothing is written."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    @contextmanager
    def running(self, job_id: str, limit_s: float) -> Iterator[None]:
        """While inside, the worker is at this job."""
        self._write(job_id, limit_s)
        try:
            yield
        finally:
            self._write(None)

    def read(self, pid: int) -> Busy | None:
        """What the process ``pid`` is at; ``None`` when idle."""
        if self._path is None:
            return None
        try:
            status = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return None
        if status["pid"] != pid or status["job"] is None:
            return None
        seconds = time.monotonic() - status["since"]  # CLOCK_MONOTONIC is one for all processes
        return Busy(status["job"], seconds, status["limit_s"])

    def _write(self, job_id: str | None, limit_s: float = 0.0) -> None:
        if self._path is None:
            return
        try:
            temporary = self._path.with_suffix(".tmp")
            status = {"pid": os.getpid(), "job": job_id, "since": time.monotonic(), "limit_s": limit_s}
            temporary.write_text(json.dumps(status))
            temporary.replace(self._path)
        except OSError as error:
            # A full disk, for one. The watchdog does not see this job, and the job runs all the same.
            log.warning("%s could not be written: %s", self._path, error)
            self._path.unlink(missing_ok=True)
