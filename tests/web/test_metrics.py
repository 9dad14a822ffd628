"""Requests are counted by route and status, those that end in a defect too."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY

from backend.web.metrics import Measured


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.add_middleware(Measured)

    @app.get("/slides-of-a-test/{number}")
    async def slide(number: int) -> int:
        return 100 // number

    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("path", "route", "status"),
    [
        ("/slides-of-a-test/5", "/slides-of-a-test/{number}", 200),
        ("/slides-of-a-test/five", "/slides-of-a-test/{number}", 422),
        ("/slides-of-a-test/0", "/slides-of-a-test/{number}", 500),
        ("/nowhere", "other", 404),
    ],
)
def test_a_request_is_counted_once_under_its_route_and_status(
    client: TestClient, path: str, route: str, status: int
) -> None:
    def counted() -> list[float]:
        by_status = REGISTRY.get_sample_value("wsc_http_requests_total", {"route": route, "status": str(status)})
        timed = REGISTRY.get_sample_value("wsc_http_request_seconds_count", {"route": route})
        return [by_status or 0, timed or 0]

    before = counted()
    assert client.get(path).status_code == status
    assert counted() == [value + 1 for value in before]
