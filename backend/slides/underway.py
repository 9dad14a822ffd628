"""Downloads that are under way in this process: one for each file, for all who want it, and without waiting for who cannot wait."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path

from backend.errors import BackendError, SourceError

log = logging.getLogger(__name__)

_AT_ONCE = 4  # in the background, from one host: a slow one holds up no other's
_FAILURE_KEPT_S = 300.0  # for whoever was told that it is under way, and asks again

_may_wait: ContextVar[bool] = ContextVar("may_wait", default=True)
_downloads: dict[Path, Download] = {}
_turns: defaultdict[str, threading.Semaphore] = defaultdict(lambda: threading.Semaphore(_AT_ONCE))
_lock = threading.Lock()


class Download:
    """One file that is being downloaded.

    Attributes
    ----------
    what
        The location, as messages show it.
    done, total
        Bytes that have come, and that there are; ``total`` is 0 as long as that is not known.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.done = 0
        self.total = 0
        self._owner = threading.current_thread()
        self._over = threading.Event()
        self._over_at = 0.0
        self._error: Exception | None = None
        self._told = False

    @property
    def over(self) -> bool:
        """Whether nothing more comes: the file is there, or it failed, or who fetched it was interrupted."""
        return self._over.is_set()

    def check(self) -> None:
        """Raise what it failed by, if it did: an error as of :meth:`DownloadCache.get <backend.slides.download.DownloadCache.get>`."""
        if self._error is not None:
            self._told = True
            raise self._error

    def _deserted(self) -> bool:
        """Whether who fetched it never got to say so. A thread that asks for what it fetches itself was interrupted before."""
        return self._owner is threading.current_thread() or not self._owner.is_alive()


class DownloadUnderWay(SourceError):
    """The slide is being downloaded, and whoever asked does not wait for it; ``download`` is what goes on."""

    code = "download_under_way"
    retryable = True
    http_status = 503

    def __init__(self, download: Download) -> None:
        come = f"{download.done / 1e6:.1f}"
        if download.total:
            come += f" of {download.total / 1e6:.1f}"
        super().__init__(
            f"{download.what} is being downloaded: {come} MB have come.",
            hint="It goes on by itself.",
        )
        self.download = download


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """In this context, a file that is not here yet is downloaded in the background, and to ask for it is :class:`DownloadUnderWay`."""
    before = _may_wait.set(False)
    try:
        yield
    finally:
        _may_wait.reset(before)


def once(target: Path, what: str, host: str, fetch: Callable[[Download], None]) -> None:
    """Return when ``target`` is there, brought by ``fetch`` in this thread or already on its way by another.

    Parameters
    ----------
    target
        The file. Its modification time becomes the time of this call.
    what
        The location, as messages show it.
    host
        Whence it comes: a few at once are fetched from each in the background, the others in turn.
    fetch
        Brings the file and keeps ``done`` and ``total`` of what it is given.

    Raises
    ------
    DownloadUnderWay
        Within :func:`without_waiting`, where ``target`` is not there.
    Exception
        Of ``fetch``. What a download in the background failed by is told to the next who asks, and the one after that tries again.
    """
    while True:
        with contextlib.suppress(FileNotFoundError):
            os.utime(target)
            return
        download = _join(target, what, host, fetch)
        if download is None:
            continue
        if not _may_wait.get():
            download.check()
            raise DownloadUnderWay(download)
        if download._owner is threading.current_thread():
            _run(download, target, fetch, kept=BackendError)
        download._over.wait()
        download.check()


def _join(target: Path, what: str, host: str, fetch: Callable[[Download], None]) -> Download | None:
    """The download of ``target`` that is under way, or a new one; ``None`` if the file has come meanwhile."""
    with _lock:
        too_old = time.monotonic() - _FAILURE_KEPT_S
        for path in [path for path, download in _downloads.items() if download.over and download._over_at < too_old]:
            del _downloads[path]
        found = _downloads.get(target)
        if found is not None:
            to_be_told = found._error is not None and not found._told and not _may_wait.get()
            if to_be_told if found.over else not found._deserted():
                return found
        if target.exists():
            return None
        made = Download(what)
        if not _may_wait.get():
            arguments = (made, target, _turns[host], fetch)
            made._owner = threading.Thread(target=_run_in_turn, args=arguments, name="download", daemon=True)
            made._owner.start()  # it waits for the lock before it says that it is over
        _downloads[target] = made
        return made


def _run_in_turn(
    download: Download, target: Path, turn: threading.Semaphore, fetch: Callable[[Download], None]
) -> None:
    with turn:
        _run(download, target, fetch, kept=Exception)


def _run(download: Download, target: Path, fetch: Callable[[Download], None], *, kept: type[Exception]) -> None:
    """Fetch, and say that it is over. Errors that are not ``kept`` (a job's time is up) concern this thread only: others try themselves."""
    try:
        fetch(download)
    except kept as error:
        download._error = error
        if not isinstance(error, BackendError):
            log.exception("the download of %s ended by a defect", download.what)
    finally:
        with _lock:
            download._over_at = time.monotonic()
            if download._error is None and _downloads.get(target) is download:
                del _downloads[target]
            download._over.set()
