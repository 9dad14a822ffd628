"""Leases: a job is always in exactly one place, whatever Redis, its clock or another worker does meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from job_helpers import bag, key
from redis import Redis
from rq.executions import Execution
from rq.registry import FailedJobRegistry, ScheduledJobRegistry, StartedJobRegistry
from rq.results import Result
from rq.serializers import JSONSerializer
from rq.utils import now, utcformat

from backend.errors import WorkerDied
from backend.jobs import scripts, tasks
from backend.jobs.bag_job import BagJob, describe_abandoned
from backend.jobs.bag_worker import BagWorker
from backend.jobs.housekeeping import Heart, Housekeeper
from backend.jobs.leases import Leases
from backend.jobs.queue import BagQueue
from backend.jobs.training import TrainingQueue
from backend.settings import Settings

LEASES = StartedJobRegistry.key_template.format("batch")
DIED = WorkerDied("It died.").as_dict()


@pytest.fixture
def leases(redis: Redis, settings: Settings) -> Leases:
    return Leases(redis, settings.heartbeat_ttl_s, settings.failure_ttl_s)


@pytest.fixture
def worker(settings: Settings, redis: Redis) -> Iterator[BagWorker]:
    """A worker that is not at work, on the queue ``batch``."""
    yield BagWorker(tasks.WorkerContext(settings, redis), ["batch"])
    tasks.set_context(None)


def running(queue: BagQueue, worker: BagWorker, name: str) -> tuple[BagJob, Execution]:
    """A bag that ``worker`` has taken and started."""
    queue.submit(bag(name), priority="batch")
    found = worker._next_job()
    assert found is not None and found[0].id == key(name)
    execution = worker.prepare_execution(found[0])
    worker.prepare_job_execution(found[0])
    return found[0], execution


def run_out(redis: Redis, execution: Execution) -> None:
    """The worker has not been heard of for long."""
    redis.zadd(LEASES, {execution.composite_key: redis.time()[0] - 1})


def listed(redis: Redis, queue: str = "batch") -> list[str]:
    return [member.decode() for member in redis.lrange(f"rq:queue:{queue}", 0, -1)]  # type: ignore[union-attr]


def places(redis: Redis, name: str) -> list[str]:
    """Every place in which a job is."""
    registries = {"failed": FailedJobRegistry, "scheduled": ScheduledJobRegistry}
    found = ["queue"] * listed(redis).count(key(name))
    found += [r for r, kind in registries.items() if redis.zscore(kind.key_template.format("batch"), key(name))]
    return found + ["started" for lease in redis.zrange(LEASES, 0, -1) if lease.decode().startswith(key(name))]  # type: ignore[union-attr]


def test_an_abandoned_job_goes_before_all_others_and_says_why(
    queue: BagQueue, redis: Redis, worker: BagWorker, leases: Leases
) -> None:
    job, execution = running(queue, worker, "a")
    queue.submit(bag("b"), priority="batch")
    run_out(redis, execution)
    assert leases.expired("batch")[1] == [execution.composite_key]
    assert leases.fail_abandoned(job, execution.composite_key, "batch", DIED) == "done"
    assert listed(redis) == [key("a"), key("b")]
    assert places(redis, "a") == ["queue"]
    state = queue.state(key("a"))
    assert state is not None and state.error == DIED
    assert BagJob.fetch(key("a"), connection=redis, serializer=JSONSerializer).retries_left == 1


def test_a_job_that_has_been_tried_often_enough_is_listed_as_failed(
    queue: BagQueue, redis: Redis, worker: BagWorker, leases: Leases, settings: Settings
) -> None:
    job, execution = running(queue, worker, "a")
    run_out(redis, execution)
    job.retries_left = 0
    assert leases.fail_abandoned(job, execution.composite_key, "batch", DIED) == "done"
    assert places(redis, "a") == ["failed"]
    assert 0 < redis.ttl(f"rq:job:{key('a')}") <= settings.failure_ttl_s  # type: ignore[operator]
    assert [state.key for state in queue.jobs(status="failed")] == [key("a")]


def test_a_failure_that_may_pass_is_tried_again_in_its_time(
    queue: BagQueue, redis: Redis, worker: BagWorker, leases: Leases
) -> None:
    job, execution = running(queue, worker, "a")
    assert leases.fail(job, execution, "batch", DIED) == "done"
    assert places(redis, "a") == ["scheduled"]
    assert leases.fail(job, execution, "batch", DIED) == "over", (
        "said twice, because an answer was lost: once is enough"
    )
    assert places(redis, "a") == ["scheduled"]


def test_a_lease_that_has_been_renewed_is_not_taken_away(
    queue: BagQueue, redis: Redis, worker: BagWorker, leases: Leases
) -> None:
    job, execution = running(queue, worker, "a")
    run_out(redis, execution)
    leases.renew(job, execution)
    assert leases.fail_abandoned(job, execution.composite_key, "batch", DIED) == "alive"
    assert places(redis, "a") == ["started"]


def test_a_job_that_another_worker_runs_by_now_is_left_to_it(
    queue: BagQueue, redis: Redis, worker: BagWorker, leases: Leases, settings: Settings
) -> None:
    job, old = running(queue, worker, "a")
    run_out(redis, old)
    assert leases.fail_abandoned(job, old.composite_key, "batch", DIED) == "done"
    again = BagWorker(tasks.WorkerContext(settings, redis), ["batch"])
    found = again._next_job()
    assert found is not None
    new = again.prepare_execution(found[0])
    again.prepare_job_execution(found[0])
    leases.renew(job, old)  # the first one was only silent
    run_out(redis, old)
    assert leases.fail_abandoned(job, old.composite_key, "batch", DIED) == "taken over"
    assert leases.fail(job, old, "batch", DIED) == "taken over", "nor is its own failure the job's"
    assert [member.decode() for member in redis.zrange(LEASES, 0, -1)] == [new.composite_key]  # type: ignore[union-attr]
    assert queue.state(key("a")).status == "started"  # type: ignore[union-attr]


def test_a_full_redis_still_takes_heartbeats_and_gives_jobs_back(
    queue: BagQueue, redis: Redis, worker: BagWorker, leases: Leases
) -> None:
    job, execution = running(queue, worker, "a")
    redis.zadd(LEASES, {execution.composite_key: redis.time()[0] + 1})
    redis.config_set("maxmemory", "1")
    try:
        with pytest.raises(Exception, match="maxmemory"):
            redis.set("anything", "x")
        leases.renew(job, execution)
        assert redis.zscore(LEASES, execution.composite_key) > redis.time()[0] + 1  # type: ignore[operator]
        assert leases.give_back(job, execution, "batch") == "done"
    finally:
        redis.config_set("maxmemory", "0")
    assert places(redis, "a") == ["queue"]


@pytest.mark.parametrize("ahead_s", [3600, -3600])
def test_a_worker_whose_clock_differs_by_an_hour_keeps_its_job(
    queue: BagQueue,
    redis: Redis,
    worker: BagWorker,
    leases: Leases,
    monkeypatch: pytest.MonkeyPatch,
    ahead_s: int,
) -> None:
    for module in ("rq.executions", "rq.registry", "rq.job", "backend.jobs.leases"):
        monkeypatch.setattr(f"{module}.now", lambda: now() + timedelta(seconds=ahead_s))
    for module in ("rq.executions", "rq.registry"):
        stamp = int(now().timestamp()) + ahead_s
        monkeypatch.setattr(f"{module}.current_timestamp", lambda stamp=stamp: stamp)
    job, execution = running(queue, worker, "a")
    assert leases.expired("batch")[1] == []
    assert redis.zscore(LEASES, execution.composite_key) <= redis.time()[0] + worker.heartbeat_ttl_s  # type: ignore[operator]
    worker.maintain_heartbeats(job, execution)
    assert leases.expired("batch")[1] == []
    assert redis.zscore(LEASES, execution.composite_key) <= redis.time()[0] + worker.heartbeat_ttl_s  # type: ignore[operator]


def test_what_was_written_before_the_clock_was_set_back_an_hour_does_not_wait_an_hour(
    queue: BagQueue, redis: Redis, worker: BagWorker, leases: Leases, settings: Settings
) -> None:
    later = redis.time()[0] + 3600
    _, execution = running(queue, worker, "dead")
    retried, second = running(queue, worker, "retried")
    queue.submit(bag("popped"), priority="batch")
    assert worker._next_job() is not None
    leases.fail(retried, second, "batch", DIED)
    redis.zadd(LEASES, {execution.composite_key: later})
    redis.zadd(ScheduledJobRegistry.key_template.format("batch"), {key("retried"): later})
    redis.zadd(scripts.POPPED, {f"batch {key('popped')}": later})
    redis.set(scripts.answer_key(1, 2, "v"), "somebody", px=3_600_000)
    leases.expired("batch")
    assert redis.zscore(LEASES, execution.composite_key) <= redis.time()[0] + settings.heartbeat_ttl_s  # type: ignore[operator]
    redis.register_script(scripts.MOVE_DUE)(args=[utcformat(now()), "batch"])
    assert listed(redis) == [key("retried")]
    recover: Any = redis.register_script(scripts.RECOVER_POPPED)
    assert recover(args=[settings.heartbeat_ttl_s]) == []
    assert redis.zscore(scripts.POPPED, f"batch {key('popped')}") <= redis.time()[0]  # type: ignore[operator]
    assert queue.claim_answer(1, 2, "v", 60)


def test_nobody_is_taken_for_dead_by_one_who_has_just_come_or_whose_clock_has_jumped(worker: BagWorker) -> None:
    housekeeper = Housekeeper(worker, Heart(worker))
    assert not housekeeper._may_judge(1000), "it has just come, and has heard nobody yet"
    housekeeper._judges_from = 0.0
    assert housekeeper._may_judge(1000)
    assert not housekeeper._may_judge(4600), "an hour in a moment: everybody slept, or the clock was set"
    housekeeper._judges_from = 0.0
    assert not housekeeper._may_judge(1000)


def test_how_long_a_job_has_run_is_told_by_a_clock_that_nobody_sets(
    queue: BagQueue, worker: BagWorker, leases: Leases
) -> None:
    job, execution = running(queue, worker, "a")
    leases.renew(job, execution, busy_s=12.34)
    job.started_at -= timedelta(hours=1)  # as if the machine's clock had been set on
    assert leases.busy_s(job) == 12.3
    assert describe_abandoned(job, 45, leases.busy_s(job)).code == "worker_died"


def test_a_lease_on_something_that_is_no_job_keeps_nobody_from_the_others(
    queue: BagQueue, worker: BagWorker, redis: Redis
) -> None:
    _, execution = running(queue, worker, "a")
    poison = [b"nonsense:1", b"\xff\xfe:2", b"no-such-job:3"]
    redis.hset("rq:job:nonsense", mapping={"data": "no data", "status": "started", "created_at": "never"})
    redis.zadd(LEASES, {execution.composite_key: 2, **dict.fromkeys(poison, 1)})
    housekeeper = Housekeeper(worker, Heart(worker))
    housekeeper._judges_from = 0.0
    housekeeper._put_in_order()
    assert redis.zrange(LEASES, 0, -1) == []
    assert listed(redis) == [key("a")], "the dead worker's job is queued again"
    assert redis.hget("rq:job:nonsense", "status") == b"failed"


def test_a_job_that_heard_no_signal_is_said_to_have_been_stuck_and_not_to_have_killed_its_worker(
    queue: BagQueue, worker: BagWorker
) -> None:
    job, _ = running(queue, worker, "a")
    assert describe_abandoned(job, 45, job.timeout - 1).code == "worker_died"
    stuck = describe_abandoned(job, 45, job.timeout + 30)
    assert (stuck.code, stuck.retryable) == ("job_timed_out", False)
    assert "stuck" in stuck.message


def test_a_job_that_ended_well_is_ended_once_though_it_is_said_twice(
    settings: Settings, redis: Redis, queue: BagQueue
) -> None:
    """The answer to the first was lost; in between, the same training was asked for again."""
    training = TrainingQueue(queue)
    training.train_now(7)
    worker = BagWorker(tasks.WorkerContext(settings, redis), ["train"])
    found = worker._next_job()
    assert found is not None
    job = found[0]
    execution = worker.prepare_execution(job)
    worker.prepare_job_execution(job)
    assert training.train_now(7) == "again"
    result = Result(job.id, Result.Type.SUCCESSFUL, redis, return_value={"version": "v"}, serializer=JSONSerializer)
    assert worker.leases.finish(job, execution, "train", result) == "done"
    assert training.report(7) == {"version": "v"}
    assert training.resume(7), "housekeeping of another worker was faster"
    assert worker.leases.finish(job, execution, "train", result) == "over"
    state = training.state(7)
    assert state is not None and state.status == "queued", "what was asked in between is still to be done"
    assert worker._next_job() is not None
    tasks.set_context(None)
