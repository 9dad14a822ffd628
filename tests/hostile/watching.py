"""Sees every file that Python opens and every address that it connects to, by the interpreter's own audit events."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Seen:
    """What happened while it was watched: real paths of files opened and folders listed, addresses asked for or connected to."""

    files: set[str] = field(default_factory=set)
    addresses: set[tuple[Any, ...]] = field(default_factory=set)
    names: set[str] = field(default_factory=set)


_watchers: list[Seen] = []
_inside = threading.local()
_installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watchers or getattr(_inside, "busy", False):
        return
    if event in ("open", "os.listdir", "os.scandir"):
        path = arguments[0]
        if isinstance(path, str | bytes | os.PathLike):
            _inside.busy = True  # realpath lists nothing, but it may
            try:
                real = os.path.realpath(os.fsdecode(path))
            finally:
                _inside.busy = False
            for seen in _watchers:
                seen.files.add(real)
    elif event == "socket.connect":
        for seen in _watchers:
            seen.addresses.add(tuple(arguments[1]) if isinstance(arguments[1], tuple) else (arguments[1],))
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        for seen in _watchers:
            seen.names.add(str(arguments[0]))


@contextmanager
def watching() -> Iterator[Seen]:
    """Everything that is opened or connected to by any thread while inside."""
    global _installed
    if not _installed:
        sys.addaudithook(_hook)  # for good: a hook cannot be taken out again, and does nothing while nobody watches
        _installed = True
    seen = Seen()
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)
