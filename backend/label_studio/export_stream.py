"""An export of Label Studio, task by task as it arrives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ijson

from backend.errors import LabelStudioError


class _Bytes:
    """An iterator of bytes as the file that ijson reads; remembers the first byte that is no white space."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts = parts
        self.first = b""

    def read(self, size: int = -1) -> bytes:
        """The next part, whatever its length; empty at the end. ijson asks for nothing (0) once, to see the type."""
        part = b"" if size == 0 else next((part for part in self._parts if part), b"")
        self.first = self.first or part.lstrip()[:1]
        return part


def tasks_of(parts: Iterator[bytes], what: str) -> Iterator[dict[str, Any]]:
    """The tasks of an export, a JSON list of objects, of which one at a time is in memory. ``what`` is for messages.

    Raises
    ------
    LabelStudioError
        It is no JSON, or no list of tasks.
    """
    file = _Bytes(parts)
    try:
        for task in ijson.items(file, "item", use_float=True):
            if not isinstance(task, dict):
                raise LabelStudioError(f"The export of {what} is no list of tasks.")
            yield task
    except ijson.JSONError as error:
        raise LabelStudioError(f"The export of {what} is no JSON: {str(error)[:200]}.") from None
    if file.first != b"[":
        raise LabelStudioError(f"The export of {what} is no list of tasks.")
