"""How every process of ours writes its log: one line an event, to standard error, as text or as JSON.

No line holds a secret of the settings, whoever wrote it. A worker does one job at a time: while it does, :func:`working_on` puts what it works on (its bag, its project) on every line of the process,
those of libraries and of other threads included.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from types import TracebackType
from typing import Any, Literal

from backend.redaction import Redactor

LogFormat = Literal["text", "json"]

_current: dict[str, str] = {}

# Addresses, names of slides and errors of others get into messages: a terminal obeys some of these, and a reader of lines ends a line at others.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_BUT_LINES_AND_TABS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_NOT_OF_JSON = re.compile("[\x7f-\x9f\u2028\u2029]")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


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
    """``TIME PROCESS LEVEL LOGGER: MESSAGE bag=…``, the last unless the message says it itself. One line, then a traceback if there is one."""

    def __init__(self, process: str, redact: Redactor | None = None) -> None:
        super().__init__(f"%(asctime)s {process} %(levelname)s %(name)s: %(message)s")
        self._redact = redact or Redactor()

    def format(self, record: logging.LogRecord) -> str:
        """The whole of it."""
        return self._redact(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # logging's name
        """The line, without a traceback."""
        line = super().formatMessage(record)
        line += "".join(f" {k}={v}" for k, v in _current.items() if f"{k}={v}" not in record.message)
        return _CONTROLS.sub(_escaped, line)

    def formatException(self, ei: Any) -> str:  # logging's name
        """The traceback."""
        return _BUT_LINES_AND_TABS.sub(_escaped, super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # logging's name
        """The stack of a line that asks for it."""
        return _BUT_LINES_AND_TABS.sub(_escaped, super().formatStack(stack_info))


class JsonLines(logging.Formatter):
    """One JSON object a line: ``time`` (ISO 8601, UTC), ``process``, ``level``, ``logger``, ``message``, ``bag`` and the like, ``traceback``."""

    def __init__(self, process: str, redact: Redactor | None = None) -> None:
        super().__init__()
        self._process = process
        self._redact = redact or Redactor()

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "process": self._process,
            "level": record.levelname,
            "logger": record.name,
            "message": self._redact(record.getMessage()),
            **_current,
        }
        if record.exc_info:
            line["traceback"] = self._redact(self.formatException(record.exc_info))
        # JSON escapes the first of them by itself.
        return _NOT_OF_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(line, ensure_ascii=False))


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return _SHORT.get(match[0]) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def configure_logging(level: str, process: str, form: LogFormat = "text", redact: Redactor | None = None) -> None:
    """Send the log of this process to standard error, ``process`` naming it in each line. As JSON, all else that Python prints there too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(process, redact) if form == "json" else TextLines(process, redact))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.captureWarnings(form == "json")
    if form == "json":
        sys.excepthook = _log_uncaught
    # A line for each request or job of a library says less than ours do.
    for chatty in ("httpx", "httpcore", "PIL", "tifffile", "rq", "rq.worker"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        logging.getLogger("backend").critical("%s", kind.__name__, exc_info=(kind, error, trace))
