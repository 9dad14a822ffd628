"""A worker with another model or other settings leaves the slides of the queue to those that fit; none is lost, doubled or failed by it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

from job_helpers import bag, eventually, key, ledger, waiting, workers
from redis import Redis
from rq.job import Job

from backend.errors import ModelMismatch
from backend.jobs import scripts
from backend.jobs.pushes import job_counts
from backend.jobs.queue import BagQueue, BagRequest, WaitingTask
from backend.jobs.training import TrainingQueue
from backend.settings import Settings

OLD, NEW = "a" * 40, "b" * 40


def asked(name: str, needs: str = NEW) -> BagRequest:
    return replace(bag(name), needs=needs)


def task(number: int, needs: str = NEW) -> WaitingTask:
    return replace(waiting(number), needs=needs)


def analysed(settings: Settings) -> Counter[str]:
    return Counter(line.split()[0] for line in ledger(settings, "analysed"))


def test_slides_wait_for_a_worker_that_fits_and_are_then_analysed_once(settings: Settings, queue: BagQueue) -> None:
    names = [f"slide-{i}" for i in range(5)]
    with workers(settings, fits=OLD):
        queue.submit_many([(asked(name), task(i)) for i, name in enumerate(names, start=1)], "batch")
        queue.submit(replace(bag("old-slide"), needs=OLD), priority="batch", waiting=task(9, OLD))
        eventually(lambda: "1:9" in "".join(ledger(settings, "published")), "the old worker does what it fits")
        eventually(lambda: queue.redis.zcard(scripts.UNFIT), "it has met the others")
        states = queue.states([key(name) for name in names])
        assert {state.status for state in states.values()} == {"queued"}, "waiting, not failed"
        errors = [state.error or {} for state in states.values()]
        assert {error["code"] for error in errors} == {ModelMismatch.code}
        assert "wsc-aaaaaa" in errors[0]["message"] and "PRECISION" in errors[0]["hint"], (
            "it is said what has to be changed"
        )
        assert analysed(settings) == {"old-slide": 1}
        assert queue.depths()["batch"] == 5 and job_counts(queue)["queued"] == 5, "they are counted"
        assert {job.key for job in queue.jobs(status="queued")} >= set(states), "and listed"
        with workers(settings, fits=NEW):
            eventually(lambda: len(ledger(settings, "published")) == 6, "a fitting worker has come, and all are pushed")
    assert analysed(settings) == Counter([*names, "old-slide"])
    assert len(set(ledger(settings, "published"))) == 6
    assert queue.redis.zcard(scripts.UNFIT) == 0 and not list(queue.redis.scan_iter(f"{scripts.UNFIT}:*"))
    log = (settings.model_dir / "worker.log").read_text()
    assert log.count("need another model or other settings") == 1, "said once, not for each slide"


def test_pushes_and_trainings_wait_for_a_worker_that_fits_too(settings: Settings, queue: BagQueue) -> None:
    """An old publisher would say that the model is no longer in use, and drop them."""
    (settings.model_dir / "go-on").touch()
    training = TrainingQueue(queue, lambda: NEW)
    with workers(settings, 1, "publish,train", fits=OLD):
        queue.put_back_waiting(key("a"), [task(1)])
        store_made_up(settings, key("a"))
        queue.enqueue_publish(key("a"))
        training.train_now(7)
        eventually(lambda: queue.redis.zcard(scripts.UNFIT) == 2, "both are put aside")
        assert not ledger(settings, "published") and not ledger(settings, "training")
        with workers(settings, 1, "publish,train", fits=NEW):
            eventually(
                lambda: ledger(settings, "published") and len(ledger(settings, "training")) == 2, "both are done"
            )
    assert ledger(settings, "training") == ["begin 7", "end 7"]
    assert len(ledger(settings, "published")) == 1


def store_made_up(settings: Settings, bag_key: str) -> None:
    from synthetic_bags import synthetic_result

    from backend.results.store import ResultStore

    ResultStore(settings.results_location).put(bag_key, synthetic_result((4_000, 3_000), 0.5, planted=(1, 1, 2, 2)))


def test_a_training_follows_the_model_of_who_asked_last(settings: Settings, queue: BagQueue) -> None:
    (settings.model_dir / "go-on").touch()
    TrainingQueue(queue, lambda: NEW).train_now(7)
    with workers(settings, 1, "train", fits=OLD):
        eventually(lambda: queue.redis.zcard(scripts.UNFIT), "it is put aside")
        TrainingQueue(queue, lambda: OLD).train_now(7)  # the new web process was a mistake, and the old one is back
        eventually(lambda: len(ledger(settings, "training")) == 2, "it is trained")


def test_opening_a_slide_that_waits_for_a_fitting_worker_puts_it_before_the_batch(
    settings: Settings, queue: BagQueue, redis: Redis
) -> None:
    queue.submit(asked("a"), priority="batch")
    pop = redis.register_script(scripts.POP)
    assert pop(args=[OLD, "{}", "interactive", "batch"])[2] == 1
    assert queue.submit(asked("a"), priority="interactive").queue == "interactive"
    assert pop(args=[NEW, "{}", "interactive", "batch"])[:2] == [b"interactive", key("a").encode()]


def test_what_no_fitting_worker_has_come_for_in_a_day_is_given_up_with_the_reason(
    settings: Settings, queue: BagQueue
) -> None:
    brief = settings.model_copy(update={"failure_ttl_s": 60})
    queue.submit(asked("a"), priority="batch", waiting=task(1))
    with workers(brief, fits=OLD):
        eventually(lambda: queue.redis.zcard(scripts.UNFIT), "it is put aside")
        queue.redis.zadd(scripts.UNFIT, {f"batch:{NEW}": time.time() - 61})
        state = eventually(lambda: (s := queue.state(key("a"))) and s.status == "failed" and s, "it is given up")
        assert state.error["code"] == ModelMismatch.code
        eventually(lambda: not queue.waiting(key("a")), "who waited is told in the log")
    assert queue.submit(asked("a"), priority="batch").status == "queued", "asked again, it is tried again"


def test_a_slide_that_failed_for_want_of_a_fitting_worker_is_tried_again_when_asked(
    settings: Settings, queue: BagQueue, redis: Redis
) -> None:
    """As an earlier release has left it in Redis: failed for good."""
    queue.submit(bag("a"), priority="batch")
    redis.lrem("rq:queue:batch", 0, key("a"))
    error = '{"error": {"code": "model_mismatch", "message": "Another model.", "retryable": false}}'
    redis.hset(Job.key_for(key("a")), mapping={"status": "failed", "meta": error})
    assert queue.submit(asked("a"), priority="batch").status == "queued"
