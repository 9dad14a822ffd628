"""The only jobs that our workers run, and what a failed one is said to have failed of."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from redis.exceptions import RedisError
from rq.exceptions import DeserializationError
from rq.job import Job
from rq.timeouts import JobTimeoutException

from backend.errors import BackendError, DeviceFailed, JobRefused, JobTimedOut, WorkerDied
from backend.jobs import tasks
from backend.jobs.redis_health import unavailable
from backend.jobs.states import ALLOWED_FUNCTIONS, PUBLISH_BAG, PUBLISH_TASK, takes
from backend.redaction import redactor_of
from backend.settings import Settings


class BagJob(Job):  # type: ignore[misc]
    """An RQ job that runs nothing but our own functions: what else is in Redis is never imported."""

    @property
    def func(self) -> Callable[..., Any]:
        """The function, if it is one of ours."""
        self._refuse_others()
        function: Callable[..., Any] = getattr(tasks, self.func_name.rsplit(".", 1)[-1])
        return function

    def _refuse_others(self) -> None:
        try:
            name, instance = self.func_name, self.instance
        except DeserializationError as error:
            raise JobRefused(
                f"Job {self.id} does not hold JSON.", hint="Something else writes to this Redis."
            ) from error
        callbacks = (self._success_callback_name, self._failure_callback_name, self._stopped_callback_name)
        ours = isinstance(name, str) and name in ALLOWED_FUNCTIONS
        if not ours or instance is not None or any(isinstance(c, str) and c for c in callbacks):
            raise JobRefused(
                f"Job {self.id} asks for {name!r}, which our workers do not run; nothing was imported.",
                hint="Something else writes to this Redis: give the backend a Redis (or a database number) of its own.",
            )
        if self.kwargs or not takes(name, self.args):
            raise JobRefused(
                f"Job {self.id} asks for {name!r} with arguments that it does not take.",
                hint="Something else writes to this Redis, or another release of this backend.",
            )

    # RQ would import these by name, and call any address.
    success_callback = failure_callback = stopped_callback = None

    def send_webhooks(self, *_args: Any, **_kwargs: Any) -> None:
        """Ours have none."""


def function_of(job: Job) -> str | None:
    """Name of the job's function, ``None`` if it cannot be read."""
    try:
        name: object = job.func_name
    except DeserializationError:
        return None
    return name if isinstance(name, str) else None  # any JSON value, where something else wrote the job


def describe_abandoned(job: Job, ttl_s: int, busy_s: float) -> JobTimedOut | WorkerDied:
    """What became of a job whose worker has not been heard of for ``ttl_s`` seconds, after the job had run for ``busy_s``."""
    stage = f"at stage {job.meta.get('stage', '?')!r}"
    if job.timeout and busy_s >= job.timeout:
        return JobTimedOut(
            f"The job was stuck {stage} and heard no signal: its worker was killed after {busy_s:.0f} s.",
            hint="Is the slide's file readable to its end, and its file system there? JOB_TIMEOUT_S is the longest time a slide may take.",
        )
    hint = "" if job.retries_left else "It was tried as often as JOB_RETRIES says. Out of memory? See the worker's log."
    return WorkerDied(
        f"Worker {job.worker_name} on {job.meta.get('device', '?')} died, or was silent for {ttl_s} s, while it was {stage}.",
        hint=hint,
    )


def is_push(job: Job) -> bool:
    """Whether a job pushes predictions: one that took too long waited for a slow Label Studio, and may be tried again."""
    return function_of(job) in (PUBLISH_BAG, PUBLISH_TASK)


def _is_of_the_device(error: BaseException | None) -> bool:
    """Whether CUDA has given up on this process, as after an illegal access; being out of memory is no such thing.

    Told by what PyTorch says, since nothing here imports it.
    """
    while error is not None:
        name = type(error).__name__
        if name == "AcceleratorError" or (isinstance(error, RuntimeError) and "CUDA error" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def describe_failure(job: Job, error: BaseException | None, settings: Settings) -> dict[str, Any]:
    """``error``, whatever it is, in the form of :meth:`BackendError.as_dict <backend.errors.BackendError.as_dict>`, without the settings' secrets."""
    return dict(redactor_of(settings, os.environ).within(_described(job, error, settings)))


def _described(job: Job, error: BaseException | None, settings: Settings) -> dict[str, Any]:
    cause = error
    while cause is not None:
        # Code that wraps every exception into its own wraps the timeout too.
        if isinstance(cause, JobTimeoutException):
            timed_out = JobTimedOut(
                f"The job ran longer than {job.timeout} s and was stopped at stage {job.meta.get('stage', '?')!r}.",
                hint="Raise JOB_TIMEOUT_S, or use a faster device.",
            )
            # A slide takes as long the next time. A push that took too long waited for a slow Label Studio.
            return {**timed_out.as_dict(), "retryable": is_push(job)}
        cause = cause.__cause__ or cause.__context__
    if _is_of_the_device(error):
        error = DeviceFailed(
            f"The device failed: {str(error).splitlines()[0][:200]}",
            hint="The slide is tried again by another process. If it happens again: driver, memory and temperature of the device.",
        )
    if isinstance(error, RedisError):
        error = unavailable(error, settings)
    if isinstance(error, DeserializationError):
        error = JobRefused(f"Job {job.id} does not hold JSON.", hint="Something else writes to this Redis.")
    if isinstance(error, BackendError):
        return dict(error.as_dict())
    return {
        "code": "unexpected_error",
        "message": f"{type(error).__name__}: {error}",
        "hint": "A defect of this backend, or of a library: the worker's log has the traceback.",
        "retryable": True,
    }
