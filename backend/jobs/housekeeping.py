"""What a worker does beside its job, in threads: heartbeats, retries whose time has come, jobs of workers that died.

RQ does the first only between jobs (``SimpleWorker``), the second in a forked process, and the third every ten minutes under a lock
that outlives a killed worker by a quarter of an hour. Here a killed worker's job is queued again within a minute.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError
from rq import Queue, worker_registration
from rq.exceptions import NoSuchJobError
from rq.executions import Execution
from rq.job import Job
from rq.registry import FailedJobRegistry, FinishedJobRegistry
from rq.serializers import JSONSerializer
from rq.utils import now, utcformat

from backend.errors import BackendError, JobTimedOut
from backend.jobs import scripts
from backend.jobs.bag_job import BagJob, describe_abandoned, function_of, is_push
from backend.jobs.states import ANALYSE
from backend.jobs.training import TrainingQueue

if TYPE_CHECKING:
    from backend.jobs.bag_worker import BagWorker

log = logging.getLogger(__name__)

TICK_S = 0.5
MAINTENANCE_EVERY_S = 5.0
SWEEP_EVERY_S = 10.0
CLOCK_SLACK_S = 3.0
"""By how much Redis' clock and ours may drift apart between two looks at both before it counts as set."""
STUCK_MARGIN_S = 120.0
"""How much longer than its limit a job may run before its worker ends itself: later than a pool's watchdog would."""
EXIT_STUCK = 70
HAND_BACK_AFTER_S = 2.0
"""How long a job may stay deaf to its interruption before this thread puts it back and ends the process."""


class _Companion(threading.Thread):
    """A thread beside the worker's own that does something regularly. It outlives every error of Redis, and says so once."""

    def __init__(self, worker: BagWorker, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._worker = worker
        self._end = threading.Event()
        self._redis_lost = False

    def stop(self) -> None:
        """End the thread; waits for what it is doing."""
        self._end.set()
        if self.ident is not None:
            self.join(timeout=2)

    def _try(self, step: Callable[[], object]) -> bool:
        try:
            step()
        except (RedisError, BackendError) as error:
            if not self._redis_lost:
                log.warning("Redis: %s; going on, and trying again", error)
            self._redis_lost = True
            return False
        except Exception:
            # It must go on whatever one round stumbles over.
            log.exception("%s failed; trying again", self.name)
            return False
        if self._redis_lost:
            log.info("Redis is back")
        self._redis_lost = False
        return True


class Heart(_Companion):
    """Says that the worker lives, and that its job does. Nothing else, so that no slow Redis makes it late."""

    def __init__(self, worker: BagWorker) -> None:
        super().__init__(worker, "heart")
        self._running: tuple[Job, Execution] | None = None
        self._began = 0.0
        self.every_s = min(worker.heartbeat_ttl_s / 5, MAINTENANCE_EVERY_S)

    @property
    def running(self) -> tuple[Job, Execution] | None:
        """The job that runs, with its execution."""
        return self._running

    @contextmanager
    def beating_for(self, job: Job, execution: Execution) -> Iterator[None]:
        """While inside, heartbeats are the job's too."""
        self._began = time.monotonic()
        self._running = (job, execution)
        try:
            yield
        finally:
            self._running = None

    def busy_s(self) -> float:
        """For how many seconds the job has run."""
        return time.monotonic() - self._began if self._running is not None else 0.0

    def run(self) -> None:
        """The thread."""
        while not self._end.wait(self.every_s if self._try(self._beat) else TICK_S):
            pass

    def _beat(self) -> None:
        running = self._running
        if running is not None:
            self._end_if_stuck(running[0])
            self._worker.maintain_heartbeats(*running)
        else:
            self._worker.heartbeat()
        with self._worker.connection.pipeline() as pipeline:
            # Written whole each time: a Redis that has lost its data, or had us for dead, gets to know us again.
            pipeline.hset(self._worker.key, mapping=self._worker.serialize())
            worker_registration.register(self._worker, pipeline)
            pipeline.execute()

    def _end_if_stuck(self, job: Job) -> None:
        """A job that is deaf to its time limit ends with its process. Usually a pool sees to that, earlier; it may be gone, or never have been."""
        busy_s = self.busy_s()
        if job.timeout and job.timeout > 0 and busy_s > job.timeout + STUCK_MARGIN_S:
            log.critical("job %s: stuck for %.0f s, and deaf; ending this process", job.id, busy_s)
            os._exit(EXIT_STUCK)


class Housekeeper(_Companion):
    """Keeps the queues in order.

    Parameters
    ----------
    worker
        Whose queues.
    heart
        Its heart.
    parent_pid
        Stop the worker (as SIGTERM does) when this process is no longer its parent: its pool has been killed.
    """

    def __init__(self, worker: BagWorker, heart: Heart, parent_pid: int | None = None) -> None:
        super().__init__(worker, "housekeeper")
        self._parent_pid = parent_pid
        self._due = dict.fromkeys(("order", "sweep"), 0.0)
        # Whoever has just come, or come back, gives the others time to be heard before it takes one of them for dead.
        self._hearing_s = 2 * heart.every_s + 2 * TICK_S
        self._judges_from = time.monotonic() + self._hearing_s
        self._clocks: tuple[float, float] | None = None
        redis: Any = worker.connection
        self._move_due = redis.register_script(scripts.MOVE_DUE)
        self._expire_unfit = redis.register_script(scripts.EXPIRE_UNFIT)
        self._recover = redis.register_script(scripts.RECOVER_POPPED)

    def run(self) -> None:
        """The thread."""
        while not self._end.wait(TICK_S):
            if self._parent_pid is not None and os.getppid() != self._parent_pid:
                log.warning("the worker pool is gone; stopping after this job")
                self._parent_pid = None
                os.kill(os.getpid(), signal.SIGTERM)
            if self._worker.deaf_since() > HAND_BACK_AFTER_S:
                self._worker.hand_back_and_exit()
            if not self._try(self._round):
                self._judges_from = time.monotonic() + self._hearing_s

    def _round(self) -> None:
        self._move_due(args=[utcformat(now()), *self._worker.queue_names()])
        self._every(MAINTENANCE_EVERY_S, "order", self._put_in_order)
        self._every(SWEEP_EVERY_S, "sweep", self._sweep)

    def _every(self, seconds: float, what: str, step: Callable[[], None]) -> None:
        at = time.monotonic()
        if at >= self._due[what]:
            step()
            self._due[what] = at + seconds

    def _sweep(self) -> None:
        if "publish" in self._worker.queue_names():
            for key in self._worker.bag_queue.sweep_waiting():
                log.warning("bag=%s: tasks still waited for it; publishing", key)
        if "train" in self._worker.queue_names():
            TrainingQueue(self._worker.bag_queue).resume_all()

    def _put_in_order(self) -> None:
        for queue in self._worker.queues:
            for registry in (FinishedJobRegistry, FailedJobRegistry):
                registry(queue=queue).cleanup()
            worker_registration.clean_worker_registry(queue)
            at, expired = self._worker.leases.expired(queue.name)
            if self._may_judge(at):
                for lease in expired:
                    try:
                        self._take_back(lease, queue)
                    except RedisError:
                        raise
                    except Exception:
                        # Put there by something else: it must not keep us from the others.
                        log.exception("the job of lease %r cannot be read from Redis; it is dropped", lease)
                        self._worker.drop_unreadable(lease.split(":", 1)[0].encode(errors="surrogateescape"))
                        self._worker.leases.drop(lease, queue.name)
        for job_id in self._recover(args=[self._worker.heartbeat_ttl_s]):
            log.warning(
                "job %s was taken by a worker that died before starting it; queued again",
                job_id.decode(errors="replace"),
            )

        for job_id in self._expire_unfit(args=[self._worker.context.settings.failure_ttl_s]):
            name = job_id.decode(errors="replace")
            log.error("job %s is given up: no worker with what it needs has come", name)
            if re.fullmatch("[0-9a-f]{40}", name):
                self._worker.bag_queue.enqueue_publish(name)  # tells those who wait for it

    def _may_judge(self, redis_time: float) -> bool:
        """Not when Redis' clock has been set, or all of us have slept: the others' leases have run out by no fault of theirs."""
        before, self._clocks = self._clocks, (redis_time, time.monotonic())
        if before is not None:
            passed = (self._clocks[0] - before[0], self._clocks[1] - before[1])
            if abs(passed[0] - passed[1]) > CLOCK_SLACK_S:
                log.warning("Redis' clock went %+.0f s in %.0f s; waiting for heartbeats", *passed)
                self._judges_from = time.monotonic() + self._hearing_s
        return time.monotonic() >= self._judges_from

    def _take_back(self, lease: str, queue: Queue) -> None:
        job_id = lease.split(":", 1)[0]
        try:
            job = BagJob.fetch(job_id, connection=self._worker.connection, serializer=JSONSerializer)
        except NoSuchJobError:
            self._worker.leases.drop(lease, queue.name)
            return
        died = describe_abandoned(job, self._worker.heartbeat_ttl_s, self._worker.leases.busy_s(job))
        if isinstance(died, JobTimedOut) and not is_push(job):
            job.retries_left = 0
        again = bool(job.retries_left)
        if self._worker.leases.fail_abandoned(job, lease, queue.name, died.as_dict()) != "done":
            return
        log.error("job %s: %s %s", job.id, died.message, "Queued again." if again else "Given up.")
        if not again and function_of(job) == ANALYSE:
            self._worker.bag_queue.enqueue_publish(job.id)
