"""Whose an address is: Label Studio's, ours, or somebody else's. The one place where that is decided.

Both may have several names (one for browsers, one for services), and each of them a path below which all of it lies, as behind a
reverse proxy. Only text is looked at; :mod:`backend.slides.places` has the rules of what may be read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import SplitResult, urlsplit

from backend.settings import Settings

_DEFAULT_PORTS = {"http": 80, "https": 443}
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_THUMBNAIL = re.compile(r"[^?#]*/thumbnails/([0-9a-f]{40})\.jpg(?:[?#].*)?", re.DOTALL)

Origin = tuple[str, str, int]


def origin(url: str) -> Origin:
    """(scheme, host, port) of an http(s) URL, lower case, the port filled in. The names of this machine for itself are one."""
    parts = urlsplit(url)
    scheme, host = parts.scheme.lower(), (parts.hostname or "").lower().rstrip(".")
    return scheme, "localhost" if host in _LOOPBACK else host, parts.port or _DEFAULT_PORTS.get(scheme, 0)


def label_studio_path(url: str, settings: Settings) -> str | None:
    """The path of ``url`` in Label Studio, without the path that Label Studio lies below; ``None`` if it lies elsewhere.

    ``url`` is absolute, or begins with the path, as Label Studio writes uploads into tasks.
    """
    return _below(urlsplit(url), settings.label_studio_urls)


def own_path(url: str, settings: Settings) -> str | None:
    """The path of an absolute ``url`` in this backend, without the path of its ``PUBLIC_URL``; ``None`` if it lies elsewhere.

    Where one of both lies below the other, it is the one with the longer path whose address it is.
    """
    ours, theirs = (_below(urlsplit(url), urls) for urls in (settings.own_urls, settings.label_studio_urls))
    return None if ours is not None and theirs is not None and len(theirs) < len(ours) else ours


def thumbnail_of(url: str) -> str | None:
    """The id of the thumbnail of ours at ``url``, whatever name it was written under: no other has that id."""
    match = _THUMBNAIL.fullmatch(url)
    return match[1] if match else None


def _below(parts: SplitResult, bases: Iterable[str]) -> str | None:
    where = origin(parts.geturl()) if parts.netloc else None
    found = [
        urlsplit(base).path
        for base in bases
        if (where is None or origin(base) == where) and parts.path.startswith(urlsplit(base).path + "/")
    ]
    return parts.path[len(max(found, key=len)) :] if found else None
