"""What is wrong with a Redis: why it does not answer, and whether one that answers can keep what the queue promises.

The queue's promise, that no slide is lost, is as good as the Redis behind it: see *What "never lost" rests on* in docs/RELIABILITY.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterCrossSlotError,
    ClusterDownError,
    InvalidResponse,
    MasterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from backend.errors import QueueUnavailable, RedisUnfit
from backend.reasons import NO_ANSWER, Reason, causes, network_reason
from backend.redaction import ENCODE_HINT, shown_address
from backend.settings import Settings

LEAST_VERSION = (6, 0, 6)
"""HELLO, by which the client greets, is of 6.0; LPOS, by which a job's place in its queue is found, of 6.0.6."""
NEARLY_FULL = 0.9

Verdict = Literal["problem", "warning"]

# By what a Redis refuses with (the first word of its answer): what that means, and who can end it. Its client takes some of these words off, and makes
# a class of its own of each.
_REFUSALS = {
    "MISCONF": ("it cannot write to its disk and so takes nothing", "Make room on its disk; see its log."),
    "OOM": ("its memory is full", "Raise its maxmemory, or remove what else it holds."),
    "NOREPLICAS": ("it has too few replicas to take anything", "See min-replicas-to-write in its configuration."),
    "READONLY": ("it is a replica, which takes nothing", "Set REDIS_URL to the primary."),
    "MASTERDOWN": ("it is a replica that has lost its primary", "Set REDIS_URL to the primary."),
    "CLUSTERDOWN": ("it is a cluster, and not whole", "Set REDIS_URL to a single Redis: a cluster cannot be used."),
    "MOVED": ("it is a cluster", "Set REDIS_URL to a single Redis: a cluster cannot be used."),
    "CROSSSLOT": ("it is a cluster", "Set REDIS_URL to a single Redis: a cluster cannot be used."),
    "BUSY": ("a script holds it up", "Wait, or end the script with SCRIPT KILL."),
}


_CLASSES: tuple[tuple[type[Exception], str], ...] = (
    (OutOfMemoryError, "OOM"),
    (ReadOnlyError, "READONLY"),
    (MasterDownError, "MASTERDOWN"),
    (ClusterDownError, "CLUSTERDOWN"),
    (MovedError, "MOVED"),
    (ClusterCrossSlotError, "CROSSSLOT"),
)


@dataclass(frozen=True)
class Remark:
    """``problem``: the queue cannot work with this Redis; ``warning``: it can lose what it was given. In words, and what to do."""

    verdict: Verdict
    text: str
    hint: str


def redis_reason(error: BaseException) -> Reason:
    """Why a Redis cannot be used, out of what its client raised."""
    chain = list(causes(error))
    said = " ".join(str(cause) for cause in chain)
    if re.search("NOAUTH|already authenticated|Authentication required", said):
        return Reason("it wants a password", f"Write it into REDIS_URL: redis://:password@host:6379/0. {ENCODE_HINT}")
    if any(isinstance(cause, AuthenticationError) for cause in chain) or "WRONGPASS" in said:
        return Reason("it refuses the user or password", f"Correct the password in REDIS_URL. {ENCODE_HINT}")
    if any(isinstance(cause, NoPermissionError) for cause in chain) or "NOPERM" in said:
        return Reason(
            "its user may not do what the queue needs",
            "Allow this user all commands on the keys ~rq:* and ~wsc:* (ACL SETUSER).",
        )
    if any(isinstance(cause, BusyLoadingError) for cause in chain) or "LOADING" in said:
        return Reason("it is loading its data", "Wait.")
    if any(isinstance(cause, InvalidResponse) for cause in chain) or "Protocol Error" in said:
        return Reason("what answers there is no Redis", "Correct the host and port in REDIS_URL.")
    if "unknown command" in said and "HELLO" in said:
        return Reason(
            f"it is older than Redis {_dotted(LEAST_VERSION)}",
            f"Use Redis {_dotted(LEAST_VERSION)} or later, or Valkey.",
        )
    if "used memory > 'maxmemory'" in said:
        said += " OOM"
    said += "".join(f" {word}" for kind, word in _CLASSES if any(isinstance(cause, kind) for cause in chain))
    for word, (text, hint) in _REFUSALS.items():
        if re.search(rf"\b{word}\b", said):
            return Reason(f"{text} ({word})", hint)
    found = network_reason(error)
    if found is not None:
        return found
    # What its client says may repeat the address; what the server says does not.
    text = said.splitlines()[0][:200].rstrip(".") if isinstance(error, ResponseError) and said else type(error).__name__
    return Reason(text, "Start it, or correct REDIS_URL.")


def unavailable(error: Exception, settings: Settings) -> QueueUnavailable:
    """``error`` of the Redis client as :class:`~backend.errors.QueueUnavailable`, saying which Redis, why, and what to do."""
    given, reason = settings.redis_url.get_secret_value(), redis_reason(error)
    if given.startswith("rediss://") and reason.text == NO_ANSWER:
        # To a Redis without TLS the greeting is the beginning of a long command, for whose end it waits.
        reason = Reason(
            f"{NO_ANSWER} to the greeting by TLS",
            "If this port is one without TLS, write redis:// instead of rediss://.",
        )
    if given:
        return QueueUnavailable(
            f"Redis at {shown_address(given)} does not answer: {reason.text}.",
            hint=f"{reason.hint} Leave REDIS_URL empty to use the embedded one.",
        )
    return QueueUnavailable(
        f"The embedded Redis in {settings.model_dir / 'redis'} does not answer: {reason.text}.",
        hint="It runs as long as `wsc-backend serve` or `wsc-backend demo` does; or set REDIS_URL to a Redis of your own.",
    )


def examine_redis(redis: Any) -> list[Remark]:
    """What of a Redis the queue cannot work with, or can lose work by; the problems first.

    Asks INFO, which every Redis answers, and CONFIG GET where that is allowed (managed ones refuse it).

    Raises
    ------
    RedisError
        It does not answer.
    """
    info: dict[str, Any] = redis.info("all")
    found = [*_unfit(info), *_evicts(info), *_forgets(redis, info), *_nearly_full(info)]
    return sorted(found, key=lambda remark: remark.verdict != "problem")


def need_fit(redis: Any, where: str) -> list[Remark]:
    """The warnings of :func:`examine_redis`.

    Raises
    ------
    RedisUnfit
        There is a problem.
    RedisError
        Redis does not answer.
    """
    remarks = examine_redis(redis)
    problems = [remark for remark in remarks if remark.verdict == "problem"]
    if problems:
        raise RedisUnfit(f"Redis at {where} cannot be used: {problems[0].text}.", hint=problems[0].hint)
    return remarks


def _unfit(info: dict[str, Any]) -> Iterator[Remark]:
    # Valkey goes on counting where Redis 7.2 stood, and says so in this field.
    version = str(info.get("redis_version", ""))
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if numbers and numbers < LEAST_VERSION:
        yield Remark("problem", f"it is Redis {version}", f"Use Redis {_dotted(LEAST_VERSION)} or later, or Valkey.")
    if info.get("cluster_enabled") == 1:
        yield Remark(
            "problem",
            "it is a cluster (cluster_enabled), in which one step cannot change several keys",
            "Set REDIS_URL to a Redis without cluster mode.",
        )
    if info.get("role") in ("slave", "replica"):
        yield Remark("problem", "it is a replica, which takes nothing", "Set REDIS_URL to the primary.")


def _evicts(info: dict[str, Any]) -> Iterator[Remark]:
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction":
        when = "when its memory is full" if info.get("maxmemory") else "as soon as a maxmemory is set"
        yield Remark(
            "warning",
            f"maxmemory-policy is {policy}: {when}, queued slides are thrown away without a word",
            "Set maxmemory-policy noeviction (a Redis of its own for the queue, not one that caches).",
        )


def _forgets(redis: Any, info: dict[str, Any]) -> Iterator[Remark]:
    if info.get("loading") == 1:
        return
    if info.get("aof_last_write_status") not in (None, "ok") or info.get("rdb_last_bgsave_status") not in (None, "ok"):
        yield Remark(
            "warning", "its last attempt to write its data to disk failed", "Make room on its disk; see its log."
        )
    if info.get("aof_enabled") != 0:  # a managed one may not say
        return
    try:
        snapshots = str(redis.config_get("save").get("save", "?"))
    except RedisError:
        snapshots = "?"
    lost = {
        "": "it keeps nothing on disk: a restart of it loses every queued slide",
        "?": "it keeps no append-only file: a restart of it may lose queued slides",
    }.get(
        snapshots,
        f"it keeps no append-only file, only snapshots ({snapshots}): a restart of it loses what was queued since the last",
    )
    yield Remark("warning", lost, "Set appendonly yes (of a managed Redis: switch persistence on).")


def _nearly_full(info: dict[str, Any]) -> Iterator[Remark]:
    most, used = int(info.get("maxmemory") or 0), int(info.get("used_memory") or 0)
    if most and used > NEARLY_FULL * most:
        yield Remark(
            "warning",
            f"{used / 2**20:.0f} of its {most / 2**20:.0f} MiB are used: once it is full it takes no more slides",
            "Raise its maxmemory, or remove what else it holds.",
        )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
