"""Submitting: each bag once, nobody who waits is forgotten, and what Redis holds is JSON."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from job_helpers import bag, key, submit_from_elsewhere, waiting
from redis import Redis
from rq.job import validate_job_id
from rq.registry import FailedJobRegistry, FinishedJobRegistry

from backend.errors import JobNotFound, MppUnknown, QueueUnavailable
from backend.jobs import scripts
from backend.jobs.job_forms import publish_id
from backend.jobs.queue import QUEUES, BagQueue, BagRequest, WaitingTask
from backend.jobs.redis_server import EmbeddedRedis, connect
from backend.settings import Settings


def listed(redis: Redis, queue: str) -> list[str]:
    return [member.decode() for member in redis.lrange(f"rq:queue:{queue}", 0, -1)]  # type: ignore[union-attr]


def end_job(redis: Redis, queue: str, name: str, status: str, error: dict[str, Any] | None = None) -> None:
    """Leave the job as a worker does that has run it."""
    redis.lrem(f"rq:queue:{queue}", 1, key(name))
    redis.hset(f"rq:job:{key(name)}", mapping={"status": status, "meta": json.dumps({"error": error} if error else {})})
    registry = {"finished": FinishedJobRegistry, "failed": FailedJobRegistry}[status]
    redis.zadd(registry.key_template.format(queue), {key(name): 2e9})


def test_a_bag_asked_for_by_ten_tasks_is_queued_once_and_all_ten_wait(queue: BagQueue, redis: Redis) -> None:
    for task in range(10):
        state = queue.submit(bag("a"), priority="batch", waiting=waiting(task))
        assert (state.key, state.status, state.queue, state.position) == (key("a"), "queued", "batch", 1)
    assert listed(redis, "batch") == [key("a")]
    assert sorted(task.task for task in queue.waiting(key("a"))) == list(range(10))


def test_processes_and_threads_that_ask_at_the_same_moment_queue_it_once(
    queue: BagQueue, redis: Redis, settings: Settings
) -> None:
    with (
        ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes,
        ThreadPoolExecutor(8) as threads,
    ):
        jobs = [processes.submit(submit_from_elsewhere, settings, "a", start, 100) for start in (0, 100)]
        jobs += [threads.submit(submit_from_elsewhere, settings, "a", start, 100) for start in range(200, 1000, 100)]
        assert {status for job in jobs for status in job.result()} == {"queued"}
    assert listed(redis, "batch") == [key("a")]
    assert len(queue.waiting(key("a"))) == 1000


def test_ten_thousand_tasks_in_one_call_are_all_queued(queue: BagQueue) -> None:
    states = queue.submit_many([(bag(str(i)), waiting(i)) for i in range(10_000)], "batch")
    assert queue.depths() == {"interactive": 0, "batch": 10_000, "publish": 0, "train": 0}
    assert states[key("9999")].position == 10_000
    assert queue.waiting(key("1234")) == [waiting(1234)]


def test_a_bag_in_the_batch_moves_ahead_when_someone_waits_for_it(queue: BagQueue, redis: Redis) -> None:
    for name in "abc":
        queue.submit(bag(name), priority="batch")
    state = queue.submit(bag("c"), priority="interactive", waiting=waiting(3))
    assert (state.queue, state.position) == ("interactive", 1)
    assert listed(redis, "batch") == [key("a"), key("b")]
    assert listed(redis, "interactive") == [key("c")]
    queue.submit(bag("c"), priority="batch")
    assert listed(redis, "interactive") == [key("c")], "asking again for the batch does not move it back"


@pytest.mark.parametrize("status", ["started", "scheduled"])
def test_a_bag_that_is_under_way_is_left_alone(queue: BagQueue, redis: Redis, status: str) -> None:
    queue.submit(bag("a"), priority="batch")
    redis.lpop("rq:queue:batch")
    redis.hset(f"rq:job:{key('a')}", "status", status)
    queue.submit(bag("a"), priority="interactive", waiting=waiting(1))
    assert queue.depths() == dict.fromkeys(QUEUES, 0)
    assert queue.waiting(key("a")) == [waiting(1)]


def test_a_finished_bag_whose_result_is_gone_is_computed_again(queue: BagQueue, redis: Redis) -> None:
    queue.submit(bag("a"), priority="batch")
    end_job(redis, "batch", "a", "finished")
    state = queue.submit(bag("a"), priority="interactive")
    assert (state.status, state.queue) == ("queued", "interactive")
    assert listed(redis, "interactive") == [key("a")]
    assert redis.zcard("rq:finished:batch") == 0


def test_a_bag_that_cannot_succeed_is_not_run_again_and_says_why(queue: BagQueue, redis: Redis) -> None:
    queue.submit(bag("a"), priority="batch")
    error = MppUnknown("slide a states no mpp", hint="Set DEFAULT_MPP.").as_dict()
    end_job(redis, "batch", "a", "failed", error)
    state = queue.submit(bag("a"), priority="interactive", waiting=waiting(1))
    assert state.status == "failed"
    assert state.error == error
    assert queue.depths() == dict.fromkeys(QUEUES, 0)
    assert queue.waiting(key("a")) == [], "nobody waits for what will not come"


def test_a_bag_that_failed_of_something_passing_is_run_again(queue: BagQueue, redis: Redis) -> None:
    queue.submit(bag("a"), priority="batch")
    end_job(redis, "batch", "a", "failed", {"code": "download_failed", "message": "", "hint": "", "retryable": True})
    state = queue.submit(bag("a"), priority="batch", waiting=waiting(1))
    assert (state.status, state.error) == ("queued", None)
    assert redis.zcard("rq:failed:batch") == 0


def test_a_user_may_have_a_failed_bag_run_again(queue: BagQueue, redis: Redis) -> None:
    for again in (lambda: queue.retry(key("a")), lambda: queue.submit(bag("a"), priority="interactive", force=True)):
        redis.flushall()
        queue.submit(bag("a", n=1), priority="batch")
        end_job(redis, "batch", "a", "failed", {"code": "mpp_unknown", "message": "", "hint": "", "retryable": False})
        assert again().status == "queued"
        assert listed(redis, "interactive") == [key("a")]
    with pytest.raises(JobNotFound, match="Open the task again"):
        queue.retry(key("unheard of"))


def test_retry_leaves_a_job_alone_that_has_not_failed(queue: BagQueue, redis: Redis) -> None:
    queue.submit(bag("a"), priority="batch")
    assert queue.retry(key("a")).position == 1
    assert listed(redis, "batch") == [key("a")]


def test_of_several_who_take_a_waiting_task_one_gets_it(queue: BagQueue) -> None:
    queue.submit(bag("a"), priority="batch", waiting=waiting(7))
    with ThreadPoolExecutor(8) as threads:
        taken = list(threads.map(lambda _: queue.take_waiting(key("a"), 1, 7), range(8)))
    assert sorted(taken) == [False] * 7 + [True]


def test_waiting_tasks_are_drained_once_and_can_be_put_back(queue: BagQueue) -> None:
    for task in range(3):
        queue.submit(bag("a"), priority="batch", waiting=waiting(task))
    drained = queue.drain_waiting(key("a"))
    assert sorted(task.task for task in drained) == [0, 1, 2]
    assert queue.drain_waiting(key("a")) == []
    queue.put_back_waiting(key("a"), drained)
    assert sorted(queue.waiting(key("a")), key=lambda task: task.task) == sorted(drained, key=lambda task: task.task)


def test_three_opens_of_one_task_at_once_give_one_answer(settings: Settings, queue: BagQueue) -> None:
    others = [BagQueue(settings, connect(settings)) for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        claims = list(threads.map(lambda other: other.claim_answer(1, 2, "v"), others))
    assert sorted(claims) == [False, False, True]
    loser, winner = others[claims.index(False)], others[claims.index(True)]
    loser.release_claim(1, 2, "v")
    assert not queue.claim_answer(1, 2, "v"), "who has no claim cannot give it back"
    assert queue.claim_answer(1, 2, "another version")
    winner.release_claim(1, 2, "v")
    assert queue.claim_answer(1, 2, "v")


def test_waiting_for_bags_ends_when_all_have_settled(queue: BagQueue, redis: Redis) -> None:
    for name in "ab":
        queue.submit(bag(name), priority="interactive")
    end_job(redis, "interactive", "a", "finished")
    end_job(redis, "interactive", "b", "failed", {"code": "no_tissue", "message": "", "hint": "", "retryable": False})
    states = queue.wait(
        [key("a"), key("b"), key("never submitted")], timeout_s=600
    )  # the test's limit is 600 s as well
    assert {name: state.status for name, state in states.items()} == {key("a"): "finished", key("b"): "failed"}


def test_waiting_gives_up_in_time(queue: BagQueue) -> None:
    queue.submit(bag("a"), priority="interactive")
    assert queue.wait([key("a")], timeout_s=0.1)[key("a")].status == "queued"


def test_the_overview_lists_running_queued_failed_and_finished(queue: BagQueue, redis: Redis) -> None:
    for name in "abcd":
        queue.submit(bag(name), priority="batch")
    end_job(redis, "batch", "a", "finished")
    end_job(redis, "batch", "b", "failed", {"code": "no_tissue", "message": "m", "hint": "", "retryable": False})
    assert [(job.key, job.status) for job in queue.jobs()] == [
        (key("c"), "queued"),
        (key("d"), "queued"),
        (key("b"), "failed"),
        (key("a"), "finished"),
    ]
    assert [job.key for job in queue.jobs(limit=1, status="failed")] == [key("b")]
    assert json.loads(json.dumps(queue.jobs()[2].as_dict()))["error"]["code"] == "no_tissue"
    assert queue.workers() == []


def test_the_same_push_has_one_id_and_a_different_one_another() -> None:
    one = publish_id(key("a"), waiting(7, "WSC 1.6 (stand-in)"))
    assert one == publish_id(key("a"), waiting(7, "WSC 1.6 (stand-in)"))
    assert one.startswith(f"publish-1-7-WSC-1-6--stand-in--{key('a')[:12]}")
    validate_job_id(one)
    other_config = WaitingTask(1, 7, "<View><Image/></View>", "WSC 1.6 (stand-in)")
    others = {publish_id(key("a"), waiting(7, "WSC 1-6 (stand-in)")), publish_id(key("a"), other_config), one}
    assert len(others) == 3


def test_a_push_can_be_put_off_so_that_a_waiting_request_answers_first(queue: BagQueue) -> None:
    queue.submit(bag("a"), priority="interactive", waiting=waiting(1))
    queue.enqueue_publish(key("a"), delay_s=60)
    queue.enqueue_publish(key("a"))
    [push] = [job for job in queue.jobs() if job.key.startswith("publish-")]
    assert (push.status, push.position) == ("queued", None)
    assert queue.depths()["publish"] == 0
    assert queue.take_waiting(key("a"), 1, 1)


def test_tasks_that_wait_for_a_bag_nobody_computes_are_found(queue: BagQueue, redis: Redis) -> None:
    for name in ("done", "under way", "fresh"):
        queue.submit(bag(name), priority="batch", waiting=waiting(1))
    end_job(redis, "batch", "done", "finished")
    end_job(redis, "batch", "fresh", "finished")
    redis.zadd(scripts.WAITING_INDEX, {key("done"): 1, key("under way"): 1})  # since 1970
    assert queue.sweep_waiting() == [key("done")]
    assert listed(redis, "publish") == [f"publish-{key('done')}"]


def test_redis_holds_json_and_no_pickle(queue: BagQueue, redis: Redis) -> None:
    queue.submit(bag("a", mpp=0.5), priority="batch", waiting=waiting(1))
    queue.enqueue_publish(key("a"))
    jobs = [redis.hgetall(name) for name in redis.scan_iter("rq:job:*")]
    assert len(jobs) == 2
    for job in jobs:
        function, instance, args, kwargs = json.loads(zlib.decompress(job[b"data"]))  # type: ignore[index]
        assert function.startswith("backend.jobs.tasks.") and instance is None and args and kwargs == {}
    assert BagRequest.from_json(json.loads(json.dumps(bag("a", mpp=0.5).to_json()))) == bag("a", mpp=0.5)
    assert WaitingTask.from_json(json.loads(waiting(1).to_text())) == waiting(1)


def test_a_redis_that_goes_away_is_said_by_every_method(tmp_path: Path) -> None:
    settings = Settings(model_dir=tmp_path)
    with EmbeddedRedis(tmp_path):
        queue = BagQueue(settings, connect(settings))
        queue.submit(bag("a"), priority="batch")
    for call in (
        queue.ping,
        lambda: queue.submit(bag("a"), priority="batch"),
        lambda: queue.submit_many([(bag("a"), None)], "batch"),
        lambda: queue.retry(key("a")),
        lambda: queue.state(key("a")),
        lambda: queue.wait([key("a")], 1.0),
        lambda: queue.claim_answer(1, 2, "v"),
        lambda: queue.release_claim(1, 2, "v"),
        lambda: queue.take_waiting(key("a"), 1, 2),
        lambda: queue.drain_waiting(key("a")),
        lambda: queue.put_back_waiting(key("a"), [waiting(1)]),
        lambda: queue.enqueue_publish(key("a")),
        queue.jobs,
        queue.depths,
        queue.workers,
    ):
        with pytest.raises(QueueUnavailable, match="wsc-backend serve"):
            call()  # type: ignore[operator]
    with EmbeddedRedis(tmp_path):
        assert queue.submit(bag("a"), priority="batch").position == 1, "and is used again when it is back"


def test_the_web_process_and_the_pool_load_neither_torch_nor_mmm() -> None:
    code = (
        "import sys, backend.jobs.queue, backend.jobs.pool, backend.jobs.tasks, backend.jobs.worker; "
        "print([name for name in ('torch', 'mmm', 'torchvision') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"


def test_opening_a_slide_that_waits_for_another_try_has_it_tried_now_and_first(queue: BagQueue, redis: Redis) -> None:
    queue.submit(bag("before it"), priority="batch")
    queue.submit(bag("a"), priority="batch")
    redis.lrem("rq:queue:batch", 0, key("a"))
    redis.hset(f"rq:job:{key('a')}", "status", "scheduled")  # as after a failure that may pass
    redis.zadd("rq:scheduled:batch", {key("a"): redis.time()[0] + 60})
    assert queue.submit(bag("a"), priority="batch").position is None, "a batch has time"
    state = queue.submit(bag("a"), priority="interactive")
    assert (state.status, state.queue, state.position) == ("queued", "interactive", 1)
    assert redis.zcard("rq:scheduled:batch") == 0


def test_a_push_that_is_put_off_while_the_answer_is_on_its_way_is_no_forgotten_one(
    queue: BagQueue, redis: Redis
) -> None:
    """An ordinary opening: the answer is given, and a push makes sure of it a minute later."""
    assert queue.claim_answer(1, 7, "v", ttl_s=60)
    queue.put_back_waiting(key("a"), [WaitingTask(1, 7, "<View/>", "v")])
    queue.enqueue_publish(key("a"), delay_s=1)
    redis.hset(f"rq:job:publish-{key('a')}", "status", "started")  # a worker looks
    assert queue.publish_waiting(key("a")) == []
    redis.hset(f"rq:job:publish-{key('a')}", "status", "finished")
    redis.zadd(scripts.WAITING_INDEX, {key("a"): redis.time()[0] - 100})
    assert queue.sweep_waiting() == [], "it is looked after"
    redis.delete(f"rq:job:publish-{key('a')}-again")
    assert queue.sweep_waiting() == [key("a")], "and now it is not"
