"""What a webhook may say, who may say it, and what comes of it. Over real HTTP and a real Redis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from web_client import served

from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.events import WEBHOOK_SECRET_HEADER
from backend.label_studio.services import Services


@pytest.fixture
def backend(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path
) -> Iterator[tuple[httpx.Client, Services]]:
    with served(tmp_path, embedded_redis, stand_in, train_debounce_n=3) as both:
        yield both


def event(action: str, project: object = 7, **more: Any) -> dict[str, Any]:
    return {"action": action, "project": {"id": project, "label_config": "<View/>"}, **more}


def tell(both: tuple[httpx.Client, Services], body: Any, secret: str | None = None) -> httpx.Response:
    client, services = both
    return client.post(
        "/webhook", json=body, headers={WEBHOOK_SECRET_HEADER: services.webhook_secret if secret is None else secret}
    )


def test_annotations_are_counted_until_they_are_enough(backend) -> None:
    assert tell(backend, event("ANNOTATION_CREATED", annotation={"id": 1})).json()["training"] == "scheduled"
    assert tell(backend, event("ANNOTATION_UPDATED", annotation={"id": 1})).json()["training"] == "scheduled"
    assert backend[1].queue.depths()["train"] == 0
    deleted = event("ANNOTATIONS_DELETED", annotations=[{"id": 1}, {"id": 2}])
    assert tell(backend, deleted).json()["training"] == "queued"
    assert backend[1].queue.depths()["train"] == 1
    (job,) = [job for job in backend[1].queue.jobs() if job.queue == "train"]
    assert (job.key, job.about) == ("train-7", "train project 7")


def test_other_events_train_only_where_labels_are_concerned(backend) -> None:
    assert tell(backend, event("TASKS_CREATED")).json()["training"] == "nothing to do"
    assert tell(backend, event("SOMETHING_NEW")).json()["training"] == "nothing to do"
    assert tell(backend, event("PROJECT_UPDATED")).json()["training"] == "nothing to do", "seen for the first time"
    assert tell(backend, event("PROJECT_UPDATED")).json()["training"] == "nothing to do", "only its title, say"
    changed = {"action": "PROJECT_UPDATED", "project": {"id": 7, "label_config": "<View><Image/></View>"}}
    assert tell(backend, changed).json()["training"] == "scheduled"


def test_without_the_secret_nothing_happens(backend) -> None:
    for secret in ("", "wrong", "geheim"):
        answer = tell(backend, event("ANNOTATION_CREATED"), secret)
        assert answer.status_code == 401 and WEBHOOK_SECRET_HEADER in answer.json()["detail"]
    assert backend[1].queue.jobs() == []


def test_start_training_is_opened_by_basic_authentication_as_the_protocol_is(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path
) -> None:
    auth = {"basic_auth_user": "studio", "basic_auth_pass": "geheim"}
    with served(tmp_path, embedded_redis, stand_in, **auth) as (client, services):
        assert client.post("/webhook", json=event("START_TRAINING")).status_code == 401
        assert client.post("/webhook", json=event("ANNOTATION_CREATED"), auth=("studio", "geheim")).status_code == 401
        answer = client.post("/webhook", json=event("START_TRAINING"), auth=("studio", "geheim"))
        assert answer.json()["training"] == "queued"
        assert services.queue.depths()["train"] == 1


@pytest.mark.parametrize("project", [None, "7", -1, 0, True, 2**60, {"id": 7}, []])
def test_an_event_of_no_project_is_refused(backend, project: object) -> None:
    answer = tell(backend, event("START_TRAINING", project))
    assert answer.status_code == 400 and "project" in answer.json()["detail"]
    assert tell(backend, {"action": "START_TRAINING"}).status_code == 400
    assert backend[1].queue.jobs() == []


def test_a_body_of_50_mb_is_refused_and_the_next_request_is_answered(backend) -> None:
    client, services = backend
    body = b'{"action": "ANNOTATION_CREATED", "project": {"id": 7}, "annotation": "' + b"x" * 50_000_000 + b'"}'
    answer = client.post("/webhook", content=body, headers={WEBHOOK_SECRET_HEADER: services.webhook_secret})
    assert answer.status_code == 413
    assert client.get("/health").status_code == 200
    assert services.queue.jobs() == []


def test_the_secret_is_made_once_and_kept(backend) -> None:
    services = backend[1]
    assert len(services.webhook_secret) == 64
    with closing(Services(services.settings)) as again:
        assert again.webhook_secret == services.webhook_secret
    file = services.settings.model_dir / "webhook.key"
    assert file.stat().st_mode & 0o077 == 0, "nobody else may read it"
