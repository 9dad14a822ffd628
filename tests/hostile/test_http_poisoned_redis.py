"""Somebody else writes into our Redis: what they wrote is left out of every view, and everybody else sees everything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis
from rq.utils import now as rq_now
from rq.utils import utcformat
from web_client import served

from backend.jobs.pushes import note_push, watched
from backend.jobs.queue import BagRequest
from backend.jobs.redis_server import EmbeddedRedis
from backend.jobs.states import state_of
from backend.jobs.tallies import note_bag
from backend.label_studio.services import Services
from backend.results.bag import digest
from backend.slides.source import SlideRef
from backend.slides.synthetic import SyntheticSlide
from backend.web.signing import SlideSigner

Both = tuple[httpx.Client, Services]
DEEP = '{"a":' * 900 + "1" + "}" * 900
DEEP_LIST = "[" * 900 + "]" * 900


@pytest.fixture
def backend(tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Redis, stand_in: Path) -> Iterator[Both]:
    with served(tmp_path, embedded_redis, stand_in) as both:
        yield both


def request(name: str) -> BagRequest:
    return BagRequest(digest({"slide": name}), SlideRef("file", (f"/slides/{name}",), name).to_json())


def worker(redis: Redis, name: str, **fields: str | bytes) -> None:
    """A worker as it writes itself down, with other ``fields`` in it."""
    sound = {
        "last_heartbeat": utcformat(rq_now()),
        "pid": "7",
        "hostname": "here",
        "state": "idle",
        "queues": "batch",
        "device": "cpu",
    }
    redis.hset(f"rq:worker:{name}", mapping={**sound, **fields})  # type: ignore[arg-type]
    redis.sadd("rq:workers", f"rq:worker:{name}")


def views(client: httpx.Client) -> dict[str, Any]:
    """What those see who look at everything."""
    found = {path: client.get(path) for path in ("/api/overview", "/api/jobs", "/metrics")}
    assert {path: answer.status_code for path, answer in found.items()} == dict.fromkeys(found, 200)
    return {
        **found["/api/overview"].json(),
        "metrics": found["/metrics"].text,
        "listed": found["/api/jobs"].json()["jobs"],
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"pid": "abc"},
        {"pid": b"\xff"},
        {"last_heartbeat": "garbage"},
        {"last_heartbeat": b"\xff\xfe"},
        {"memory_bytes": "much"},
        {"device_memory_bytes": "1e400"},
        {"pid": "9" * 5000},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_a_worker_of_nonsense_is_left_out(backend: Both, redis: Redis, fields: dict[str, Any]) -> None:
    client, _ = backend
    worker(redis, "sound")
    worker(redis, "poisoned", **fields)
    seen = views(client)
    assert [w["name"] for w in seen["workers"]] == ["sound"]
    assert 'wsc_workers{device="cpu",state="idle"} 1.0' in seen["metrics"]


def test_keys_that_hold_something_else_are_left_out(backend: Both, redis: Redis) -> None:
    client, services = backend
    services.queue.submit(request("sound.svs"), priority="batch")
    worker(redis, "sound")
    redis.sadd("rq:workers", "rq:worker:text", b"rq:worker:\xff\xfe")
    redis.set("rq:worker:text", "x")
    redis.set("rq:worker:sound:executions", "x")
    redis.set("rq:job:text", "x")
    redis.rpush("rq:queue:interactive", "text")
    redis.set("rq:failed:batch", "x")
    redis.set("rq:queue:train", "x")
    redis.set("wsc:tallies", "x")
    seen = views(client)
    assert (
        [job["about"] for job in seen["listed"]]
        == ["analyse sound.svs"]
        == [job["about"] for job in client.get("/api/overview").json()["jobs"]]
    )
    assert [w["name"] for w in seen["workers"]] == ["sound"]
    assert seen["counts"]["queued"] == 2 and seen["counts"]["failed"] == 0
    assert client.get("/api/bags/text").status_code == 404


def test_tallies_of_nonsense_are_left_out(backend: Both, redis: Redis) -> None:
    client, _ = backend
    note_bag(redis, {"encode": 1.5}, 100)
    for name, value in (
        ("stage/x", "abc"),
        ("failed/f/c", "nan"),
        ("stage/y", "-5"),
        (b"\xff", "1"),
        ("failed/g/c", "inf"),
    ):
        redis.hset("wsc:tallies", name, value)  # type: ignore[arg-type]
    redis.hset("wsc:trained", "x", "y")
    seen = views(client)["metrics"]
    assert "wsc_tiles_total 100.0" in seen and 'wsc_stage_seconds_total{stage="encode"} 1.5' in seen


@pytest.mark.parametrize(
    "meta",
    [
        f'{{"error": {DEEP}}}',
        f'{{"error": {{"code": {DEEP}, "message": {DEEP_LIST}, "more": {DEEP}}}}}',
        f'{{"stage": {DEEP_LIST}, "device": {DEEP}}}',
        f'{{"done": 1{"0" * 4000}, "total": 9{"0" * 4000}, "tiles_per_s": 9{"0" * 4000}}}',
        '{"done": -1, "total": true, "tiles_per_s": 1e-320}',
        '{"done": 1, "total": 9, "tiles_per_s": NaN}',
        r'{"stage": "\ud800", "device": "\udfff", "error": {"message": "\ud800", "hint": "\ud800"}}',
        f'{{"stage": "{"s" * 1_000_000}", "error": {{"message": "{"m" * 1_000_000}", "code": "{"c" * 1_000_000}"}}}}',
    ],
    ids=[
        "deep error",
        "deep texts",
        "deep stage",
        "huge numbers",
        "odd numbers",
        "NaN",
        "half characters",
        "long texts",
    ],
)
def test_what_a_job_says_of_itself_is_cut_down_to_what_we_write(
    backend: Both, redis: Redis, meta: str, synthetic_slide: SyntheticSlide
) -> None:
    client, services = backend
    slide = services.settings.slide_roots[0] / "slide.tif"
    shutil.copy(synthetic_slide.path, slide)
    ref = services.resolver.resolve(str(slide))
    poisoned = BagRequest(services.key(ref), ref.to_json())
    services.queue.submit(poisoned, priority="batch")
    services.queue.submit(request("sound.svs"), priority="batch")
    for status in ("started", "failed"):
        redis.hset(f"rq:job:{poisoned.key}", mapping={"meta": meta, "status": status})
        redis.zadd(f"rq:{'wip' if status == 'started' else 'failed'}:batch", {poisoned.key: 9e9})
        seen = views(client)
        assert {job["key"] for job in seen["listed"]} == {poisoned.key, request("sound.svs").key}
        assert len(json.dumps([seen["jobs"], seen["listed"]])) < 50_000
        state = client.get("/panel/state", params={"slide": SlideSigner(services.settings.model_dir).token(ref)})
        assert state.status_code == 200 and state.json()["status"]["job"]["key"] == poisoned.key
        json.dumps(state.json(), allow_nan=False)


def test_an_error_of_ours_comes_through_whole() -> None:
    error = {"code": "no_tissue", "message": "No tissue: 0.1 µm².", "hint": "Look at it.", "retryable": True}
    raw = {b"data": b"x", b"status": b"failed", b"meta": json.dumps({"error": {**error, "more": [1]}}).encode()}
    state = state_of("k", raw)
    assert state is not None and state.error == error


@pytest.mark.parametrize(
    ("name", "at"), [("x:y", "1"), ("1", "1"), ("", ""), ("1:2", "never"), ("1:2", "nan"), (b"\xff:\xfe", "1"), ("9" * 5000 + ":1", "1"), ("1:2:3", "1")]
)  # fmt: skip
def test_a_push_of_nonsense_is_left_out_of_the_panel(backend: Both, redis: Redis, name: Any, at: str) -> None:
    _, services = backend
    key, other = digest({"slide": "a"}), digest({"slide": "b"})
    note_push(services.queue, key, 7, 5)
    redis.hset(f"wsc:pushed:{key}", name, at)
    redis.hset(f"wsc:waiting:{key}", name, "x")
    redis.set(f"wsc:pushed:{other}", "x")
    found = watched(services.queue, [key, other])
    assert [(push.project, push.task) for push in found[key].pushes] == [(7, 5)]
    assert set(found[key].waiting) <= {"1:2"} and found[other].pushes == ()
