"""One look that fails is not the last: every panel that is open depends on the next."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from backend.web import events
from backend.web.events import StatusHub

IDLE = {"phase": "idle", "job": None, "pushes": [], "waiting": [], "error": None}


async def told(stream: AsyncIterator[str]) -> dict[str, Any]:
    """The next status of a stream."""
    async for text in stream:
        if text.startswith("event: status"):
            return dict(json.loads(text.partition("data: ")[2]))
    raise AssertionError("the stream ended")


@pytest.mark.parametrize("failure", [ValueError("poison"), RecursionError(), KeyError("x")])
def test_the_looks_go_on_after_one_that_failed(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks = 0

    def read(_services: Any, keys: Any, _stored: Any) -> dict[str, Any]:
        nonlocal looks
        looks += 1
        if looks <= 3:
            raise failure
        return dict.fromkeys(keys, IDLE)

    monkeypatch.setattr(events, "read_statuses", read)
    monkeypatch.setattr(events, "LOOK_EVERY_S", 0.01)

    async def watch() -> list[dict[str, Any]]:
        hub = StatusHub(services=None)  # type: ignore[arg-type]
        streams = [hub.stream("a"), hub.stream("b")]
        found = [await asyncio.wait_for(told(stream), 30) for stream in streams]
        hub.close()
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]
        return found

    assert asyncio.run(watch()) == [IDLE, IDLE]
    assert looks >= 4
    assert len([record for record in caplog.records if record.exc_info]) == 1, "said once, not each second"
