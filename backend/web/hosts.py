"""By which names this backend is known. A page on the web may have its own name lead to a loopback address (DNS rebinding).

Its browser then takes our answers for that page's. What gives it away is the name, which the browser sends as ``Host``.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from backend.settings import Settings

log = logging.getLogger(__name__)

_PLACE = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]/?#@]+)(?::\d{0,5})?")
# Names that nobody can register (RFC 6761, RFC 6762, RFC 8375; .internal is reserved by ICANN, .lan by habit).
_PRIVATE = (".localhost", ".internal", ".local", ".lan", ".home.arpa")
_TOLD_AT_MOST = 20


class KnownNames:
    """The names under which this backend may be asked: private ones, addresses, and those that ``PUBLIC_URL`` and ``HOST`` say."""

    def __init__(self, settings: Settings) -> None:
        names = [urlsplit(url).hostname or "" for url in settings.own_urls] + [settings.host]
        self._set = {name.lower().rstrip(".") for name in names} - {""}

    def __contains__(self, place: str) -> bool:
        """Whether ``place``, a name or address with or without a port, is one of them."""
        match = _PLACE.fullmatch(place)
        if match is None:
            return False
        name = match[1].lower().removesuffix(".")
        # No page of a stranger has an address or a name without a dot for its own.
        return name in self._set or "." not in name or name.endswith(_PRIVATE) or _is_address(name)


class OnlyKnownNames:
    """ASGI middleware: answers 421 (RFC 9110, 15.5.20) to who asks for another name. A request without a name comes from no browser."""

    def __init__(self, app: ASGIApp, names: KnownNames) -> None:
        self._app = app
        self._names = names
        self._told: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        for field, value in scope["headers"]:
            if field == b"host" and value and (place := value.decode("latin-1")) not in self._names:
                await self._refuse(place[:255], send)
                return
        await self._app(scope, receive, send)

    async def _refuse(self, place: str, send: Send) -> None:
        message = (
            f"This backend is asked as {place!r}, which is no name that it knows. Set PUBLIC_URL to its address in the browser, "
            "or BASIC_AUTH_USER and BASIC_AUTH_PASS: with a password, every name does."
        )
        if place not in self._told and len(self._told) < _TOLD_AT_MOST:
            self._told.add(place)
            log.warning("%s", message)
        body = json.dumps({"detail": message, "error": {"code": "host_unknown"}}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 421, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
