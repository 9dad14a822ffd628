"""The path below which browsers find this backend, such as ``/wsc`` behind a reverse proxy, whether the proxy takes it away or not."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

from starlette.requests import Request
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from backend.addresses import origin
from backend.settings import Settings


class BelowPrefix:
    """ASGI middleware: takes the path of ``PUBLIC_URL`` off the path that is asked for, and notes it for :func:`prefix_of`.

    A proxy that has taken it off already says nothing of it. Then the name that was asked for decides, else the first in ``PUBLIC_URL``.
    """

    def __init__(self, app: ASGIApp, settings: Settings, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        paths = [unquote(urlsplit(url).path) for url in settings.own_urls]
        self._first = paths[0]
        self._prefixes = sorted({*paths} - {""}, key=len, reverse=True)
        # Of several with the same name, the first counts.
        self._by_origin = dict(
            reversed([(origin(url), path) for url, path in zip(settings.own_urls, paths, strict=True)])
        )
        # Below /slides, /slides/KEY is a slide that a proxy has taken the prefix off, and not the unknown /KEY.
        self._tops = {route.path.split("/")[1] for route in routes if isinstance(route, Route)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._prefixes:
            prefix, path = self._split(scope["path"])
            if prefix is None:
                prefix = self._named(scope)
            scope = {**scope, "path": path, "state": {**scope.get("state", {}), "prefix": prefix}}
        await self._app(scope, receive, send)

    def _split(self, path: str) -> tuple[str | None, str]:
        for prefix in self._prefixes:
            if path == prefix and path[1:] not in self._tops:
                return prefix, "/"
            if path.startswith(prefix + "/") and path[len(prefix) :].split("/")[1] in self._tops:
                return prefix, path[len(prefix) :]
        return None, path

    def _named(self, scope: Scope) -> str:
        host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        for scheme in ("https", "http"):  # which of them the browser used, only the proxy knows
            try:
                found = self._by_origin.get(origin(f"{scheme}://{host}"))
            except ValueError:  # no port
                break
            if found is not None:
                return found
        return self._first


def prefix_of(request: Request) -> str:
    """What the browser that asks has in front of our paths: ``""``, or a path without a final slash."""
    return str(getattr(request.state, "prefix", ""))
