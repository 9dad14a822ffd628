"""Pushing a finished prediction into Label Studio, once, however often it is tried."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import lru_cache

from redis import Redis

from backend.errors import LabelStudioUnreachable, SourceError
from backend.jobs.pushes import note_push
from backend.jobs.queue import WaitingTask
from backend.label_studio.answers import Answers, slide_ref
from backend.label_studio.api_errors import TaskGone
from backend.label_studio.client import Pushed
from backend.label_studio.labeling_config import parse_config
from backend.label_studio.predictor import CLAIM_TTL_S
from backend.label_studio.services import Services
from backend.label_studio.versions import is_ours, model_of
from backend.settings import Settings
from backend.slides.source import SlideRef

log = logging.getLogger(__name__)

ASKED_ANEW_MAX = 3
"""So often the slide of a task may turn out to be another one, or its result to be gone, before that is called a failure."""
_CLAIM_WAIT_S = 3.0
_CLAIM_PAUSE_S = 0.25


class TaskBusy(LabelStudioUnreachable):
    """An answer to /predict for the same task is on its way; pushing now could store it twice."""

    code = "task_busy"
    ordinary = True


def publish(settings: Settings, redis: Redis, key: str, waiting: WaitingTask) -> Pushed | None:
    """:func:`push` for a worker process, which has settings and a Redis connection."""
    return push(services_of(settings, redis), key, waiting)


@lru_cache(maxsize=2)
def services_of(settings: Settings, redis: Redis) -> Services:
    """The services of a worker process, made once."""
    return Services(settings, redis)


@lru_cache(maxsize=2)
def _answers_of(services: Services) -> Answers:
    return Answers(services)


def push(services: Services, key: str, waiting: WaitingTask) -> Pushed | None:
    """Push the prediction of one task. Returns what was done, ``None`` if the task no longer exists, or its slide is analysed anew.

    It takes the same claim as an answer to /predict, so that the two never store the same prediction twice.

    Raises
    ------
    LabelStudioUnreachable, TaskBusy
        Label Studio is away, or the task is being answered: try again later.
    SourceError
        The task's slide is another one each time it is looked at.
    HeadDamaged
        The project's heads cannot be read. Its next training makes new ones, and pushes all anew.
    """
    if model_of(waiting.model_version) != services.model.model_version:
        log.info("task %d: %s is no longer the model, not pushed", waiting.task, waiting.model_version)
        return None
    # Heads may have been trained since the question: only what the project is at now counts there.
    waiting = replace(waiting, model_version=services.versions.version(waiting.project))
    services.versions.in_use(waiting.project)  # never a prediction without the heads, in place of one with them
    if not _claim(services, waiting):
        raise TaskBusy(f"Task {waiting.task} is being answered by someone else.", hint="It is tried again by itself.")
    try:
        # As they are now: since the question, a control may have been renamed, or the task given another slide.
        data = services.client.task(waiting.task)
        label_config = services.client.label_config(waiting.project)
        ref = slide_ref(services, parse_config(label_config), data)
        if services.key(ref) != key:
            log.info("task %d has another slide by now, which is analysed instead", waiting.task)
            services.queue.release_claim(waiting.project, waiting.task, waiting.model_version)
            _ask_anew(services, ref, replace(waiting, label_config=label_config))
            return None
        prediction = _answers_of(services).prediction(key, data, label_config, project=waiting.project)
        if prediction is None:
            log.warning("task %d: the result %s is gone or damaged, the slide is analysed again", waiting.task, key)
            services.queue.release_claim(waiting.project, waiting.task, waiting.model_version)
            _ask_anew(services, ref, replace(waiting, label_config=label_config))
            return None
        snapshot = services.versions.snapshot(waiting.project)
        cluster = snapshot.cluster_of(waiting.task) if snapshot else None
        if cluster is not None:
            prediction = {**prediction, "cluster": cluster}
        outdated = None if services.settings.keep_old_predictions else is_ours
        pushed = services.client.push_prediction(
            waiting.task, prediction, outdated=outdated, before_creating=lambda: _hold_claim(services, waiting)
        )
    except TaskGone:
        log.info("task %d was deleted in Label Studio, nothing to push", waiting.task)
        return None
    except BaseException:
        services.queue.release_claim(waiting.project, waiting.task, waiting.model_version)
        raise
    services.queue.forget_again(_again(waiting))
    if pushed != "kept":
        # A panel that is open beside the task offers to reload it.
        note_push(services.queue, key, waiting.project, waiting.task)
    if cluster is None and services.settings.rank_tasks:
        services.training.note_slides(waiting.project)  # a slide that has no place among the others yet
    # The claim is left to run out: a question that Label Studio asked before it had this prediction may arrive just now.
    log.info("task %d: prediction %s (%d regions)", waiting.task, pushed, len(prediction["result"]))
    return pushed


def _again(waiting: WaitingTask) -> str:
    return f"task:{waiting.id}"


def _ask_anew(services: Services, ref: SlideRef, waiting: WaitingTask) -> None:
    if services.queue.count_again(_again(waiting)) > ASKED_ANEW_MAX:
        raise SourceError(
            f"Each time its result is to be pushed, the slide of task {waiting.task} is another one, or the result is gone.",
            hint="Is the file being written to, or does its server change ETag or Last-Modified at every request? Open the task again when that has ended.",
        )
    request = services.request(ref)
    if services.store.has(request.key):
        services.queue.put_back_waiting(request.key, [waiting])
        services.queue.enqueue_publish(request.key)
    else:
        services.queue.submit(request, priority="batch", waiting=waiting)


def _hold_claim(services: Services, waiting: WaitingTask) -> None:
    """What came before the storing may have taken longer than the claim holds."""
    if not services.queue.renew_claim(waiting.project, waiting.task, waiting.model_version, CLAIM_TTL_S):
        raise TaskBusy(f"Task {waiting.task} was answered by someone else.", hint="It is looked at again by itself.")


def _claim(services: Services, waiting: WaitingTask) -> bool:
    deadline = time.monotonic() + _CLAIM_WAIT_S
    while not services.queue.claim_answer(waiting.project, waiting.task, waiting.model_version, CLAIM_TTL_S):
        if time.monotonic() > deadline:
            return False
        time.sleep(_CLAIM_PAUSE_S)
    return True
