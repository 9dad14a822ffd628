"""When training runs: after enough annotations or enough time, now if asked, one at a time, never forgotten."""

from __future__ import annotations

import time

import pytest
from job_helpers import eventually, ledger, workers
from redis import Redis

from backend.jobs import scripts
from backend.jobs.queue import BagQueue
from backend.jobs.training import TrainingQueue
from backend.settings import Settings


@pytest.fixture
def training(settings: Settings, redis: Redis) -> TrainingQueue:
    patient = settings.model_copy(update={"train_debounce_n": 3, "train_debounce_s": 30.0})
    return TrainingQueue(BagQueue(patient, redis))


def due_in_s(redis: Redis, project: int) -> float:
    due = redis.zscore("rq:scheduled:train", f"train-{project}")
    assert due is not None, "it is not scheduled"
    return float(due) - time.time()


def queued(redis: Redis) -> list[str]:
    return [name.decode() for name in redis.lrange("rq:queue:train", 0, -1)]


def started(redis: Redis, project: int) -> None:
    """As a worker does that takes the job."""
    redis.lrem("rq:queue:train", 1, f"train-{project}")
    redis.hset(f"rq:job:train-{project}", "status", "started")


def test_an_annotation_waits_for_more_and_enough_of_them_do_not(training: TrainingQueue, redis: Redis) -> None:
    assert [training.note_annotations(7), training.note_annotations(7)] == ["scheduled", "scheduled"]
    assert queued(redis) == [] and 25 < due_in_s(redis, 7) <= 31
    assert training.note_annotations(8) == "scheduled", "another project counts for itself"
    assert training.note_annotations(7) == "queued"
    assert queued(redis) == ["train-7"]
    assert redis.zscore("rq:scheduled:train", "train-7") is None


def test_many_deleted_at_once_count_as_many(training: TrainingQueue, redis: Redis) -> None:
    assert training.note_annotations(7, 12) == "queued"


def test_start_training_does_not_wait_and_joins_what_waits(training: TrainingQueue, redis: Redis) -> None:
    training.note_annotations(7)
    assert [training.train_now(7), training.train_now(7)] == ["queued", "queued"]
    assert queued(redis) == ["train-7"]


def test_a_project_in_which_something_always_happens_is_trained_all_the_same(
    training: TrainingQueue, redis: Redis
) -> None:
    training.note_slides(7)
    redis.hset(scripts.training_key(7), "first", int(time.time()) - 290)
    training.note_slides(7)
    assert due_in_s(redis, 7) <= 11, "no later than ten times the delay after the first event"
    redis.hset(scripts.training_key(7), "first", int(time.time()) - 301)
    assert training.note_slides(7) == "queued"


def test_two_requests_during_a_training_make_one_more(training: TrainingQueue, redis: Redis) -> None:
    training.train_now(7)
    started(redis, 7)
    training.begin(7)
    assert [training.train_now(7), training.note_annotations(7)] == ["again", "again"]
    assert training.again(7) and queued(redis) == []
    assert not training.resume(7), "it still runs"
    redis.hset("rq:job:train-7", "status", "finished")
    assert training.resume(7) and queued(redis) == ["train-7"]
    assert not training.resume(7) and queued(redis) == ["train-7"]


def test_what_was_asked_while_a_worker_died_is_found(training: TrainingQueue, redis: Redis) -> None:
    training.train_now(7)
    started(redis, 7)
    training.train_now(7)
    redis.hset("rq:job:train-7", "status", "finished")  # and the worker was killed right then
    assert training.resume_all() == [7]
    assert queued(redis) == ["train-7"] and training.resume_all() == []


def test_a_failed_training_is_tried_again_when_asked(training: TrainingQueue, redis: Redis) -> None:
    training.train_now(7)
    started(redis, 7)
    redis.hset("rq:job:train-7", mapping={"status": "failed", "meta": '{"error": {"retryable": false}}'})
    assert training.train_now(7) == "queued"


def test_only_another_labelling_config_is_a_change(training: TrainingQueue) -> None:
    assert [training.config_changed(7, xml) for xml in ("<A/>", "<A/>", "<B/>", "<B/>")] == [False, False, True, False]


# --- real workers -------------------------------------------------------------------------------------------------


def test_a_real_worker_trains_once_more_for_all_that_was_asked_meanwhile(settings: Settings, redis: Redis) -> None:
    training = TrainingQueue(BagQueue(settings, redis))
    with workers(settings, 1, "train"):
        training.train_now(7)
        eventually(lambda: ledger(settings, "training"), "the training has begun")
        training.train_now(7)
        training.train_now(7)
        (settings.model_dir / "go-on").touch()
        eventually(lambda: ledger(settings, "training").count("end 7") == 2, "it has run once more")
        eventually(lambda: (s := training.state(7)) is not None and s.status == "finished", "it has settled")
        time.sleep(1.0)
    assert ledger(settings, "training") == ["begin 7", "end 7", "begin 7", "end 7"]
