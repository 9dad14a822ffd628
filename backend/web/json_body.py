"""JSON bodies: read once it is known who asks, and read so that the server answers others meanwhile.

Python's parser holds the interpreter for as long as it runs, in whichever thread: many seconds for a body that is made for it. So a large body is
parsed piece by piece (each member of the outer object, each item of a list in it), and a body of too many parts is not parsed at all.
"""

from __future__ import annotations

import json
import re
from json import JSONDecodeError, JSONDecoder
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from backend.errors import RequestInvalid
from backend.web.body_limit import BodyTooLarge

M = TypeVar("M", bound=BaseModel)

LARGE_BYTES = 100_000
"""From here on, a body is parsed in a thread; below, that takes a millisecond and a thread costs more."""
MIN_PARTS = 2_000_000
"""So many objects and lists are always taken; beyond, one for each :data:`BYTES_A_PART` bytes of ``MAX_BODY_BYTES``."""
BYTES_A_PART = 32
MAX_PIECE_CHARS = 16_000_000
"""Longest member of a body, or item of a list in it: more than half a second of parsing at a stretch."""
_PIECES = (4_096, 65_536, 1_048_576, MAX_PIECE_CHARS)
_MAX_TOLD = 10

_decode = JSONDecoder().raw_decode
_WHITESPACE = re.compile(r"[ \t\n\r]*")


class JsonBodies:
    """Reads a request's body as a model, when a route asks for it: its dependencies have been asked by then.

    Parameters
    ----------
    max_bytes
        ``MAX_BODY_BYTES``. The limit itself is kept by :class:`~backend.web.body_limit.BodyLimit`.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_parts = max(MIN_PARTS, max_bytes // BYTES_A_PART)
        # One after the other: they would only take the interpreter from each other.
        self._lane = anyio.CapacityLimiter(1)

    async def __call__(self, request: Request, model: type[M]) -> M:
        """The body of ``request`` as a ``model``.

        Raises
        ------
        RequestValidationError, RequestInvalid
            It is no JSON, not said to be, or not what the model takes.
        BodyTooLarge
            It has more parts than a body of that size has, or one that is too long.
        """
        chunks, size, parts = [], 0, 0
        try:
            async for chunk in request.stream():
                chunks.append(chunk)
                size += len(chunk)
                parts += chunk.count(b"[") + chunk.count(b"{")
                if parts > self._max_parts:
                    raise BodyTooLarge(f"The request's body has over {self._max_parts} objects and lists.")
        except ClientDisconnect:
            raise RequestInvalid("The request ended before its body did.") from None
        if size and not _is_json(request.headers.get("content-type", "")):
            # A page of any site may send a form or text without asking first, but not JSON.
            raise _invalid(("body",), "Content-Type is not application/json")
        if size < LARGE_BYTES:
            return parse(b"".join(chunks), model)
        return await anyio.to_thread.run_sync(lambda: parse(b"".join(chunks), model), limiter=self._lane)


def described(model: type[BaseModel]) -> dict[str, Any]:
    """What a route's ``openapi_extra`` says of a body that it reads as ``model``."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


def parse(body: bytes, model: type[M]) -> M:
    """``body`` as a ``model``; errors as :class:`JsonBodies`."""
    if not body:
        raise _invalid(("body",), "Field required")
    try:
        text = body.decode(json.detect_encoding(body), "surrogatepass")
        value = json.loads(text) if len(body) < LARGE_BYTES else parse_in_pieces(text)
        return model.model_validate(value)
    except JSONDecodeError as error:
        raise _invalid(("body", error.pos), f"JSON decode error, {error.msg}") from None
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)[:_MAX_TOLD]
        raise RequestValidationError([{**problem, "loc": ("body", *problem["loc"])} for problem in found]) from None
    except (ValueError, RecursionError):  # no UTF-8, a number of thousands of digits, nested a thousand deep
        raise RequestInvalid("There was an error parsing the body.") from None


def parse_in_pieces(text: str) -> Any:
    """As :func:`json.loads`, other threads running in between; what is no object comes out as ``None``.

    Raises
    ------
    json.JSONDecodeError
        It is no JSON.
    BodyTooLarge
        A member, or an item of a list that is one, is longer than :data:`MAX_PIECE_CHARS`.
    """
    at = _space(text, 0)
    if text[at : at + 1] != "{":
        return None
    found: dict[str, Any] = {}
    at = _space(text, at + 1)
    if text[at : at + 1] == "}":
        return _ended(text, at + 1, found)
    while True:
        if text[at : at + 1] != '"':
            raise JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
        name, at = _decode(text, at)
        at = _space(text, at)
        if text[at : at + 1] != ":":
            raise JSONDecodeError("Expecting ':' delimiter", text, at)
        at = _space(text, at + 1)
        found[name], at = _items(text, at + 1) if text[at : at + 1] == "[" else _piece(text, at)
        at, more = _more(text, at, "}")
        if not more:
            return _ended(text, at, found)


def _items(text: str, at: int) -> tuple[list[Any], int]:
    """The items of a list that begins before ``at``, and where it ends."""
    items: list[Any] = []
    at = _space(text, at)
    if text[at : at + 1] == "]":
        return items, at + 1
    while True:
        item, at = _piece(text, at)
        items.append(item)
        at, more = _more(text, at, "]")
        if not more:
            return items, at


def _piece(text: str, at: int) -> tuple[Any, int]:
    """The value at ``at``, and where it ends."""
    for length in _PIECES:
        piece = text[at : at + length]
        whole = at + length >= len(text)
        try:
            value, end = _decode(piece)
        except JSONDecodeError as error:
            if whole:
                raise JSONDecodeError(error.msg, text, at + error.pos) from None
        else:
            # A number may go on behind the piece, which then ends with the part read here, or with that and ".", "e" or "e-".
            if whole or end < len(piece) - 2:
                return value, at + end
    raise BodyTooLarge(f"A part of the request's body is over {MAX_PIECE_CHARS} characters, or no JSON.")


def _more(text: str, at: int, close: str) -> tuple[int, bool]:
    """Where what comes next begins, and whether it is another value rather than what follows ``close``."""
    at = _space(text, at)
    if text[at : at + 1] == close:
        return at + 1, False
    if text[at : at + 1] != ",":
        raise JSONDecodeError("Expecting ',' delimiter", text, at)
    return _space(text, at + 1), True


def _ended(text: str, at: int, value: Any) -> Any:
    if (at := _space(text, at)) != len(text):
        raise JSONDecodeError("Extra data", text, at)
    return value


def _space(text: str, at: int) -> int:
    match = _WHITESPACE.match(text, at)
    return match.end() if match else at


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _invalid(loc: tuple[str | int, ...], message: str) -> RequestValidationError:
    return RequestValidationError([{"type": "json_invalid", "loc": loc, "msg": message}])
