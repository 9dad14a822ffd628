"""The worker: one process, one device, one model that stays warm. ``python -m backend.jobs.worker --device cuda:0``.

An RQ :class:`~rq.SimpleWorker` (RQ's default worker forks for each job: CUDA does not survive that, and the model would be loaded
anew for each slide), with what that leaves out: see :mod:`backend.jobs.housekeeping`. Signals: SIGTERM or SIGINT ends
it after the current job, a second one at once; an interrupted job goes back to the front of its queue.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from rq import Queue, SimpleWorker
from rq.executions import Execution
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.utils import now, utcformat
from rq.worker import WorkerStatus

from backend.errors import BackendError, DeviceUnavailable
from backend.jobs import scripts, tasks
from backend.jobs.bag_job import BagJob, describe_failure, function_of
from backend.jobs.devices import memory_in_use, pin_device
from backend.jobs.housekeeping import Housekeeper
from backend.jobs.queue import BagQueue
from backend.jobs.redis_server import connect, unavailable
from backend.jobs.states import ANALYSE, ANALYSIS_QUEUES, QUEUES
from backend.logs import configure_logging
from backend.settings import Settings, load_settings

log = logging.getLogger("backend.jobs.worker")  # run as a program, __name__ is __main__

IDLE_POLL_S = 0.1
RECONNECT_MAX_S = 10.0
GRACE_S = 30.0
PUBLISH_DELAY_S = 1
"""Head start for a request that waits for the bag: it answers its task itself, and the annotator need not reload the page."""
EXIT_DEVICE_UNAVAILABLE = 3

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
        self._status_file = status_file
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
        self._give_back = self.connection.register_script(scripts.GIVE_BACK)
        self._housekeeper = Housekeeper(self, parent_pid)
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
        self._through_outages(self.register_birth)
        self._housekeeper.start()
        try:
            if set(self.queue_names()) & set(ANALYSIS_QUEUES):
                self._warm_up()
            log.info("worker %s: ready, queues %s", self.name, ", ".join(self.queue_names()))
            while not self._stop_requested:
                try:
                    found = self._next_job()
                    if found is not None:
                        self.execute_job(*found)
                        worked = True
                except RedisError as error:
                    self._outage(error)
        except _ShutdownNow:
            log.warning("worker %s: interrupted", self.name)
        finally:
            self._housekeeper.stop()
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
        popped = self._pop(args=self.queue_names())
        if popped is None:
            time.sleep(IDLE_POLL_S)
            return None
        name, job_id = popped[0].decode(), popped[1].decode()
        try:
            job = BagJob.fetch(job_id, connection=self.connection, serializer=JSONSerializer)
        except RedisError:
            raise  # the job is noted as taken, and will be put back
        except Exception:
            log.exception("job %s cannot be read from Redis; it is dropped", job_id)
            self.connection.hset(Job.key_for(job_id), "status", "failed")
            self.connection.zrem(scripts.POPPED, f"{name} {job_id}")
            return None
        job.origin = name
        return job, next(queue for queue in self.queues if queue.name == name)

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Run one job in this thread, with heartbeats from the other."""
        execution = self.prepare_execution(job)
        with self._housekeeper.beating_for(job, execution), self._status(job):
            self.perform_job(job, queue, execution)
        self.set_state(WorkerStatus.IDLE)

    def prepare_job_execution(self, job: Job, remove_from_intermediate_queue: bool = False) -> None:  # noqa: ARG002
        """Mark the job as started; from here on its heartbeats answer for it."""
        super().prepare_job_execution(job, False)
        self.connection.zrem(scripts.POPPED, f"{job.origin} {job.id}")
        self._interruptible = True

    @contextmanager
    def _status(self, job: Job) -> Iterator[None]:
        self._write_status(job.id)
        try:
            yield
        finally:
            self._write_status(None)

    def _write_status(self, job_id: str | None) -> None:
        if self._status_file is not None:
            temporary = self._status_file.with_suffix(".tmp")
            temporary.write_text(json.dumps({"pid": self.pid, "job": job_id, "since": time.monotonic()}))
            temporary.replace(self._status_file)

    # --- the end of a job -------------------------------------------------------------------------------------------

    def _finalize_success(self, job: Job, queue: Queue, execution: Execution, return_value: Any) -> None:
        self._interruptible = False
        finish = super()._finalize_success
        self._through_outages(lambda: finish(job, queue, execution, return_value))
        self._publish(job)

    def _finalize_failure(self, job: Job, queue: Queue, execution: Execution, exc_info: ExcInfo) -> None:
        begun, self._interruptible = self._interruptible, False
        error = exc_info[1]
        if isinstance(error, _ShutdownNow):
            self._put_back(job, queue, execution)
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

        def record() -> None:
            job.retries_left = retries_left
            job.meta["error"] = failure
            # First of all and in one step: should the rest be lost with Redis or with us, the verdict is not.
            fields = {"meta": JSONSerializer.dumps(job.meta), "retries_left": retries_left or 0}
            self.connection.hset(job.key, mapping=fields)
            self.handle_execution_ended(job, queue, self.heartbeat_ttl_s)
            self.handle_job_failure(
                job=job,
                queue=queue,
                started_job_registry=queue.started_job_registry,
                exc_string=f"{failure['code']}: {failure['message']}",
                execution=execution,
            )

        self._through_outages(record)
        if final:
            self._publish(job)

    def _publish(self, job: Job) -> None:
        """Tell those who wait for the bag. After the job's own end is written, so that no task comes in between."""
        if function_of(job) != ANALYSE:
            return
        try:
            self.bag_queue.enqueue_publish(job.id, delay_s=PUBLISH_DELAY_S)
        except BackendError as error:
            log.warning("bag=%s: publishing is put off: %s", job.id, error)  # the sweep of waiting tasks finds it

    def _put_back(self, job: Job, queue: Queue, execution: Execution) -> None:
        try:
            with self.connection.pipeline() as pipeline:
                self.cleanup_execution(job, pipeline=pipeline, execution=execution)
                self._give_back(args=[job.id, queue.name, utcformat(now())], client=pipeline)
                pipeline.execute()
            log.warning("job=%s goes back to the front of queue %s", job.id, queue.name)
        except RedisError as error:
            log.warning(
                "job=%s could not be put back (%s): it is queued again when our heartbeat has run out", job.id, error
            )

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
        log.error("worker %s: %s Waiting for it.", self.name, unavailable(error, self.context.settings).message)
        wait_s = 0.2
        while not self._stop_requested:
            time.sleep(wait_s)
            wait_s = min(RECONNECT_MAX_S, wait_s * 2)
            try:
                self.connection.ping()
                log.info("worker %s: Redis answers again", self.name)
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

    def serialize(self) -> dict[str, Any]:
        """What Redis knows of this worker."""
        return {**super().serialize(), "device": self.device, "state": str(getattr(self._state, "value", self._state))}

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


def _worker_name(device: str) -> str:
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())
    return f"{host}-{device.replace(':', '')}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


def run_worker(
    settings: Settings,
    device: str,
    queues: Sequence[str],
    *,
    grace_s: float = GRACE_S,
    parent_pid: int | None = None,
    status_file: Path | None = None,
    prepare: Callable[[tasks.WorkerContext], None] | None = None,
) -> int:
    """Tie this process to ``device`` (``cpu``, ``cuda:N``) and work until stopped; returns the exit status.

    ``prepare`` may replace parts of the :class:`~backend.jobs.tasks.WorkerContext` before work begins.
    """
    try:
        engine_device = pin_device(device, os.environ)
        redis: Redis = connect(settings, check=False)
        context = tasks.WorkerContext(settings, redis, device=device, engine_device=engine_device)
        if prepare is not None:
            prepare(context)
        worker = BagWorker(context, queues, grace_s=grace_s, parent_pid=parent_pid, status_file=status_file)
        worker.work(logging_level="WARNING")  # its lines per job say less than ours
    except DeviceUnavailable as error:
        log.critical("%s", error)
        return EXIT_DEVICE_UNAVAILABLE
    except BackendError as error:
        log.critical("%s", error)
        return 1
    return 0


def main(argv: Sequence[str] | None = None, *, prepare: Callable[[tasks.WorkerContext], None] | None = None) -> int:
    """Entry of a worker process; settings come from the environment."""
    parser = argparse.ArgumentParser(prog="python -m backend.jobs.worker", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--queues", default=",".join(ANALYSIS_QUEUES), help="names in order of urgency")
    parser.add_argument(
        "--grace-s", type=float, default=GRACE_S, help="seconds that a job may go on after SIGTERM; 0: no limit"
    )
    parser.add_argument("--parent-pid", type=int, help="stop when this is no longer the parent process")
    parser.add_argument("--status-file", type=Path, help="where to write which job runs since when")
    given = parser.parse_args(argv)
    queues = given.queues.split(",")
    if not re.fullmatch(r"cpu|cuda:\d+", given.device) or not set(queues) <= set(QUEUES):
        parser.error(f"--device {given.device!r} must be cpu or cuda:N, --queues {given.queues!r} some of {QUEUES}")
    try:
        settings = load_settings()
    except BackendError as error:
        print(error, file=sys.stderr)
        return 1
    configure_logging(settings.log_level, f"worker[{given.device}:{queues[0]}]")
    return run_worker(
        settings,
        given.device,
        queues,
        grace_s=given.grace_s,
        parent_pid=given.parent_pid,
        status_file=given.status_file,
        prepare=prepare,
    )


if __name__ == "__main__":
    sys.exit(main())
