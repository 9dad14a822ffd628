"""Prometheus metrics of the HTTP process and, read from Redis when asked, of queues and workers."""

from __future__ import annotations

import logging
import time

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from redis.exceptions import ResponseError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backend.errors import QueueUnavailable
from backend.jobs.pushes import job_counts
from backend.jobs.tallies import read_tallies
from backend.label_studio.services import Services

log = logging.getLogger(__name__)

REQUESTS = Counter("wsc_http_requests_total", "HTTP requests by route and status.", ["route", "status"])
SECONDS = Histogram(
    "wsc_http_request_seconds",
    "Seconds to answer, by route.",
    ["route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 60),
)


class Measured:
    """ASGI middleware: counts each request by route and status, and times it until its answer begins.

    Starlette's own way, a function around the request, starts a task and two queues for each: a quarter of a millisecond.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        counted = False

        def count(status: int) -> None:
            nonlocal counted
            counted = True
            # The router has written its route into the scope by now; addresses that are nowhere share one name.
            route = getattr(scope.get("route"), "path", "other")
            REQUESTS.labels(route, str(status)).inc()
            SECONDS.labels(route).observe(time.perf_counter() - started)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            if not counted:
                count(500)  # what a defect is answered with, further out
            raise


def render_metrics(services: Services) -> tuple[bytes, str]:
    """All metrics in Prometheus' text format, and its content type."""
    now = CollectorRegistry()
    up = Gauge("wsc_redis_up", "1 if Redis answers.", registry=now)
    depth = Gauge("wsc_queue_depth", "Jobs waiting, by queue.", ["queue"], registry=now)
    workers = Gauge("wsc_workers", "Live workers, by device and state.", ["device", "state"], registry=now)
    try:
        for queue, jobs in services.queue.depths().items():
            depth.labels(queue).set(jobs)
        for worker in services.queue.workers():
            workers.labels(str(worker.get("device") or "cpu"), str(worker.get("state"))).inc()
        _tallied(services, now)
        up.set(1)
    except QueueUnavailable:
        up.set(0)
    return generate_latest(REGISTRY) + generate_latest(now), CONTENT_TYPE_LATEST


def _tallied(services: Services, registry: CollectorRegistry) -> None:
    """What the workers and trainings have added up, as counters."""
    tallies = read_tallies(services.queue.redis, services.settings)
    Counter("wsc_bags_total", "Bags computed.", registry=registry).inc(tallies.bags)
    Counter("wsc_tiles_total", "Tiles computed.", registry=registry).inc(tallies.tiles)
    stages = Counter("wsc_stage_seconds_total", "Seconds that analyses spent, by stage.", ["stage"], registry=registry)
    for stage, seconds in tallies.stage_s.items():
        stages.labels(stage).inc(seconds)
    failures = Counter("wsc_job_failures_total", "Failed tries of jobs.", ["function", "code"], registry=registry)
    for (function, code), count in tallies.failures.items():
        failures.labels(function, code).inc(count)
    trainings = Counter("wsc_trainings_total", "Trainings started.", registry=registry)
    try:
        trainings.inc(sum(services.training.runs().values()))
    except (ValueError, ResponseError) as error:  # not written by us
        log.debug("trainings cannot be counted: %s", error)
    jobs = Gauge("wsc_jobs", "Jobs that are listed, by status.", ["status"], registry=registry)
    for status, count in job_counts(services.queue).items():
        jobs.labels(status).set(count)
