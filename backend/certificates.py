"""Which certificates are trusted by what this backend asks."""

from __future__ import annotations

import os
import ssl
from functools import lru_cache

import httpx

from backend.errors import SettingsError


def ssl_context() -> ssl.SSLContext:
    """What is trusted: the certificates of ``SSL_CERT_FILE`` or ``SSL_CERT_DIR`` in the environment, else those of certifi.

    Raises
    ------
    SettingsError
        ``SSL_CERT_FILE`` cannot be read.
    """
    return _context(os.environ.get("SSL_CERT_FILE", ""), os.environ.get("SSL_CERT_DIR", ""))


@lru_cache(maxsize=2)
def _context(file: str, folder: str) -> ssl.SSLContext:
    try:
        return httpx.create_ssl_context()  # takes some 20 ms
    except OSError as error:  # of which ssl.SSLError is one
        raise SettingsError(
            f"The certificates in SSL_CERT_FILE={file!r}, SSL_CERT_DIR={folder!r} cannot be read: {error.strerror or error}.",
            hint="It must be a file of certificates in PEM format.",
        ) from error
