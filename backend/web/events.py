"""Where bags stand, told as it changes: server-sent events (HTML standard, 9.2) from one look at Redis a second for all who watch.

Fifty open panels cost one round trip a second, whatever they show. A stream ends by itself once nothing more is to be expected,
with an event ``end``; a browser that is refused, or whose proxy swallows streams, asks for the state instead.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import anyio.to_thread

from backend.errors import BackendError
from backend.jobs.pushes import Watched, watched
from backend.jobs.states import JobState
from backend.label_studio.services import Services

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
KEEP_ALIVE_S = 15.0
LINGER_S = 120.0
"""How long a stream goes on after the job has settled: the push to Label Studio comes after it."""

Status = dict[str, Any]


@dataclass
class _Bag:
    """A bag that somebody watches. ``changed`` is replaced by a new event each time ``status`` is."""

    watchers: int = 0
    status: Status | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class StatusHub:
    """Looks at the bags that are watched, as long as any is. Lives in one event loop."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._bags: dict[str, _Bag] = {}
        self._looking: asyncio.Task[None] | None = None
        self._closed = asyncio.Event()
        self._failing = False

    def close(self) -> None:
        """End every stream: the server stops."""
        self._closed.set()
        for bag in self._bags.values():
            bag.changed.set()

    async def stream(self, key: str, project: int | None = None) -> AsyncIterator[str]:
        """The event stream of one bag, as text: its status as :func:`for_project` tells it, now and each time that changes."""
        bag = self._bags.setdefault(key, _Bag())
        bag.watchers += 1
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        try:
            yield "retry: 3000\n\n"
            told: Status | None = None
            settled_at: float | None = None
            while not self._closed.is_set():
                changed = bag.changed
                status = None if bag.status is None else for_project(bag.status, project)
                if status is not None and status != told:
                    told = status
                    yield f"event: status\ndata: {json.dumps(told)}\n\n"
                    if told["phase"] not in ("done", "failed"):
                        settled_at = None
                    elif settled_at is None:
                        settled_at = time.monotonic()
                if settled_at is not None and time.monotonic() - settled_at > LINGER_S:
                    break
                try:
                    await asyncio.wait_for(changed.wait(), KEEP_ALIVE_S)
                except asyncio.TimeoutError:  # in Python 3.10 not yet the built-in one
                    yield ": still here\n\n"
            yield "event: end\ndata: {}\n\n"
        finally:
            bag.watchers -= 1
            if not bag.watchers and self._bags.get(key) is bag:
                del self._bags[key]

    async def _look(self) -> None:
        while self._bags and not self._closed.is_set():
            keys = list(self._bags)
            # A result stays: a store that lies elsewhere is not asked each second for what was there the second before.
            stored = {
                key for key, bag in self._bags.items() if bag.status is not None and bag.status["phase"] == "done"
            }
            try:
                found = await anyio.to_thread.run_sync(read_statuses, self._services, keys, stored)
            except Exception:
                # The next look may succeed; without one, every panel that is open would wait for ever.
                if not self._failing:
                    log.exception("panels cannot be told where their jobs stand")
                self._failing, found = True, {}
            else:
                self._failing = False
            for key, status in found.items():
                bag = self._bags.get(key)
                if bag is not None and bag.status != status:
                    bag.status = status
                    waiting, bag.changed = bag.changed, asyncio.Event()
                    waiting.set()
            await asyncio.sleep(LOOK_EVERY_S)


def read_statuses(services: Services, keys: Iterable[str], stored: Collection[str] = frozenset()) -> dict[str, Status]:
    """Where each bag stands, as :func:`status_of` says it; phase ``unavailable`` where Redis does not answer.

    ``stored``: keys that are known to have a result, for which the store is not asked.
    """
    keys = list(keys)
    try:
        states = services.queue.listed(keys)
        marks = watched(services.queue, keys)
    except BackendError as error:
        log.warning("panels cannot be told where their jobs stand: %s", error)
        return {key: _unavailable(services, key, error) for key in keys}
    return {key: _guarded(services, key, states.get(key), marks[key], known=key in stored) for key in keys}


def status_of(state: JobState | None, marks: Watched, *, stored: bool, label_studio_url: str) -> Status:
    """One bag's status, JSON values only.

    ``phase``
        ``idle`` (nobody has asked for it), ``queued``, ``running``, ``failed``, ``done`` (its result is stored) or ``unavailable``.
    ``job``
        :meth:`JobState.as_dict <backend.jobs.states.JobState.as_dict>`, if one is listed, and ``left_s``, seconds to go in this stage.
    ``pushes``
        Predictions pushed in the last day: ``project``, ``task``, ``at`` (s since 1970), ``url`` of the task.
    ``waiting``
        ``project:task`` that will be pushed to.
    """
    if stored:
        phase = "done"
    elif state is None or state.status == "finished":  # finished and not stored: the result was deleted since
        phase = "idle"
    else:
        phase = {"queued": "queued", "started": "running", "failed": "failed"}[state.status]
    job = None
    if state is not None:
        left = None
        if phase == "running" and state.tiles_per_s and state.total > state.done:
            seconds = (state.total - state.done) / state.tiles_per_s
            left = round(seconds, 1) if math.isfinite(seconds) else None
        job = {**state.as_dict(), "left_s": left}
    pushes = [
        {
            "project": push.project,
            "task": push.task,
            "at": push.at,
            "url": f"{label_studio_url}/projects/{push.project}/data?task={push.task}" if label_studio_url else "",
        }
        for push in marks.pushes
    ]
    return {"phase": phase, "job": job, "pushes": pushes, "waiting": list(marks.waiting), "error": None}


def for_project(status: Status, project: int | None) -> Status:
    """``status`` for whoever has an address that was made for ``project``: nothing of tasks of others, nor of any without a project."""
    return {
        **status,
        "pushes": [push for push in status["pushes"] if push["project"] == project],
        "waiting": [task for task in status["waiting"] if task.partition(":")[0] == str(project)],
    }


def _guarded(services: Services, key: str, state: JobState | None, marks: Watched, *, known: bool) -> Status:
    busy = state is not None and state.status in ("queued", "started")
    try:
        stored = not busy and (known or services.store.has(key))
    except BackendError as error:
        log.warning("the store cannot be asked for %s: %s", key, error)
        return {"phase": "unavailable", "job": None, "pushes": [], "waiting": [], "error": error.as_dict()}
    return status_of(state, marks, stored=stored, label_studio_url=services.settings.label_studio_browser_url)


def _unavailable(services: Services, key: str, error: BackendError) -> Status:
    """Redis is away: a stored result can be shown all the same."""
    try:
        stored = services.store.has(key)
    except BackendError:
        stored = False
    phase = "done" if stored else "unavailable"
    return {"phase": phase, "job": None, "pushes": [], "waiting": [], "error": error.as_dict()}
