"""A secret key that is made once and kept in a file."""

from __future__ import annotations

import contextlib
import os
import secrets
import uuid
from pathlib import Path

from backend.errors import SettingsError

KEY_BYTES = 32


class KeyDamaged(SettingsError):
    """A file of a key holds less than a key: what is signed with it could be guessed."""

    code = "key_damaged"


def kept_key(path: Path) -> bytes:
    """The key in ``path`` (mode 0600), made of :data:`KEY_BYTES` random bytes by whoever asks first, of however many processes.

    Raises
    ------
    KeyDamaged
        The file has fewer bytes than that.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        temporary.touch(mode=0o600)
        try:
            with temporary.open("wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())  # after a power cut the name must not be there without the bytes
            # Unlike a rename, a link fails if another process was first.
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            temporary.unlink()
    key = path.read_bytes()
    if len(key) < KEY_BYTES:
        raise KeyDamaged(
            f"The key in {path} has {len(key)} bytes instead of {KEY_BYTES}.",
            hint="Delete the file and start again: a new key is made. What was made with the old one (addresses, webhooks) is to be made anew.",
        )
    return key
