"""What browsers are told about every answer: that its type is what it says, and for pictures that any page may read them."""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Label Studio's page draws these into a canvas, for which the browser asks for the header.
_PICTURES = re.compile(r"/thumbnails/.*|/(?:panel|deepzoom)/.*\.(?:jpg|jpeg|png)|/api/bags/[^/]+/heatmap\.png")
NO_SNIFFING = {"X-Content-Type-Options": "nosniff"}
_NO_SNIFFING = [(name.lower().encode(), value.encode()) for name, value in NO_SNIFFING.items()]
_FOR_ALL = [*_NO_SNIFFING, (b"access-control-allow-origin", b"*")]


class BrowserHeaders:
    """ASGI middleware: ``X-Content-Type-Options: nosniff`` on every answer, ``Access-Control-Allow-Origin: *`` on pictures.

    The addresses of pictures are secrets. Results, jobs and the protocol get no such header: without a password, any page that is open in
    the annotator's browser could read them otherwise.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        more = _FOR_ALL if _PICTURES.fullmatch(scope["path"]) else _NO_SNIFFING

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *more]
            await send(message)

        await self._app(scope, receive, marked)
