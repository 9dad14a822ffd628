"""The steps on Redis that must happen as one, as Lua. RQ's own keys are named by RQ; ours begin with ``wsc:``.

RQ offers ``enqueue(unique=True)``: it refuses a second job of one id. Between that refusal and what has to follow (is the
other one finished? has it failed? must it move to a faster queue? is the task that waits for it written down?) another process
may act, so all of it is one script here. Keys are composed inside the scripts: made for a single Redis, not for a cluster.
"""

from __future__ import annotations

from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry, FinishedJobRegistry, ScheduledJobRegistry
from rq.results import Result

WAITING_INDEX = "wsc:waiting"
"""Sorted set of the bag keys that some task waits for, scored by the time (s) since when."""
POPPED = "wsc:popped"
"""Sorted set ``queue id`` of jobs taken from a queue and not yet marked as started, scored by the time (s)."""

UNFIT = "wsc:unfit"
"""Sorted set ``queue:needs`` of the lists of jobs that no worker that met them fits, scored by when one was put there last (s); see :func:`unfit_key`."""
NEEDS_FIELD = "wsc_needs"
"""Of a job's Redis hash: which model and settings its worker must have."""

LONGEST_RETRY_S = 600
"""No retry of an analysis or a push is put off for so long, in seconds."""


def waiting_key(bag_key: str) -> str:
    """Redis hash of the tasks that wait for a bag: ``project:task`` → JSON of the WaitingTask."""
    return f"wsc:waiting:{bag_key}"


def unfit_key(queue_and_needs: str) -> str:
    """Redis list of the jobs, taken out of ``queue``, that wait for a worker with what they need."""
    return f"{UNFIT}:{queue_and_needs}"


def answer_key(project: int, task: int, model_version: str) -> str:
    """Redis key that is held while somebody hands out the prediction of this task."""
    return f"wsc:answer:{project}:{task}:{model_version}"


def waited_key(bag_key: str) -> str:
    """As :func:`waiting_key`, of the tasks that waited when the bag failed: should it be tried again, they wait again."""
    return f"wsc:waited:{bag_key}"


def again_key(what: str) -> str:
    """Redis counter of how often something was begun again that should not need it."""
    return f"wsc:again:{what}"


TRAIN_AGAIN = "wsc:train:again"
"""Set of the projects for which training was asked while one ran."""


DISCONNECTED = "wsc:train:disconnected"
"""Set of the projects that were found not to be connected to this backend."""


TRAINED = "wsc:trained"
"""Hash: how many trainings of each project were started."""


def training_key(project: int) -> str:
    """Redis hash of what was asked of a project's next training: ``events``, and ``first`` (when, s)."""
    return f"wsc:train:{project}"


def training_lock_key(project: int) -> str:
    """Redis key that is held while somebody trains a project."""
    return f"wsc:training:{project}"


def config_key(project: int) -> str:
    """Redis key of a project's labelling config as it was last seen."""
    return f"wsc:config:{project}"


_NAMES = f"""
local JOB, QUEUE, QUEUES = '{Job.key_for("")}', '{Queue.redis_queue_namespace_prefix}', '{Queue.redis_queues_keys}'
local RESULTS, SCHEDULED = '{Result.get_key("")}', '{ScheduledJobRegistry.key_template.format("")}'
local FINISHED, FAILED = '{FinishedJobRegistry.key_template.format("")}', '{FailedJobRegistry.key_template.format("")}'
local INDEX, POPPED = '{WAITING_INDEX}', '{POPPED}'
local UNFIT, NEEDS = '{UNFIT}', '{NEEDS_FIELD}'
"""

# Write a job afresh, whatever its former self left behind, and put it at the end of its queue (or there in `delay` seconds).
_CREATE = """
local function leave_unfit(id, queue)  -- out of the list of those that wait for a worker that fits; whether it was there
    local place = queue .. ':' .. (redis.call('HGET', JOB .. id, NEEDS) or '')
    local there = redis.call('LREM', UNFIT .. ':' .. place, 1, id) == 1
    if there and redis.call('EXISTS', UNFIT .. ':' .. place) == 0 then redis.call('ZREM', UNFIT, place) end
    return there
end

local function create(id, queue, delay, first_field)
    local origin = redis.call('HGET', JOB .. id, 'origin')
    local needs = redis.call('HGET', JOB .. id, NEEDS)
    if origin then
        for _, registry in ipairs({FINISHED, FAILED, SCHEDULED}) do redis.call('ZREM', registry .. origin, id) end
    end
    redis.call('DEL', JOB .. id, RESULTS .. id)
    redis.call('HSET', JOB .. id, unpack(ARGV, first_field))
    if needs then redis.call('HSETNX', JOB .. id, NEEDS, needs) end
    redis.call('SADD', QUEUES, QUEUE .. queue)
    if tonumber(delay) > 0 then
        redis.call('HSET', JOB .. id, 'status', 'scheduled')
        redis.call('ZADD', SCHEDULED .. queue, redis.call('TIME')[1] + delay, id)
    else
        redis.call('RPUSH', QUEUE .. queue, id)
    end
end

local function status_of(id)
    if redis.call('HEXISTS', JOB .. id, 'data') == 0 then return false end
    return redis.call('HGET', JOB .. id, 'status')
end

local function forget_waiting(waiting, field, bag)
    redis.call('HDEL', waiting, field)
    if redis.call('EXISTS', waiting) == 0 then redis.call('ZREM', INDEX, bag) end
end
"""

SUBMIT = (
    _NAMES
    + _CREATE
    + """
-- KEYS: waiting hash. ARGV: id, queue, waiting field ('' for none), its value, force ('1' or '0'), delay, then the job's fields.
-- Returns 'created', 'refused' (it has failed for good), or the status of the live job: 'queued', 'started', 'scheduled'.
local id, queue, field, value, force = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if field ~= '' then  -- first of all, so that a job that ends just now finds it
    redis.call('HSET', KEYS[1], field, value)
    redis.call('ZADD', INDEX, 'NX', redis.call('TIME')[1], id)
end
local status = status_of(id)
if status == 'queued' then
    local origin = redis.call('HGET', JOB .. id, 'origin')
    if queue == 'interactive' and origin ~= queue
            and (redis.call('LREM', QUEUE .. origin, 1, id) == 1 or leave_unfit(id, origin)) then
        redis.call('HSET', JOB .. id, 'origin', queue)
        redis.call('SADD', QUEUES, QUEUE .. queue)
        redis.call('RPUSH', QUEUE .. queue, id)
    end
    return status
end
if status == 'scheduled' and queue == 'interactive' then  -- somebody waits: the next try is now, and before those of a batch
    local origin = redis.call('HGET', JOB .. id, 'origin')
    if redis.call('ZREM', SCHEDULED .. origin, id) == 1 then
        redis.call('HSET', JOB .. id, 'status', 'queued', 'origin', queue)
        redis.call('SADD', QUEUES, QUEUE .. queue)
        redis.call('RPUSH', QUEUE .. queue, id)
        status = 'queued'
    end
    return status
end
if status == 'scheduled' and queue == 'publish' then  -- sooner, if asked for sooner
    local due = redis.call('TIME')[1] + ARGV[6]
    if due < tonumber(redis.call('ZSCORE', SCHEDULED .. queue, id) or due) then
        redis.call('ZADD', SCHEDULED .. queue, due, id)
    end
    return status
end
if status == 'failed' and force == '0' then
    local ok, meta = pcall(cjson.decode, redis.call('HGET', JOB .. id, 'meta') or '')
    if ok and type(meta) == 'table' and type(meta.error) == 'table' and meta.error.retryable == false
            and meta.error.code ~= 'model_mismatch' then  -- that was for want of a worker that fits
        if field ~= '' then forget_waiting(KEYS[1], field, id) end
        return 'refused'
    end
end
if status and status ~= 'finished' and status ~= 'failed' and status ~= 'stopped' and status ~= 'canceled' then
    return status
end
create(id, queue, ARGV[6], 7)
return 'created'
"""
)

REQUEST_TRAINING = (
    _NAMES
    + _CREATE
    + f"""
local AGAIN = '{TRAIN_AGAIN}'
"""
    + """
-- Have a project trained: now, or some time after the last event. KEYS: hash of what was asked.
-- ARGV: id, queue, project, events, events that are enough, delay (s, 0: now), longest delay (times the delay), then the job's fields.
-- Returns 'scheduled', 'queued', or 'again' (it runs now, and will run once more).
local id, queue, delay = ARGV[1], ARGV[2], tonumber(ARGV[6])
local at = tonumber(redis.call('TIME')[1])
local events = redis.call('HINCRBY', KEYS[1], 'events', ARGV[4])
redis.call('HSETNX', KEYS[1], 'first', at)
local latest = redis.call('HGET', KEYS[1], 'first') + ARGV[7] * delay
if events >= tonumber(ARGV[5]) or latest <= at then delay = 0 end
local status = status_of(id)
if status == 'started' then
    redis.call('SADD', AGAIN, ARGV[3])
    return 'again'
end
for i = 8, #ARGV - 1, 2 do  -- who asks may have another model than who asked before
    if status and ARGV[i] == NEEDS and ARGV[i + 1] ~= redis.call('HGET', JOB .. id, NEEDS) then
        local unfit = leave_unfit(id, queue)
        redis.call('HSET', JOB .. id, NEEDS, ARGV[i + 1])
        if unfit then redis.call('RPUSH', QUEUE .. queue, id) end
    end
end
if status == 'queued' then
    return status
elseif status == 'scheduled' and delay == 0 then
    redis.call('ZREM', SCHEDULED .. queue, id)
    redis.call('HSET', JOB .. id, 'status', 'queued')
    redis.call('RPUSH', QUEUE .. queue, id)
    return 'queued'
elseif status == 'scheduled' then
    redis.call('ZADD', SCHEDULED .. queue, 'XX', math.ceil(math.min(at + delay, latest)), id)
    return status
end
create(id, queue, math.ceil(delay), 8)
return delay > 0 and 'scheduled' or 'queued'
"""
)

MOVE_WAITING = (
    _NAMES
    + _CREATE
    + """
-- Turn one waiting task into a publish job. KEYS: waiting hash.
-- ARGV: bag key, waiting field, the value it must still have, id, queue, then the job's fields.
local bag, field, value, id = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if redis.call('HGET', KEYS[1], field) ~= value then return 0 end
forget_waiting(KEYS[1], field, bag)
local status = status_of(id)
if status == 'queued' or status == 'started' or status == 'scheduled' then return 0 end
create(id, ARGV[5], 0, 6)
return 1
"""
)

TAKE_WAITING = (
    _NAMES
    + """
-- KEYS: waiting hash. ARGV: bag key, field. Returns whether the task was waiting.
local removed = redis.call('HDEL', KEYS[1], ARGV[2])
if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('ZREM', INDEX, ARGV[1]) end
return removed
"""
)

DRAIN_WAITING = (
    _NAMES
    + _CREATE
    + """
-- KEYS: waiting hash. ARGV: bag key, '1' to do nothing while the bag's job is live. Returns all values, and leaves none.
local status = status_of(ARGV[1])
if ARGV[2] == '1' and (status == 'queued' or status == 'started' or status == 'scheduled') then return {} end
local values = redis.call('HVALS', KEYS[1])
redis.call('DEL', KEYS[1])
redis.call('ZREM', INDEX, ARGV[1])
return values
"""
)

SAVE_META = (
    _NAMES
    + """
-- Write a job's progress, unless the job is gone. ARGV: id, meta.
if redis.call('HEXISTS', JOB .. ARGV[1], 'data') == 1 then redis.call('HSET', JOB .. ARGV[1], 'meta', ARGV[2]) end
"""
)

RENEW = """
-- Hold a key on if it is still ours. KEYS: the key. ARGV: our token, milliseconds. Returns whether it is.
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 0
"""

RELEASE = """
-- Give a key back if it is still ours. KEYS: the key. ARGV: our token.
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""

POP = (
    _NAMES
    + """
-- Take the next job that the worker fits. ARGV: the worker's digest of model and settings ('' fits all), what is noted of a job that it does not fit
-- (its meta), queue names in order of priority. Returns {queue, id, how many it did not fit}; queue and id are '' if there is none.
-- RQ pops with BLPOP: a worker killed before it marked the job as started would lose it. Here the job is noted in the same step.
-- An id that is in a queue twice, or whose job is gone, is passed over. A job that the worker does not fit is put aside, for one that does.
local own, unfit, now = ARGV[1], 0, redis.call('TIME')[1]
for i = 3, #ARGV do
    local queue = ARGV[i]
    local aside = queue .. ':' .. own
    while true do
        local id = own ~= '' and redis.call('LPOP', UNFIT .. ':' .. aside)
        if id then
            if redis.call('EXISTS', UNFIT .. ':' .. aside) == 0 then redis.call('ZREM', UNFIT, aside) end
        else
            id = redis.call('LPOP', QUEUE .. queue)
        end
        if not id then break end
        if redis.call('HGET', JOB .. id, 'status') == 'queued' then
            local needs = redis.call('HGET', JOB .. id, NEEDS) or ''
            if own == '' or needs == own or #needs ~= 40 or string.find(needs, '[^0-9a-f]') then
                redis.call('ZADD', POPPED, now, queue .. ' ' .. id)
                return {queue, id, unfit}
            end
            redis.call('RPUSH', UNFIT .. ':' .. queue .. ':' .. needs, id)
            redis.call('ZADD', UNFIT, now, queue .. ':' .. needs)
            redis.call('HSET', JOB .. id, 'meta', ARGV[2])
            unfit = unfit + 1
        end
    end
end
return {'', '', unfit}
"""
)

EXPIRE_UNFIT = (
    _NAMES
    + """
-- Give up what has waited too long for a worker that fits. ARGV: age in seconds. Returns the ids.
local given_up, time = {}, redis.call('TIME')
for _, place in ipairs(redis.call('ZRANGEBYSCORE', UNFIT, '-inf', time[1] - ARGV[1], 'LIMIT', 0, 10)) do
    local queue = string.match(place, '^(%a+):')
    for _ = 1, 500 do
        local id = redis.call('LPOP', UNFIT .. ':' .. place)
        if not id then break end
        if queue and redis.call('HGET', JOB .. id, 'status') == 'queued' then
            redis.call('HSET', JOB .. id, 'status', 'failed')
            redis.call('ZADD', FAILED .. queue, string.format('%.6f', time[1] + ARGV[1] + time[2] / 1e6), id)
            redis.call('EXPIRE', JOB .. id, ARGV[1])
            table.insert(given_up, id)
        end
    end
    if redis.call('EXISTS', UNFIT .. ':' .. place) == 0 then redis.call('ZREM', UNFIT, place) end
end
return given_up
"""
)

RECOVER_POPPED = (
    _NAMES
    + """
-- Put back what was taken and never started. ARGV: age in seconds. Returns the ids.
local recovered, now = {}, tonumber(redis.call('TIME')[1])
for _, entry in ipairs(redis.call('ZRANGEBYSCORE', POPPED, now + 1, '+inf')) do  -- the clock was set back
    redis.call('ZREM', POPPED, entry)
    redis.call('ZADD', POPPED, now, entry)
end
for _, entry in ipairs(redis.call('ZRANGEBYSCORE', POPPED, '-inf', now - ARGV[1], 'LIMIT', 0, 100)) do
    redis.call('ZREM', POPPED, entry)
    local queue, id = string.match(entry, '^(%S+) (%S+)$')
    if id and redis.call('HGET', JOB .. id, 'status') == 'queued' then
        redis.call('LPUSH', QUEUE .. queue, id)
        table.insert(recovered, id)
    end
end
return recovered
"""
)

MOVE_DUE = (
    _NAMES
    + _CREATE
    + f"local LONGEST_RETRY_S = {LONGEST_RETRY_S}"
    + """
-- Queue the retries whose time has come (RQ needs a process of its own for this). ARGV: now as RQ writes it, queue names.
-- A retry that is not due for longer than any is put off was put off before the clock was set back. (Trainings wait as long as they are told.)
local moved, now = 0, tonumber(redis.call('TIME')[1])
for i = 2, #ARGV do
    local registry = SCHEDULED .. ARGV[i]
    if ARGV[i] ~= 'train' then
        for _, id in ipairs(redis.call('ZRANGEBYSCORE', registry, now + LONGEST_RETRY_S, '+inf', 'LIMIT', 0, 500)) do
            redis.call('ZADD', registry, 'XX', now, id)
        end
    end
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', registry, '-inf', now, 'LIMIT', 0, 500)) do
        redis.call('ZREM', registry, id)
        if status_of(id) == 'scheduled' then
            redis.call('HSET', JOB .. id, 'status', 'queued', 'enqueued_at', ARGV[1], 'origin', ARGV[i])
            redis.call('RPUSH', QUEUE .. ARGV[i], id)
            moved = moved + 1
        end
    end
end
return moved
"""
)
