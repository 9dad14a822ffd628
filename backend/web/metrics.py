"""Prometheus metrics of the HTTP process and, read from Redis when asked, of queues and workers."""

from __future__ import annotations

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from backend.errors import QueueUnavailable
from backend.label_studio.services import Services

REQUESTS = Counter("wsc_http_requests_total", "HTTP requests by route and status.", ["route", "status"])
SECONDS = Histogram(
    "wsc_http_request_seconds",
    "Seconds to answer, by route.",
    ["route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 60),
)


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
        up.set(1)
    except QueueUnavailable:
        up.set(0)
    return generate_latest(REGISTRY) + generate_latest(now), CONTENT_TYPE_LATEST
