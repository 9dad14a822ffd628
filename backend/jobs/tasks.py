"""The functions that RQ runs. Arguments and results are JSON; everything else comes from the process's :class:`WorkerContext`.

This module imports neither torch nor mmm: what needs them (the engine, the pipeline) is imported when an analysis starts, in a worker.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

from redis import Redis
from redis.exceptions import RedisError
from rq import get_current_job
from rq.job import Job

from backend.errors import JobTimedOut, PushUnsure, ResultNotFound, WorkerDied
from backend.jobs import scripts
from backend.jobs.queue import BagQueue, BagRequest, JobState, WaitingTask
from backend.jobs.tallies import note_bag
from backend.jobs.training import TrainingQueue
from backend.logs import working_on
from backend.redaction import shown_address
from backend.settings import Settings

log = logging.getLogger(__name__)

PROGRESS_EVERY_S = 0.25
"""Shortest time between two writes of a job's progress within one stage."""
LOOK_AGAIN_S = 180
"""How long after a push of which it was unsure whether it was stored the task is looked at again: longer than servers work on a request."""
LOOK_FOR_RESULT_S = 15
LOOKS_FOR_RESULT = 2
ANALYSES_AGAIN = 2
"""How often a result that should be there is looked for, so many seconds apart, and how often its bag is analysed again after that."""
WAIT_FOR_TRAINING_S = 20.0
"""How long a training waits for one by a command; after that it is tried again later."""
_UNSURE = "unsure"
_MAY_HAVE_STORED = (PushUnsure.code, WorkerDied.code, JobTimedOut.code)


class Store(Protocol):
    """What a worker needs of :class:`backend.results.store.ResultStore`."""

    def has(self, key: str) -> bool:
        """Whether a result is stored under ``key``."""
        ...


class Analyser(Protocol):
    """Computes one bag and stores its result under ``key``.

    ``slide`` is a SlideRef as JSON, ``engine`` a loaded model; ``progress(stage, done, total)`` may be called as often as it likes.
    """

    def __call__(
        self,
        slide: dict[str, Any],
        *,
        key: str,
        settings: Settings,
        engine: Any,
        store: Any,
        progress: Callable[[str, int, int], None],
    ) -> object: ...


class Publisher(Protocol):
    """Pushes the prediction of one task to Label Studio, so that doing it twice stores it once."""

    def __call__(self, settings: Settings, redis: Any, key: str, waiting: WaitingTask) -> object: ...


def _analyse_ref(slide: dict[str, Any], **parts: Any) -> object:
    from backend.inference.pipeline import analyse_ref
    from backend.label_studio.client import LabelStudioClient
    from backend.slides.source import SlideRef, SourceResolver

    # Label Studio's own files open only with its token.
    with closing(LabelStudioClient(parts["settings"])) as client:
        resolver = SourceResolver(parts["settings"], label_studio_headers=client.authorization)
        return analyse_ref(SlideRef.from_json(slide), resolver=resolver, **parts)


class Trainer(Protocol):
    """Trains one project; returns JSON values. ``progress(stage, done, total)`` may be called as often as it likes."""

    def __call__(
        self, settings: Settings, redis: Any, project: int, progress: Callable[[str, int, int], None]
    ) -> dict[str, Any]: ...


def _train(settings: Settings, redis: Any, project: int, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    from backend.label_studio.trainer import train_project

    return train_project(settings, redis, project, progress)


def _publish(settings: Settings, redis: Any, key: str, waiting: WaitingTask) -> object:
    from backend.label_studio.publisher import publish

    return publish(settings, redis, key, waiting)


def _open_store(settings: Settings) -> Store:
    from backend.results.store import ResultStore

    store = ResultStore(settings.results_location)
    try:
        store.tidy()
    except OSError as error:
        log.warning("the store of results could not be tidied: %s", error)
    return store


@dataclass(frozen=True)
class Fit:
    """Which jobs a worker fits: those that need its ``digest`` of model and settings. Empty: all, for one that cannot tell."""

    digest: str = ""
    model_version: str = ""


def _fit(settings: Settings, engine: Any) -> Fit:
    from backend.inference.checkpoint import model_identity
    from backend.inference.key import analysis_digest

    # What is loaded, where something is: the file may be another by now.
    identity = getattr(engine, "identity", None) or model_identity(settings)
    return Fit(analysis_digest(identity, settings), identity.model_version)


def _load_engine(settings: Settings, device: str) -> Any:
    from backend.inference.engine import load_engine

    return load_engine(settings, device)


@dataclass
class WorkerContext:
    """What the functions of this module work with: one for each worker process, set by :func:`set_context`.

    Attributes
    ----------
    settings, redis
        As the worker was started with.
    device
        The device's name in the job list: ``cuda:3``, ``cpu``.
    engine_device
        The same device as this process sees it: ``cuda:0`` in a process that sees one only.
    analyser, publisher, trainer, open_store, load_engine, find_fit
        The parts of other rooms, imported when first needed. A test puts small real computations of its own here, in
        the ``prepare`` function that it hands to :func:`backend.jobs.worker.main`.
    """

    settings: Settings
    redis: Redis
    device: str = "cpu"
    engine_device: str = "cpu"
    analyser: Analyser = _analyse_ref
    publisher: Publisher = _publish
    trainer: Trainer = _train
    open_store: Callable[[Settings], Store] = _open_store
    load_engine: Callable[[Settings, str], Any] = _load_engine
    find_fit: Callable[[Settings, Any], Fit] = _fit
    queue: BagQueue = field(init=False)
    _store: Store | None = field(default=None, init=False)
    _engine: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.queue = BagQueue(self.settings, self.redis)

    @property
    def store(self) -> Store:
        """The result store, opened once."""
        if self._store is None:
            self._store = self.open_store(self.settings)
        return self._store

    @property
    def engine(self) -> Any:
        """The model on this worker's device, loaded once and kept."""
        if self._engine is None:
            started = time.monotonic()
            self._engine = self.load_engine(self.settings, self.engine_device)
            log.info("model loaded on %s in %.1f s", self.device, time.monotonic() - started)
        return self._engine

    def fit(self) -> Fit:
        """Which jobs this worker fits; of one that has no model yet what its settings say."""
        return self.find_fit(self.settings, self._engine)


_context: WorkerContext | None = None


def set_context(context: WorkerContext | None) -> None:
    """Set what this process's jobs work with."""
    global _context
    _context = context


def context() -> WorkerContext:
    """What this process's jobs work with."""
    if _context is None:
        raise RuntimeError("no WorkerContext is set: jobs run in backend.jobs.worker only")
    return _context


class Progress:
    """Writes what an analysis is doing into its job, and remembers how long each stage took.

    Written at the start of each stage and then at most every :data:`PROGRESS_EVERY_S`. Redis may be away meanwhile: the analysis goes on.
    """

    def __init__(self, job: Job | None, device: str) -> None:
        self._job = job
        self._device = device
        self._stage = ""
        self._stage_started = self._written = time.monotonic()
        self.stage_s: dict[str, float] = {}
        self.total = 0
        self("start", 0, 0)

    def __call__(self, stage: str, done: int, total: int) -> None:
        at = time.monotonic()
        changed = stage != self._stage
        if changed:
            self._close_stage(at)
            self._stage, self._stage_started = stage, at
        self.total = total
        if changed or done == total or at - self._written >= PROGRESS_EVERY_S:
            self._written = at
            elapsed = at - self._stage_started
            rate = round(done / elapsed, 2) if done and elapsed > 0 else None
            self._write({"stage": stage, "done": done, "total": total, "tiles_per_s": rate, "device": self._device})

    def _close_stage(self, at: float) -> None:
        if self._stage:
            self.stage_s[self._stage] = self.stage_s.get(self._stage, 0.0) + at - self._stage_started

    def summary(self) -> str:
        """``encode=12.3s store=0.1s``: the stages so far."""
        self._close_stage(time.monotonic())
        self._stage = ""
        return " ".join(f"{stage}={seconds:.2f}s" for stage, seconds in self.stage_s.items())

    def _write(self, meta: dict[str, Any]) -> None:
        if self._job is None:
            return
        self._job.meta = meta
        try:
            # RQ would bring a job back that has run out meanwhile, as a ruin without an end.
            self._job.connection.eval(scripts.SAVE_META, 0, self._job.id, self._job.serializer.dumps(meta))
        except RedisError as error:
            log.debug("progress of %s not written: %s", self._job.id, error)


def analyse(request: dict[str, Any]) -> dict[str, Any]:
    """Compute one bag, unless the store has it. The argument is a :class:`~backend.jobs.queue.BagRequest` as JSON."""
    work = context()
    bag = BagRequest.from_json(request)
    started = time.monotonic()
    progress = Progress(get_current_job(), work.device)
    if work.store.has(bag.key):
        log.info("bag=%s device=%s already stored", bag.key, work.device)
        return {"key": bag.key, "computed": False}
    with working_on(bag=bag.key):
        parts: dict[str, Any] = {"settings": work.settings, "engine": work.engine, "store": work.store}
        work.analyser(bag.slide, key=bag.key, progress=progress, **parts)
        seconds, tiles = time.monotonic() - started, progress.total
        log.info("bag=%s device=%s tiles=%d %s total=%.2fs", bag.key, work.device, tiles, progress.summary(), seconds)
    note_bag(work.redis, progress.stage_s, tiles)
    return {"key": bag.key, "computed": True, "tiles": tiles, "seconds": round(seconds, 3)}


def publish_bag(key: str) -> dict[str, Any]:
    """Queue one push for each task that waits for the bag; drop them, saying why, if there will be no result.

    While the bag is still (or again) under way, nothing happens: the end of that job asks anew. A bag that was analysed and has no result is looked for
    again, as file systems of a network may show it later, then analysed again, and then given up.

    Raises
    ------
    ResultNotFound
        It is given up.
    """
    work = context()
    if work.store.has(key):
        moved = work.queue.publish_waiting(key)
        return {"key": key, "published": len(moved)}
    state = work.queue.state(key)
    if state is not None and state.status in ("queued", "started"):
        return {"key": key, "published": 0}
    if not work.queue.waiting(key):
        return {"key": key, "published": 0}
    if (state is None or state.status != "failed") and _looked_for(work, key):
        return {"key": key, "published": 0}
    dropped = work.queue.drain_waiting(key, unless_live=True)
    work.queue.remember_waiting(key, dropped)
    for task in dropped:
        log.warning(
            "project=%d task=%d gets no prediction from bag=%s: %s", task.project, task.task, key, _reason(state)
        )
    if dropped and (state is None or state.status != "failed"):
        raise ResultNotFound(
            f"The slide was analysed, and its result is not in {shown_address(work.settings.results_location)}; {len(dropped)} tasks waited for it.",
            hint="Backend and workers must share one RESULTS_URL (or MODEL_DIR). Open the tasks again.",
        )
    return {"key": key, "published": 0, "dropped": len(dropped)}


def _looked_for(work: WorkerContext, key: str) -> bool:
    """Look for a result that should be there; whether there is still hope."""
    tries = work.queue.count_again(f"result:{key}")
    if tries <= LOOKS_FOR_RESULT:
        log.warning("bag=%s has no result although its job has ended; looking again in %d s", key, LOOK_FOR_RESULT_S)
        work.queue.enqueue_publish(key, delay_s=LOOK_FOR_RESULT_S)
        return True
    request = work.queue.request(key)
    if request is None or tries > LOOKS_FOR_RESULT + ANALYSES_AGAIN:
        return False
    log.warning("bag=%s still has no result; it is analysed again", key)
    work.queue.submit(request, priority="batch")
    return True


def publish_task(key: str, waiting: dict[str, Any]) -> dict[str, Any]:
    """Push the prediction of one task. ``waiting`` is a :class:`~backend.jobs.queue.WaitingTask` as JSON.

    If an earlier try may have stored it unheard (no answer came, or its worker died), it is looked at again :data:`LOOK_AGAIN_S` later: Label Studio
    may have been slow, and have stored both.
    """
    work, job = context(), get_current_job()
    task = WaitingTask.from_json(waiting)
    if job is not None and (job.meta.get("error") or {}).get("code") in _MAY_HAVE_STORED:
        job.meta[_UNSURE] = True  # kept with the job, whatever the next tries fail of
    work.publisher(work.settings, work.redis, key, task)
    log.info("project=%d task=%d version=%s published from bag=%s", task.project, task.task, task.model_version, key)
    if job is not None and job.meta.get(_UNSURE):
        work.queue.look_again(key, task, delay_s=LOOK_AGAIN_S)
    return {"key": key, "task": task.task}


def train(project: int) -> dict[str, Any]:
    """Fit a project's heads on its annotations, put them in use, rank its slides. Returns a short report."""
    work = context()
    requests = TrainingQueue(work.queue)
    progress = Progress(get_current_job(), work.device)
    with working_on(project=project), requests.alone(project, WAIT_FOR_TRAINING_S):
        requests.begin(project)
        report = work.trainer(work.settings, work.redis, project, progress)
        log.info("project=%d %s %s", project, progress.summary(), report.get("message", ""))
    return dict(report)


def _reason(state: JobState | None) -> str:
    if state is None:
        return "its job is gone and it has no result"
    if state.error is None:
        return "it has no result"
    return f"{state.error.get('code', 'failed')}: {state.error.get('message', '')}"
