"""What is known of pushes and tasks that wait, for whoever watches a bag: kept in Redis for a day, read for many bags at once."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.exceptions import RedisError
from rq.registry import FailedJobRegistry, FinishedJobRegistry, ScheduledJobRegistry, StartedJobRegistry

from backend.jobs import scripts
from backend.jobs.queue import BagQueue
from backend.jobs.queue_overview import cannot_serve, readings
from backend.jobs.redis_health import unavailable
from backend.jobs.states import QUEUES

log = logging.getLogger(__name__)

KEPT_S = 86_400
_TASK = re.compile(rb"(\d{1,18}):(\d{1,18})")


@dataclass(frozen=True)
class Push:
    """A prediction that was pushed: Label Studio's project and task, and when (s since 1970, by Redis' clients)."""

    project: int
    task: int
    at: float


@dataclass(frozen=True)
class Watched:
    """Of one bag: the pushes of the last day, and the tasks (``project:task``) that still wait for theirs."""

    pushes: tuple[Push, ...] = ()
    waiting: tuple[str, ...] = ()


def _name(key: str) -> str:
    return f"wsc:pushed:{key}"


def note_push(queue: BagQueue, key: str, project: int, task: int) -> None:
    """Write down that the prediction of ``task`` was pushed now.

    Raises
    ------
    QueueUnavailable
        Redis does not answer.
    """
    try:
        with queue.redis.pipeline() as pipeline:
            pipeline.hset(_name(key), f"{project}:{task}", str(time.time()))
            pipeline.expire(_name(key), KEPT_S)
            pipeline.execute()
    except RedisError as error:
        if cannot_serve(error):
            raise unavailable(error, queue.settings) from error
        raise


def watched(queue: BagQueue, keys: Sequence[str]) -> dict[str, Watched]:
    """Pushes and waiting tasks of every bag in ``keys``; errors as :func:`note_push`."""
    try:
        with queue.redis.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.hgetall(_name(key))
                pipeline.hkeys(scripts.waiting_key(key))
            answers = readings(pipeline)
    except RedisError as error:
        if cannot_serve(error):
            raise unavailable(error, queue.settings) from error
        raise
    return {
        key: Watched(
            tuple(push for item in (pushed or {}).items() if (push := _push(*item)) is not None),
            tuple(name.decode() for name in waiting or () if _TASK.fullmatch(name)),
        )
        for key, pushed, waiting in zip(keys, answers[::2], answers[1::2], strict=True)
    }


def _push(name: bytes, at: bytes) -> Push | None:
    """A push as :func:`note_push` writes it down; ``None`` for what something else has put there."""
    task = _TASK.fullmatch(name)
    try:
        when = float(at)
    except ValueError:
        when = math.nan
    if task is None or not math.isfinite(when):
        log.debug("skipped a push of %r at %r", name[:80], at[:80])
        return None
    return Push(int(task[1]), int(task[2]), when)


def job_counts(queue: BagQueue) -> dict[str, int]:
    """How many jobs are ``started``, ``queued`` (those that wait for another try included), ``failed`` and ``finished``."""
    registries: dict[str, Any] = {
        "started": StartedJobRegistry,
        "queued": ScheduledJobRegistry,
        "failed": FailedJobRegistry,
        "finished": FinishedJobRegistry,
    }
    try:
        with queue.redis.pipeline(transaction=False) as pipeline:
            for registry in registries.values():
                for name in QUEUES:
                    pipeline.zcard(registry.key_template.format(name))
            answers = [int(answer or 0) for answer in readings(pipeline)]
    except RedisError as error:
        if cannot_serve(error):
            raise unavailable(error, queue.settings) from error
        raise
    width = len(QUEUES)
    counts = {status: sum(answers[i * width : (i + 1) * width]) for i, status in enumerate(registries)}
    counts["queued"] += sum(queue.depths().values())
    return counts
