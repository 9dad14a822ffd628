"""A lease for each job that runs, by Redis' own clock, and how it ends: in one step, whoever ends it.

RQ notes when a running job's worker is to be taken for dead by the clock of the machine that the worker runs on, and ends a job in several
steps. Two machines whose clocks differ would take each other's jobs away, and a Redis that goes away between two of the steps would leave a job
that is in no queue and on no list. Here the time is Redis', and each end is one script: a job is always in exactly one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from redis import Redis
from rq import Queue
from rq.defaults import DEFAULT_RESULT_TTL
from rq.executions import Execution
from rq.job import Job
from rq.registry import FailedJobRegistry, FinishedJobRegistry, ScheduledJobRegistry, StartedJobRegistry
from rq.results import Result
from rq.serializers import JSONSerializer
from rq.utils import now, utcformat

Ended = Literal["done", "alive", "over", "taken over"]
"""What :class:`Leases` did: ``done``, or why not. ``alive``: the lease has been renewed; ``over``: the job does not run (any more);
``taken over``: another worker runs it, whose lease holds."""

LONGEST_S = 660
"""No lease ends later than so long after now, in seconds: the longest ``HEARTBEAT_TTL_S`` and a minute. One that seems to has a clock behind it
that was set back since."""

BUSY_FIELD = "wsc_busy_s"
"""Of a job's Redis hash."""

_NAMES = f"""
local JOB, QUEUE = '{Job.key_for("")}', '{Queue.redis_queue_namespace_prefix}'
local BUSY = '{BUSY_FIELD}'
local LEASES = '{StartedJobRegistry.key_template.format("")}'
local SCHEDULED, FAILED = '{ScheduledJobRegistry.key_template.format("")}', '{FailedJobRegistry.key_template.format("")}'
local FINISHED, RESULTS = '{FinishedJobRegistry.key_template.format("")}', '{Result.get_key("")}'
"""

# The first thing that writes is a removal, here and below: a full Redis allows it, and everything after it in the same script.
_RENEW = (
    _NAMES
    + """
-- ARGV: queue, lease, job's id, seconds, now as RQ writes it, for how many seconds it has run. Returns whether the job is one that runs or is about to.
local status = redis.call('HGET', JOB .. ARGV[3], 'status')
if status ~= 'started' and status ~= 'queued' then return 0 end
redis.call('ZREM', LEASES .. ARGV[1], ARGV[2])
redis.call('ZADD', LEASES .. ARGV[1], redis.call('TIME')[1] + ARGV[4], ARGV[2])
redis.call('HSET', JOB .. ARGV[3], 'last_heartbeat', ARGV[5], BUSY, ARGV[6])
return 1
"""
)

_EXPIRED = (
    _NAMES
    + f"local LONGEST = {LONGEST_S}"
    + """
-- ARGV: queue, seconds. Returns Redis' time, and the leases that have run out.
local now = tonumber(redis.call('TIME')[1])
for _, lease in ipairs(redis.call('ZRANGEBYSCORE', LEASES .. ARGV[1], now + LONGEST, '+inf')) do
    redis.call('ZREM', LEASES .. ARGV[1], lease)
    redis.call('ZADD', LEASES .. ARGV[1], now + ARGV[2], lease)
end
local answer = redis.call('ZRANGEBYSCORE', LEASES .. ARGV[1], '-inf', now)
table.insert(answer, 1, tostring(now))
return answer
"""
)

_END = (
    _NAMES
    + """
-- End a lease. ARGV: lease, job's id, queue, '1' if only one that has run out, outcome, seconds, how many of the next are fields and values of what
-- the job returned, these, then fields and values of the job.
-- Outcomes: 'front' of the queue, 'later' (scheduled in so many seconds), 'finished' and 'failed' (listed for so many seconds).
local returned = tonumber(ARGV[7])
local lease, id, queue, outcome, seconds = ARGV[1], ARGV[2], ARGV[3], ARGV[5], tonumber(ARGV[6])
local time = redis.call('TIME')
local now = tonumber(time[1])
local ends = redis.call('ZSCORE', LEASES .. queue, lease)
if ARGV[4] == '1' and (not ends or tonumber(ends) > now) then return 'alive' end
redis.call('ZREM', LEASES .. queue, lease)
if redis.call('HGET', JOB .. id, 'status') ~= 'started' then return 'over' end
for _, other in ipairs(redis.call('ZRANGEBYSCORE', LEASES .. queue, '(' .. now, '+inf')) do
    if string.sub(other, 1, #id + 1) == id .. ':' then return 'taken over' end
end
redis.call('HSET', JOB .. id, unpack(ARGV, 8 + returned))
if outcome == 'front' then
    redis.call('HSET', JOB .. id, 'status', 'queued', 'worker_name', '')
    redis.call('LPUSH', QUEUE .. queue, id)
elseif outcome == 'later' then
    redis.call('HSET', JOB .. id, 'status', 'scheduled')
    redis.call('ZADD', SCHEDULED .. queue, now + seconds, id)
else
    redis.call('HSET', JOB .. id, 'status', outcome)
    local list = outcome == 'finished' and FINISHED or FAILED
    redis.call('ZADD', list .. queue, string.format('%.6f', now + seconds + time[2] / 1e6), id)  -- listed by when they ended
    redis.call('EXPIRE', JOB .. id, seconds)
    if returned > 0 then
        redis.call('XADD', RESULTS .. id, 'MAXLEN', 10, '*', unpack(ARGV, 8, 7 + returned))
        redis.call('EXPIRE', RESULTS .. id, seconds)
    end
end
return 'done'
"""
)


class Leases:
    """Takes, renews and ends leases. Every method raises what the Redis client raises, and has changed nothing then.

    Parameters
    ----------
    redis
        Connection.
    ttl_s
        How long a lease holds without being renewed, in seconds: ``HEARTBEAT_TTL_S``.
    failure_ttl_s
        How long a job stays listed as failed that does not say so itself, in seconds.
    """

    def __init__(self, redis: Redis, ttl_s: int, failure_ttl_s: int) -> None:
        self._redis: Any = redis
        self._ttl_s = ttl_s
        self._failure_ttl_s = failure_ttl_s
        self._renew = self._redis.register_script(_RENEW)
        self._expired = self._redis.register_script(_EXPIRED)
        self._end = self._redis.register_script(_END)

    def renew(self, job: Job, execution: Execution, *, busy_s: float = 0.0, client: Any = None) -> None:
        """Take the lease of an execution, or renew it, noting for how many seconds it has run. ``client`` may be a pipeline."""
        args = [job.origin, execution.composite_key, job.id, self._ttl_s, utcformat(now()), round(busy_s, 1)]
        self._renew(args=args, client=client)

    def busy_s(self, job: Job) -> float:
        """For how many seconds a job had run at its last heartbeat, by its worker's clock that nobody sets."""
        text = self._redis.hget(job.key, BUSY_FIELD)
        try:
            return float(text or 0)
        except ValueError:
            return 0.0

    def expired(self, queue: str) -> tuple[int, list[str]]:
        """Redis' time (s since 1970), and the leases of a queue that have run out, as ``job:execution``."""
        at, *leases = self._expired(args=[queue, self._ttl_s])
        return int(at), [lease.decode(errors="surrogateescape") for lease in leases]

    def drop(self, lease: str, queue: str) -> None:
        """Remove a lease whose job is gone, or none of ours."""
        self._redis.zrem(StartedJobRegistry.key_template.format(queue), lease.encode(errors="surrogateescape"))

    def give_back(self, job: Job, execution: Execution, queue: str) -> Ended:
        """Put a job that was interrupted back to the front of its queue."""
        return self._ended(execution.composite_key, job.id, queue, "front", 0, {"enqueued_at": utcformat(now())})

    def finish(self, job: Job, execution: Execution, queue: str, result: Result) -> Ended:
        """Record that a job has ended well, and what it returned."""
        ttl_s = job.result_ttl or DEFAULT_RESULT_TTL
        returned = [item for pair in result.serialize().items() for item in pair]
        fields = {"ended_at": utcformat(now())}
        return self._ended(execution.composite_key, job.id, queue, "finished", ttl_s, fields, returned=returned)

    def fail(self, job: Job, execution: Execution, queue: str, failure: dict[str, Any]) -> Ended:
        """Record why a job has failed, and have it tried again in its time if it has tries left (``job.retries_left``)."""
        if job.retries_left:
            fields = self._verdict(job, failure)
            return self._ended(execution.composite_key, job.id, queue, "later", job.get_retry_interval(), fields)
        return self._failed(job, execution.composite_key, queue, failure)

    def fail_abandoned(self, job: Job, lease: str, queue: str, failure: dict[str, Any]) -> Ended:
        """As :meth:`fail` for a job whose lease has run out; another try is due at once, before everything else in the queue."""
        if job.retries_left:
            return self._ended(lease, job.id, queue, "front", 0, self._verdict(job, failure), only_expired=True)
        return self._failed(job, lease, queue, failure, only_expired=True)

    def _failed(
        self, job: Job, lease: str, queue: str, failure: dict[str, Any], *, only_expired: bool = False
    ) -> Ended:
        ttl_s = job.failure_ttl or self._failure_ttl_s
        return self._ended(
            lease, job.id, queue, "failed", ttl_s, self._verdict(job, failure), only_expired=only_expired
        )

    def _verdict(self, job: Job, failure: dict[str, Any]) -> dict[str, Any]:
        at, left = utcformat(now()), job.retries_left or 0
        meta = JSONSerializer.dumps({**job.meta, "error": failure})
        return {"meta": meta, "retries_left": max(0, left - 1), "ended_at": at, **({"enqueued_at": at} if left else {})}

    def _ended(
        self,
        lease: str,
        job_id: str,
        queue: str,
        outcome: Literal["front", "later", "finished", "failed"],
        seconds: int,
        fields: dict[str, Any],
        *,
        only_expired: bool = False,
        returned: Sequence[Any] = (),
    ) -> Ended:
        flat = [item for pair in fields.items() for item in pair]
        given = [lease, job_id, queue, int(only_expired), outcome, seconds, len(returned), *returned, *flat]
        answer: bytes = self._end(args=given)
        return answer.decode()  # type: ignore[return-value]
