"""Which certificates are trusted, and what is said of one that is not, such as one that signed itself."""

from __future__ import annotations

import os
import ssl
from functools import lru_cache

import httpx

from backend.errors import SettingsError

# As OpenSSL numbers them (openssl-verification-options(1), x509_vfy.h).
_EXPIRED = 10
_OTHER_NAME = (62, 64)


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


def untrusted(error: BaseException) -> tuple[str, str] | None:
    """Why a certificate was not trusted, and what to do, if ``error``, or what it was raised from, is of that; else ``None``."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLCertVerificationError):
            return seen.verify_message or str(seen), _hint(seen.verify_code)
        seen = seen.__cause__ or seen.__context__
    return None


def _hint(code: int) -> str:
    if code in _OTHER_NAME:
        return "Use the name that the certificate is for, or have one made for this name (subjectAltName)."
    if code == _EXPIRED:
        return "Have it renewed, and check the clock of this machine."
    return (
        "Set SSL_CERT_FILE to a file of all certificates to be trusted (PEM): its own or its authority's, "
        "and for other hosts those of `python -m certifi`."
    )
