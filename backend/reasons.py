"""Why something on the network could not be reached, in words that lead to the setting at fault: the same for Redis and for Label Studio.

The libraries wrap what the system said, each in its own way; what it said is found along ``__cause__`` and ``__context__``.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass

# As OpenSSL numbers them (openssl-verification-options(1), x509_vfy.h).
_EXPIRED = 10
_OTHER_NAME = (62, 64)

NO_ANSWER = "no answer came in time"


@dataclass(frozen=True)
class Reason:
    """What is wrong, as the end of a sentence, and what to do about it."""

    text: str
    hint: str


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """``error`` and all that it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def network_reason(error: BaseException) -> Reason | None:
    """Why a connection failed; ``None`` if that was not for a reason of the network."""
    chain = list(causes(error))
    said = " ".join(str(cause) for cause in chain)
    for cause in chain:
        if isinstance(cause, ssl.SSLCertVerificationError):
            why = cause.verify_message or "it cannot be verified"
            return Reason(f"its certificate is not trusted: {why}", _about_trust(cause.verify_code))
    for cause in chain:
        if isinstance(cause, ssl.SSLError) or "[SSL" in str(cause):
            return Reason(
                "it does not speak TLS there, or not as we do",
                "Is the port one for TLS? If not, begin the address with http:// or redis:// instead of https:// or rediss://.",
            )
        if isinstance(cause, socket.gaierror) or "Name or service not known" in said or "name resolution" in said:
            return Reason(
                "no address is known for its name (DNS)", "Check the host's name, and that this machine can resolve it."
            )
    for cause in chain:
        if isinstance(cause, ConnectionRefusedError) or "Connection refused" in said:
            return Reason("nothing listens there (connection refused)", "Start it, or correct the host and port.")
        if isinstance(cause, FileNotFoundError) or "No such file" in str(cause):
            return Reason("there is no such socket", "Start it, or correct the path.")
        if isinstance(cause, PermissionError):
            return Reason("the connection is not permitted", "A firewall, or the permissions of a socket.")
        if isinstance(cause, TimeoutError) or type(cause).__name__.endswith(("Timeout", "TimeoutError")):
            return Reason(NO_ANSWER, "Is it overloaded, or does a firewall drop what is sent there?")
    for cause in chain:
        if (
            isinstance(cause, ConnectionResetError | BrokenPipeError)
            or "closed by server" in said
            or "disconnected" in said
        ):
            return Reason(
                "it closed the connection without an answer",
                "Does something else listen there, or does it want TLS (https://, rediss://)?",
            )
        if isinstance(cause, OSError) and cause.strerror and cause.errno:
            return Reason(cause.strerror.lower(), "Check the address, and the network of this machine.")
    return None


def _about_trust(code: int) -> str:
    if code in _OTHER_NAME:
        return "Use the name that the certificate is for, or have one made for this name (subjectAltName)."
    if code == _EXPIRED:
        return "Have it renewed, and check the clock of this machine."
    return (
        "Set SSL_CERT_FILE (of a Redis: rediss://…?ssl_ca_certs=FILE) to a file of all certificates to be trusted (PEM): "
        "its own or its authority's, and for other hosts those of `python -m certifi`."
    )
