"""A limit on request bodies, counted as they arrive: a header that lies about the length does not help."""

from __future__ import annotations

import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware: answers 413 once a body is longer than ``max_bytes``."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            await self._drain(receive, 0)
            await self._refuse(send)
            return
        seen = 0
        over = refused = False

        async def counted() -> Message:
            nonlocal seen, over
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_bytes:
                over = True
                if message.get("more_body"):
                    await self._drain(receive, seen)
                raise _TooLong
            return message

        async def watched(message: Message) -> None:
            # The application turns what went wrong while it read the body into an answer of its own: ours goes out instead.
            nonlocal refused
            if not over:
                await send(message)
            elif not refused:
                refused = True
                await self._refuse(send)

        try:
            await self._app(scope, counted, watched)
        except _TooLong:
            if not refused:
                await self._refuse(send)

    async def _drain(self, receive: Receive, seen: int) -> None:
        """Read the rest and forget it, up to four times the limit: a client that is still sending would not see an answer."""
        while seen <= 4 * self._max_bytes:
            message = await receive()
            seen += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body"):
                return

    async def _refuse(self, send: Send) -> None:
        body = json.dumps(
            {
                "detail": f"The request's body is over {self._max_bytes} bytes (MAX_BODY_BYTES).",
                "error": {"code": "body_too_large"},
            }
        ).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class _TooLong(Exception):
    """The body went over the limit."""
