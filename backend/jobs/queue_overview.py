"""What an overview asks of the queue: jobs, depths, workers. Part of :class:`~backend.jobs.queue.BagQueue`."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from functools import wraps
from typing import Any, TypeVar

from redis.exceptions import ConnectionError, OutOfMemoryError, ReadOnlyError, RedisError, ResponseError, TimeoutError
from rq import Queue
from rq.defaults import RQ_KEY_PREFIX
from rq.job import Job
from rq.registry import FailedJobRegistry, FinishedJobRegistry, ScheduledJobRegistry, StartedJobRegistry
from rq.utils import utcparse
from rq.worker_registration import REDIS_WORKER_KEYS

from backend.jobs.redis_health import unavailable
from backend.jobs.scripts import UNFIT, unfit_key
from backend.jobs.states import QUEUES, JobState, Status, state_of
from backend.settings import Settings

log = logging.getLogger(__name__)

_MAX_UNFIT = 100

F = TypeVar("F", bound=Callable[..., Any])

# A full disk, full memory, too few replicas, a replica cut off, another password, a script that hangs: an operator can end each of them.
_REFUSALS = (
    "MISCONF",
    "OOM",
    "EXECABORT",
    "NOREPLICAS",
    "READONLY",
    "MASTERDOWN",
    "NOAUTH",
    "WRONGPASS",
    "NOPERM",
    "BUSY ",
    "CLUSTERDOWN",
    "MOVED",
    "CROSSSLOT",
    "HELLO",  # one that is too old does not know the greeting
)


def cannot_serve(error: RedisError) -> bool:
    """Whether ``error`` says that Redis is away or refuses to work for now, rather than that it was asked something wrong."""
    if isinstance(error, ConnectionError | TimeoutError | OutOfMemoryError | ReadOnlyError):
        return True
    # Anywhere in the text: what a script is told, older servers wrap into an error of the script.
    return isinstance(error, ResponseError) and any(word in str(error) for word in _REFUSALS)


def readings(pipeline: Any) -> list[Any]:
    """What a pipeline of questions is answered; ``None`` for a key that holds something else than was asked for.

    Something else may write to this Redis: one such key must not take everything else from who looks. Raises a RedisError only if Redis
    :func:`cannot serve <cannot_serve>`.
    """
    answers = pipeline.execute(raise_on_error=False)
    for place, answer in enumerate(answers):
        if isinstance(answer, RedisError):
            if cannot_serve(answer):
                raise answer
            log.debug("skipped in Redis: %s", answer)
            answers[place] = None
    return list(answers)


def answers_or_unavailable(method: F) -> F:
    """Turn every sign that Redis cannot serve into QueueUnavailable."""

    @wraps(method)
    def guarded(self: QueueOverview, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except RedisError as error:
            if cannot_serve(error):
                raise unavailable(error, self.settings) from error
            raise

    return guarded  # type: ignore[return-value]


class QueueOverview(ABC):
    """The asking half of :class:`~backend.jobs.queue.BagQueue`, which sets these attributes and answers :meth:`states`."""

    settings: Settings
    redis: Any
    _queues: dict[str, Queue]

    def _unfit(self) -> list[tuple[str, str]]:
        """Queue and key of each list of jobs that wait for a worker that fits."""
        with self.redis.pipeline(transaction=False) as pipeline:
            pipeline.zrange(UNFIT, 0, _MAX_UNFIT - 1)
            places = [place.decode(errors="replace") for place in readings(pipeline)[0] or ()]
        return [(queue, unfit_key(place)) for place in places if (queue := place.partition(":")[0]) in QUEUES]

    @abstractmethod
    def states(self, keys: Iterable[str]) -> dict[str, JobState]:
        """The states of several jobs; see :meth:`BagQueue.states <backend.jobs.queue.BagQueue.states>`."""

    @answers_or_unavailable
    def listed(self, keys: Iterable[str]) -> dict[str, JobState]:
        """As :meth:`states`, for who looks at many: what is there and no job is left out, instead of being an error."""
        keys = list(dict.fromkeys(keys))
        try:
            return self.states(keys)
        except ResponseError as error:
            log.debug("looked at one by one, without their places: %s", error)
        with self.redis.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.hgetall(Job.key_for(key))
            found = {key: state_of(key, raw or {}) for key, raw in zip(keys, readings(pipeline), strict=True)}
        return {key: state for key, state in found.items() if state is not None}

    @answers_or_unavailable
    def jobs(self, limit: int = 100, status: Status | None = None) -> list[JobState]:
        """Jobs of all queues: running, queued in order, waiting for another try or for a worker that fits, then failed and finished, latest first."""
        unfit = self._unfit()
        with self.redis.pipeline(transaction=False) as pipeline:
            for _, name in unfit:
                pipeline.lrange(name, 0, limit - 1)
            for name in QUEUES:
                pipeline.zrange(StartedJobRegistry.key_template.format(name), 0, limit - 1)
                pipeline.lrange(self._queues[name].key, 0, limit - 1)
                pipeline.zrange(ScheduledJobRegistry.key_template.format(name), 0, limit - 1)
                pipeline.zrange(FailedJobRegistry.key_template.format(name), 0, limit - 1, desc=True)
                pipeline.zrange(FinishedJobRegistry.key_template.format(name), 0, limit - 1, desc=True)
            answers = readings(pipeline)
        aside, answers = answers[: len(unfit)], answers[len(unfit) :]
        kinds = [answers[kind::5] for kind in range(5)]
        kinds.insert(3, aside)
        members = (member for kind in kinds for answer in kind for member in answer or ())
        ids = [member.decode(errors="replace").split(":")[0] for member in members]
        states = self.listed(ids)
        return [state for state in states.values() if status in (None, state.status)][:limit]

    @answers_or_unavailable
    def depths(self) -> dict[str, int]:
        """How many jobs lie in each queue, those included that wait for a worker that fits."""
        unfit = self._unfit()
        with self.redis.pipeline(transaction=False) as pipeline:
            for name in QUEUES:
                pipeline.llen(self._queues[name].key)
            for _, key in unfit:
                pipeline.llen(key)
            names = [*QUEUES, *(queue for queue, _ in unfit)]
            depths = dict.fromkeys(QUEUES, 0)
            for name, depth in zip(names, readings(pipeline), strict=True):
                depths[name] += depth or 0
            return depths

    @answers_or_unavailable
    def workers(self) -> list[dict[str, Any]]:
        """The workers that have beaten within ``HEARTBEAT_TTL_S``.

        Each has name, device, queues, state, job, heartbeat_age_s, pid, host, model_version and fits (see
        :class:`~backend.jobs.tasks.Fit`; empty until its model is known), and memory_bytes and device_memory_bytes (``None`` where the worker
        cannot say).
        """
        with self.redis.pipeline(transaction=False) as pipeline:
            pipeline.smembers(REDIS_WORKER_KEYS)
            names = sorted(readings(pipeline)[0] or ())
            for name in names:
                pipeline.hgetall(name)
                pipeline.smembers(name + b":executions")
            answers = readings(pipeline)
        found = []
        for name, raw, executions in zip(names, answers[::2], answers[1::2], strict=True):
            if not raw or b"last_heartbeat" not in raw or b"death" in raw:
                continue
            try:
                found.append(_worker(name, raw, executions or ()))
            except ValueError as error:
                log.debug("skipped %r, which is no worker of ours: %s", name[:200], error)
        return found


def _worker(name: bytes, raw: Mapping[bytes, bytes], executions: Iterable[bytes]) -> dict[str, Any]:
    """A worker as it has written itself down; raises ValueError for what no worker writes."""
    text = {field.decode(errors="replace"): value.decode(errors="replace") for field, value in raw.items()}
    age = (datetime.now(timezone.utc) - utcparse(text["last_heartbeat"])).total_seconds()
    return {
        "name": name.decode(errors="replace").removeprefix(f"{RQ_KEY_PREFIX}:worker:"),
        "device": text.get("device", ""),
        "queues": [queue for queue in text.get("queues", "").split(",") if queue],
        "state": text.get("state", ""),
        "job": next((member.decode(errors="replace").split(":")[0] for member in executions), None),
        "heartbeat_age_s": max(0.0, age),
        "pid": int(text.get("pid", 0)),
        "host": text.get("hostname", ""),
        "model_version": text.get("model_version", ""),
        "fits": text.get("fits", ""),
        "memory_bytes": int(text["memory_bytes"]) if text.get("memory_bytes") else None,
        "device_memory_bytes": int(text["device_memory_bytes"]) if text.get("device_memory_bytes") else None,
    }
