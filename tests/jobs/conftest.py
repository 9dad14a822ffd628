"""Settings and a queue on the run's Redis."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis import Redis

from backend.jobs.queue import BagQueue
from backend.jobs.redis_server import EmbeddedRedis
from backend.settings import Settings


@pytest.fixture
def settings(tmp_path: Path, embedded_redis: EmbeddedRedis) -> Settings:
    """A worker counts as dead after five silent seconds."""
    return Settings(model_dir=tmp_path, redis_url=embedded_redis.url, heartbeat_ttl_s=5, job_retries=2, devices="cpu")


@pytest.fixture
def queue(settings: Settings, redis: Redis) -> BagQueue:
    return BagQueue(settings, redis)
