"""A limit on request bodies, counted as they arrive: a header that lies about the length does not help."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backend.errors import BackendError


class BodyTooLarge(BackendError):
    """The request's body has more in it than this backend takes."""

    code = "body_too_large"
    http_status = 413


class BodyLimit:
    """ASGI middleware: answers 413 once a body is longer than ``max_bytes``, or than what ``paths`` says of its path, if that is less."""

    def __init__(self, app: ASGIApp, max_bytes: int, paths: Mapping[str, int] | None = None) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._paths = paths or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = min(self._max_bytes, self._paths.get(scope["path"], self._max_bytes))
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            await self._drain(receive, 0, limit)
            await self._refuse(send, limit)
            return
        seen = 0
        over = refused = False

        async def counted() -> Message:
            nonlocal seen, over
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                over = True
                if message.get("more_body"):
                    await self._drain(receive, seen, limit)
                raise _TooLong
            return message

        async def watched(message: Message) -> None:
            # The application turns what went wrong while it read the body into an answer of its own: ours goes out instead.
            nonlocal refused
            if not over:
                await send(message)
            elif not refused:
                refused = True
                await self._refuse(send, limit)

        try:
            await self._app(scope, counted, watched)
        except _TooLong:
            if not refused:
                await self._refuse(send, limit)

    async def _drain(self, receive: Receive, seen: int, limit: int) -> None:
        """Read the rest and forget it, up to four times the limit: a client that is still sending would not see an answer."""
        while seen <= 4 * limit:
            message = await receive()
            seen += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body"):
                return

    async def _refuse(self, send: Send, limit: int) -> None:
        body = json.dumps(
            {
                "detail": f"The request's body is over {limit} bytes"
                + (" (MAX_BODY_BYTES)." if limit == self._max_bytes else "."),
                "error": {"code": BodyTooLarge.code},
            }
        ).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class _TooLong(Exception):
    """The body went over the limit."""
