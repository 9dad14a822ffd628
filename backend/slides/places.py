"""The rules of where a slide may come from. Text and stat only: nothing is opened, nothing is downloaded."""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit, urlunsplit

import httpx

from backend.addresses import label_studio_path, own_path
from backend.errors import DownloadFailed, SlideNotFound, SourceError, SourceRefused, TaskFieldMissing
from backend.redaction import shown_address
from backend.settings import Settings
from backend.stores import fsspec_url, how_to_allow, is_allowed, store_name

PlaceKind = Literal["file", "label_studio", "fsspec", "http"]

_MAX_LENGTH = 8192
_OF_THE_PATH = (
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
)  # and no passing state of the system
_DEFAULT_PORTS = {"http": 80, "https": 443}
_UPLOAD = re.compile(r"/data/upload/[^/]+/[^/]+$")
_RESOLVE = re.compile(r"/(?:api/)?(?:tasks|projects)/\d+/(?:presign|resolve)/?")
_BELOW_A_PATH = re.compile(
    r"(/[^/]+)+?(?:/data/(?:upload|local-files)/|/storage-data/uploaded/|/(?:tasks|projects)/\d+/(?:presign|resolve)/)"
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True)
class Place:
    """One location that has passed the rules: a real path, or a URL in full."""

    kind: PlaceKind
    location: str

    @property
    def is_upload(self) -> bool:
        """Whether it is a file uploaded into Label Studio, whose name is never used twice."""
        return self.kind == "label_studio" and _UPLOAD.search(urlsplit(self.location).path) is not None


def classify(value: object, settings: Settings) -> Place:
    """Say where ``value`` (one entry of a task's field) lies, if it may be read from there.

    Raises
    ------
    TaskFieldMissing
        It is empty.
    SourceRefused
        It lies outside what the settings allow; the message says which setting would allow it.
    SlideNotFound
        A file inside ``SLIDE_ROOTS`` that is not there.
    """
    if not isinstance(value, str):
        raise SourceError(f"The slide's location must be text, not {type(value).__name__}.")
    value = value.strip()
    if not value:
        raise TaskFieldMissing("The task's slide field is empty.")
    if len(value) > _MAX_LENGTH or any(ord(c) < 32 or ord(c) == 127 for c in value):
        raise SourceRefused(f"{shown(value)} holds control characters or is longer than {_MAX_LENGTH}.")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise SourceRefused(f"{shown(value)} holds half of a character.", hint="Names of files must be UTF-8.")
    match = _SCHEME.match(value)
    scheme = match.group(1).lower() if match else ""
    if scheme in ("http", "https"):
        return _classify_http(value, settings)
    if scheme:
        return _classify_other(value, scheme, settings)
    if value.startswith("/") and not value.startswith("//"):
        there = _in_label_studio(value, settings)
        if there is not None:
            return there
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", value):
        raise SourceRefused(f"{shown(value)} is neither a path nor a URL that is known here.")
    return Place("file", str(allowed_file(value, settings)))


def check_redirect(url: str, settings: Settings) -> Place:
    """Whether a download may go on to ``url``, an absolute address: as :func:`classify`, and only http(s)."""
    if not url.lower().startswith(("http://", "https://")):
        raise SourceRefused(f"A redirect leads to {shown(url)}, which is not http(s).")
    return _classify_http(url, settings, from_redirect=True)


def allowed_file(path: str, settings: Settings) -> Path:
    """The real path of an existing regular file inside ``SLIDE_ROOTS``. A relative ``path`` is looked for in each root in turn."""
    if "\0" in path:
        raise SourceRefused(f"{shown(path)} holds a NUL character.")
    if not settings.slide_roots:
        raise SourceRefused(
            f"{shown(path)} is a file, and no folder is allowed.", hint="Set SLIDE_ROOTS to the folders of your slides."
        )
    candidates = [Path(path)] if path.startswith("/") else [root / path for root in settings.slide_roots]
    inside = [real for real in (Path(os.path.realpath(c)) for c in candidates) if _is_inside(real, settings)]
    if not inside:
        raise SourceRefused(
            f"{shown(path)} lies outside the allowed folders.",
            hint="Add its folder to SLIDE_ROOTS, or move the slide into one of them. Symbolic links count by where they lead.",
        )
    for real in inside:
        try:
            status = real.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if error.errno in _OF_THE_PATH:
                raise SourceRefused(f"{shown(path)} cannot be looked at: {error.strerror}.") from error
            raise DownloadFailed(
                f"{shown(path)} cannot be looked at now: {error.strerror}.", hint="Is its disk or network share there?"
            ) from error
        if stat.S_ISDIR(status.st_mode):
            raise SourceRefused(
                f"{shown(path)} is a folder.", hint="Name a file; of a DICOM slide, any one of its files."
            )
        if not stat.S_ISREG(status.st_mode):
            raise SourceRefused(f"{shown(path)} is not a regular file.", hint="Pipes and devices are not read.")
        if not os.access(real, os.R_OK):
            raise SourceRefused(f"{shown(path)} may not be read by this user.", hint="Change its permissions.")
        return real
    raise SlideNotFound(
        f"There is no file {shown(path)}.",
        hint="Check the location in the task's data, and that this machine sees the folder.",
    )


def shown(value: str) -> str:
    """``value`` for a message: :func:`public`, quoted, and not endless."""
    value = public(value)
    return repr(value if len(value) <= 200 else value[:199] + "…")


def public(value: str) -> str:
    """A location for others to see: without its query (which may hold a signature) or a password."""
    match = _SCHEME.match(value)
    if match is None:
        return value
    if store_name(value) in ("s3", "gs", "az"):
        # The name of an object may hold any character: @, # and ? mean nothing in it.
        bucket, slash, name = value[match.end() :].partition("/")
        return shown_address(match[0] + bucket) + slash + name
    return shown_address(value)


def _is_ours(path: str, settings: Settings) -> bool:
    """Whether a path under /data, where Label Studio has its files, is a file of ours instead."""
    real = Path(os.path.realpath(path))
    return _is_inside(real, settings) and (real.exists() or not settings.label_studio_url)


def _is_inside(real: Path, settings: Settings) -> bool:
    return any(real.is_relative_to(root) for root in settings.slide_roots)


def _decoded(path: str, value: str) -> str:
    try:
        return unquote(path, errors="strict")
    except UnicodeDecodeError as error:
        raise SourceRefused(f"{shown(value)} is not UTF-8 when its percent signs are decoded.") from error


def _parse(value: str) -> SplitResult:
    """An http(s) URL on whose host two parsers agree; everything on which they might not is refused."""
    try:
        parts = urlsplit(value)
        port, other = parts.port, httpx.URL(value)
    except (ValueError, httpx.InvalidURL) as error:
        raise SourceRefused(f"{shown(value)} is not a valid URL: {error}.") from error
    if "@" in parts.netloc:
        raise SourceRefused(f"{shown(value)} carries a user name.", hint="Leave user names and passwords out of URLs.")
    if "\\" in value or any(c.isspace() for c in value) or not parts.hostname:
        raise SourceRefused(f"{shown(value)} is not a valid URL.")
    default = _DEFAULT_PORTS[parts.scheme.lower()]
    # httpx shows an international host decoded in `host`, and as it is sent in `raw_host`.
    same_host = other.raw_host.decode("ascii", "replace").strip("[]") == parts.hostname.lower()
    if not same_host or (other.port or default) != (port or default):
        raise SourceRefused(f"The host of {shown(value)} is ambiguous.", hint="Write international names as xn--….")
    return parts


def _classify_http(value: str, settings: Settings, *, from_redirect: bool = False) -> Place:
    parts = _parse(value)
    if own_path(value, settings) is not None:
        raise SourceRefused(
            f"{shown(value)} is a picture made by this backend, not the slide.",
            hint="Keep the slide's own location in the task's field `slide`.",
        )
    local = None if from_redirect else _local_file(parts, settings)
    if local is not None:
        return local
    path = label_studio_path(value, settings)
    if path is not None and _is_label_studio_file(_decoded(path, value)):
        return _label_studio_place(path, parts.query, value, settings)
    host, port = (parts.hostname or "").lower().rstrip("."), parts.port or _DEFAULT_PORTS[parts.scheme.lower()]
    names = {host, f"{host}:{port}", f"[{host}]", f"[{host}]:{port}"}
    if names.isdisjoint(name.lower() for name in settings.allowed_hosts):
        what = "A redirect leads to" if from_redirect else "The slide is at"
        hint = f"Add {host}:{port} to ALLOWED_HOSTS to allow it."
        if _BELOW_A_PATH.match("/x" + parts.path) and not from_redirect:
            hint += " If that is Label Studio, add its address, as it stands there, to LABEL_STUDIO_PUBLIC_URL."
        raise SourceRefused(f"{what} {shown(value)}, and {host}:{port} is not an allowed host.", hint=hint)
    return Place("http", urlunsplit(parts._replace(fragment="")))


def _in_label_studio(value: str, settings: Settings) -> Place | None:
    """Where an address without a host lies in Label Studio; ``None`` if it is a path of ours."""
    parts = urlsplit(value)
    path = label_studio_path(value, settings)
    path = parts.path if path is None else path
    # Also if it climbs: then it is refused, and not looked for on this machine.
    theirs = path.startswith(("/data/", "/storage-data/uploaded/")) or _RESOLVE.fullmatch(path) is not None
    below = None if theirs else _BELOW_A_PATH.match(path)
    if (not theirs and below is None) or _is_ours(value, settings):
        return None
    if below is not None:
        if _is_inside(Path(os.path.realpath(value)), settings):
            return None
        raise SourceRefused(
            f"{shown(value)} lies outside the allowed folders.",
            hint=f"If it is a file of Label Studio, add the address that the browser shows, with {below[1]}, to LABEL_STUDIO_PUBLIC_URL; "
            "if it is one on this machine, its folder to SLIDE_ROOTS.",
        )
    local = _local_file(parts, settings)
    return local if local is not None else _label_studio_place(path, parts.query, value, settings)


def _label_studio_place(path: str, query: str, value: str, settings: Settings) -> Place:
    if not settings.label_studio_url:
        raise SourceRefused(
            f"{shown(value)} is on Label Studio, whose address is not known.",
            hint="Set LABEL_STUDIO_URL (and LABEL_STUDIO_API_KEY).",
        )
    plain = _decoded(path, value)
    # Decoded twice, in case a proxy on the way does so: the token must reach files only, never the API.
    segments = unquote(plain).split("/")
    if ".." in segments or "." in segments or "\\" in unquote(plain) or "//" in plain:
        raise SourceRefused(f"{shown(value)} has a path that climbs.")
    if not _is_label_studio_file(plain):
        raise SourceRefused(
            f"{shown(value)} is not one of Label Studio's files.", hint="Files of Label Studio lie under /data/."
        )
    stored = _stored_at(path, query)
    if stored is not None and is_allowed(stored, settings.remote_stores):
        return classify(
            stored, settings
        )  # it is the same slide for every task, and does not take the way through Label Studio
    return Place("label_studio", settings.label_studio_url + path + (f"?{query}" if query else ""))


def _stored_at(path: str, query: str) -> str | None:
    """The ``s3://…`` (``gs``, ``azure-blob``) behind the address that Label Studio shows in its place."""
    if _RESOLVE.fullmatch(path) is None:
        return None
    text = parse_qs(query).get("fileuri", [""])[0]
    with contextlib.suppress(ValueError):  # older ones are not encoded
        text = base64.b64decode(text, altchars=b"-_", validate=True).decode()
    return text if _SCHEME.match(text) and not text.lower().startswith(("http:", "https:", "file:")) else None


def _is_label_studio_file(path: str) -> bool:
    return path.startswith(("/data/", "/storage-data/uploaded/")) or _RESOLVE.fullmatch(path) is not None


def _local_file(parts: SplitResult, settings: Settings) -> Place | None:
    """The file of a Label Studio local-files URL, if it lies in a root of ours too; ``None``: it must be asked for."""
    if not parts.path.rstrip("/").endswith("/data/local-files"):
        return None
    # As Label Studio reads it: decoded once, the last value counts, always relative to its document root.
    relative = parse_qs(parts.query, keep_blank_values=True).get("d", [""])[-1]
    normal = os.path.normpath(relative).lstrip("/")
    if not relative or "\0" in relative or normal in ("", ".") or normal.split("/")[0] == "..":
        raise SourceRefused(
            f"The local file {shown(relative)} lies outside the document root.", hint="Its path is the `d` of the URL."
        )
    for root in settings.slide_roots:
        if os.path.lexists(root / normal):
            return Place("file", str(allowed_file(str(root / normal), settings)))
    return None


def _classify_other(value: str, scheme: str, settings: Settings) -> Place:
    try:
        parts = urlsplit(value)
    except ValueError as error:
        raise SourceRefused(f"{shown(value)} is not a valid URL: {error}.") from error
    if scheme != "file":
        return _classify_fsspec(value, scheme, settings)
    if parts.netloc not in ("", "localhost"):
        raise SourceRefused(f"{shown(value)} names another machine.", hint="Write file:///path.")
    return Place("file", str(allowed_file(_decoded(parts.path, value), settings)))


def _classify_fsspec(value: str, scheme: str, settings: Settings) -> Place:
    if "::" in value:
        raise SourceRefused(f"{shown(value)} chains several stores.", hint="Give the plain URL of the slide.")
    if not is_allowed(value, settings.remote_stores):
        raise SourceRefused(
            f"{shown(value)} is in a store of kind {scheme}, which is not allowed.", hint=how_to_allow(value)
        )
    if ":" in urlsplit(value).netloc.rpartition("@")[0]:
        raise SourceRefused(
            f"{shown(value)} carries a password.", hint="Put credentials where fsspec finds them, not into the task."
        )
    return Place("fsspec", fsspec_url(value))
