"""When a project's heads are trained: after so many annotations or so many seconds, now if asked, once at a time.

One job for each project, ``train-7``: while it waits, further requests join it; while it runs, the next one is written down
and the job runs once more afterwards, however many asked. Imports neither torch nor scikit-learn.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from redis.exceptions import RedisError
from redis.lock import Lock
from rq.exceptions import NoSuchJobError
from rq.job import Job
from rq.serializers import JSONSerializer

from backend.errors import TrainingRuns
from backend.jobs import scripts
from backend.jobs.job_forms import job_fields, training_id
from backend.jobs.queue import BagQueue
from backend.jobs.queue_overview import answers_or_unavailable
from backend.jobs.states import JobState

log = logging.getLogger(__name__)

LONGEST_DELAY = 10
"""A project in which something happens all the time is trained after so many times ``TRAIN_DEBOUNCE_S``, at the latest."""


class TrainingQueue:
    """Requests for training. Every method raises :class:`~backend.errors.QueueUnavailable` when Redis does not answer.

    Parameters
    ----------
    needs
        Gives the digest of model and settings that a worker must have, see :class:`~backend.jobs.states.BagRequest`. Empty: that of who asked before.
    """

    def __init__(self, queue: BagQueue, needs: Callable[[], str] = str) -> None:
        self._queue = queue
        self._needs = needs
        self.redis = queue.redis
        self.settings = queue.settings
        self._request = self.redis.register_script(scripts.REQUEST_TRAINING)

    @answers_or_unavailable
    def train_now(self, project: int) -> str:
        """Train as soon as a worker is free. Returns ``queued``, or ``again`` if it runs now and will run once more."""
        return self._ask(project, 0, 0)

    @answers_or_unavailable
    def note_annotations(self, project: int, count: int = 1) -> str:
        """Annotations were made, changed or deleted: train ``TRAIN_DEBOUNCE_S`` after the last, or now if they are many.

        Returns
        -------
        ``scheduled``, ``queued``, or ``again`` if a training runs now and will run once more.
        """
        return self._ask(project, count, self.settings.train_debounce_s)

    @answers_or_unavailable
    def note_slides(self, project: int) -> str:
        """Slides got results, which are to be ranked among the others: as :meth:`note_annotations`, however many they are."""
        return self._ask(project, 0, self.settings.train_debounce_s)

    @contextmanager
    def alone(self, project: int, wait_s: float = 0.0) -> Iterator[None]:
        """Be the only one that trains a project while inside, worker or command, on whatever machine.

        The right is held for ``HEARTBEAT_TTL_S`` and renewed by a thread: of one that was killed, it runs out.

        Raises
        ------
        TrainingRuns
            Somebody else has it, still after ``wait_s`` seconds.
        """
        ttl_s = self.settings.heartbeat_ttl_s
        lock = self.redis.lock(scripts.training_lock_key(project), timeout=ttl_s, thread_local=False)
        if not self._acquire(lock, wait_s):
            raise TrainingRuns(
                f"Project {project} is being trained by somebody else.",
                hint="Wait until that has ended, and start it again.",
            )
        over = threading.Event()
        renewing = threading.Thread(target=_renew, args=(lock, ttl_s / 3, over), name="training lock", daemon=True)
        renewing.start()
        try:
            yield
        finally:
            over.set()
            renewing.join()
            with suppress(RedisError):  # it runs out
                lock.release()

    @answers_or_unavailable
    def _acquire(self, lock: Lock, wait_s: float) -> bool:
        return bool(lock.acquire(blocking=wait_s > 0, blocking_timeout=wait_s or None))

    @answers_or_unavailable
    def begin(self, project: int) -> None:
        """To be called when a training starts: what was asked until now is answered by it."""
        self.redis.delete(scripts.training_key(project))
        self.redis.srem(scripts.TRAIN_AGAIN, project)
        self.redis.hincrby(scripts.TRAINED, project, 1)

    @answers_or_unavailable
    def runs(self) -> dict[int, int]:
        """How often each project's training has been started since this Redis is in use."""
        return {int(project): int(count) for project, count in self.redis.hgetall(scripts.TRAINED).items()}

    @answers_or_unavailable
    def resume(self, project: int) -> bool:
        """Queue what was asked while a training ran; whether there was something. To be called when it has ended."""
        if not self.redis.sismember(scripts.TRAIN_AGAIN, project):
            return False
        # Should we die between the two steps, it runs once too often instead of never.
        asked = self._ask(project, 0, 0)
        if asked != "again":
            self.redis.srem(scripts.TRAIN_AGAIN, project)
        return asked != "again"

    @answers_or_unavailable
    def resume_all(self) -> list[int]:
        """:meth:`resume` for every project: the net under a worker that was killed right after a training."""
        return [project for name in self.redis.smembers(scripts.TRAIN_AGAIN) if self.resume(project := int(name))]

    @answers_or_unavailable
    def again(self, project: int) -> bool:
        """Whether somebody asked for another training since this one started."""
        return bool(self.redis.sismember(scripts.TRAIN_AGAIN, project))

    @answers_or_unavailable
    def note_connection(self, project: int, connected: bool) -> bool:
        """Write down whether a project is connected to this backend; whether that is news."""
        note = self.redis.srem if connected else self.redis.sadd
        return bool(note(scripts.DISCONNECTED, project))

    @answers_or_unavailable
    def is_disconnected(self, project: int) -> bool:
        """Whether a project was found not to be connected, and has not asked for anything since."""
        return bool(self.redis.sismember(scripts.DISCONNECTED, project))

    def state(self, project: int) -> JobState | None:
        """Where a project's training stands; ``None`` if none is listed."""
        return self._queue.state(training_id(project))

    @answers_or_unavailable
    def report(self, project: int) -> dict[str, Any] | None:
        """What a project's last training returned; ``None`` if it failed, has not ended, or is not listed any more."""
        try:
            job = Job.fetch(training_id(project), connection=self.redis, serializer=JSONSerializer)
        except NoSuchJobError:
            return None
        found = job.return_value()
        return found if isinstance(found, dict) else None

    def config_changed(self, project: int, label_config: str) -> bool:
        """Whether a project's labelling config is another than when this was asked last (the first time it is not)."""
        return self._config_changed(project, label_config)

    @answers_or_unavailable
    def _config_changed(self, project: int, label_config: str) -> bool:
        # A config comes out of a request: half a character in it is no reason to fail.
        now = label_config.encode("utf-8", "surrogatepass")
        before = self.redis.getset(scripts.config_key(project), now)
        return before is not None and bool(before != now)

    def _ask(self, project: int, count: int, delay_s: float) -> str:
        job, settings = self._queue.forms.training(project), self.settings
        arguments: list[Any] = [job.id, "train", project, count, settings.train_debounce_n, delay_s, LONGEST_DELAY]
        answer: bytes = self._request(
            keys=[scripts.training_key(project)], args=[*arguments, *job_fields(job, self._needs())]
        )
        return answer.decode()


def _renew(lock: Lock, every_s: float, over: threading.Event) -> None:
    while not over.wait(every_s):
        try:
            lock.reacquire()
        except RedisError as error:  # away for now; or away for so long that it has run out, and may be another's
            log.debug("the right to train is not renewed: %s", error)
