"""What all workers have done so far, added up in Redis: for metrics. A tally that cannot be written is lost, and no job with it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import RedisError

from backend.jobs.queue_overview import cannot_serve
from backend.jobs.redis_health import unavailable
from backend.settings import Settings

log = logging.getLogger(__name__)

TALLIES = "wsc:tallies"
"""Redis hash: ``bags``, ``tiles``, ``stage/NAME`` (seconds) and ``failed/FUNCTION/CODE``."""


@dataclass(frozen=True)
class Tallies:
    """Bags and tiles computed, seconds by stage, and failed tries by function and error code, since this Redis is in use."""

    bags: int = 0
    tiles: int = 0
    stage_s: Mapping[str, float] = field(default_factory=dict)
    failures: Mapping[tuple[str, str], int] = field(default_factory=dict)


def note_bag(redis: Any, stage_s: Mapping[str, float], tiles: int) -> None:
    """A bag of so many ``tiles`` was computed; ``stage_s`` are the seconds of its stages."""
    try:
        with redis.pipeline() as pipeline:
            pipeline.hincrby(TALLIES, "bags", 1)
            pipeline.hincrby(TALLIES, "tiles", tiles)
            for stage, seconds in stage_s.items():
                pipeline.hincrbyfloat(TALLIES, f"stage/{stage}", round(seconds, 4))
            pipeline.execute()
    except RedisError as error:
        log.debug("tally not written: %s", error)


def note_failure(redis: Any, function: str, code: str) -> None:
    """A try of a job failed, with this error code."""
    try:
        redis.hincrby(TALLIES, f"failed/{function}/{code}", 1)
    except RedisError as error:
        log.debug("tally not written: %s", error)


def read_tallies(redis: Any, settings: Settings) -> Tallies:
    """All tallies.

    Raises
    ------
    QueueUnavailable
        Redis does not answer.
    """
    try:
        found = redis.hgetall(TALLIES)
    except RedisError as error:
        if cannot_serve(error):
            raise unavailable(error, settings) from error
        log.debug("no tallies: %s", error)
        return Tallies()
    raw = {name.decode(errors="replace"): number for name, value in found.items() if (number := _number(value)) >= 0}
    stages = {name.split("/", 1)[1]: value for name, value in raw.items() if name.startswith("stage/")}
    failures = {
        (parts[1], parts[2]): int(value)
        for name, value in raw.items()
        if len(parts := name.split("/")) == 3 and parts[0] == "failed"
    }
    return Tallies(int(raw.get("bags", 0)), int(raw.get("tiles", 0)), stages, failures)


def _number(value: bytes) -> float:
    """A tally; -1 for what none of ours can be."""
    try:
        number = float(value)
    except ValueError:
        return -1
    return number if math.isfinite(number) else -1
