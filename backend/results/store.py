"""The content-addressed store: one HDF5 file for each bag key, on any fsspec URL."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from backend.errors import (
    BackendError,
    ResultDamaged,
    ResultDamagedAgain,
    ResultNotFound,
    SettingsError,
    StoreUnavailable,
)
from backend.paths import StrPath
from backend.redaction import redactor_for, shown_address
from backend.results.bag import BagResult, Float32Array
from backend.results.hdf5 import Summary, read_end, read_hdf5, summary_of, write_hdf5
from backend.results.seal import Seal
from backend.stores import driver_hint

log = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{40}")
DAMAGED_MAX = 3
"""So often a result is computed again because its file was damaged. Then its disk is."""
_STALE_S = 86_400.0
_END_BYTES = 65_536
"""More than a seal takes."""
# Stores of objects: what is written appears whole or not at all, and renaming is copying.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss"})


class ResultStore:
    """Results by bag key.

    Writes go to a temporary name in the same folder and are renamed (an object store takes them whole under their name), so that a reader sees a
    whole file or none, and two writers of one key leave one whole file. A file that cannot be read back is renamed to ``KEY.h5.damaged-…`` and counts as
    absent, so that it is computed again; after :data:`DAMAGED_MAX` of them that is given up.

    Every method raises :class:`~backend.errors.StoreUnavailable` where the store does not answer.

    Parameters
    ----------
    url
        A folder: a local path, or any URL that fsspec knows (``s3://bucket/prefix``). The attribute of this name is for messages, and lacks its secrets.

    Raises
    ------
    SettingsError
        fsspec does not know such a store, or lacks the package for it.
    """

    def __init__(self, url: StrPath) -> None:
        url = os.fspath(url)
        self.url = shown_address(url)
        redact = self._redact = redactor_for(url)
        self._fs: Any
        # fsspec may remember listings for ever, and others write here too.
        remembers_nothing = {"use_listings_cache": False} if "://" in url else {}
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, **remembers_nothing)
        except (ImportError, ValueError) as error:
            raise SettingsError(
                f"RESULTS_URL {self.url!r} cannot be opened: {redact(str(error))}.", hint=driver_hint(url)
            ) from error
        self._local = isinstance(self._fs, LocalFileSystem)
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        self._objects = not protocols.isdisjoint(_OBJECT_STORES)

    def has(self, key: str) -> bool:
        """Whether a file is stored under ``key`` (it is not opened)."""
        path = self._path(key)
        with self._answers():
            if not self._local:
                return bool(self._fs.exists(path))
            try:
                Path(path).stat()  # fsspec takes every error for an absence
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

    def get(self, key: str, *, latents: bool = True) -> BagResult | None:
        """The result stored under ``key``; ``None`` if there is none, or a damaged one (which is set aside).

        With ``latents=False`` the latents are left out, see :func:`backend.results.hdf5.read_hdf5`.

        Raises
        ------
        ResultDamagedAgain
            It is damaged, and has been so often that computing it again makes no sense.
        """
        path = self._path(key)
        try:
            try:
                return self._read(path, latents)
            except ResultDamaged:
                return self._read(path, latents)  # somebody may just have put a whole one in its place
        except FileNotFoundError:
            return None
        except ResultDamaged as error:
            self._set_aside(key, path, error)
            return None

    def _read(self, path: str, latents: bool) -> BagResult:
        if self._local:
            return read_hdf5(Path(path), latents=latents)
        if not latents:
            with contextlib.suppress(ResultDamaged), self._small_part(path) as file:
                return read_hdf5(file, latents=False)
        with self._answers():  # also where its end does not say where what lies: judged as a whole
            content = self._fs.cat_file(path)
        return read_hdf5(io.BytesIO(content), latents=latents)

    @contextlib.contextmanager
    def _small_part(self, path: str) -> Iterator[BinaryIO]:
        """A result as a file on this machine in which the latents, nearly all of it, are a hole: they are not fetched."""
        before, end = self._end_of(path)
        seal = read_end(io.BytesIO(end), before=before)
        ranges = [(first, min(after, before)) for first, after in seal.ranges() if first < before]
        with tempfile.TemporaryFile() as file:
            file.seek(before)
            file.write(end)
            with self._answers():
                starts, ends = [first for first, _ in ranges], [after for _, after in ranges]
                pieces = self._fs.cat_ranges([path] * len(ranges), starts, ends, on_error="raise")
            for start, piece in zip(starts, pieces, strict=True):
                file.seek(start)
                file.write(piece)
            yield file

    def _end_of(self, path: str) -> tuple[int, bytes]:
        """The last bytes of a file in a remote store, its seal among them, and how many lie before."""
        with self._answers():
            size = int(self._fs.info(path)["size"])
            before = max(0, size - _END_BYTES)
            return before, self._fs.cat_file(path, start=before, end=size)

    def _seal(self, path: str) -> Seal:
        if self._local:
            return read_end(Path(path))
        before, end = self._end_of(path)
        return read_end(io.BytesIO(end), before=before)

    def _set_aside(self, key: str, path: str, error: ResultDamaged) -> None:
        aside = f"{path}.damaged-{uuid.uuid4().hex[:8]}"
        log.warning("result %s is damaged (%s); set aside as %s", key, error, aside)
        with self._answers():
            with contextlib.suppress(FileNotFoundError):  # another reader was faster
                self._fs.mv(path, aside)
            found = self._fs.glob(f"{path}.damaged-*")
            for surplus in [other for other in found if not str(other).endswith(aside[-8:])][DAMAGED_MAX - 1 :]:
                self._fs.rm_file(surplus)
        if len(found) >= DAMAGED_MAX:
            raise ResultDamagedAgain(
                f"The stored result of this slide was damaged {len(found)} times; it is not computed again.",
                hint=f"Check the disk or store of {self.url}; then delete {aside.rsplit('-', 1)[0]}-* and ask again.",
            ) from error

    @contextlib.contextmanager
    def _answers(self) -> Iterator[None]:
        """What the store raises as an error of ours; a file that is not there stays what it is."""
        try:
            yield
        except (FileNotFoundError, BackendError):
            raise
        except Exception as error:  # stores raise what their client libraries do, of no common class
            raise StoreUnavailable(
                f"The store of results does not answer as it should: {self._redact(_said(error))}.",
                hint=f"Can {self.url} be reached and read from this machine?",
            ) from error

    def slide_embedding(self, key: str) -> Float32Array | None:
        """Only the slide embedding, float32 (D,); ``None`` if nothing is stored, or nothing readable."""
        try:
            return self._seal(self._path(key)).embedding
        except FileNotFoundError:
            return None
        except ResultDamaged:
            found = self.get(key, latents=False)  # sets it aside, if it is
            return None if found is None else found.slide_embedding

    def summary(self, key: str) -> Summary | None:
        """What is shown of many results at once, out of the last bytes of a file; ``None`` as :meth:`slide_embedding`."""
        with contextlib.suppress(FileNotFoundError, ResultDamaged):
            if (found := summary_of(self._seal(self._path(key)))) is not None:
                return found
        result = self.get(key, latents=False)  # an earlier file, or a damaged one
        return None if result is None else Summary(result.slide_embedding, len(result.bag), result.provenance)

    def need(self, key: str, *, latents: bool = True) -> BagResult:
        """Like :meth:`get`, but raises :class:`~backend.errors.ResultNotFound` where there is nothing."""
        result = self.get(key, latents=latents)
        if result is None:
            raise ResultNotFound(f"No result is stored under {key}.", hint="The slide has not been analysed yet.")
        return result

    def put(self, key: str, result: BagResult) -> None:
        """Store ``result`` under ``key``, replacing what was there.

        Raises
        ------
        StoreUnavailable
            The disk is full, or the store does not take it; nothing has changed.
        """
        path = self._path(key)
        folder, name = path.rsplit("/", 1)
        temporary = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"
        # Made in memory, whatever the store: the HDF5 library ends the process when a disk fills up under it.
        buffer = io.BytesIO()
        write_hdf5(result, buffer)
        try:
            if self._objects:
                self._fs.pipe_file(path, buffer.getvalue())
                return
            self._fs.makedirs(folder, exist_ok=True)
            try:
                if self._local:
                    with Path(temporary).open("xb") as file:
                        file.write(buffer.getbuffer())
                        file.flush()
                        os.fsync(file.fileno())  # a rename that survives a power cut must not name an empty file
                    Path(temporary).replace(path)
                else:
                    self._fs.pipe_file(temporary, buffer.getvalue())
                    self._fs.mv(temporary, path)
            finally:
                if self._fs.exists(temporary):
                    self._fs.rm_file(temporary)
        except Exception as error:  # stores raise what their client libraries do, of no common class
            raise StoreUnavailable(
                f"The result cannot be written: {self._redact(_said(error))}.",
                hint=f"Is there room in {self.url}, and may the backend write there? The slide is analysed again when asked for.",
            ) from error

    def keys(self) -> Iterator[str]:
        """All keys that have a file."""
        with self._answers():
            found = self._fs.glob(f"{self._root}/*/*.h5")
        for path in found:
            name = str(path).rsplit("/", 1)[-1].removesuffix(".h5")
            if _KEY.fullmatch(name):
                yield name

    def tidy(self) -> int:
        """Delete what writers that were killed have left half written a day ago or earlier; how many files."""
        if not self._local:
            return 0
        found = list(Path(self._root).glob("??/.*.tmp"))
        old = [path for path in found if time.time() - _changed(path) > _STALE_S]
        for path in old:
            path.unlink(missing_ok=True)
        return len(old)

    def _path(self, key: str) -> str:
        if not _KEY.fullmatch(key):
            # Keys reach us in URLs and in jobs: one that is no digest must never become a path.
            raise ResultNotFound(f"{key[:80]!r} is not a bag key.", hint="A bag key is 40 hexadecimal digits.")
        return f"{self._root}/{key[:2]}/{key}.h5"


def _changed(path: Path) -> float:
    """When a file was changed last (s since 1970); now, if it is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def _said(error: Exception) -> str:
    """What an error says, without a final full stop."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(said).rstrip(".")
