"""Answering /predict: what is stored is given, the rest is queued and answered with an empty slot, to be pushed when done.

Label Studio has no uniqueness of its own: three people opening one task store three predictions. So a prediction is handed out under a
claim in Redis that is held for some seconds: whoever does not get it answers with an empty slot.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from functools import partial
from typing import Any

from backend.errors import (
    BackendError,
    DownloadFailed,
    QueueUnavailable,
    RequestInvalid,
    ResultNotFound,
    StoreUnavailable,
)
from backend.jobs.queue import BagRequest, JobState, WaitingTask
from backend.label_studio.answers import Answers, slide_ref
from backend.label_studio.drawn_area import DrawnArea, area_from_context
from backend.label_studio.labeling_config import LabelingConfig, parse_config
from backend.label_studio.services import Services

log = logging.getLogger(__name__)

Task = Mapping[str, Any]
# One slot a task: a prediction, or the empty list that makes Label Studio store nothing and ask again.
Slot = dict[str, Any] | list[Any]

# How long the right to hand out a prediction is held: long enough for Label Studio to have stored a whole batch's answer.
CLAIM_TTL_S = 60.0
MAX_PROJECT = 2**53
"""No number of a project is that large: it is where JSON's numbers stop being exact."""
_LOOKUPS_AT_ONCE = 8
_CONFIGS_KEPT = 100
# What one answer may hold: Label Studio keeps all of it in memory, and so do we. The rest is pushed.
_ANSWER_MAX_PREDICTIONS = 500
_ANSWER_MAX_BYTES = 64_000_000
# How long an opener waits whose prediction another opener has just been given: Label Studio stores that one meanwhile.
_OTHER_OPENER_S = 0.5


class SlideFailed(BackendError):
    """The slide's analysis has failed before, with a reason that does not pass by itself."""

    code = "slide_failed"
    http_status = 422


@dataclass
class _Pending:
    index: int
    task: Task
    task_id: int | None
    key: str
    request: BagRequest
    stored: bool


class Predictor:
    """Answers /predict for any project."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._answers = Answers(services)
        self._configs: dict[int, str] = {}

    def predict(
        self, tasks: Sequence[Task], *, project: int | None, label_config: str, context: Mapping[str, Any] | None = None
    ) -> list[Slot]:
        """One slot for each task, in their order.

        A single task is waited for (``PREDICT_WAIT_S``), and its error is raised, so that Label Studio shows it. Several
        tasks share ``PREDICT_BATCH_BUDGET_S``; errors of single ones are logged, and the others answered, unless it is Redis or the store that is away.

        ``context``: what was drawn with a smart tool. Where attention cannot be pooled over it, the slots are empty at once.
        """
        config = parse_config(label_config)
        area = area_from_context(context, config) if context else None
        if context and area is None:
            log.info("project %s: a smart tool drew something that attention cannot be pooled over: no answer", project)
            return [[] for _ in tasks]
        if project is not None:
            self._note_config(project, label_config)
        single = len(tasks) == 1
        settings = self._services.settings
        deadline = time.monotonic() + (settings.predict_wait_s if single else settings.predict_batch_budget_s)
        slots: list[Slot] = [[] for _ in tasks]
        pending: list[_Pending] = []
        overdue: list[_Pending] = []
        given = given_bytes = 0
        for task, located in zip(tasks, self._located(tasks, config, deadline), strict=True):
            try:
                item = located()
                if not item.stored:
                    pending.append(item)
                elif not single and (
                    time.monotonic() > deadline or given >= _ANSWER_MAX_PREDICTIONS or given_bytes >= _ANSWER_MAX_BYTES
                ):
                    overdue.append(item)  # stored, but this answer has no time or room left for its regions
                else:
                    answer = self._answer(item, project, label_config, area)
                    if answer is None:
                        pending.append(item)  # the stored file was damaged: compute it again
                    else:
                        slots[item.index] = answer
                        if single and answer and area is None:
                            self._push_later(item, project, label_config)  # in case this answer does not arrive
                        given += bool(answer)
                        given_bytes += approximate_bytes(answer)
            except BackendError as error:
                if single or isinstance(error, QueueUnavailable | StoreUnavailable):
                    raise  # said aloud: an empty answer would mean that it is being worked on
                log.warning("task %s: %s", task.get("id"), error)
            except Exception:
                # A defect of ours, or a task odder than we thought of: it must not cost the other tasks their answer.
                if single:
                    raise
                log.exception("task %s", task.get("id"))
        self._submit(pending, overdue, project, label_config, single=single)
        if single and pending:
            slots[0] = self._wait(pending[0], project, label_config, area, deadline)
        elif single and slots == [[]]:
            time.sleep(_OTHER_OPENER_S)
        return slots

    def _note_config(self, project: int, label_config: str) -> None:
        """The project is connected, as it asks. Have its heads trained anew if controls or labels have changed.

        Label Studio's own event of a change carries no secret of ours where the project was connected in its settings,
        and is refused; the config that comes with a question is the one that counts.
        """
        self._services.training.note_connection(project, True)
        if self._configs.get(project) == label_config:
            return
        if self._services.training.config_changed(project, label_config):
            self._services.training.note_annotations(project, 0)
        if len(self._configs) >= _CONFIGS_KEPT:
            self._configs.clear()
        self._configs[project] = label_config

    def _located(
        self, tasks: Sequence[Task], config: LabelingConfig, deadline: float
    ) -> Iterator[Callable[[], _Pending]]:
        """For each task a function that gives where its slide is and whether its result is stored, or raises what is wrong.

        Slides behind HTTP and results in an object store cost a request each, so many tasks are looked up side by side; those that are not reached before
        ``deadline`` say so, and Label Studio asks for them again.
        """
        if len(tasks) == 1:
            yield lambda: self._locate(0, tasks[0], config)
            return
        pool = ThreadPoolExecutor(_LOOKUPS_AT_ONCE, thread_name_prefix="locate")
        try:
            futures = [pool.submit(self._locate, index, task, config) for index, task in enumerate(tasks)]
            for future in futures:
                yield partial(_in_time, future, deadline)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _locate(self, index: int, task: Task, config: LabelingConfig) -> _Pending:
        data = task.get("data")
        if not isinstance(data, Mapping):
            raise RequestInvalid(f"Task {task.get('id')!r} has no data.", hint="A task is {'id': …, 'data': {…}}.")
        try:
            ref = slide_ref(self._services, config, data)
        except UnicodeError as error:
            raise RequestInvalid(
                f"The slide of task {task.get('id')!r} has a location that is no text: {error}.",
                hint="Correct the task's data.",
            ) from None
        request, task_id = self._services.request(ref), task.get("id")
        number = task_id if isinstance(task_id, int) else None
        return _Pending(index, task, number, request.key, request, self._services.store.has(request.key))

    def _answer(self, item: _Pending, project: int | None, label_config: str, area: DrawnArea | None) -> Slot | None:
        """The prediction of a stored bag, ``[]`` if someone else is handing it out, ``None`` if nothing readable is stored."""
        if area is None and not self._claim(item, project):
            # Someone is handing it out. Should that come to nothing, the push after the claim's time makes up for it.
            self._push_later(item, project, label_config)
            return []
        try:
            prediction = self._answers.prediction(item.key, item.task["data"], label_config, project=project, area=area)
        except BaseException:
            self._release(item, project)
            raise
        if prediction is None:
            self._release(item, project)
        return prediction

    def _push_later(self, item: _Pending, project: int | None, label_config: str) -> None:
        waiting = self._waiting(item, project, label_config)
        if waiting is not None:
            self._services.queue.put_back_waiting(item.key, [waiting])
            self._services.queue.enqueue_publish(item.key, delay_s=round(CLAIM_TTL_S))

    def _claim(self, item: _Pending, project: int | None) -> bool:
        if item.task_id is None or project is None:
            return True  # a preview without a task: nothing is stored, so nothing can be stored twice
        return self._services.queue.claim_answer(
            project, item.task_id, self._services.versions.version(project), CLAIM_TTL_S
        )

    def _release(self, item: _Pending, project: int | None) -> None:
        if item.task_id is not None and project is not None:
            self._services.queue.release_claim(project, item.task_id, self._services.versions.version(project))

    def _submit(
        self, pending: list[_Pending], overdue: list[_Pending], project: int | None, label_config: str, *, single: bool
    ) -> None:
        waiting = [self._waiting(item, project, label_config) for item in pending]
        if pending:
            states = self._services.queue.submit_many(
                [(item.request, task) for item, task in zip(pending, waiting, strict=True)],
                "interactive" if single else "batch",
            )
            failed = {key: state for key, state in states.items() if state.status == "failed"}
            if single and failed:
                raise _failure(next(iter(failed.values())))
            for item in pending:
                if item.key in failed:
                    log.warning("task %s: %s", item.task_id, _failure(failed[item.key]))
        for item in overdue:
            task = self._waiting(item, project, label_config)
            if task is not None:
                self._services.queue.put_back_waiting(item.key, [task])
                self._services.queue.enqueue_publish(item.key)

    def _waiting(self, item: _Pending, project: int | None, label_config: str) -> WaitingTask | None:
        if item.task_id is None or project is None:
            return None
        version = self._services.versions.version(project)
        return WaitingTask(project, item.task_id, label_config, version, self._services.needs)

    def _wait(
        self, item: _Pending, project: int | None, label_config: str, area: DrawnArea | None, deadline: float
    ) -> Slot:
        """Wait for one slide. If it is done in time and nobody else has taken the task, answer it here; the push that follows finds it there."""
        timeout = max(0.0, deadline - time.monotonic())
        state = self._services.queue.wait([item.key], timeout).get(item.key)
        if state is None or state.status not in ("finished", "failed"):
            return []
        if state.status == "failed":
            raise _failure(state)
        if not self._services.store.has(item.key):
            raise ResultNotFound(
                f"A worker has finished bag {item.key[:12]}, but its result is not in {self._services.store.url}.",
                hint="Backend and workers must share one RESULTS_URL (or MODEL_DIR).",
            )
        # The task goes on waiting: should this answer not arrive, because we or the connection end first, a push makes up for it.
        return self._answer(item, project, label_config, area) or []


def approximate_bytes(answer: Slot) -> int:
    """About how long an answer is as JSON: its run-length codes, four characters a number, and a little for each region."""
    if not isinstance(answer, dict):
        return 0
    return sum(4 * len(r["value"].get("rle", ())) + 10_000 * ("meta" in r) + 500 for r in answer["result"])


def _in_time(future: Future[_Pending], deadline: float) -> _Pending:
    try:
        return future.result(timeout=max(0.0, deadline - time.monotonic()))
    except FutureTimeout:
        raise DownloadFailed(
            "Its slide was not reached within PREDICT_BATCH_BUDGET_S.", hint="Retrieve predictions again for the rest."
        ) from None


def _failure(state: JobState) -> BackendError:
    error = state.error or {}
    return SlideFailed(str(error.get("message") or "The analysis failed."), hint=str(error.get("hint") or ""))


def project_id(project: object, tasks: Sequence[Task]) -> int | None:
    """The project's number, from ``"1.1795461014"`` as Label Studio sends it, or from the tasks themselves."""
    text = str(project).split(".", 1)[0] if project is not None else ""
    if text.isascii() and text.isdecimal() and len(text) < 19:
        return int(text)
    from_task = tasks[0].get("project") if tasks else None
    return from_task if type(from_task) is int and 0 < from_task < MAX_PROJECT else None


def project_created(project: object) -> int | None:
    """The second (Unix time) in which the project was created, from ``"1.1795461014"``; ``None`` where it is not said."""
    number, _, created = str(project).partition(".")
    if not (
        number.isascii() and number.isdecimal() and created.isascii() and created.isdecimal() and len(created) < 16
    ):
        return None
    return int(created)


__all__ = ["MAX_PROJECT", "Predictor", "SlideFailed", "Slot", "Task", "project_created", "project_id"]
