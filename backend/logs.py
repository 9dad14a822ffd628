"""How every process of ours writes its log: one line an event, to standard error, as text or as JSON.

A worker does one job at a time: while it does, :func:`working_on` puts what it works on (its bag, its project) on every line of the process,
those of libraries and of other threads included.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Literal

LogFormat = Literal["text", "json"]

_current: dict[str, str] = {}


@contextmanager
def working_on(**fields: object) -> Iterator[None]:
    """Name what this process works on in every line of its log. Not for processes that do several things at once."""
    before = dict(_current)
    _current.update({name: str(value) for name, value in fields.items()})
    try:
        yield
    finally:
        _current.clear()
        _current.update(before)


class TextLines(logging.Formatter):
    """``TIME PROCESS LEVEL LOGGER: MESSAGE bag=…``, the last unless the message says it itself."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s {process} %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # logging's name
        """The line, without a traceback."""
        line = super().formatMessage(record)
        return line + "".join(f" {k}={v}" for k, v in _current.items() if f"{k}={v}" not in record.message)


class JsonLines(logging.Formatter):
    """One JSON object a line: ``time`` (ISO 8601, UTC), ``process``, ``level``, ``logger``, ``message``, ``bag`` and the like, ``traceback``."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "process": self._process,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_current,
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure_logging(level: str, process: str, form: LogFormat = "text") -> None:
    """Send the log of this process to standard error, ``process`` naming it in each line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(process) if form == "json" else TextLines(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # A line for each request or job of a library says less than ours do.
    for chatty in ("httpx", "httpcore", "PIL", "tifffile", "rq", "rq.worker"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
