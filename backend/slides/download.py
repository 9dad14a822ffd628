"""Bytes from other machines: asking who a remote slide is, fetching it whole, and keeping the cache within its size."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar
from urllib.parse import urljoin, urlsplit

import fsspec
import httpx

from backend.addresses import origin
from backend.certificates import ssl_context
from backend.errors import BackendError, DownloadFailed, SettingsError, SlideNotFound, SourceError, SourceRefused
from backend.reasons import network_reason
from backend.results.bag import digest
from backend.settings import Settings
from backend.slides.pace import Watch
from backend.slides.peers import guard
from backend.slides.places import Place, check_redirect, shown
from backend.slides.underway import Download, once
from backend.stores import driver_hint

log = logging.getLogger(__name__)

Headers = Callable[[], Mapping[str, str]]
Trace = Callable[[str, Mapping[str, Any]], None]

_ASK_TIMEOUT_S = 5.0
_MAX_REDIRECTS = 5
_PIECE_BYTES = 1 << 20
_RECENT_S = 300.0  # another process may be about to open what it fetched so recently
_STALE_PART_S = 86_400.0


# --- who is it ----------------------------------------------------------------------------------------------------


def http_identity(place: Place, settings: Settings, headers: Headers) -> str:
    """What tells this content from another under the same URL: ETag, Last-Modified and length, by HEAD, or GET where HEAD is refused."""
    for method in ("HEAD", "GET"):
        watch = Watch(shown(place.location), silence_s=_ASK_TIMEOUT_S, longest_s=_ASK_TIMEOUT_S)
        with watch, _request(method, place, settings, headers, watch) as response:
            if method == "HEAD" and response.status_code in (400, 403, 405, 501):
                continue  # signed URLs are signed for one method
            _check_status(response, place)
            told = [response.headers.get(name, "") for name in ("ETag", "Last-Modified", "Content-Length")]
            return "|".join([place.location, *told])
    raise AssertionError("GET was not answered")


def fsspec_identity(place: Place) -> str:
    """URL, size, ETag and modification time as the store tells them."""
    info = _fsspec(place, lambda fs, path: fs.info(path))
    if info.get("type") == "directory":
        raise SourceRefused(f"{shown(place.location)} is a folder.", hint="Name a file.")
    told = [
        str(info.get(name) or "")
        for name in ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "updated")
    ]
    return "|".join([place.location, *told])


# --- fetching -----------------------------------------------------------------------------------------------------


class DownloadCache:
    """Downloaded slides in ``MODEL_DIR/cache/slides``, least recently used ones deleted first.

    A file appears under its name only when it is complete, and within a process it is fetched once, however many ask for it. What the
    threads of this process fetched last is never deleted, nor is anything that any process fetched within the last five minutes.
    """

    _held: ClassVar[dict[int, frozenset[Path]]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, settings: Settings, headers: Headers) -> None:
        self.folder = settings.model_dir / "cache" / "slides"
        self._settings = settings
        self._headers = headers

    def get(self, place: Place, identity: str) -> Path:
        """The local copy of a remote slide, downloaded if it is not there.

        Raises
        ------
        DownloadFailed
            Its server is away or silent for ``DOWNLOAD_TIMEOUT_S``, or the download is hopeless as
            :class:`~backend.slides.pace.Watch` says it: too slow, or not complete after ``JOB_TIMEOUT_S``. A store (fsspec) is
            judged each time that it has given a piece. Or there is no room here.
        SlideNotFound, SourceRefused, SourceError
            Its server says so, or it is over ``DOWNLOAD_MAX_BYTES``.
        DownloadUnderWay
            Within :func:`~backend.slides.underway.without_waiting`.
        """
        # The name is a digest: nothing of a URL becomes part of a path but a short ending, by which some readers know the format.
        ending = re.search(r"\.[A-Za-z0-9]{1,8}$", urlsplit(place.location).path)
        name = digest({"location": place.location, "identity": identity}) + (ending.group().lower() if ending else "")
        target = self.folder / name
        host = urlsplit(place.location).netloc
        once(target, shown(place.location), host, lambda download: self._download(place, target, download))
        return target

    def _download(self, place: Place, target: Path, download: Download) -> None:
        part = self.folder / f".{target.name}.{uuid.uuid4().hex}.part"
        timeouts = {"silence_s": self._settings.download_timeout_s, "longest_s": self._settings.job_timeout_s}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with part.open("xb") as file, Watch(shown(place.location), **timeouts) as watch:
                transfer = _Transfer(place, file, self._settings.download_max_bytes, watch, download)
                if place.kind == "fsspec":
                    _from_store(transfer)
                else:
                    _from_http(transfer, self._settings, self._headers)
            part.replace(target)
        except OSError as error:
            reason = f"{shown(place.location)} could not be kept in {self.folder}: {error.strerror or error}."
            raise DownloadFailed(reason, hint="Make room there, or set MODEL_DIR to another disk.") from error
        finally:
            part.unlink(missing_ok=True)

    def hold(self, paths: tuple[Path, ...]) -> None:
        """Keep ``paths`` until this thread fetches its next slide, and trim the cache of others."""
        alive = {thread.ident for thread in threading.enumerate()}
        with self._lock:
            for ident in [i for i in self._held if i not in alive]:
                del self._held[ident]
            self._held[threading.get_ident()] = frozenset(paths)
            held = frozenset().union(*self._held.values())
        self._trim(held)

    def _trim(self, held: frozenset[Path]) -> None:
        now = time.time()
        entries: list[tuple[float, int, Path]] = []
        try:
            found = list(os.scandir(self.folder))
        except FileNotFoundError:
            return
        for entry in found:
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                status = entry.stat(follow_symlinks=False)
                if entry.name.endswith(".part"):
                    if now - status.st_mtime > _STALE_PART_S:
                        Path(entry.path).unlink()
                else:
                    entries.append((status.st_mtime, status.st_size, Path(entry.path)))
        total = sum(size for _, size, _ in entries)
        for used, size, path in sorted(entries):
            if total <= self._settings.download_cache_max_bytes:
                return
            if path in held or now - used < _RECENT_S:
                continue
            path.unlink(missing_ok=True)
            total -= size
            log.info("deleted %s from the cache of downloaded slides", path.name)


@dataclass
class _Transfer:
    """What comes from ``place`` and goes into ``file``: within its size, at its pace, and seen by who waits for it."""

    place: Place
    file: BinaryIO
    max_bytes: int
    watch: Watch
    download: Download

    def expect(self, size: int) -> None:
        """The body begins; ``size``: its bytes as its sender says, 0 if it does not."""
        self._check_size(size)
        self.download.total = size
        self.watch.expect_body()

    def copy(self, pieces: Iterator[bytes]) -> None:
        for piece in pieces:
            self._check_size(self.download.done + len(piece))
            self.file.write(piece)
            self.download.done += len(piece)
            self.watch.came(len(piece))
        self.watch.check()  # a body of no stated length ends where its connection does, which may have been cut

    def _check_size(self, size: int) -> None:
        if size > self.max_bytes:
            raise SourceRefused(
                f"{shown(self.place.location)} is larger than {self.max_bytes} bytes.",
                hint="Raise DOWNLOAD_MAX_BYTES if it shall be downloaded.",
            )


def _from_http(transfer: _Transfer, settings: Settings, headers: Headers) -> None:
    place, watch = transfer.place, transfer.watch
    with _request("GET", place, settings, headers, watch) as response:
        _check_status(response, place)
        length = response.headers.get("Content-Length", "")
        transfer.expect(int(length) if length.isdigit() else 0)
        with _http_errors(place, watch):
            transfer.copy(response.iter_bytes())  # as they come: a whole piece of a slow one would be waited for


def _from_store(transfer: _Transfer) -> None:
    def copy(fs: Any, path: str) -> None:
        transfer.expect(int(fs.info(path).get("size") or 0))
        with fs.open(path, "rb") as remote:
            transfer.copy(iter(lambda: remote.read(_PIECE_BYTES), b""))

    _fsspec(transfer.place, copy)


# --- http ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _http_errors(place: Place, watch: Watch) -> Iterator[None]:
    try:
        yield
    except httpx.TimeoutException as error:
        watch.check()
        raise DownloadFailed(f"{shown(place.location)} did not answer in time ({type(error).__name__}).") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        watch.check()  # a connection that was cut from here looks as if the server had hung up
        if (why := network_reason(error)) is not None:
            raise DownloadFailed(f"{shown(place.location)} could not be fetched: {why.text}.", hint=why.hint) from error
        raise DownloadFailed(
            f"{shown(place.location)} could not be fetched: {error or type(error).__name__}."
        ) from error


@contextlib.contextmanager
def _request(method: str, place: Place, settings: Settings, headers: Headers, watch: Watch) -> Iterator[httpx.Response]:
    """The answer to a request, its body not read yet, after at most five redirects of which each has passed the rules."""
    with httpx.Client(verify=ssl_context(), timeout=watch.silence_s, follow_redirects=False) as client:
        at = place
        for _ in range(_MAX_REDIRECTS + 1):
            # The token goes to Label Studio's own files and nowhere else, whoever redirects where.
            private = dict(headers()) if at.kind == "label_studio" else {}
            # Label Studio is where the operator says it is, on this machine too; the others are where their names lead.
            checks: list[Trace] = [watch.connected]
            if at.kind != "label_studio":
                checks.insert(0, guard(at.location, shown(at.location)))
            watched = {"trace": partial(_tell_all, checks)}
            headers_sent = {"Accept-Encoding": "identity", **private}
            request = client.build_request(method, at.location, headers=headers_sent, extensions=watched)
            watch.expect_header()
            with _http_errors(at, watch):
                response = client.send(request, stream=True)
            try:
                if not response.has_redirect_location:
                    yield response
                    return
                at = _redirected(at, urljoin(at.location, response.headers["Location"]), settings)
            finally:
                response.close()
        raise SourceRefused(f"{shown(place.location)} redirects more than {_MAX_REDIRECTS} times.")


def _tell_all(checks: Sequence[Trace], event: str, about: Mapping[str, Any]) -> None:
    for check in checks:
        check(event, about)


def _redirected(at: Place, target: str, settings: Settings) -> Place:
    if at.kind == "label_studio" and "/user/login" in urlsplit(target).path and origin(target) == origin(at.location):
        raise SourceRefused(
            f"Label Studio asks for a login before it gives {shown(at.location)}.",
            hint="Set LABEL_STUDIO_API_KEY to a token of a user.",
        )
    place = check_redirect(target, settings)
    if place.kind == "file":
        raise SourceRefused(f"A redirect leads to {shown(target)}.")
    return place


def _check_status(response: httpx.Response, place: Place) -> None:
    status, where = response.status_code, shown(place.location)
    if response.is_success:
        return
    if status in (404, 410):
        raise SlideNotFound(f"There is nothing at {where} (HTTP {status}).")
    if status in (401, 403):
        ours = place.kind == "label_studio"
        hint = (
            "Set LABEL_STUDIO_API_KEY to a token of a user who may see this project."
            if ours
            else "Its server wants a login."
        )
        raise SourceRefused(f"{where} was refused (HTTP {status}).", hint=hint)
    if status >= 500 or status in (408, 425, 429):
        raise DownloadFailed(f"{where} is not available now (HTTP {status}).")
    raise SourceError(f"{where} was answered with HTTP {status}.")


# --- fsspec -------------------------------------------------------------------------------------------------------


def _fsspec(place: Place, use: Callable[[Any, str], Any]) -> Any:
    """Run ``use(file system, path)``, with what stores raise turned into errors of ours."""
    try:
        fs, path = fsspec.core.url_to_fs(place.location)
        return use(fs, path)
    except BackendError:
        raise
    except FileNotFoundError as error:
        raise SlideNotFound(f"There is nothing at {shown(place.location)}.") from error
    except PermissionError as error:
        raise SourceRefused(
            f"{shown(place.location)} was refused: {error}.", hint="Check the store's credentials."
        ) from error
    except (ImportError, ValueError) as error:
        raise SettingsError(
            f"{shown(place.location)} cannot be read: {error}.", hint=driver_hint(place.location)
        ) from error
    except Exception as error:  # stores raise what their client libraries do, of no common class
        raise DownloadFailed(
            f"{shown(place.location)} could not be fetched: {type(error).__name__}: {error}."
        ) from error
