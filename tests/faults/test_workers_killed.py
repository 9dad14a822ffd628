"""A worker is killed (`kill -9`) at every stage of a slide and at every step between: another takes the slide over, once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fault_rig import Rig, Tally, assert_none_lost, eventually
from redis_rig import OwnRedis
from reliability_report import record

from backend.jobs.states import JobState

# Where the bag is when its worker is killed, and the stage that its progress says.
STAGES = {
    "fetch": "fetch",
    "open": "open",
    "tissue": "tissue",
    "encode": "encode",
    "store": "store",  # half written: the temporary file lies there
    "stored": "store",  # the result is there, and nobody has been told
}
EVERY_REQUEST = 60
"""More requests to Redis than one slide takes, from being taken off the queue to its being published."""


@dataclass
class Killed:
    """What was seen of the massacre: where each bag stood when its worker died, and what was half written."""

    rig: Rig
    states: dict[str, JobState | None]
    temporaries: list[Path]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, small_slide: Path, checkpoint: Path) -> Iterator[Killed]:
    """Six workers, each killed at another stage of its slide, and then a pool that finds what they left."""
    folder = tmp_path_factory.mktemp("killed")
    redis = OwnRedis(folder / "redis")
    rig = Rig(folder, small_slide, checkpoint, redis_url=redis.url)
    try:
        rig.serve()
        rig.hold(*(f"{stage}.{stage}" for stage in STAGES))
        rig.ask(*STAGES)
        workers = [rig.worker() for _ in STAGES]
        pids = {stage: rig.reached(f"{stage}.{stage}") for stage in STAGES}
        states = {stage: rig.state(stage) for stage in STAGES}
        assert sorted(pids.values()) == sorted(worker.pid for worker in workers)
        for worker in workers:
            worker.kill()
        temporaries = list((folder / "results").rglob("*.tmp"))
        rig.pool()
        for stage in STAGES:
            rig.release(f"{stage}.{stage}")
        yield Killed(rig, states, temporaries)
    finally:
        rig.close()
        redis.stop()


@pytest.mark.parametrize("stage", STAGES)
def test_a_slide_whose_worker_is_killed_is_taken_over(killed: Killed, stage: str) -> None:
    state = killed.states[stage]
    assert state is not None
    assert (state.status, state.stage) == ("started", STAGES[stage]), "it was really there when its worker died"
    tally = killed.rig.settle(stage)
    assert_none_lost(tally, killed.rig)
    assert killed.rig.runs(stage) == (1 if stage == "stored" else 2), "a stored result is not computed again"
    record("faults", f"worker killed at stage {stage}", **tally.counts())


def test_a_half_written_result_is_never_taken_for_one(killed: Killed) -> None:
    assert len(killed.temporaries) == 1, "one worker died while it wrote"
    killed.rig.settle()
    assert sorted(killed.rig.services.store.keys()) == sorted(killed.rig.key(stage) for stage in STAGES)


@pytest.mark.faults_long
def test_with_the_default_settings_a_killed_workers_slide_is_taken_over_within_a_minute(
    make_rig, own_redis: OwnRedis
) -> None:
    rig = make_rig(redis_url=own_redis.url, heartbeat_ttl_s=45)
    rig.serve()
    rig.hold("a.encode")
    rig.ask("a")
    rig.worker()
    rig.pool()
    pid = rig.reached("a.encode")
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    eventually(lambda: len(rig.ledger("analysed")) > 1, "another takes it", 120)
    taken_over_s = time.monotonic() - killed
    rig.release("a.encode")
    tally = rig.settle()
    assert_none_lost(tally, rig)
    assert taken_over_s < 60, "this is promised: HEARTBEAT_TTL_S and the time to notice"
    record("faults", "worker killed, default settings", **tally.counts(), taken_over_s=round(taken_over_s, 1))


def kill_between_requests(rig: Rig, numbers: list[int], at_once: int) -> Tally:
    """As many workers as ``numbers``, each killed when it sends that request to Redis after it took its first job; then a pool."""
    rig.serve()
    rig.ask(*(f"slide-{number}" for number in numbers))
    for start in range(0, len(numbers), at_once):
        workers = [
            rig.worker("interactive,batch,publish", WSC_KILL_AT_COMMAND=str(number))
            for number in numbers[start : start + at_once]
        ]
        eventually(
            lambda w=workers: rig.all_done() or not any(x.alive() for x in w), "each dies, or finds nothing to do"
        )
        for worker in workers:
            worker.kill()
            assert worker.popen.returncode == -signal.SIGKILL, rig.log()[-4000:]
    rig.pool()
    return rig.settle()


@pytest.mark.faults_long
def test_a_worker_may_be_killed_between_any_two_requests_to_redis(make_rig, own_redis: OwnRedis) -> None:
    rig = make_rig(redis_url=own_redis.url, job_retries=20)
    tally = kill_between_requests(rig, list(range(1, EVERY_REQUEST + 1)), 15)
    assert_none_lost(tally, rig)
    record("faults", "worker killed at every request to Redis", **tally.counts())
