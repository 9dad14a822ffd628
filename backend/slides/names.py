"""What people call a slide: the name of its file, wherever it lies."""

from __future__ import annotations

import base64
import re
from urllib.parse import parse_qsl, unquote, urlsplit

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# Label Studio's addresses of what lies in a storage: its location stands in the query, in base64.
_RESOLVES = re.compile(r"/(?:resolve|presign)/?$")
_LONGEST = 120


def slide_name(location: str) -> str:
    """The file name in a path or address, without folders and query, of 120 characters at most.

    >>> slide_name("http://studio/data/local-files/?d=slides/x%20y.svs")
    'x y.svs'
    """
    name = slide_path(location).rstrip("/").rsplit("/", 1)[-1]
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2]}…{name[-_LONGEST // 2 + 1 :]}"


def slide_path(location: str) -> str:
    """The path of a slide where it really lies, without host and query: of an address of Label Studio's, that of the
    file behind it.

    >>> slide_path("http://studio/data/local-files/?d=slides/x%20y.svs")
    'slides/x y.svs'
    """
    if not _SCHEME.match(location) and not location.startswith("/data/"):
        return location
    try:
        parts = urlsplit(location)
    except ValueError:
        return location.split("?", 1)[0]
    query = dict(parse_qsl(parts.query))
    if parts.path.rstrip("/").endswith("/data/local-files"):
        return query.get("d") or unquote(parts.path)
    if _RESOLVES.search(parts.path) and (inner := _decoded(query.get("fileuri", ""))):
        return slide_path(inner)
    return unquote(parts.path).rstrip("/") or location.split("?", 1)[0]


def _decoded(text: str) -> str:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
    except ValueError:  # binascii.Error and UnicodeDecodeError are such
        return ""
