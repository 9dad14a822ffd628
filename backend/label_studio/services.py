"""What answering Label Studio needs, built once for a process: settings, Redis, queue, store, resolver, model identity."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from redis import Redis

from backend.inference.checkpoint import ModelIdentity, model_identity
from backend.inference.key import analysis_digest, bag_key
from backend.jobs.queue import BagQueue, BagRequest
from backend.jobs.redis_server import connect
from backend.jobs.redis_watch import RedisWatch
from backend.jobs.training import TrainingQueue
from backend.kept_key import kept_key
from backend.label_studio.client import LabelStudioClient
from backend.label_studio.versions import ProjectVersions
from backend.results.store import ResultStore
from backend.settings import Settings, get_settings
from backend.slides.source import SlideRef, SourceResolver
from backend.slides.thumbnails import ThumbnailStore


@dataclass(frozen=True, eq=False)
class Services:
    """Everything that the label_studio room works with. Parts are made when first asked for.

    ``redis`` may be handed in; otherwise it is found by the settings, and
    :class:`~backend.errors.QueueUnavailable` says what to do where there is none.
    """

    settings: Settings
    given_redis: Redis | None = None

    @cached_property
    def redis(self) -> Redis:
        return self.given_redis or connect(self.settings)

    @cached_property
    def redis_watch(self) -> RedisWatch:
        return RedisWatch(self.settings)

    @cached_property
    def queue(self) -> BagQueue:
        return BagQueue(self.settings, self.redis)

    @cached_property
    def training(self) -> TrainingQueue:
        return TrainingQueue(self.queue, lambda: self.needs)

    @cached_property
    def versions(self) -> ProjectVersions:
        return ProjectVersions(self.settings.model_dir / "heads", self.model, self.settings.label_studio_url)

    @cached_property
    def webhook_secret(self) -> str:
        """What a webhook must carry: the setting, else a secret made once."""
        given = self.settings.webhook_secret.get_secret_value()
        return given or kept_key(self.settings.model_dir / "webhook.key").hex()

    @cached_property
    def store(self) -> ResultStore:
        return ResultStore(self.settings.results_location)

    @cached_property
    def thumbnails(self) -> ThumbnailStore:
        return ThumbnailStore(self.settings.model_dir)

    @cached_property
    def client(self) -> LabelStudioClient:
        return LabelStudioClient(self.settings)

    @cached_property
    def resolver(self) -> SourceResolver:
        return SourceResolver(self.settings, label_studio_headers=self.label_studio_headers)

    @cached_property
    def model(self) -> ModelIdentity:
        return model_identity(self.settings)

    @cached_property
    def needs(self) -> str:
        """The model and settings that a worker must have to do what is asked here, as a digest."""
        return analysis_digest(self.model, self.settings)

    def request(self, ref: SlideRef) -> BagRequest:
        """What the queue is asked for a slide."""
        return BagRequest(self.key(ref), ref.to_json(), self.needs)

    def close(self) -> None:
        """Close what was opened here."""
        if "client" in self.__dict__:
            self.client.close()
        if "redis_watch" in self.__dict__:
            self.redis_watch.close()
        if "redis" in self.__dict__ and self.given_redis is None:
            self.redis.close()

    def label_studio_headers(self) -> Mapping[str, str]:
        """The header that opens Label Studio's own files."""
        return self.client.authorization()

    def key(self, ref: SlideRef) -> str:
        """The bag key of a slide under the current settings and model."""
        return bag_key(ref, self.model, self.settings)


_lock = threading.Lock()
_services: Services | None = None


def get_services() -> Services:
    """The process's services, from the environment."""
    global _services
    with _lock:
        if _services is None:
            _services = Services(get_settings())
        return _services


def set_services(services: Services | None) -> None:
    """Use these services in this process: what an application factory or a test does."""
    global _services
    with _lock:
        _services = services
