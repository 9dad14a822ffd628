"""Redis is killed, full, read-only, slow, locked or cut off while slides are computed: nothing is lost, and the refusal says why."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from fault_rig import Parts, Rig, assert_none_lost, eventually
from redis import Redis
from redis_rig import OwnRedis, RedisProxy
from reliability_report import record


@contextmanager
def killed(parts: Parts) -> Iterator[None]:
    parts.server.kill()
    yield
    parts.server.start()


@contextmanager
def configured(parts: Parts, setting: str, value: str, before: str) -> Iterator[None]:
    with parts.server.client() as client:
        client.config_set(setting, value)
        yield
        client.config_set(setting, before)


def full(parts: Parts) -> AbstractContextManager[None]:
    return configured(parts, "maxmemory", "1", "0")  # `noeviction` is Redis' default


def read_only(parts: Parts) -> AbstractContextManager[None]:
    return configured(parts, "min-replicas-to-write", "1", "0")


@contextmanager
def password_changed(parts: Parts) -> Iterator[None]:
    with parts.server.client() as client:
        client.config_set("requirepass", "another-password")
        parts.proxy.refuse()  # who is connected stays let in: cut them off
        parts.proxy.accept()
        yield
        client.config_set("requirepass", "")


FAULTS: dict[str, tuple[Callable[[Parts], AbstractContextManager[None]], str]] = {
    "killed": (killed, "does not answer"),
    "full": (full, "its memory is full (OOM)"),
    "read-only": (read_only, "NOREPLICAS"),
    "password changed": (password_changed, "wants a password"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_redis_fails_in_the_middle_of_a_slide(parts: Parts, fault: str) -> None:
    rig = parts.rig
    break_it, reason = FAULTS[fault]
    name = fault.replace(" ", "-")
    running, queued, refused = f"{name}-running", f"{name}-queued", f"{name}-refused"
    rig.hold(f"{running}.encode")
    rig.ask(running)
    rig.reached(f"{running}.encode")
    rig.ask(queued)
    with break_it(parts):
        answer = rig.ask(refused)
        assert answer.status_code == 503, "the asking person is told, at once"
        assert reason in answer.text and "Redis" in answer.text, answer.text
        assert "another-password" not in answer.text
        rig.release(f"{running}.encode")
        eventually(lambda: rig.services.store.has(rig.key(running)), "the slide is computed all the same")
        time.sleep(1)  # the worker is in the middle of saying so
    rig.ask_until_taken(refused)
    tally = rig.settle(running, queued, refused)
    assert_none_lost(tally, rig)
    record("faults", f"Redis {fault} mid-job", **tally.counts())


@pytest.mark.faults_long
@pytest.mark.parametrize("fault", FAULTS)
def test_redis_fails_between_two_slides(parts: Parts, fault: str) -> None:
    rig = parts.rig
    name = f"idle-{fault.replace(' ', '-')}"
    with FAULTS[fault][0](parts):
        assert rig.ask(name).status_code == 503
    rig.ask_until_taken(name)
    tally = rig.settle(name)
    assert_none_lost(tally, rig)
    record("faults", f"Redis {fault} between jobs", **tally.counts())


@pytest.mark.faults_long
def test_a_redis_that_refuses_for_a_while_does_not_fill_the_log(parts: Parts) -> None:
    before = len(parts.rig.log().splitlines())
    with read_only(parts):
        time.sleep(4)
    said = parts.rig.log().splitlines()[before:]
    assert 1 <= len(said) < 30, "\n".join(said)


@pytest.mark.parametrize("pause_s", [2, pytest.param(12, marks=pytest.mark.faults_long)])
def test_redis_pauses_in_the_middle_of_a_slide(parts: Parts, pause_s: int) -> None:
    """`CLIENT PAUSE`: shorter than a client waits for an answer, and longer than that and than a worker may be silent."""
    rig = parts.rig
    names = [f"pause-{pause_s}-{i}" for i in range(3)]
    rig.hold(f"{names[0]}.encode")
    rig.ask(*names)
    rig.reached(f"{names[0]}.encode")
    with parts.server.client() as client:
        client.execute_command("CLIENT", "PAUSE", pause_s * 1000, "ALL")
    rig.release(f"{names[0]}.encode")
    rig.ask_until_taken(*names)
    tally = rig.settle(*names)
    assert_none_lost(tally, rig)
    record("faults", f"Redis pauses for {pause_s} s", **tally.counts())


@pytest.mark.faults_long
def test_redis_is_slow(parts: Parts) -> None:
    rig = parts.rig
    with parts.proxy.slow(0.05):
        rig.ask_until_taken("slow-a", "slow-b")
        tally = rig.settle("slow-a", "slow-b")
    assert_none_lost(tally, rig)
    record("faults", "Redis slow: 50 ms more for each message", **tally.counts())


@pytest.mark.faults_long
def test_redis_takes_two_seconds_for_every_command(make_rig: Callable[..., Rig], own_redis: OwnRedis) -> None:
    """With the default heartbeat: nobody is taken for dead, and all is done, slowly."""
    proxy = RedisProxy(own_redis.port)
    rig = make_rig(redis_url=proxy.url, heartbeat_ttl_s=45)
    try:
        rig.serve()
        rig.pool()
        rig.ask("quick")
        assert_none_lost(rig.settle("quick"), rig)
        with proxy.slow(2.0):
            assert rig.ask("slow").status_code == 200
            eventually(lambda: rig.services.store.has(rig.key("slow")), "it is computed", 240)
            eventually(lambda: rig.studio.of(rig.task("slow")), "it is pushed", 240)
        tally = rig.settle("slow")
        assert_none_lost(tally, rig)
        assert rig.runs("slow") == 1
        record("faults", "Redis slow: 2 s more for each command", **tally.counts())
    finally:
        rig.close()
        proxy.stop()


def cut_now_and_then(parts: Parts, names: list[str], share: float, seed: int) -> None:
    """Cut connections before or after a request takes effect, until all is done."""
    dice = random.Random(seed)

    def choose(_number: int, _data: bytes) -> str:
        drawn = dice.random()
        return "cut before" if drawn < share / 2 else "cut after" if drawn < share else "pass"

    parts.proxy.on_request = choose
    try:
        parts.rig.ask_until_taken(*names)
        deadline = time.monotonic() + 60
        while not all(parts.rig.services.store.has(parts.rig.key(name)) for name in names):
            assert time.monotonic() < deadline, parts.rig.log()[-3000:]
            time.sleep(0.2)
        time.sleep(2)  # while they are pushed
    finally:
        parts.proxy.on_request = lambda _number, _data: "pass"


@pytest.mark.faults_long
@pytest.mark.parametrize(("slides", "share"), [(6, 0.05), (60, 0.1)], ids=["few", "many"])
def test_connections_to_redis_are_cut_before_and_after_requests(parts: Parts, slides: int, share: float) -> None:
    rig = parts.rig
    names = [f"cut-{slides}-{i}" for i in range(slides)]
    cut_now_and_then(parts, names, share, seed=slides)
    tally = rig.settle(*names)
    assert_none_lost(tally, rig)
    record("faults", f"connections to Redis cut at {share:.0%} of requests", **tally.counts())


def test_the_embedded_redis_is_killed_mid_job_and_between_jobs(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(job_retries=10)
    rig.serve("--with-workers")
    rig.hold("running.encode")
    rig.ask("running")
    rig.reached("running.encode")
    rig.ask("queued")

    def server_pid() -> int:
        with Redis.from_url(str(rig.redis.connection_pool.connection_kwargs["path"]).join(("unix://", ""))) as client:
            return int(client.info("server")["process_id"])

    first = server_pid()
    os.kill(first, signal.SIGKILL)
    rig.release("running.encode")
    rig.ask_until_taken("asked-right-after")
    tally = rig.settle()
    assert_none_lost(tally, rig)
    assert rig.runs("running") == 1, "what is under way is not begun again"
    record("faults", "embedded Redis killed mid-job", **tally.counts())

    second = server_pid()
    assert second != first
    os.kill(second, signal.SIGKILL)
    rig.ask_until_taken("later")
    tally = rig.settle("later")
    assert_none_lost(tally, rig)
    record("faults", "embedded Redis killed between jobs", **tally.counts())
