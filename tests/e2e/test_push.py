"""Pushing into a real Label Studio: the right prediction survives, whatever was there and whatever has changed meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from studio import Studio
from web_client import CONFIG, served, store_result

from backend.errors import LabelStudioUnreachable
from backend.jobs.queue import WaitingTask
from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.api_errors import TokenRefused
from backend.label_studio.client import LabelStudioClient
from backend.label_studio.publisher import TaskBusy, push
from backend.label_studio.services import Services
from backend.settings import load_settings
from backend.slides.synthetic import SyntheticSlide

pytestmark = pytest.mark.e2e


@pytest.fixture
def services(
    label_studio: Studio, tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path
) -> Iterator[Services]:
    studio = {"label_studio_url": label_studio.base_url, "label_studio_api_key": label_studio.token}
    with served(tmp_path, embedded_redis, stand_in, **studio) as (_, services):
        yield services


@pytest.fixture
def slides(services: Services, synthetic_slide: SyntheticSlide) -> list[Path]:
    """Two slides with a stored result each, and a picture."""
    (root,) = services.settings.slide_roots
    paths = [root / "one.tif", root / "two.tif"]
    for path in paths:
        os.link(synthetic_slide.path, path)
    for path in paths:
        store_result(services, path)
    return paths


def key_of(services: Services, slide: Path) -> str:
    return services.key(services.resolver.resolve(str(slide)))


@pytest.fixture
def task(label_studio: Studio, services: Services, slides: list[Path]) -> tuple[int, WaitingTask]:
    from backend.slides.reader import open_slide

    with open_slide(slides[0], services.settings) as opened:
        thumbnail = services.thumbnails.make("picture", opened)
    project = label_studio.create_project("Push", CONFIG)
    image = f"{services.settings.browser_url}/thumbnails/{thumbnail.id}.jpg"
    (number,) = label_studio.import_tasks(project, [{"image": image, "slide": str(slides[0])}])
    return number, WaitingTask(project, number, CONFIG, services.model.model_version)


def test_pushing_twice_stores_one_and_keeps_it(
    services: Services, slides: list[Path], task: Any, label_studio: Studio
) -> None:
    number, waiting = task
    assert push(services, key_of(services, slides[0]), waiting) == "created"
    services.queue.release_claim(waiting.project, number, waiting.model_version)
    assert push(services, key_of(services, slides[0]), waiting) == "kept"
    assert len(label_studio.predictions(number)) == 1


def test_stale_and_doubled_predictions_of_the_version_are_cleared_away(
    services: Services, slides: list[Path], task: Any, label_studio: Studio
) -> None:
    number, waiting = task
    push(services, key_of(services, slides[0]), waiting)
    (right,) = label_studio.predictions(number)
    stale = {"task": number, "model_version": waiting.model_version, "result": right["result"][:1]}
    other = {**stale, "model_version": "somebody-else"}
    for body in (stale, stale, other):
        label_studio.call("POST", "/api/predictions/", json=body)
    services.queue.release_claim(waiting.project, number, waiting.model_version)
    assert push(services, key_of(services, slides[0]), waiting) == "kept"
    left = label_studio.predictions(number)
    assert [p["id"] for p in left if p["model_version"] == waiting.model_version] == [right["id"]]
    assert [p["model_version"] for p in left if p["id"] != right["id"]] == ["somebody-else"]


def test_a_control_renamed_since_the_question_gets_its_new_name(
    services: Services, slides: list[Path], task: Any, label_studio: Studio
) -> None:
    number, waiting = task
    renamed = CONFIG.replace('name="attention"', 'name="heat"')
    label_studio.call("PATCH", f"/api/projects/{waiting.project}/", json={"label_config": renamed})
    push(services, key_of(services, slides[0]), waiting)
    (prediction,) = label_studio.predictions(number)
    names = {region["from_name"] for region in prediction["result"]}
    assert "heat" in names
    assert "attention" not in names


def test_a_task_that_was_given_another_slide_does_not_get_the_old_ones_regions(
    services: Services, slides: list[Path], task: Any, label_studio: Studio
) -> None:
    number, waiting = task
    data = label_studio.call("GET", f"/api/tasks/{number}/")["data"]
    label_studio.call("PATCH", f"/api/tasks/{number}/", json={"data": {**data, "slide": str(slides[1])}})
    assert push(services, key_of(services, slides[0]), waiting) is None
    assert label_studio.predictions(number) == []
    assert [w.task for w in services.queue.waiting(key_of(services, slides[1]))] == [number]


def test_a_deleted_task_is_no_error(services: Services, slides: list[Path], task: Any, label_studio: Studio) -> None:
    number, waiting = task
    label_studio.call("DELETE", f"/api/tasks/{number}/")
    assert push(services, key_of(services, slides[0]), waiting) is None


def test_a_task_that_is_being_answered_is_tried_later(services: Services, slides: list[Path], task: Any) -> None:
    number, waiting = task
    other = type(services.queue)(services.settings, services.redis)
    assert other.claim_answer(waiting.project, number, waiting.model_version)
    with pytest.raises(TaskBusy) as busy:
        push(services, key_of(services, slides[0]), waiting)
    assert busy.value.retryable


def test_an_absent_label_studio_and_a_refused_token_can_be_tried_again(
    services: Services, label_studio: Studio, task: Any
) -> None:
    number, _ = task
    token = {"label_studio_api_key": "x" * 40}
    away = LabelStudioClient(load_settings(label_studio_url="http://127.0.0.1:9", **token))
    with closing(away), pytest.raises(LabelStudioUnreachable, match="does not answer"):
        away.task(number)
    refused = LabelStudioClient(load_settings(label_studio_url=label_studio.base_url, **token))
    with closing(refused), pytest.raises(TokenRefused, match="LABEL_STUDIO_API_KEY") as error:
        refused.task(number)
    assert error.value.retryable
    assert "x" * 40 not in str(error.value)
