"""A secret key that is made once and kept in a file."""

from __future__ import annotations

import contextlib
import os
import secrets
import uuid
from pathlib import Path

KEY_BYTES = 32


def kept_key(path: Path) -> bytes:
    """The key in ``path`` (mode 0600), made of :data:`KEY_BYTES` random bytes by whoever asks first, of however many processes."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        temporary.touch(mode=0o600)
        try:
            temporary.write_bytes(secrets.token_bytes(KEY_BYTES))
            # Unlike a rename, a link fails if another process was first.
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            temporary.unlink()
    return path.read_bytes()
