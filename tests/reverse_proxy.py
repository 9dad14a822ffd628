"""A reverse proxy on loopback, over HTTP and, if asked, HTTPS: below each path another server, as nginx and its like have it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from backend.web.server import bind

_OF_THE_CONNECTION = {
    "connection",
    "keep-alive",
    "transfer-encoding",
    "te",
    "trailer",
    "upgrade",
    "proxy-authorization",
}


@dataclass(frozen=True)
class Behind:
    """A server behind the proxy.

    Attributes
    ----------
    url
        Where it is.
    strips
        Whether the path below which it lies is taken off what it is asked for (nginx: a final slash at ``proxy_pass``).
    """

    url: str
    strips: bool = True


class ReverseProxy:
    """Listens at once; ``routes`` may change at any time, and ``before`` is called with each request before it is passed on."""

    def __init__(self, certificate: tuple[Path, Path] | None = None) -> None:
        self.routes: dict[str, Behind] = {}
        self.before: Callable[[str, str], None] = lambda _method, _path: None
        self.asked: list[str] = []
        listener = bind("127.0.0.1", 0)
        self.port = int(listener.getsockname()[1])
        self.scheme = "http" if certificate is None else "https"
        app = Starlette(
            routes=[Route("/{path:path}", self._pass_on, methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"])]
        )
        tls = {} if certificate is None else {"ssl_certfile": str(certificate[0]), "ssl_keyfile": str(certificate[1])}
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1, **tls)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        """The address of ``path`` at the proxy."""
        return f"{self.scheme}://{host}:{self.port}{path}"

    def stop(self) -> None:
        """End it."""
        self._server.should_exit = True
        self._thread.join(10)

    async def _pass_on(self, request: Request) -> Response:
        path = request.scope["raw_path"].decode()
        query = request.scope["query_string"].decode()
        self.asked.append(path)
        found = next((p for p in self.routes if path == p or path.startswith(f"{p}/")), None)
        if found is None:
            return Response(f"nothing lies at {path}", 404)
        await asyncio.to_thread(self.before, request.method, path)
        behind = self.routes[found]
        there = behind.url + ((path[len(found) :] or "/") if behind.strips else path) + (f"?{query}" if query else "")
        headers = [(name, value) for name, value in request.headers.raw if name.decode() not in _OF_THE_CONNECTION]
        client = httpx.AsyncClient(timeout=120, trust_env=False, follow_redirects=False)
        asked = client.build_request(request.method, there, headers=headers, content=await request.body())
        answer = await client.send(asked, stream=True)

        async def body():  # type: ignore[no-untyped-def]
            try:
                async for piece in answer.aiter_raw():
                    yield piece
            finally:
                await answer.aclose()
                await client.aclose()

        passed = StreamingResponse(body(), answer.status_code)
        passed.raw_headers = [
            (n.lower(), v) for n, v in answer.headers.raw if n.decode().lower() not in _OF_THE_CONNECTION
        ]
        return passed
