"""Files that are either whole or not there, and names as text that files can hold."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backend.paths import StrPath


def write_bytes(path: StrPath, data: bytes | memoryview) -> None:
    """Write a file so that it is whole or not there: by a temporary name beside it, then renamed. Makes the folder."""
    with whole_file(path) as temporary, temporary.open("xb") as file:
        file.write(data)


@contextmanager
def whole_file(path: StrPath) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to, renamed to it at the end, gone after an error. Makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the file's own name, which may be as long as a name can be.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: StrPath, content: Any, *, indent: int | None = None) -> None:
    """Write JSON, whole or not at all.

    Raises
    ------
    ValueError
        A number is not finite: JSON has no word for it.
    """
    text = json.dumps(content, allow_nan=False, ensure_ascii=False, indent=indent)
    # A file name that is no UTF-8 has lone surrogates in Python; as \udc80 … they are JSON all the same.
    write_bytes(path, text.encode(errors="backslashreplace"))


def readable(name: str) -> str:
    """A file name as text for any file format: what is no UTF-8 (lone surrogates, in Python) becomes U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", name)
