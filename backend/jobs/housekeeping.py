"""What a worker does beside its job, in a thread: heartbeats, retries whose time has come, jobs of workers that died.

RQ does the first only between jobs (``SimpleWorker``), the second in a forked process, and the third every ten minutes under a lock
that outlives a killed worker by a quarter of an hour. Here a killed worker's job is queued again within a minute.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError
from rq import worker_registration
from rq.exceptions import AbandonedJobError
from rq.executions import Execution
from rq.job import Job
from rq.registry import clean_registries
from rq.utils import now, utcformat

from backend.errors import BackendError, WorkerDied
from backend.jobs import scripts
from backend.jobs.bag_job import function_of
from backend.jobs.states import ANALYSE

if TYPE_CHECKING:
    from backend.jobs.worker import BagWorker

log = logging.getLogger(__name__)

TICK_S = 0.5
MAINTENANCE_EVERY_S = 5.0
MAINTENANCE_LOCK_S = 30
SWEEP_EVERY_S = 30.0


class Housekeeper(threading.Thread):
    """The worker's second thread. It outlives every error of Redis, and says so once.

    Parameters
    ----------
    worker
        Whose heart beats.
    parent_pid
        Stop the worker (as SIGTERM does) when this process is no longer its parent: its pool has been killed.
    """

    def __init__(self, worker: BagWorker, parent_pid: int | None = None) -> None:
        super().__init__(name="housekeeper", daemon=True)
        self._worker = worker
        self._parent_pid = parent_pid
        self._running: tuple[Job, Execution] | None = None
        self._end = threading.Event()
        self._redis_lost = False
        self._given_up: list[str] = []
        self._beat_every_s = min(worker.heartbeat_ttl_s / 5, MAINTENANCE_EVERY_S)
        redis: Any = worker.connection
        self._move_due = redis.register_script(scripts.MOVE_DUE)
        self._recover = redis.register_script(scripts.RECOVER_POPPED)
        self._release = redis.register_script(scripts.RELEASE)

    @contextmanager
    def beating_for(self, job: Job, execution: Execution) -> Iterator[None]:
        """While inside, heartbeats are the job's too."""
        self._running = (job, execution)
        try:
            yield
        finally:
            self._running = None

    def stop(self) -> None:
        """End the thread; waits for what it is doing."""
        self._end.set()
        self.join(timeout=10)

    def run(self) -> None:
        """The thread."""
        next_beat = next_maintenance = next_sweep = 0.0
        while not self._end.wait(TICK_S):
            if self._parent_pid is not None and os.getppid() != self._parent_pid:
                log.warning("the worker pool is gone; stopping after this job")
                self._parent_pid = None
                os.kill(os.getpid(), signal.SIGTERM)
            at = time.monotonic()
            try:
                if at >= next_beat:
                    self._beat()
                    next_beat = at + self._beat_every_s
                self._move_due(args=[utcformat(now()), *self._worker.queue_names()])
                if at >= next_maintenance:
                    self._put_in_order()
                    next_maintenance = at + MAINTENANCE_EVERY_S
                if at >= next_sweep and "publish" in self._worker.queue_names():
                    for key in self._worker.bag_queue.sweep_waiting():
                        log.warning("bag=%s: tasks still waited for it; publishing", key)
                    next_sweep = at + SWEEP_EVERY_S
                if self._redis_lost:
                    log.info("Redis is back")
                    self._redis_lost = False
            except (RedisError, BackendError) as error:
                if not self._redis_lost:
                    log.warning("Redis: %s; going on, and trying again", error)
                    self._redis_lost = True
            except Exception:
                # The heart must go on beating whatever one round of housekeeping stumbles over.
                log.exception("housekeeping failed; trying again")

    def _beat(self) -> None:
        running = self._running
        if running is not None:
            self._worker.maintain_heartbeats(*running)
        else:
            self._worker.heartbeat()
        with self._worker.connection.pipeline() as pipeline:
            # Written whole each time: a Redis that has lost its data, or had us for dead, gets to know us again.
            pipeline.hset(self._worker.key, mapping=self._worker.serialize())
            worker_registration.register(self._worker, pipeline)
            pipeline.execute()

    def _put_in_order(self) -> None:
        for queue in self._worker.queues:
            lock, token = scripts.maintenance_key(queue.name), uuid.uuid4().hex
            if not self._worker.connection.set(lock, token, nx=True, ex=MAINTENANCE_LOCK_S):
                continue  # another worker is at it
            try:
                clean_registries(queue, [self._on_abandoned])
                worker_registration.clean_worker_registry(queue)
            finally:
                self._release(keys=[lock], args=[token])
            while self._given_up:
                self._worker.bag_queue.enqueue_publish(self._given_up.pop())
        for job_id in self._recover(args=[self._worker.heartbeat_ttl_s]):
            log.warning("job %s was taken by a worker that died before starting it; queued again", job_id.decode())

    def _on_abandoned(self, job: Job, kind: type[BaseException], error: BaseException, trace: object) -> None:  # noqa: ARG002
        """RQ's hook: called for each job whose worker fell silent, before it is queued again or failed."""
        if not issubclass(kind, AbandonedJobError):
            return
        again = bool(job.retries_left and job.retries_left > 0)
        died = WorkerDied(
            f"Worker {job.worker_name} on {job.meta.get('device', '?')} died, or was silent for {self._worker.heartbeat_ttl_s} s, "
            f"while it was at stage {job.meta.get('stage', '?')!r}.",
            hint="" if again else "It was tried as often as JOB_RETRIES says. Out of memory? See the worker's log.",
        )
        job.meta["error"] = died.as_dict()
        job.save_meta()
        log.error("job %s: %s %s", job.id, died.message, "Queued again." if again else "Given up.")
        if not again and function_of(job) == ANALYSE:
            self._given_up.append(job.id)
