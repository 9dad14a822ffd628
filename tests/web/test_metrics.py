"""Requests are counted by route and status, those that end in a defect too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY
from web_client import served

from backend.jobs.redis_server import EmbeddedRedis
from backend.jobs.tallies import note_bag, note_failure
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


def test_what_workers_have_added_up_is_there_for_prometheus(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path
) -> None:
    with served(tmp_path, embedded_redis, stand_in) as (client, services):
        for _ in range(2):
            note_bag(redis, {"encode": 1.5, "store": 0.25}, 100)
        note_failure(redis, "analyse", "no_tissue")
        services.training.train_now(7)
        services.training.begin(7)
        lines = client.get("/metrics").text.splitlines()
    for wanted in (
        "wsc_redis_up 1.0",
        "wsc_bags_total 2.0",
        "wsc_tiles_total 200.0",
        'wsc_stage_seconds_total{stage="encode"} 3.0',
        'wsc_job_failures_total{code="no_tissue",function="analyse"} 1.0',
        "wsc_trainings_total 1.0",
        'wsc_jobs{status="queued"} 1.0',
        'wsc_queue_depth{queue="train"} 1.0',
    ):
        assert wanted in lines


def test_every_alert_asks_for_metrics_that_there_are(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path
) -> None:
    rules = yaml.safe_load((Path(__file__).parents[2] / "docs" / "alerts.yml").read_text())["groups"][0]["rules"]
    with served(tmp_path, embedded_redis, stand_in) as (client, _):
        client.post("/predict", json={"tasks": []})
        text = client.get("/metrics").text
    for rule in rules:
        for name in set(re.findall(r"wsc_\w+", rule["expr"])):
            assert f"# TYPE {name.removesuffix('_bucket')} " in text, f"{rule['alert']} asks for {name}"
