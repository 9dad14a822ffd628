"""The overview over HTTP: what goes on, what failed and why, and a retry that only its own page may ask for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from redis import Redis
from rq.job import Job
from rq.registry import FailedJobRegistry
from web_client import served, store_result

from backend.jobs.queue import BagRequest
from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.services import Services
from backend.results.bag import digest
from backend.slides.source import SlideRef
from backend.slides.synthetic import SyntheticSlide
from backend.web.embedding_map import principal_plane

AUTH = ("ls", "secret")


@pytest.fixture
def running(
    tmp_path: Path, redis: Redis, embedded_redis: EmbeddedRedis, stand_in: Path
) -> Iterator[tuple[httpx.Client, Services]]:
    options = {"basic_auth_user": AUTH[0], "basic_auth_pass": AUTH[1]}
    with served(tmp_path, embedded_redis, stand_in, **options) as (client, services):
        client.auth = httpx.BasicAuth(*AUTH)
        yield client, services


def request(name: str) -> BagRequest:
    return BagRequest(digest({"slide": name}), SlideRef("file", (f"/slides/{name}",), name).to_json())


def fail(redis: Redis, request: BagRequest, message: str) -> None:
    """As a worker leaves a job that failed for good."""
    error = {"code": "no_tissue", "message": message, "hint": "Look at the slide.", "retryable": False}
    redis.hset(Job.key_for(request.key), mapping={"status": "failed", "meta": json.dumps({"error": error})})
    redis.lrem("rq:queue:batch", 0, request.key)
    redis.zadd(FailedJobRegistry.key_template.format("batch"), {request.key: 2e9})


def test_failures_are_listed_with_their_reason_and_can_be_tried_again(
    running: tuple[httpx.Client, Services], redis: Redis
) -> None:
    client, services = running
    failed = request("pale slide.svs")
    services.queue.submit(failed, priority="batch")
    fail(redis, failed, "No tissue: it covers 0.1 % of the slide.")
    services.queue.submit(request("other.svs"), priority="batch")
    overview = client.get("/api/overview").json()
    assert overview["counts"] == {"started": 0, "queued": 1, "failed": 1, "finished": 0}
    job = next(job for job in overview["jobs"] if job["status"] == "failed")
    assert job["about"] == "analyse pale slide.svs"
    assert job["error"]["message"].startswith("No tissue") and job["error"]["hint"]
    assert [j["about"] for j in client.get("/api/overview?status=failed").json()["jobs"]] == [job["about"]]

    assert client.post(f"/api/jobs/{failed.key}/retry").json()["status"] == "queued"
    assert client.get("/api/overview").json()["counts"]["failed"] == 0
    assert client.post(f"/api/jobs/{digest({})}/retry").status_code == 404


def test_another_sites_page_cannot_ask_for_a_retry(running: tuple[httpx.Client, Services], redis: Redis) -> None:
    client, services = running
    failed = request("a.svs")
    services.queue.submit(failed, priority="batch")
    fail(redis, failed, "No tissue.")
    answer = client.post(f"/api/jobs/{failed.key}/retry", headers={"Origin": "https://evil.example"})
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "origin_refused"
    assert services.queue.state(failed.key).status == "failed"  # type: ignore[union-attr]
    own = {"Origin": str(client.base_url).rstrip("/")}
    assert client.post(f"/api/jobs/{failed.key}/retry", headers=own).status_code == 200


def test_ten_thousand_jobs_are_counted_and_the_first_are_listed(
    running: tuple[httpx.Client, Services], redis: Redis
) -> None:
    client, services = running
    services.queue.submit_many([(request(f"{i}.svs"), None) for i in range(10_000)], "batch")
    overview = client.get("/api/overview?limit=100").json()
    assert (overview["counts"]["queued"], overview["queues"]["batch"], len(overview["jobs"])) == (10_000, 10_000, 100)
    assert [job["position"] for job in overview["jobs"]] == list(range(1, 101))
    assert len(client.get("/api/overview?limit=1000").json()["jobs"]) == 1000
    assert client.get("/api/overview?limit=10001").status_code == 400


def test_without_redis_the_overview_says_what_is_missing(
    running: tuple[httpx.Client, Services], tmp_path: Path
) -> None:
    from backend.jobs.queue import BagQueue

    client, services = running
    away = Redis(unix_socket_path=str(tmp_path / "nobody.sock"))
    services.__dict__["queue"] = BagQueue(services.settings, away)
    answer = client.get("/api/overview")
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "queue_unavailable"


def test_the_map_shows_every_analysed_slide_and_leads_to_its_panel(
    running: tuple[httpx.Client, Services], synthetic_slide: SyntheticSlide
) -> None:
    client, services = running
    assert client.get("/api/map").json()["points"] == []
    keys = []
    for name in ("a.tif", "b.tif"):
        path = services.settings.slide_roots[0] / name
        shutil.copy(synthetic_slide.path, path)
        keys.append(store_result(services, path))
    points = client.get("/api/map").json()["points"]
    assert {(point["key"], point["slide"]) for point in points} == set(zip(keys, ("a.tif", "b.tif"), strict=True))
    leads = client.get(points[0]["url"])
    assert leads.status_code == 307
    state = client.get(leads.headers["location"].replace("/panel?", "/panel/state?")).json()
    assert state["key"] == points[0]["key"] and state["status"]["phase"] == "done"
    assert client.get(f"/slides/{digest({})}").status_code == 404


def test_the_map_is_the_plane_in_which_slides_differ_most() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(40, 2)) * (5, 2)
    directions = np.linalg.qr(rng.normal(size=(768, 2)))[0].T
    plane, explained = principal_plane((truth @ directions + 3).astype(np.float32))
    distances = lambda points: np.linalg.norm(points[:, None] - points[None], axis=-1)  # noqa: E731
    assert np.allclose(distances(plane), distances(truth), atol=1e-3)
    assert explained[0] > explained[1] > 0.01 and sum(explained) == pytest.approx(1, abs=1e-5)
    again, _ = principal_plane((truth @ directions + 3).astype(np.float32))
    assert np.array_equal(plane, again)


@pytest.mark.parametrize("count", [1, 2])
def test_one_slide_or_equal_slides_have_a_map_too(count: int) -> None:
    plane, explained = principal_plane(np.ones((count, 768), np.float32))
    assert np.array_equal(plane, np.zeros((count, 2))) and explained == (0.0, 0.0)


def test_label_studio_being_away_is_said_and_the_rest_is_shown(running: tuple[httpx.Client, Services]) -> None:
    client, _ = running
    projects = client.get("/api/projects").json()
    assert projects["projects"] == [] and "LABEL_STUDIO_URL" in projects["problem"]


def test_what_the_page_shows_is_described_as_openapi(running: tuple[httpx.Client, Services]) -> None:
    client, _ = running
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/api/overview", "/api/projects", "/api/map"):
        answer = paths[path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        assert "$ref" in answer, path
    page = client.get("/")
    assert page.status_code == 200 and "Whole slides" in page.text
