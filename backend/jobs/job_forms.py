"""The jobs that the queue holds, as they are written down: function, arguments, id, time limit, retries. Nothing here asks Redis."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from redis import Redis
from rq import Queue
from rq.job import Job, Retry
from rq.serializers import JSONSerializer
from rq.utils import now

from backend.jobs import scripts
from backend.jobs.states import ANALYSE, PUBLISH_BAG, PUBLISH_TASK, QUEUES, TRAIN, BagRequest, WaitingTask
from backend.settings import Settings
from backend.slides.names import slide_name

PUBLISH_TIMEOUT_S = 300
"""Longest time that pushing one prediction may take."""
PUBLISH_BACKOFF_CAP_S = 300
TRAINING_PREFIX = "train-"
NEEDS_FIELD = scripts.NEEDS_FIELD


class JobForms:
    """Makes jobs as our workers take them, with the settings' limits. None of them is in Redis yet."""

    def __init__(self, settings: Settings, redis: Redis) -> None:
        self._settings = settings
        self._queues = {name: Queue(name, connection=redis, serializer=JSONSerializer) for name in QUEUES}

    def analysis(self, request: BagRequest, queue: str) -> Job:
        """Computes a bag. The id is the bag key."""
        settings = self._settings
        # The first retry comes at once: it is the answer to a killed worker. Later ones give a remote store time to come back.
        return self._make(
            queue,
            ANALYSE,
            (request.to_json(),),
            request.key,
            timeout=settings.job_timeout_s,
            intervals=backoff(1, 8, 60, settings.job_retries),
            about=f"analyse {_about(request.slide)}",
        )

    def bag_push(self, key: str, *, again: bool = False) -> Job:
        """Queues a push for each task that waits for a bag. ``again``: a second one, while the first runs."""
        return self.publishing(PUBLISH_BAG, (key,), self.bag_push_id(key, again=again))

    @staticmethod
    def bag_push_id(key: str, *, again: bool = False) -> str:
        """Id of :meth:`bag_push`."""
        return f"publish-{key}{'-again' * again}"

    def task_push(self, key: str, task: WaitingTask) -> Job:
        """Pushes the prediction of one task."""
        return self.publishing(PUBLISH_TASK, (key, task.to_json()), publish_id(key, task))

    def look_again(self, key: str, task: WaitingTask, *, once_more: bool = False) -> Job:
        """The same push once more, under an id of its own. ``once_more``: under another, while the first runs."""
        job_id = f"{publish_id(key, task)}-{'once-more' if once_more else 'again'}"
        job = self.publishing(PUBLISH_TASK, (key, task.to_json()), job_id)
        job.description = f"look again at task {task.task} of project {task.project}"
        return job

    def publishing(self, function: str, args: tuple[Any, ...], job_id: str) -> Job:
        """One of the two above, by its function."""
        about = f"push what waits for {job_id.removeprefix('publish-')}"
        if function == PUBLISH_TASK:
            about = f"push task {args[1]['task']} of project {args[1]['project']}"
        intervals = backoff(2, 2, PUBLISH_BACKOFF_CAP_S, self._settings.publish_retries)
        return self._make(
            "publish", function, args, job_id, timeout=PUBLISH_TIMEOUT_S, intervals=intervals, about=about
        )

    def training(self, project: int) -> Job:
        """Trains a project's heads."""
        # A Label Studio that is away is waited for as long as with a push.
        intervals = backoff(5, 2, PUBLISH_BACKOFF_CAP_S, self._settings.publish_retries)
        timeout = self._settings.job_timeout_s
        about = f"train project {project}"
        return self._make(
            "train", TRAIN, (project,), training_id(project), timeout=timeout, intervals=intervals, about=about
        )

    def _make(
        self,
        queue: str,
        function: str,
        args: tuple[Any, ...],
        job_id: str,
        *,
        timeout: int,
        intervals: list[int],
        about: str,
    ) -> Job:
        """Seconds: ``timeout``, and ``intervals`` before each retry."""
        job = self._queues[queue].create_job(
            function,
            args=args,
            job_id=job_id,
            timeout=timeout,
            result_ttl=self._settings.result_ttl_s,
            failure_ttl=self._settings.failure_ttl_s,
            retry=Retry(len(intervals), intervals) if intervals else None,
            description=about,
        )
        job.enqueued_at = now()
        return job


def backoff(first_s: int, factor: int, cap_s: int, count: int) -> list[int]:
    """``count`` waiting times in seconds, each ``factor`` times the one before, none above ``cap_s``."""
    return [min(cap_s, first_s * factor**i) for i in range(count)]


def publish_id(key: str, task: WaitingTask) -> str:
    """Id of the job that pushes one task's prediction: the same push has the same id, so it is queued once.

    RQ allows letters, digits, ``_`` and ``-`` only, so the digest keeps apart what that folds together, and also other configs.
    """
    version = re.sub(r"[^A-Za-z0-9_-]", "-", task.model_version)[:60]
    exact = hashlib.sha256(task.to_text().encode()).hexdigest()[:8]
    return f"publish-{task.project}-{task.task}-{version}-{key[:12]}-{exact}"


def training_id(project: int) -> str:
    """Id of the job that trains a project."""
    return f"{TRAINING_PREFIX}{project}"


def job_fields(job: Job, needs: str = "") -> list[Any]:
    """Names and values of a job's Redis hash, one after the other. ``needs``: see :class:`~backend.jobs.states.BagRequest`; else what its arguments say."""
    fields = {**job.to_dict(), NEEDS_FIELD: needs or _needs_of(job) or None}
    return [item for name, value in fields.items() if value is not None for item in (name, value)]


def _needs_of(job: Job) -> str:
    last = job.args[-1] if job.args else None
    return str(last.get("needs", "")) if isinstance(last, dict) else ""


def _about(slide: dict[str, Any]) -> str:
    """What people call the slide of a reference; the queue knows no more of it."""
    locations = slide.get("locations") or ["a slide"]
    name = slide_name(str(locations[0]))
    return name if len(locations) == 1 else f"{len(locations)} patches from {name}"
