"""Pushes and answers while something else happens in the same moment. The stub is there because a real Label Studio cannot be made to race."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from label_studio_stub import PROJECT, StudioStub
from redis import Redis
from web_client import predict_body, served, store_result, task

from backend.errors import HeadDamaged, StoreUnavailable
from backend.jobs.queue import WaitingTask
from backend.jobs.redis_server import EmbeddedRedis
from backend.jobs.scripts import answer_key
from backend.label_studio.client import LabelStudioClient
from backend.label_studio.publisher import TaskBusy, push
from backend.label_studio.services import Services
from backend.learning.heads import Head
from backend.learning.training import fit_choice_head
from backend.settings import Settings
from backend.slides.synthetic import SyntheticSlide


@pytest.fixture
def studio() -> Iterator[StudioStub]:
    stub = StudioStub()
    yield stub
    stub.stop()


def prediction(text: str) -> dict[str, object]:
    region = {"from_name": "summary", "to_name": "image", "type": "textarea", "value": {"text": [text]}}
    return {"model_version": "wsc-3f2a1c", "result": [region]}


def test_a_prediction_that_is_deleted_while_it_is_updated_is_created_anew(studio: StudioStub, tmp_path: Path) -> None:
    task = studio.add_task(tmp_path / "slide.tif")
    client = LabelStudioClient(
        Settings(label_studio_url=studio.url, label_studio_api_key="a-legacy-token-of-a-stub", model_dir=tmp_path)
    )
    assert client.push_prediction(task, prediction("first")) == "created"

    def deletes_first(method: str, _path: str) -> None:
        if method == "PATCH":
            studio.forget(task)

    with studio.choosing(deletes_first):
        assert client.push_prediction(task, prediction("second")) == "created"
    (stored,) = studio.of(task)
    assert stored["result"] == prediction("second")["result"]
    client.close()


def test_a_push_that_has_lost_its_claim_meanwhile_stores_nothing(
    studio: StudioStub,
    tmp_path: Path,
    embedded_redis: EmbeddedRedis,
    redis: Redis,
    stand_in: Path,
    synthetic_slide: SyntheticSlide,
) -> None:
    """Label Studio was slow, and an answer to /predict has been given instead: both would be stored."""
    more = {"label_studio_url": studio.url, "label_studio_api_key": "a-legacy-token-of-a-stub"}
    with served(tmp_path, embedded_redis, stand_in, **more) as (_, services):
        slide = tmp_path / "slides" / "slide.tif"
        shutil.copy(synthetic_slide.path, slide)
        key, number = store_result(services, slide), studio.add_task(slide)
        waiting = WaitingTask(PROJECT, number, "", services.model.model_version)
        name = answer_key(PROJECT, number, waiting.model_version)

        def loses_the_claim(method: str, path: str) -> None:
            if method == "GET" and path == "/api/predictions":
                redis.set(name, "somebody else", px=60_000)

        with studio.choosing(loses_the_claim), pytest.raises(TaskBusy):
            push(services, key, waiting)
        assert studio.of(number) == []
        assert redis.get(name) == b"somebody else", "whose claim is left alone"
        redis.delete(name)
        assert push(services, key, waiting) == "created"


def test_a_batch_is_told_that_the_store_is_away_rather_than_that_it_is_being_worked_on(
    tmp_path: Path,
    embedded_redis: EmbeddedRedis,
    redis: Redis,
    stand_in: Path,
    synthetic_slide: SyntheticSlide,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with served(tmp_path, embedded_redis, stand_in) as (client, services):
        slides = [tmp_path / "slides" / f"slide-{i}.tif" for i in range(3)]
        for slide in slides:
            shutil.copy(synthetic_slide.path, slide)
        body = predict_body(*(task(i, image=str(slide)) for i, slide in enumerate(slides, start=1)))

        def away(_key: str) -> bool:
            raise StoreUnavailable("The store of results does not answer.", hint="Start it.")

        with monkeypatch.context() as patch:
            patch.setattr(services.store, "has", away)
            answer = client.post("/predict", json=body)
        assert answer.status_code == 503 and "store of results does not answer" in answer.text
        assert client.post("/predict", json=body).json()["results"] == [[], [], []], (
            "and once it is back, they are queued"
        )
        assert services.queue.depths()["batch"] == 3


def test_a_push_while_the_heads_are_damaged_takes_no_better_prediction_away(
    studio: StudioStub,
    tmp_path: Path,
    embedded_redis: EmbeddedRedis,
    redis: Redis,
    stand_in: Path,
    synthetic_slide: SyntheticSlide,
) -> None:
    more = {"label_studio_url": studio.url, "label_studio_api_key": "a-legacy-token-of-a-stub"}
    with served(tmp_path, embedded_redis, stand_in, **more) as (_, services):
        slide = tmp_path / "slides" / "slide.tif"
        shutil.copy(synthetic_slide.path, slide)
        key, number = store_result(services, slide), studio.add_task(slide)
        labels = ["Tumour", "Normal"] * 10
        x = np.random.default_rng(0).normal(size=(20, 768)) + np.array([[1.0], [-1.0]] * 10)
        head = fit_choice_head("diagnosis", ("Tumour", "Normal"), x, labels, fingerprint=services.model.fingerprint)
        assert isinstance(head, Head)
        services.versions.registry.add(PROJECT, [head], model_version=services.model.model_version)
        waiting = WaitingTask(PROJECT, number, "", services.model.model_version)
        assert push(services, key, waiting) == "created"
        (better,) = studio.of(number)
        assert better["model_version"].endswith("-h1")
        arrays = next((tmp_path / "heads" / str(PROJECT)).glob("*/arrays.safetensors"))
        whole = arrays.read_bytes()
        arrays.write_bytes(whole[: len(whole) // 2])
        redis.flushall()  # the claim of the push above
        with closing(Services(services.settings)) as started_since, pytest.raises(HeadDamaged):
            push(started_since, key, waiting)
        assert studio.of(number) == [better]
