"""The content-addressed store: one HDF5 file for each bag key, on any fsspec URL."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from backend.errors import ResultDamaged, ResultNotFound, StoreUnavailable
from backend.results.bag import BagResult, Float32Array
from backend.results.hdf5 import read_hdf5, read_slide_embedding, write_hdf5

log = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{40}")


class ResultStore:
    """Results by bag key.

    Writes go to a temporary name in the same folder and are renamed, so that a reader sees a whole file or none, and two
    writers of one key leave one whole file. A file that cannot be read back is renamed to ``KEY.h5.damaged-…`` and counts as absent.

    Parameters
    ----------
    url
        A folder: a local path, or any URL that fsspec knows (``s3://bucket/prefix``).
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs: Any
        self._fs, self._root = fsspec.core.url_to_fs(url)
        self._local = isinstance(self._fs, LocalFileSystem)

    def has(self, key: str) -> bool:
        """Whether a file is stored under ``key`` (it is not opened)."""
        return bool(self._fs.exists(self._path(key)))

    def get(self, key: str, *, latents: bool = True) -> BagResult | None:
        """The result stored under ``key``; ``None`` if there is none, or a damaged one (which is set aside).

        With ``latents=False`` the latents are left out, see :func:`backend.results.hdf5.read_hdf5`.
        """
        path = self._path(key)
        try:
            if self._local:
                return read_hdf5(Path(path), latents=latents)
            return read_hdf5(io.BytesIO(self._fs.cat_file(path)), latents=latents)
        except FileNotFoundError:
            return None
        except ResultDamaged as error:
            aside = f"{path}.damaged-{uuid.uuid4().hex[:8]}"
            log.warning("result %s is damaged (%s); set aside as %s, it will be computed again", key, error, aside)
            with contextlib.suppress(FileNotFoundError):  # another reader was faster
                self._fs.mv(path, aside)
            return None

    def slide_embedding(self, key: str) -> Float32Array | None:
        """Only the slide embedding, float32 (D,); ``None`` if nothing is stored, or nothing readable."""
        try:
            with self._fs.open(self._path(key), "rb") as file:
                return read_slide_embedding(file)
        except FileNotFoundError:
            return None
        except ResultDamaged:
            self.get(key, latents=False)  # sets it aside
            return None

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
        except OSError as error:
            raise StoreUnavailable(
                f"The result cannot be written: {error.strerror or error}.",
                hint=f"Is there room in {self.url}, and may the backend write there? The slide is analysed again when asked for.",
            ) from error

    def keys(self) -> Iterator[str]:
        """All keys that have a file."""
        for path in self._fs.glob(f"{self._root}/*/*.h5"):
            name = str(path).rsplit("/", 1)[-1].removesuffix(".h5")
            if _KEY.fullmatch(name):
                yield name

    def _path(self, key: str) -> str:
        if not _KEY.fullmatch(key):
            # Keys reach us in URLs and in jobs: one that is no digest must never become a path.
            raise ResultNotFound(f"{key[:80]!r} is not a bag key.", hint="A bag key is 40 hexadecimal digits.")
        return f"{self._root}/{key[:2]}/{key}.h5"
