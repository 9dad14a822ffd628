"""Real worker processes on a real Redis: every bag once, every task answered once, whatever dies in between."""

from __future__ import annotations

import base64
import json
import os
import pickle
import signal
import zlib
from collections import Counter
from pathlib import Path

from job_helpers import TILES, bag, eventually, key, ledger, waiting, workers
from redis import Redis
from rq.serializers import JSONSerializer

from backend.jobs import scripts
from backend.jobs.bag_job import BagJob
from backend.jobs.queue import BagQueue
from backend.jobs.redis_server import EmbeddedRedis, connect
from backend.jobs.tasks import Progress
from backend.results.store import ResultStore
from backend.settings import Settings


def log_of(settings: Settings) -> str:
    return (settings.model_dir / "worker.log").read_text()


def runs(settings: Settings, name: str) -> int:
    return sum(line.split()[0] == name for line in ledger(settings, "analysed"))


def published(settings: Settings) -> Counter[str]:
    return Counter(line.split()[0] for line in ledger(settings, "published"))


def started_job(queue: BagQueue, name: str) -> str:
    """Wait until a worker is in the middle of a bag; returns the worker's name."""
    return eventually(
        lambda: (
            (state := queue.state(key(name))) and state.status == "started" and state.stage == "encode" and state.worker
        ),
        f"{name} is being computed",
    )


def pid_of(queue: BagQueue, worker: str) -> int:
    return int(next(entry["pid"] for entry in queue.workers() if entry["name"] == worker))


def test_ten_tasks_that_wait_for_one_bag_get_one_computation_and_one_push_each(
    settings: Settings, queue: BagQueue
) -> None:
    for task in range(10):
        queue.submit(bag("a"), priority="batch", waiting=waiting(task))
    with workers(settings, 2):
        state = queue.wait([key("a")], 60)[key("a")]
        eventually(lambda: sum(published(settings).values()) >= 10, "all ten are published")
        queue.submit(
            bag("b"), priority="batch", waiting=waiting(99)
        )  # queued behind: nothing more of "a" can be on its way
        eventually(lambda: "1:99" in published(settings), "the last is published")
    assert (state.status, state.stage, state.done, state.total, state.device) == (
        "finished",
        "store",
        TILES,
        TILES,
        "cpu",
    )
    assert runs(settings, "a") == 1
    assert published(settings) == Counter([f"1:{task}" for task in range(10)] + ["1:99"])
    assert ResultStore(settings.results_location).has(key("a"))
    assert "engine-on-cpu" in ledger(settings, "analysed")[0]
    assert f"bag={key('a')} device=cpu tiles={TILES}" in log_of(settings)


def test_progress_can_be_watched(settings: Settings, queue: BagQueue) -> None:
    queue.submit(bag("a", tile_s=0.3), priority="interactive")
    with workers(settings):
        state = eventually(
            lambda: (s := queue.state(key("a"))) and s.status == "started" and s.tiles_per_s and s, "a rate is shown"
        )
        assert 0 < state.done <= state.total == TILES
        [worker] = queue.workers()
        assert (worker["job"], worker["state"], worker["device"]) == (key("a"), "busy", "cpu")
        assert worker["queues"] == ["interactive", "batch", "publish"]
        assert worker["heartbeat_age_s"] < settings.heartbeat_ttl_s


def test_what_someone_waits_for_goes_before_the_batch(settings: Settings, queue: BagQueue) -> None:
    queue.submit_many([(bag(name), None) for name in ("a", "b", "c")], "batch")
    queue.submit(bag("c"), priority="interactive")
    with workers(settings):
        queue.wait([key(name) for name in ("a", "b", "c")], 60)
    assert [line.split()[0] for line in ledger(settings, "analysed")] == ["c", "a", "b"]


def test_a_bag_whose_worker_is_killed_is_computed_by_another(settings: Settings, queue: BagQueue) -> None:
    queue.submit(bag("a", until="go"), priority="interactive", waiting=waiting(1))
    with workers(settings, 2):
        first = started_job(queue, "a")
        os.kill(pid_of(queue, first), signal.SIGKILL)
        second = eventually(
            lambda: (state := queue.state(key("a"))) and state.worker not in ("", first) and state.worker,
            "another takes over",
            60,
        )
        (settings.model_dir / "go").touch()
        assert queue.wait([key("a")], 60)[key("a")].status == "finished"
        eventually(lambda: published(settings), "it is published")
        assert [entry["name"] for entry in queue.workers()] == [second], "the dead one is no longer listed"
    assert runs(settings, "a") == 2
    assert published(settings) == Counter(["1:1"])


def test_a_bag_whose_worker_died_between_taking_and_starting_it_is_not_lost(
    settings: Settings, queue: BagQueue
) -> None:
    queue.submit(bag("a"), priority="interactive")
    assert queue.redis.eval(scripts.POP, 0, "", "{}", "interactive") == [b"interactive", key("a").encode(), 0]
    assert queue.depths()["interactive"] == 0, "this is where RQ would have lost it"
    with workers(settings):
        assert queue.wait([key("a")], 60)[key("a")].status == "finished"
    assert runs(settings, "a") == 1


def test_a_bag_longer_than_the_heartbeat_is_not_taken_for_abandoned(settings: Settings, queue: BagQueue) -> None:
    queue.submit(bag("a", tile_s=1.0), priority="interactive")  # 12 s, more than twice HEARTBEAT_TTL_S
    with workers(settings, 2):
        assert queue.wait([key("a")], 60)[key("a")].status == "finished"
    assert runs(settings, "a") == 1


def test_a_bag_that_kills_every_worker_is_given_up_with_a_reason(settings: Settings, queue: BagQueue) -> None:
    once = BagQueue(settings.model_copy(update={"job_retries": 1}), queue.redis)
    once.submit(bag("a", fail="die"), priority="interactive", waiting=waiting(1))
    with workers(settings, 2), workers(settings, 1, "publish"), workers(settings):
        state = eventually(lambda: (s := queue.state(key("a"))) and s.status == "failed" and s, "it is given up")
        eventually(lambda: queue.waiting(key("a")) == [], "nobody waits in vain")
    assert state.error is not None
    assert state.error["code"] == "worker_died"
    assert not state.error["retryable"]
    assert runs(settings, "a") == 2
    assert f"project=1 task=1 gets no prediction from bag={key('a')}: worker_died" in log_of(settings)
    assert queue.submit(bag("a"), priority="batch").status == "failed", "it would kill the next worker too"


def test_what_cannot_succeed_is_not_tried_again(settings: Settings, queue: BagQueue) -> None:
    queue.submit(bag("a", fail="no tissue"), priority="interactive", waiting=waiting(1))
    with workers(settings):
        state = queue.wait([key("a")], 60)[key("a")]
        eventually(lambda: queue.waiting(key("a")) == [], "the waiting task is dropped")
    assert state.error == {
        "code": "no_tissue",
        "message": "There is no tissue on a.",
        "hint": "Look at the slide.",
        "retryable": False,
    }
    assert runs(settings, "a") == 1
    assert published(settings) == Counter()
    log = log_of(settings)
    assert f"project=1 task=1 gets no prediction from bag={key('a')}: no_tissue: There is no tissue on a." in log
    assert "Traceback" not in log, "a slide without tissue is no defect"


def test_what_may_pass_is_tried_again_and_then_published(settings: Settings, queue: BagQueue) -> None:
    queue.submit(bag("a", fail="download once"), priority="interactive", waiting=waiting(1))
    with workers(settings):
        assert queue.wait([key("a")], 60)[key("a")].status == "finished"
        eventually(lambda: published(settings), "it is published")
    assert runs(settings, "a") == 2
    assert queue.state(key("a")).error is None  # type: ignore[union-attr]


def test_a_defect_is_recorded_with_its_message_and_tried_no_more_than_settings_say(
    settings: Settings, queue: BagQueue
) -> None:
    once = BagQueue(settings.model_copy(update={"job_retries": 1}), queue.redis)
    once.submit(bag("a", fail="defect"), priority="interactive")
    with workers(settings):
        state = queue.wait([key("a")], 60)[key("a")]
    assert state.error is not None
    assert (state.error["code"], state.error["message"]) == ("unexpected_error", "ZeroDivisionError: a defect")
    assert runs(settings, "a") == 2
    assert "Traceback" in log_of(settings)


def test_a_bag_that_takes_too_long_is_stopped_and_not_tried_again(settings: Settings, queue: BagQueue) -> None:
    quick = BagQueue(settings.model_copy(update={"job_timeout_s": 1}), queue.redis)
    quick.submit(bag("a", until="never"), priority="interactive")
    with workers(settings):
        state = queue.wait([key("a")], 60)[key("a")]
    assert state.error is not None
    assert state.error["code"] == "job_timed_out"
    assert "longer than 1 s" in state.error["message"] and "JOB_TIMEOUT_S" in state.error["hint"]
    assert runs(settings, "a") == 1


def test_a_push_is_repeated_until_label_studio_is_back(settings: Settings, queue: BagQueue) -> None:
    down = settings.model_dir / "label-studio-down"
    down.touch()
    queue.submit(bag("a"), priority="interactive", waiting=waiting(1))
    with workers(settings):
        eventually(lambda: ledger(settings, "refused"), "a push was tried")
        [push] = eventually(lambda: [job for job in queue.jobs() if "1-1" in job.key and job.error], "it is kept")
        assert push.error is not None
        assert push.error["code"] == "label_studio_unreachable"
        assert push.status in ("queued", "started"), "it waits for its next try, or has just begun it"
        down.unlink()
        eventually(lambda: published(settings), "it is pushed after all")
    assert published(settings) == Counter(["1:1"])
    assert runs(settings, "a") == 1


def test_a_task_that_came_while_the_bag_was_being_finished_is_answered_too(settings: Settings, queue: BagQueue) -> None:
    """The worst moment: the result is stored, the job is over, and the caller has looked just before."""
    queue.submit(bag("a"), priority="interactive")
    with workers(settings):
        queue.wait([key("a")], 60)
        queue.submit(bag("a"), priority="interactive", waiting=waiting(1))
        eventually(lambda: published(settings), "it is published")
    assert runs(settings, "a") == 1, "the store had it"


def poison(queue: BagQueue, name: str, data: bytes, **fields: str) -> None:
    job = queue._queues["interactive"].create_job("backend.jobs.tasks.analyse", args=(), job_id=name)
    mapping = {**{k: v for k, v in job.to_dict().items() if v is not None}, "data": zlib.compress(data), **fields}
    queue.redis.hset(f"rq:job:{name}", mapping=mapping)
    queue.redis.rpush("rq:queue:interactive", name)


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_job_that_names_another_function_is_refused_and_nothing_runs(settings: Settings, queue: BagQueue) -> None:
    trap = settings.model_dir / "trap"
    ours = json.dumps(["backend.jobs.tasks.publish_bag", None, [key("a")], {}]).encode()
    poison(queue, "other-function", json.dumps(["os.mkdir", None, [str(trap)], {}]).encode())
    poison(queue, "method", json.dumps(["upper", "text", [], {}]).encode())
    poison(queue, "callback", ours, failure_callback_name="antigravity.fly", success_callback_name="antigravity.fly")
    poison(queue, "pickle", pickle.dumps(("os.mkdir", None, (Hostile(trap),), {})))
    names = ["other-function", "method", "callback", "pickle"]
    with workers(settings):
        states = queue.wait(names, 60)
        queue.submit(bag("a"), priority="interactive")
        assert queue.wait([key("a")], 60)[key("a")].status == "finished", "the worker goes on"
    assert [states[name].error["code"] for name in names] == ["job_refused"] * 4  # type: ignore[index]
    assert "'os.mkdir'" in states["other-function"].error["message"]  # type: ignore[index]
    assert not trap.exists()


def test_sigterm_lets_the_job_finish(settings: Settings, queue: BagQueue) -> None:
    queue.submit_many([(bag("a", until="go"), None), (bag("b"), None)], "interactive")
    with workers(settings) as [process]:
        started_job(queue, "a")
        process.send_signal(signal.SIGTERM)
        (settings.model_dir / "go").touch()
        assert process.wait(60) == 0
    assert queue.state(key("a")).status == "finished"  # type: ignore[union-attr]
    assert queue.state(key("b")).position == 1, "no new one was begun"  # type: ignore[union-attr]
    assert queue.workers() == []


def test_a_second_sigterm_puts_the_job_back_in_front(settings: Settings, queue: BagQueue) -> None:
    queue.submit_many([(bag("a", until="go"), None), (bag("b"), None)], "interactive")
    with workers(settings) as [process]:
        started_job(queue, "a")
        process.send_signal(signal.SIGTERM)
        eventually(lambda: "stopping after this job" in log_of(settings), "the first is heard")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    state = queue.state(key("a"))
    assert state is not None
    assert (state.status, state.position) == ("queued", 1)
    (settings.model_dir / "go").touch()
    with workers(settings):
        assert queue.wait([key("a")], 60)[key("a")].status == "finished"


def test_the_grace_period_ends_a_job_that_takes_too_long(settings: Settings, queue: BagQueue) -> None:
    queue.submit(bag("a", until="never"), priority="interactive")
    with workers(settings, 1, "interactive", "--grace-s", "0.5") as [process]:
        started_job(queue, "a")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert queue.state(key("a")).position == 1  # type: ignore[union-attr]


def test_redis_may_be_away_at_the_start_and_in_the_middle_of_a_job(tmp_path: Path) -> None:
    settings = Settings(model_dir=tmp_path, heartbeat_ttl_s=30)
    with workers(settings) as [process]:
        eventually(lambda: "Waiting for it." in log_of(settings), "the worker waits for Redis")
        with EmbeddedRedis(tmp_path):
            queue = BagQueue(settings, connect(settings))
            queue.submit(bag("a", until="go"), priority="interactive", waiting=waiting(1))
            started_job(queue, "a")
        (tmp_path / "go").touch()
        eventually(lambda: ResultStore(settings.results_location).has(key("a")), "the bag is computed meanwhile")
        with EmbeddedRedis(tmp_path):
            assert queue.wait([key("a")], 60)[key("a")].status == "finished"
            eventually(lambda: published(settings), "it is published")
            assert process.poll() is None
    assert runs(settings, "a") == 1
    assert published(settings) == Counter(["1:1"])


def test_everything_a_worker_leaves_in_redis_is_json(settings: Settings, queue: BagQueue, redis: Redis) -> None:
    queue.submit(bag("a"), priority="interactive", waiting=waiting(1))
    queue.submit(bag("b", fail="no tissue"), priority="interactive")
    with workers(settings):
        eventually(lambda: published(settings), "a is published")
        queue.wait([key("b")], 60)
    jobs = [redis.hgetall(name) for name in redis.scan_iter("rq:job:*")]
    assert len(jobs) >= 4
    for job in jobs:
        json.loads(zlib.decompress(job[b"data"]))  # type: ignore[index]
        json.loads(job.get(b"meta", b"{}"))  # type: ignore[union-attr]
    results = [entry for name in redis.scan_iter("rq:results:*") for _, entry in redis.xrange(name)]  # type: ignore[union-attr]
    values = [json.loads(base64.b64decode(entry[b"return_value"])) for entry in results if b"return_value" in entry]
    assert {"key": key("a"), "computed": True} in [
        {name: v[name] for name in ("key", "computed")} for v in values if "computed" in v
    ]


def test_progress_does_not_bring_back_a_job_that_is_gone(settings: Settings, queue: BagQueue) -> None:
    queue.submit(bag("a"), priority="batch")
    job = BagJob.fetch(key("a"), connection=queue.redis, serializer=JSONSerializer)
    progress = Progress(job, "cpu")
    assert json.loads(queue.redis.hget(job.key, "meta"))["stage"] == "start"
    queue.redis.delete(job.key)  # it has run out, or Redis has lost its data
    progress("encode", 0, 1)
    assert not queue.redis.exists(job.key)
