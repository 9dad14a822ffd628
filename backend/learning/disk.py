"""What the disk below ``MODEL_DIR/heads`` refuses, as an error of ours: that a file cannot be opened now says nothing about what is in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from backend.errors import StoreUnavailable

NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""There is no such file, however often one looks."""


@contextmanager
def disk(what: str) -> Iterator[None]:
    """Around reading or writing ``what`` (the subject of a sentence); errors of :data:`NO_FILE` stay what they are.

    Raises
    ------
    StoreUnavailable
        Any other error of the system: too many open files, no permission, a full disk, a network disk that is away.
    """
    try:
        yield
    except NO_FILE:
        raise
    except OSError as error:
        raise StoreUnavailable(
            f"{what} cannot be read or written now: {error.strerror or error}.",
            hint="Check the disk of MODEL_DIR, its permissions, and the limit of open files (`ulimit -n`).",
        ) from error
