"""What the queue is asked, and what it answers: small frozen values, all of them JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

QUEUES = ("interactive", "batch", "publish", "train")
"""All queues. ``interactive`` (someone is waiting) goes before ``batch``."""
ANALYSIS_QUEUES = ("interactive", "batch")

# The functions that workers run, by name: the web process enqueues them without importing them.
ANALYSE = "backend.jobs.tasks.analyse"
PUBLISH_BAG = "backend.jobs.tasks.publish_bag"
PUBLISH_TASK = "backend.jobs.tasks.publish_task"
TRAIN = "backend.jobs.tasks.train"
ALLOWED_FUNCTIONS = frozenset({ANALYSE, PUBLISH_BAG, PUBLISH_TASK, TRAIN})


def takes(function: str, args: object) -> bool:
    """Whether ``args`` are such as we enqueue one of our functions with. Something else may write to this Redis."""
    match function, args:
        case (_, [dict() as request]) if function == ANALYSE:
            return _is_key(request.get("key")) and isinstance(request.get("slide"), dict) and _may_need(request)
        case (_, [key]) if function == PUBLISH_BAG:
            return _is_key(key)
        case (_, [key, dict() as waiting]) if function == PUBLISH_TASK:
            numbers = all(type(waiting.get(name)) is int for name in ("project", "task"))
            return (
                numbers
                and _is_key(key)
                and all(isinstance(waiting.get(name), str) for name in ("label_config", "model_version"))
                and _may_need(waiting)
            )
        case (_, [project]) if function == TRAIN:
            return type(project) is int and project > 0
    return False


def _is_key(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40}", value) is not None


def _may_need(value: Mapping[str, Any]) -> bool:
    return value.get("needs", "") == "" or _is_key(value["needs"])


Priority = Literal["interactive", "batch"]
Status = Literal["queued", "started", "finished", "failed"]

# RQ knows more states than a user needs. A retry that waits for its time is "scheduled" there.
_STATUS: Mapping[str, Status] = {
    "started": "started",
    "finished": "finished",
    "failed": "failed",
    "stopped": "failed",
    "canceled": "failed",
}
_ERROR_TEXTS = {"code": 80, "message": 4000, "hint": 4000}  # characters
_MAX_COUNT = 2**53  # beyond, a page's numbers are not exact


@dataclass(frozen=True)
class BagRequest:
    """One bag to compute.

    Attributes
    ----------
    key
        The bag key, 40 hexadecimal digits; also the id of the job.
    slide
        A :class:`backend.slides.source.SlideRef` as JSON. The queue does not look inside.
    needs
        :func:`~backend.inference.key.analysis_digest` of the asker: a worker with another would make another bag, and leaves the job to those that
        fit. Empty: any worker takes it.
    """

    key: str
    slide: dict[str, Any]
    needs: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON values only."""
        return {"key": self.key, "slide": self.slide, **({"needs": self.needs} if self.needs else {})}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BagRequest:
        """The inverse of :meth:`to_json`."""
        return cls(str(value["key"]), dict(value["slide"]), str(value.get("needs", "")))


@dataclass(frozen=True)
class WaitingTask:
    """A Label Studio task that is to get its prediction pushed when its bag is done, by a worker with what it ``needs`` (:class:`BagRequest`)."""

    project: int
    task: int
    label_config: str
    model_version: str
    needs: str = ""

    @property
    def id(self) -> str:
        """``project:task``. A bag has one waiting entry for each."""
        return f"{self.project}:{self.task}"

    def to_json(self) -> dict[str, Any]:
        """JSON values only."""
        return {name: value for name, value in asdict(self).items() if value or name != "needs"}

    def to_text(self) -> str:
        """Canonical JSON text: equal tasks have equal texts."""
        return json.dumps(self.to_json(), sort_keys=True)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> WaitingTask:
        """The inverse of :meth:`to_json`."""
        texts = (str(value["label_config"]), str(value["model_version"]), str(value.get("needs", "")))
        return cls(int(value["project"]), int(value["task"]), *texts)


@dataclass(frozen=True)
class JobState:
    """Where a job stands.

    Attributes
    ----------
    key
        The job's id: the bag key for an analysis.
    status
        ``failed`` includes stopped and cancelled jobs; ``queued`` includes those that wait for another try.
    queue
        Name of the queue it is in or came from.
    stage, done, total, tiles_per_s
        Progress of the running job: what it does now, tiles done of total (0 of 0 while unknown), tiles per second in this stage.
    position
        Place in its queue, 1 for the next; ``None`` unless it lies in the queue.
    error
        :meth:`BackendError.as_dict <backend.errors.BackendError.as_dict>` of the last failure. A queued job has one if it failed and will be tried again.
    worker, device
        Who runs or ran it.
    about
        What it is about, for a list that people read: ``analyse slide-1.tif``, ``push task 5 of project 3``.
    enqueued_at, started_at, ended_at
        ISO 8601, UTC.
    """

    key: str
    status: Status
    queue: str
    stage: str = ""
    done: int = 0
    total: int = 0
    tiles_per_s: float | None = None
    position: int | None = None
    error: dict[str, Any] | None = None
    worker: str = ""
    device: str = ""
    enqueued_at: str | None = None
    started_at: str | None = None
    ended_at: str | None = None
    about: str = ""

    @property
    def settled(self) -> bool:
        """Whether nothing more will happen by itself."""
        return self.status in ("finished", "failed")

    def as_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return asdict(self)


def state_of(key: str, raw: Mapping[bytes, bytes], position: int | None = None) -> JobState | None:
    """The state that an RQ job hash says; ``None`` for a hash that is empty or no job's."""
    if b"data" not in raw or b"status" not in raw:
        return None
    meta = _meta(raw.get(b"meta", b""))
    return JobState(
        key=key,
        status=_STATUS.get(raw[b"status"].decode(errors="replace"), "queued"),
        queue=_text(raw.get(b"origin")),
        stage=_text(meta.get("stage")),
        done=_count(meta.get("done")),
        total=_count(meta.get("total")),
        tiles_per_s=_rate(meta.get("tiles_per_s")),
        position=position,
        error=_error(meta.get("error")),
        worker=_text(raw.get(b"worker_name")),
        device=_text(meta.get("device")),
        enqueued_at=_when(raw.get(b"enqueued_at")),
        started_at=_when(raw.get(b"started_at")),
        ended_at=_when(raw.get(b"ended_at")),
        about=_text(raw.get(b"description"), 1000),
    )


# Something else may write to this Redis: one hash of nonsense must not hide the other jobs from who asks for the list.


def _text(value: object, most: int = 200) -> str:
    """A text as it can be sent, cut after ``most`` characters; empty for what is none."""
    if isinstance(value, bytes):
        return value[: 4 * most].decode(errors="replace")[:most]
    # JSON can spell half a character, which no answer can carry.
    return value[:most].encode(errors="replace").decode() if isinstance(value, str) else ""


def _error(value: object) -> dict[str, Any] | None:
    """The fields of :meth:`BackendError.as_dict <backend.errors.BackendError.as_dict>`, and nothing else that may lie there."""
    if not isinstance(value, dict):
        return None
    texts = {name: _text(value.get(name), most) for name, most in _ERROR_TEXTS.items()}
    return {**texts, "retryable": value.get("retryable") is True}


def _rate(value: object) -> float | None:
    try:
        rate = float(value) if isinstance(value, int | float) else 0.0
    except OverflowError:
        return None
    return rate if math.isfinite(rate) and rate > 0 else None


def _count(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value <= _MAX_COUNT else 0


def _meta(text: bytes) -> dict[str, Any]:
    try:
        meta = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _when(text: bytes | None) -> str | None:
    try:
        return datetime.fromisoformat(text.decode().replace("Z", "+00:00")).isoformat() if text else None
    except ValueError:
        return None
