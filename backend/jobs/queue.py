"""The queue as the web process sees it: submit a bag once, say where it stands, remember who waits for it.

Imports neither torch nor mmm. Jobs are RQ jobs with the JSON serializer; the id of an analysis is its bag key, so the same bag
asked for by ten tasks runs once and answers ten.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from redis import Redis
from rq import Queue
from rq.exceptions import DeserializationError, TimeoutFormatError
from rq.job import Job
from rq.serializers import JSONSerializer

from backend.errors import JobNotFound
from backend.jobs import scripts
from backend.jobs.job_forms import JobForms, job_fields
from backend.jobs.queue_overview import QueueOverview, answers_or_unavailable
from backend.jobs.redis_server import connect
from backend.jobs.states import (
    ANALYSE,
    ANALYSIS_QUEUES,
    QUEUES,
    TRAIN,
    BagRequest,
    JobState,
    Priority,
    WaitingTask,
    state_of,
    takes,
)
from backend.settings import Settings

__all__ = ["QUEUES", "BagQueue", "BagRequest", "JobState", "WaitingTask", "connect"]

POLL_S = 0.05
AGAIN_KEPT_S = 3600
SWEEP_AFTER_S = 15
"""Age from which a task that waits for a bag nobody computes is looked after."""
CLAIM_MAX_S = 300
"""No claim on an answer is for longer. One that seems to be was made before the clock was set back."""
_CHUNK = 500
# What reading a job raises that something else has put there.
_FOREIGN_ERRORS = (
    DeserializationError,
    TimeoutFormatError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class BagQueue(QueueOverview):
    """Submits work and says where it stands. Threads may share one.

    Every method raises :class:`~backend.errors.QueueUnavailable` when Redis does not answer.

    Parameters
    ----------
    settings
        Time limits, retries and TTLs of the jobs.
    redis
        From :func:`backend.jobs.redis_server.connect`. It need not answer yet.
    """

    def __init__(self, settings: Settings, redis: Redis) -> None:
        self.settings = settings
        self.redis: Any = redis
        self.forms = JobForms(settings, redis)
        self._queues = {name: Queue(name, connection=redis, serializer=JSONSerializer) for name in QUEUES}
        self._token = uuid.uuid4().hex
        register = self.redis.register_script
        self._submit = register(scripts.SUBMIT)
        self._move = register(scripts.MOVE_WAITING)
        self._take = register(scripts.TAKE_WAITING)
        self._drain = register(scripts.DRAIN_WAITING)
        self._release = register(scripts.RELEASE)
        self._renew = register(scripts.RENEW)

    @answers_or_unavailable
    def ping(self) -> None:
        """Return if Redis answers."""
        self.redis.ping()

    # --- analyses ---------------------------------------------------------------------------------------------------

    def submit(
        self, request: BagRequest, *, priority: Priority, waiting: WaitingTask | None = None, force: bool = False
    ) -> JobState:
        """Have a bag computed, unless it is under way. To be called when the store has no result for it.

        In one step: ``waiting`` is written down; a live job of this bag is left alone, but moves from ``batch`` to ``interactive``
        if asked for interactively; a finished one runs again; a failed one runs again only if it may succeed (or with
        ``force``). One that has failed for good is answered as it is, and ``waiting`` is not kept.
        """
        return self.submit_many([(request, waiting)], priority, force=force)[request.key]

    @answers_or_unavailable
    def submit_many(
        self, requests: Sequence[tuple[BagRequest, WaitingTask | None]], priority: Priority, *, force: bool = False
    ) -> dict[str, JobState]:
        """:meth:`submit` for many, in few round trips. Returns the state of each bag key."""
        if priority not in ANALYSIS_QUEUES:
            raise ValueError(f"priority must be one of {ANALYSIS_QUEUES}, not {priority!r}")
        for chunk in _chunks(requests):
            with self.redis.pipeline(transaction=False) as pipeline:
                for request, waiting in chunk:
                    self._submit_one(pipeline, self.forms.analysis(request, priority), waiting, force)
                pipeline.execute()
        return self.states([request.key for request, _ in requests])

    @answers_or_unavailable
    def retry(self, key: str) -> JobState:
        """Run a failed job again because a user asks for it, whatever it failed of. A job that has not failed is left alone.

        Raises
        ------
        JobNotFound
            No job of this id is listed.
        """
        raw = self.redis.hgetall(Job.key_for(key))
        state = state_of(key, raw)
        if state is None:
            raise JobNotFound(f"No job {key!r} is listed.", hint="Open the task again: that submits its slide.")
        if state.status == "failed":
            foreign = JobNotFound(f"Job {key!r} is none of ours.", hint="It was put into Redis by something else.")
            try:
                job = Job(key, connection=self.redis, serializer=JSONSerializer)
                job.restore(raw)
                function, args = job.func_name, tuple(job.args)
                if not takes(function, args):
                    raise foreign
                if function == TRAIN:
                    again = self.forms.training(int(args[0]))
                elif function == ANALYSE:
                    self._wait_again(key)
                    again = self.forms.analysis(BagRequest.from_json(args[0]), "interactive")
                else:
                    again = self.forms.publishing(function, args, key)
            except _FOREIGN_ERRORS as error:
                raise foreign from error
            self._submit_one(self.redis, again, None, True)
        return self._one(key)

    @answers_or_unavailable
    def request(self, key: str) -> BagRequest | None:
        """What the analysis listed under ``key`` was asked; ``None`` if none is listed (any more)."""
        raw = self.redis.hgetall(Job.key_for(key))
        if state_of(key, raw) is None:
            return None
        try:
            job = Job(key, connection=self.redis, serializer=JSONSerializer)
            job.restore(raw)
            return BagRequest.from_json(job.args[0]) if job.func_name == ANALYSE else None
        except _FOREIGN_ERRORS:
            return None  # put there by something else

    @answers_or_unavailable
    def state(self, key: str) -> JobState | None:
        """Where a job stands; ``None`` if none of this id is listed (any more)."""
        return self.states([key]).get(key)

    @answers_or_unavailable
    def states(self, keys: Iterable[str]) -> dict[str, JobState]:
        """The states of several jobs. Those that are not listed are absent."""
        found: dict[str, JobState] = {}
        keys = list(dict.fromkeys(keys))
        places = self._places() if len(keys) > 8 else None
        for chunk in _chunks(keys):
            with self.redis.pipeline(transaction=False) as pipeline:
                for key in chunk:
                    pipeline.hgetall(Job.key_for(key))
                answers = pipeline.execute()
            for key, raw in zip(chunk, answers, strict=True):
                state = state_of(key, raw, self._place(key, raw, places))
                if state is not None:
                    found[key] = state
        return found

    @answers_or_unavailable
    def wait(self, keys: Iterable[str], timeout_s: float) -> dict[str, JobState]:
        """Wait until every job has settled (finished, failed, or not listed), at most ``timeout_s``; then :meth:`states`."""
        keys = list(dict.fromkeys(keys))
        deadline = time.monotonic() + timeout_s
        open_keys = keys
        while open_keys:
            open_keys = self._live(open_keys)
            left = deadline - time.monotonic()
            if not open_keys or left <= 0:
                break
            time.sleep(min(POLL_S, left))
        return self.states(keys)

    # --- who answers a task -----------------------------------------------------------------------------------------

    @answers_or_unavailable
    def claim_answer(self, project: int, task: int, model_version: str, ttl_s: float = 15) -> bool:
        """Whether the caller may hand out the prediction of this task and version now: one caller may, for ``ttl_s``."""
        name, ttl_ms = scripts.answer_key(project, task, model_version), max(1, round(ttl_s * 1000))
        if self.redis.set(name, self._token, nx=True, px=ttl_ms):
            return True
        stale = self.redis.pttl(name) > 1000 * max(ttl_s, CLAIM_MAX_S)
        return stale and bool(self.redis.set(name, self._token, px=ttl_ms))

    @answers_or_unavailable
    def renew_claim(self, project: int, task: int, model_version: str, ttl_s: float) -> bool:
        """Hold on for ``ttl_s`` what :meth:`claim_answer` of this queue gave; whether nobody else has it by now."""
        name = scripts.answer_key(project, task, model_version)
        return bool(self._renew(keys=[name], args=[self._token, max(1, round(ttl_s * 1000))]))

    @answers_or_unavailable
    def release_claim(self, project: int, task: int, model_version: str) -> None:
        """Give back what :meth:`claim_answer` of this queue gave. One that has passed to somebody else is left alone."""
        self._release(keys=[scripts.answer_key(project, task, model_version)], args=[self._token])

    @answers_or_unavailable
    def waiting(self, key: str) -> list[WaitingTask]:
        """The tasks that wait for a bag."""
        return [WaitingTask.from_json(json.loads(text)) for text in self.redis.hvals(scripts.waiting_key(key))]

    @answers_or_unavailable
    def take_waiting(self, key: str, project: int, task: int) -> bool:
        """Remove one waiting task; whether it was there. Of several callers one gets True."""
        return bool(self._take(keys=[scripts.waiting_key(key)], args=[key, f"{project}:{task}"]))

    @answers_or_unavailable
    def drain_waiting(self, key: str, *, unless_live: bool = False) -> list[WaitingTask]:
        """Remove and return all tasks that wait for a bag. Of several callers one gets them.

        With ``unless_live``, nothing is removed while the bag's job is queued or running.
        """
        texts = self._drain(keys=[scripts.waiting_key(key)], args=[key, int(unless_live)])
        return [WaitingTask.from_json(json.loads(text)) for text in texts]

    @answers_or_unavailable
    def remember_waiting(self, key: str, waited: Iterable[WaitingTask]) -> None:
        """Keep tasks that waited for a bag that has failed, for ``FAILURE_TTL_S``: :meth:`retry` has them wait again."""
        mapping = {task.id: task.to_text() for task in waited}
        if mapping:
            with self.redis.pipeline() as pipeline:
                pipeline.hset(scripts.waited_key(key), mapping=mapping)
                pipeline.expire(scripts.waited_key(key), self.settings.failure_ttl_s)
                pipeline.execute()

    def _wait_again(self, key: str) -> None:
        texts = self.redis.hvals(scripts.waited_key(key))
        self.put_back_waiting(key, [WaitingTask.from_json(json.loads(text)) for text in texts])
        self.redis.delete(scripts.waited_key(key))

    @answers_or_unavailable
    def count_again(self, what: str) -> int:
        """How often this has been called for ``what``, with less than :data:`AGAIN_KEPT_S` between: so that nothing is begun again for ever."""
        name = scripts.again_key(what)
        with self.redis.pipeline() as pipeline:
            pipeline.incr(name)
            pipeline.expire(name, AGAIN_KEPT_S)
            return int(pipeline.execute()[0])

    @answers_or_unavailable
    def forget_again(self, what: str) -> None:
        """Begin to count anew: it has gone well."""
        self.redis.delete(scripts.again_key(what))

    @answers_or_unavailable
    def put_back_waiting(self, key: str, waiting: Iterable[WaitingTask]) -> None:
        """Write down tasks that wait for a bag; they are pushed when the bag is done, soon if it is done already."""
        mapping = {task.id: task.to_text() for task in waiting}
        if mapping:
            with self.redis.pipeline() as pipeline:
                pipeline.hset(scripts.waiting_key(key), mapping=mapping)
                pipeline.zadd(scripts.WAITING_INDEX, {key: int(time.time())}, nx=True)
                pipeline.execute()

    # --- publishing ------------------------------------------------------------------------------------

    @answers_or_unavailable
    def enqueue_publish(self, key: str, *, delay_s: int = 0) -> None:
        """Have the tasks that wait for a bag pushed (or dropped with a log line, if the bag has failed), in ``delay_s`` seconds."""
        if self._submit_one(self.redis, self.forms.bag_push(key), None, True, delay_s) == b"started":
            # That run may have looked at the waiting tasks already: one more afterwards.
            self._submit_one(self.redis, self.forms.bag_push(key, again=True), None, True, delay_s)

    @answers_or_unavailable
    def look_again(self, key: str, task: WaitingTask, *, delay_s: int) -> None:
        """Push a task's prediction once more in ``delay_s`` seconds, which changes nothing where it is there once."""
        if self._submit_one(self.redis, self.forms.look_again(key, task), None, True, delay_s) == b"started":
            # The one that looks now was itself not sure.
            self._submit_one(self.redis, self.forms.look_again(key, task, once_more=True), None, True, delay_s)

    @answers_or_unavailable
    def publish_waiting(self, key: str) -> list[WaitingTask]:
        """Turn every task that waits for a bag into one publish job; returns those. No task is lost or doubled on the way.

        One whose answer is being handed out right now waits on, until it can be seen whether the answer has arrived.
        """
        moved, held = [], []
        for task in self.waiting(key):
            held_ms = self.redis.pttl(scripts.answer_key(task.project, task.task, task.model_version))
            if 0 < held_ms <= 1000 * CLAIM_MAX_S:
                held.append(held_ms)
                continue
            job = self.forms.task_push(key, task)
            args = [key, task.id, task.to_text(), job.id, job.origin, *job_fields(job)]
            if self._move(keys=[scripts.waiting_key(key)], args=args):
                moved.append(task)
        if held:
            self.enqueue_publish(key, delay_s=min(held) // 1000 + 1)
        return moved

    @answers_or_unavailable
    def sweep_waiting(self) -> list[str]:
        """Publish for bags that tasks wait for although no job is under way; returns their keys.

        Nothing should be found. It is the net under a worker that was killed between finishing a bag and saying so.
        """
        at = self.redis.time()[0]
        # Those from the future were written down before the clock was set back.
        ages = (("-inf", at - SWEEP_AFTER_S), (at + SWEEP_AFTER_S, "+inf"))
        old = [
            key.decode(errors="replace")
            for age in ages
            for key in self.redis.zrangebyscore(scripts.WAITING_INDEX, *age)
        ]
        # Who looks after a bag: its own job, or one of the pushes of enqueue_publish, which may be put off.
        cares = {key: (key, self.forms.bag_push_id(key), self.forms.bag_push_id(key, again=True)) for key in old}
        live = set(self._live([name for names in cares.values() for name in names]))
        swept = [key for key, names in cares.items() if live.isdisjoint(names)]
        for key in swept:
            self.enqueue_publish(key)
        return swept

    # --- inside -----------------------------------------------------------------------------------------------------

    def _submit_one(self, client: Any, job: Job, waiting: WaitingTask | None, force: bool, delay_s: int = 0) -> Any:
        field, value = (waiting.id, waiting.to_text()) if waiting is not None else ("", "")
        return self._submit(
            keys=[scripts.waiting_key(job.id)],
            args=[job.id, job.origin, field, value, int(force), delay_s, *job_fields(job)],
            client=client,
        )

    def _live(self, keys: Sequence[str]) -> list[str]:
        """Those of ``keys`` whose job has not settled."""
        live: list[str] = []
        for chunk in _chunks(keys):
            with self.redis.pipeline(transaction=False) as pipeline:
                for key in chunk:
                    pipeline.hget(Job.key_for(key), "status")
                settled = (None, b"finished", b"failed", b"stopped", b"canceled")
                live += [key for key, status in zip(chunk, pipeline.execute(), strict=True) if status not in settled]
        return live

    def _one(self, key: str) -> JobState:
        return self.states([key])[key]

    def _places(self) -> dict[str, int]:
        with self.redis.pipeline(transaction=False) as pipeline:
            for name in QUEUES:
                pipeline.lrange(self._queues[name].key, 0, -1)
            answers = pipeline.execute()
        return {key.decode(errors="replace"): place for answer in answers for place, key in enumerate(answer, start=1)}

    def _place(self, key: str, raw: dict[bytes, bytes], places: dict[str, int] | None) -> int | None:
        if raw.get(b"status") != b"queued":
            return None
        if places is not None:
            return places.get(key)
        place = self.redis.lpos(
            Queue.redis_queue_namespace_prefix + raw.get(b"origin", b"").decode(errors="replace"), key
        )
        return None if place is None else int(place) + 1


def _chunks(items: Sequence[T]) -> Iterable[Sequence[T]]:
    return (items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK))
