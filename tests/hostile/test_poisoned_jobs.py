"""Somebody else writes into our Redis: nothing of it is run, the jobs end as refused, workers and job lists live on."""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from jobs.job_helpers import bag, key, workers
from redis import Redis
from reliability_report import record

from backend.errors import BackendError
from backend.jobs.queue import BagQueue
from backend.jobs.redis_server import EmbeddedRedis
from backend.jobs.states import ALLOWED_FUNCTIONS, ANALYSE, PUBLISH_BAG, PUBLISH_TASK, TRAIN
from backend.settings import Settings

PUSH = {"project": 1, "task": 2, "label_config": "<View/>", "model_version": "v"}


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def settings(tmp_path: Path, embedded_redis: EmbeddedRedis) -> Settings:
    return Settings(
        model_dir=tmp_path,
        redis_url=embedded_redis.url,
        heartbeat_ttl_s=5,
        job_retries=0,
        publish_retries=0,
        devices="cpu",
    )


@pytest.fixture
def queue(settings: Settings, redis: Redis) -> BagQueue:
    return BagQueue(settings, redis)


def job(*data: Any) -> bytes:
    """The ``data`` of a job: function, instance, positional and keyword arguments."""
    return zlib.compress(json.dumps(list(data)).encode())


def put(queue: BagQueue, name: bytes, data: bytes, **fields: str | bytes) -> None:
    """A job as RQ writes it, and then as somebody else does."""
    ours = queue._queues["interactive"].create_job(ANALYSE, args=(), job_id="any")
    mapping = {**{k: v for k, v in ours.to_dict().items() if v is not None}, "status": "queued", "data": data, **fields}
    queue.redis.hset(b"rq:job:" + name, mapping=mapping)
    queue.redis.rpush("rq:queue:interactive", name)


def poisons(trap: Path) -> dict[str, tuple[bytes, dict[str, str | bytes]]]:
    """Name → data and other fields. Those that run would make the folder ``trap``."""
    made = str(trap)
    slide = {"key": key("x"), "slide": {"name": "x"}}
    ours = job(PUBLISH_BAG, None, [key("x")], {})
    data: dict[str, bytes] = {
        "os.mkdir": job("os.mkdir", None, [made], {}),
        "os.system": job("os.system", None, [f"mkdir {made}"], {}),
        "subprocess": job("subprocess.check_call", None, [["mkdir", made]], {}),
        "builtins.exec": job("builtins.exec", None, [f"__import__('os').mkdir({made!r})"], {}),
        "another function of ours": job("backend.jobs.tasks.set_context", None, [None], {}),
        "a private name of ours": job("backend.jobs.tasks._open_store", None, [None], {}),
        "a dotted name below ours": job(ANALYSE + ".__globals__.get", None, ["os"], {}),
        "a name like ours": job("evil.backend.jobs.tasks.analyse", None, [slide], {}),
        "a method of text": job("upper", "text", [], {}),
        "a method of ours": job(ANALYSE, "instance", [slide], {}),
        "no function": job(None, None, [], {}),
        "a list as function": job(["os.mkdir"], None, [made], {}),
        "a number as function": job(7, None, [made], {}),
        "pickle": zlib.compress(pickle.dumps(("os.mkdir", None, (Canary(trap),), {}))),
        "pickle, not compressed": pickle.dumps(Canary(trap)),
        "no data": b"",
        "an inflating bomb": zlib.compress(b"[" * 30_000_000),
        "half a JSON": zlib.compress(b'["os.mk'),
        "JSON of another shape": zlib.compress(b'{"function": "os.mkdir"}'),
        "JSON too short": zlib.compress(b'["os.mkdir", null]'),
        "analyse without arguments": job(ANALYSE, None, [], {}),
        "analyse of a text": job(ANALYSE, None, ["text"], {}),
        "analyse of a key that climbs": job(ANALYSE, None, [{**slide, "key": "../../../../etc/passwd"}], {}),
        "analyse of no slide": job(ANALYSE, None, [{**slide, "slide": "/etc/passwd"}], {}),
        "analyse by keyword": job(ANALYSE, None, [], {"request": slide}),
        "analyse of a null": job(ANALYSE, None, [None], {}),
        "push to a list": job(PUBLISH_BAG, None, [[key("x")]], {}),
        "push of a key that climbs": job(PUBLISH_BAG, None, ["../" * 9 + "etc/passwd"], {}),
        "push a task of text": job(PUBLISH_TASK, None, [key("x"), {**PUSH, "task": "1 or 2"}], {}),
        "push a task of nothing": job(PUBLISH_TASK, None, [key("x"), {}], {}),
        "push one argument": job(PUBLISH_TASK, None, [key("x")], {}),
        "train a text": job(TRAIN, None, ["../../heads"], {}),
        "train a truth": job(TRAIN, None, [True], {}),
        "train minus one": job(TRAIN, None, [-1], {}),
    }
    fields: dict[str, tuple[bytes, dict[str, str | bytes]]] = {
        "callbacks": (ours, {"failure_callback_name": "antigravity.fly", "success_callback_name": "antigravity.fly"}),
        "a stopped callback": (ours, {"stopped_callback_name": "antigravity.fly"}),
        "times that are none": (ours, {"created_at": "yesterday", "enqueued_at": b"\xff"}),
        "a timeout that is none": (ours, {"timeout": "for ever"}),
    }
    return {name: (body, {}) for name, body in data.items()} | fields


def test_what_somebody_else_puts_into_the_queue_is_refused_and_the_worker_lives_on(
    settings: Settings, queue: BagQueue
) -> None:
    trap = settings.model_dir / "trap"
    mine = poisons(trap)
    for name, (data, fields) in mine.items():
        put(queue, name.replace(" ", "-").encode(), data, **fields)
    put(queue, b"\xff\xfe not text", job("os.mkdir", None, [str(trap)], {}))
    queue.redis.rpush("rq:queue:interactive", b"\x00\x01", "no such job")
    names = [name.replace(" ", "-") for name in mine]
    with workers(settings) as [process]:
        states = queue.wait(names, 120)
        queue.submit(bag("a"), priority="interactive")
        assert queue.wait([key("a")], 60)[key("a")].status == "finished", "the worker goes on"
        assert process.poll() is None
        assert queue.redis.hget(b"rq:job:\xff\xfe not text", "status") == b"failed"
    assert not trap.exists()
    assert {name: states[name].status for name in names} == dict.fromkeys(names, "failed")
    codes = {name: (states[name].error or {}).get("code") for name in names}
    assert codes == dict.fromkeys(names, "job_refused")
    assert "antigravity" not in (settings.model_dir / "worker.log").read_text()
    record(
        "jobs",
        "jobs that are not ours, or of wrong arguments",
        tried=len(names) + 1,
        refused=len(names) + 1,
        ran=0,
        workers_lost=0,
    )


def test_none_of_them_can_be_asked_for_again_and_the_lists_stay_readable(settings: Settings, queue: BagQueue) -> None:
    """What the overview and the panel ask of the queue; the button `try again` is one of them."""
    trap = settings.model_dir / "trap"
    names = []
    for number, (name, (data, fields)) in enumerate(poisons(trap).items()):
        put(queue, name.replace(" ", "-").encode(), data, **fields)
        queue.redis.hset(f"rq:job:{name.replace(' ', '-')}", "status", "failed")
        queue.redis.zadd("rq:failed:interactive", {name.replace(" ", "-"): 1e10 + number})
        names.append(name.replace(" ", "-"))
    queue.redis.zadd("rq:failed:interactive", {b"\xff\xfe not text": 1e10})
    nonsense = {
        "status": b"\xff\xfe",
        "data": b"x",
        "meta": '{"done": "x", "total": [], "tiles_per_s": "NaN", "error": 7}',
        "started_at": "yesterday",
    }
    queue.redis.hset("rq:job:nonsense", mapping=nonsense)  # type: ignore[arg-type]
    queue.redis.rpush("rq:queue:interactive", "nonsense")
    listed = {state.key for state in queue.jobs(1000)}
    assert {*names, "nonsense"} <= listed
    json.dumps([state.as_dict() for state in queue.jobs(1000)])
    before = queue.depths()
    refused = 0
    for name in names:
        queue.request(name)
        try:
            queue.retry(name)
        except BackendError as error:
            refused += error.code == "job_not_found"
        else:
            # What was asked is ours: it is asked again, and what somebody hung onto it is gone.
            again = queue.redis.hgetall(f"rq:job:{name}") or {}
            assert not any(b"antigravity" in value or b"instance" in value for value in again.values())
    ours = {"a-method-of-ours", "a-stopped-callback", "callbacks"}
    assert refused >= len(names) - len(ours)
    assert sum(queue.depths().values()) - sum(before.values()) <= len(ours)


def test_random_bytes_in_a_job_end_as_a_refusal(settings: Settings, queue: BagQueue) -> None:
    """Two hundred jobs with any of their fields replaced, flipped or cut."""
    chance = random.Random("jobs")
    ours = job(ANALYSE, None, [{"key": key("never"), "slide": {"name": "never", "fail": "no tissue"}}], {})
    fields = (
        "data",
        "created_at",
        "timeout",
        "meta",
        "origin",
        "description",
        "retries_left",
        "retry_intervals",
        "result_ttl",
        "failure_ttl",
        "ttl",
        "group_id",
        "dependency_ids",
    )
    names = [f"random-{number}" for number in range(200)]
    for name in names:
        hurt = chance.choice(fields)
        damaged = bytearray(ours) if hurt == "data" else bytearray(chance.randbytes(chance.choice((1, 8, 200))))
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        put(queue, name.encode(), ours)
        queue.redis.hset(f"rq:job:{name}", hurt, bytes(damaged[: chance.randrange(len(damaged)) + 1]))
    with workers(settings) as [process]:
        states = queue.wait(names, 200)
        assert process.poll() is None, "the worker lives"
        queue.submit(bag("a"), priority="interactive")
        assert queue.wait([key("a")], 60)[key("a")].status == "finished"
    settled = [name for name in names if name in states and states[name].status == "failed"]
    assert len(settled) == len(names), [states.get(name) for name in names if name not in settled][:3]
    codes = {(states[name].error or {}).get("code") for name in names}
    assert codes <= {"job_refused", "no_tissue"}, codes
    assert "no_tissue" in codes and "job_refused" in codes
    record(
        "jobs",
        "jobs with random damage",
        tried=len(names),
        refused=sum((states[name].error or {}).get("code") == "job_refused" for name in names),
        ran=0,
        workers_lost=0,
    )


def test_the_list_of_functions_is_closed() -> None:
    assert {ANALYSE, PUBLISH_BAG, PUBLISH_TASK, TRAIN} == ALLOWED_FUNCTIONS
    assert "antigravity" not in sys.modules
