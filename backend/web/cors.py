"""Which answers a page of another origin may read: pictures, whose addresses are secrets. Nothing else."""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Label Studio's page draws these into a canvas, for which the browser asks for the header.
_PICTURES = re.compile(r"/thumbnails/.*|/(?:panel|deepzoom)/.*\.(?:jpg|jpeg|png)|/api/bags/[^/]+/heatmap\.png")


class PicturesForAll:
    """ASGI middleware: ``Access-Control-Allow-Origin: *`` on pictures.

    Results, jobs and the protocol get no such header: without a password, any page that is open in the annotator's browser could read
    them otherwise.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _PICTURES.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"access-control-allow-origin", b"*")]
            await send(message)

        await self._app(scope, receive, marked)
