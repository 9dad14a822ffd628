"""The worker: takes jobs one after the other, with one model that stays warm. :mod:`backend.jobs.worker` runs it in a process.

An RQ :class:`~rq.SimpleWorker` (RQ's default worker forks for each job: CUDA does not survive that, and the model would be loaded
anew for each slide), with what that leaves out: see :mod:`backend.jobs.housekeeping`. Signals: SIGTERM or SIGINT ends
it after the current job, a second one at once; an interrupted job goes back to the front of its queue.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from redis.exceptions import RedisError
from rq import Queue, SimpleWorker
from rq.executions import Execution
from rq.job import Job
from rq.results import Result
from rq.serializers import JSONSerializer
from rq.utils import now
from rq.worker import WorkerStatus

from backend.errors import BackendError, DeviceFailed, DeviceUnavailable, JobRefused
from backend.jobs import scripts, tasks
from backend.jobs.bag_job import BagJob, describe_failure, function_of
from backend.jobs.devices import memory_in_use
from backend.jobs.fitting import Fitting
from backend.jobs.housekeeping import Heart, Housekeeper
from backend.jobs.job_forms import TRAINING_PREFIX
from backend.jobs.leases import Leases
from backend.jobs.queue import BagQueue
from backend.jobs.redis_health import unavailable
from backend.jobs.signals import SignalWatch
from backend.jobs.states import ANALYSE, ANALYSIS_QUEUES, TRAIN
from backend.jobs.status_file import StatusFile
from backend.jobs.tallies import note_failure
from backend.jobs.training import TrainingQueue

log = logging.getLogger(__name__)

IDLE_POLL_S = 0.1
RECONNECT_FIRST_S = 0.2
RECONNECT_MAX_S = 10.0
GRACE_S = 30.0
PUBLISH_DELAY_S = 1
"""Head start for a request that waits for the bag: it answers its task itself, and the annotator need not reload the page."""

ExcInfo = tuple[type[BaseException] | None, BaseException | None, TracebackType | None]


class _ShutdownNow(BaseException):
    """Raised in the middle of a job by the second signal. No job may catch it, so it is no Exception."""


class BagWorker(SimpleWorker):  # type: ignore[misc]
    """Takes jobs from ``queues`` in their order until it is stopped.

    Parameters
    ----------
    context
        What the jobs work with; set for :mod:`backend.jobs.tasks` as well.
    queues
        Names, the most urgent first.
    grace_s
        After SIGTERM, how long the current job may go on before it is interrupted, in seconds. 0: as long as it takes.
    parent_pid
        See :class:`~backend.jobs.housekeeping.Housekeeper`.
    status_file
        Where to write which job runs since when, for the pool's watchdog.
    """

    job_class = BagJob
    connection_timeout = (
        0  # RQ would raise the client's socket timeout to minutes, for a blocking pop that is not used here
    )

    def __init__(
        self,
        context: tasks.WorkerContext,
        queues: Sequence[str],
        *,
        grace_s: float = GRACE_S,
        parent_pid: int | None = None,
        status_file: Path | None = None,
    ) -> None:
        self.context = context
        self.device = context.device
        self.heartbeat_ttl_s = context.settings.heartbeat_ttl_s
        self.bag_queue: BagQueue = context.queue
        self._grace_s = grace_s
        self._status_file = StatusFile(status_file)
        self._grace_timer: threading.Timer | None = None
        self._interruptible = False
        redis = context.redis
        super().__init__(
            [Queue(name, connection=redis, job_class=BagJob, serializer=JSONSerializer) for name in queues],
            name=_worker_name(context.device),
            connection=redis,
            serializer=JSONSerializer,
            worker_ttl=self.heartbeat_ttl_s,
            prepare_for_work=False,
        )
        self._stop_requested: bool = False
        self.hostname, self.pid = socket.gethostname(), os.getpid()
        self._pop = self.connection.register_script(scripts.POP)
        self.leases = Leases(redis, self.heartbeat_ttl_s, context.settings.failure_ttl_s)
        self._heart = Heart(self)
        self._housekeeper = Housekeeper(self, self._heart, parent_pid)
        self._signals = SignalWatch()
        self._outage_wait_s = 0.0
        self.fitting = Fitting(self.name, context.settings)
        tasks.set_context(context)

    # --- the loop ---------------------------------------------------------------------------------------------------

    def work(self, *_args: Any, **_kwargs: Any) -> bool:
        """Work until stopped. Redis may be away, at the start too: the worker waits for it.

        Raises
        ------
        DeviceUnavailable
            The model cannot be brought onto the device.
        """
        worked = False
        self._install_signal_handlers()
        self._signals.start()
        self._through_outages(self.register_birth)
        self._heart.start()
        self._housekeeper.start()
        try:
            if set(self.queue_names()) & set(ANALYSIS_QUEUES):
                self._warm_up()
            self.fitting.find(self.context)
            log.info("worker %s: ready, queues %s", self.name, ", ".join(self.queue_names()))
            while not self._stop_requested:
                try:
                    found = self._next_job()
                    if found is not None:
                        self.execute_job(*found)
                        worked = True
                    self._outage_wait_s = 0.0
                except RedisError as error:
                    self._outage(error)
                except Exception:
                    # One job that cannot even be ended must not take the worker with it: its lease runs out, and housekeeping ends it.
                    log.exception("worker %s: a job could not be ended; going on", self.name)
                    time.sleep(IDLE_POLL_S)
        except _ShutdownNow:
            log.warning("worker %s: interrupted", self.name)
        finally:
            self._housekeeper.stop()
            self._heart.stop()
            self._signals.stop()
            if self._grace_timer is not None:
                self._grace_timer.cancel()
            try:
                self.register_death()
            except RedisError as error:
                log.warning("worker %s: could not sign off: %s", self.name, error)
        log.info("worker %s: stopped", self.name)
        return worked

    def _warm_up(self) -> None:
        try:
            _ = self.context.engine
        except DeviceUnavailable:
            raise
        except BackendError as error:
            # The checkpoint or the licence: every slide that is asked for must fail with this reason, where its user sees it.
            log.error("worker %s: the model cannot be loaded: %s", self.name, error)

    def _next_job(self) -> tuple[BagJob, Queue] | None:
        popped = self._pop(args=[self.fitting.fit.digest, self.fitting.meta, *self.queue_names()])
        if popped[2]:
            self.fitting.tell(popped[2])
        if not popped[1]:
            time.sleep(IDLE_POLL_S)
            return None
        name, job_id = popped[0].decode(), popped[1]
        try:
            job = BagJob.fetch(job_id.decode(), connection=self.connection, serializer=JSONSerializer)
        except RedisError:
            raise  # the job is noted as taken, and will be put back
        except Exception:
            log.exception("job %r cannot be read from Redis; it is dropped", job_id)
            self.drop_unreadable(job_id)
            self.connection.zrem(scripts.POPPED, popped[0] + b" " + job_id)
            return None
        job.origin = name
        return job, next(queue for queue in self.queues if queue.name == name)

    def drop_unreadable(self, job_id: bytes) -> None:
        """List a job as failed that cannot even be read."""
        refused = JobRefused("The job is not one of ours.", hint="Something else writes to this Redis.")
        key = Job.key_for("").encode() + job_id  # whatever bytes it is made of
        self.connection.hset(key, mapping={"status": "failed", "meta": json.dumps({"error": refused.as_dict()})})
        self.connection.expire(key, self.context.settings.failure_ttl_s)

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Run one job in this thread, with heartbeats from the other."""
        execution = self.prepare_execution(job)
        limit_s = job.timeout or self.context.settings.job_timeout_s
        with self._heart.beating_for(job, execution), self._status_file.running(job.id, limit_s):
            self.perform_job(job, queue, execution)
        self.set_state(WorkerStatus.IDLE)

    def prepare_execution(self, job: Job) -> Execution:
        """Write down that this worker is about to run the job, and take its lease."""
        with self.connection.pipeline() as pipeline:
            execution: Execution = Execution.create(job, self.heartbeat_ttl_s, pipeline, worker_name=self.name)
            self.leases.renew(job, execution, client=pipeline)  # by Redis' clock, where RQ has just taken ours
            self.set_state(WorkerStatus.BUSY, pipeline=pipeline)
            pipeline.execute()
        self.executions[execution.id] = execution
        return execution

    def prepare_job_execution(self, job: Job, remove_from_intermediate_queue: bool = False) -> None:  # noqa: ARG002
        """Mark the job as started; from here on its heartbeats answer for it."""
        super().prepare_job_execution(job, False)
        self.connection.zrem(scripts.POPPED, f"{job.origin} {job.id}")
        self._interruptible = True

    # --- the end of a job -------------------------------------------------------------------------------------------

    def _finalize_success(self, job: Job, queue: Queue, execution: Execution, return_value: Any) -> None:
        self._interruptible = False
        result = Result(
            job.id,
            Result.Type.SUCCESSFUL,
            self.connection,
            return_value=return_value,
            worker_name=self.name,
            serializer=job.serializer,
            execution_id=execution.id,
        )
        # One guarded step, as with a failure: said twice, because the first answer was lost, it must not end what was asked for in between.
        self._through_outages(lambda: self.leases.finish(job, execution, queue.name, result))
        self._clean_up(job, execution, succeeded=True)
        self._publish(job)

    def _finalize_failure(self, job: Job, queue: Queue, execution: Execution, exc_info: ExcInfo) -> None:
        begun, self._interruptible = self._interruptible, False
        error = exc_info[1]
        if isinstance(error, _ShutdownNow):
            self._put_back(job, queue.name, execution)
            raise error
        if isinstance(error, RedisError) and not begun:
            raise error  # not even begun: it is noted as taken, and will be put back
        failure = describe_failure(job, error, self.context.settings)
        retries_left = job.retries_left
        if not failure["retryable"]:
            retries_left = 0
        unexpected = failure["code"] == "unexpected_error"
        final = not retries_left
        if unexpected and final:
            failure["retryable"] = False
        level = logging.ERROR if final else logging.WARNING
        if isinstance(error, BackendError) and error.ordinary and not final:
            level = logging.DEBUG
        log.log(
            level,
            "job=%s function=%s device=%s failed (%s): %s%s",
            job.id,
            (function_of(job) or "?").rsplit(".", 1)[-1],
            self.device,
            failure["code"],
            failure["message"],
            "" if final else f" ({retries_left} more tries)",
            exc_info=exc_info if unexpected else None,  # type: ignore[arg-type]
        )

        if level != logging.DEBUG:
            note_failure(self.connection, (function_of(job) or "unknown").rsplit(".", 1)[-1][:40], failure["code"])
        job.retries_left = retries_left
        ended = ""

        def record() -> None:
            nonlocal ended
            ended = self.leases.fail(job, execution, queue.name, failure)

        self._through_outages(record)
        self._clean_up(job, execution)
        if failure["code"] == DeviceFailed.code:
            # Whatever runs on this device in this process fails from now on, and would fail fast: a worker that takes every slide.
            log.critical(
                "worker %s: %s is lost to this process, which ends; its pool starts another", self.name, self.device
            )
            self._stop_requested = True
        if final and ended == "done":
            self._publish(job)

    def _clean_up(self, job: Job, execution: Execution, *, succeeded: bool = False) -> None:
        """Remove what RQ keeps of an execution, and count it. Of no consequence if it fails: all of it runs out by itself."""
        try:
            with self.connection.pipeline() as pipeline:
                if succeeded:
                    self.increment_successful_job_count(pipeline=pipeline)
                    if job.started_at is not None:
                        self.increment_total_working_time(now() - job.started_at, pipeline)
                self.cleanup_execution(job, pipeline=pipeline, execution=execution)
                pipeline.execute()
        except RedisError as error:
            log.debug("job=%s: %s", job.id, error)

    def _publish(self, job: Job) -> None:
        """Tell those who wait for the job. After its own end is written, so that nobody comes in between."""
        if function_of(job) == TRAIN:
            self._resume_training(job)
        if function_of(job) != ANALYSE:
            return
        try:
            self.bag_queue.enqueue_publish(job.id, delay_s=PUBLISH_DELAY_S)
        except BackendError as error:
            log.warning("bag=%s: publishing is put off: %s", job.id, error)  # the sweep of waiting tasks finds it

    def _resume_training(self, job: Job) -> None:
        try:
            TrainingQueue(self.bag_queue).resume(int(job.id.removeprefix(TRAINING_PREFIX)))
        except (BackendError, ValueError) as error:
            log.warning("job=%s: what was asked meanwhile is put off: %s", job.id, error)  # housekeeping finds it

    def _put_back(self, job: Job, queue_name: str, execution: Execution) -> None:
        try:
            self.leases.give_back(job, execution, queue_name)
            log.warning("job=%s goes back to the front of queue %s", job.id, queue_name)
        except RedisError as error:
            log.warning(
                "job=%s could not be put back (%s): it is queued again when our heartbeat has run out", job.id, error
            )
            return
        self._clean_up(job, execution)

    # --- Redis, heartbeats ------------------------------------------------------------------------------------------

    def _through_outages(self, step: Callable[[], object]) -> None:
        """Do ``step``, again and again while Redis is away (as long as nobody wants us to stop)."""
        while True:
            try:
                step()
                return
            except RedisError as error:
                if self._stop_requested:
                    raise
                self._outage(error)

    def _outage(self, error: RedisError) -> None:
        """Wait until Redis answers, ever longer while it answers and refuses; said once until something works again."""
        if not self._outage_wait_s:
            log.error("worker %s: %s Waiting for it.", self.name, unavailable(error, self.context.settings).message)
        self._outage_wait_s = min(RECONNECT_MAX_S, max(RECONNECT_FIRST_S, self._outage_wait_s * 2))
        wait_s = self._outage_wait_s
        while not self._stop_requested:
            time.sleep(wait_s)
            wait_s = min(RECONNECT_MAX_S, wait_s * 2)
            try:
                self.connection.ping()
                return
            except RedisError:
                continue

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:  # noqa: ARG002
        """Seconds after which a silent worker's job counts as abandoned. RQ would take the job's whole timeout."""
        return self.heartbeat_ttl_s

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:  # noqa: ARG002
        """Say that this worker lives, for ``HEARTBEAT_TTL_S``, and how much memory it holds."""
        super().heartbeat(self.heartbeat_ttl_s, pipeline=pipeline)
        if memory := memory_in_use():
            (self.connection if pipeline is None else pipeline).hset(self.key, mapping=memory)

    def maintain_heartbeats(self, job: Job, execution: Execution) -> None:
        """One heartbeat, the job's included. Its lease first: that a full Redis still takes."""
        self.leases.renew(job, execution, busy_s=self._heart.busy_s())
        with self.connection.pipeline() as pipeline:
            self.heartbeat(pipeline=pipeline)
            pipeline.expire(execution.key, self.heartbeat_ttl_s)
            pipeline.execute()

    def serialize(self) -> dict[str, Any]:
        """What Redis knows of this worker."""
        state = str(getattr(self._state, "value", self._state))
        fit = {"fits": self.fitting.fit.digest, "model_version": self.fitting.fit.model_version}
        return {**super().serialize(), **fit, "device": self.device, "state": state}

    # --- signals ----------------------------------------------------------------------------------------------------

    def request_stop(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """The signal handler: the first time stop after the current job, the second time now."""
        if self._stop_requested:
            if self._interruptible:
                self._interruptible = False
                raise _ShutdownNow
            return
        self._stop_requested = True
        log.info("worker %s: stopping after this job", self.name)
        if self._grace_s > 0:
            self._grace_timer = threading.Timer(self._grace_s, os.kill, (os.getpid(), signal.SIGTERM))
            self._grace_timer.daemon = True
            self._grace_timer.start()

    def deaf_since(self) -> float:
        """How long ago the second signal came, in seconds; 0.0 if none did. Asked by a thread, while the job may be in code that no signal interrupts."""
        return self._signals.since_second()

    def hand_back_and_exit(self) -> None:
        """End the process from a thread: the job, which has not heard that it is to stop, goes back to its queue."""
        running = self._heart.running
        if running is not None:
            self._put_back(running[0], running[0].origin, running[1])
        try:
            self.register_death()
        except RedisError as error:
            log.warning("worker %s: could not sign off: %s", self.name, error)
        log.warning("worker %s: its job heard no signal; ended all the same", self.name)
        os._exit(0)


def _worker_name(device: str) -> str:
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())
    return f"{host}-{device.replace(':', '')}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
