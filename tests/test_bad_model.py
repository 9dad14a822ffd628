"""A backend whose model, licence or Redis is not in order: what the annotator's question is answered with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from slides.slide_makers import stroma, write
from web_client import predict_body, served, task

from backend.jobs.pool import WorkerPool
from backend.jobs.redis_server import EmbeddedRedis


def ask(folder: Path, redis: EmbeddedRedis, stand_in: Path, **overrides: Any) -> tuple[int, dict[str, Any]]:
    """Open one task on a backend with a worker of its own; the answer's status and body."""
    with served(folder, redis, stand_in, predict_wait_s=60, devices="cpu", **overrides) as (client, services):
        slide = write(services.settings.slide_roots[0] / "slide.tif", stroma(900, 900))
        pool = WorkerPool(services.settings)
        pool.start()
        try:
            answer = client.post("/predict", json=predict_body(task(1, slide=str(slide), image=str(slide))))
        finally:
            pool.stop()
    return answer.status_code, answer.json()


def test_a_checkpoint_of_the_wrong_kind(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path
) -> None:
    wrong = tmp_path / "weights.pt.zip"
    wrong.write_bytes(b"these are no blocks")
    status, body = ask(tmp_path, embedded_redis, stand_in, model=str(wrong))
    assert status == 422
    assert "weights.pt.zip is not a zip file of blocks" in body["detail"]


def test_a_hostile_checkpoint(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path, test_data: Path
) -> None:
    status, body = ask(tmp_path, embedded_redis, stand_in, model=str(test_data / "checkpoints" / "hostile.pt.zip"))
    assert status == 422
    assert ".system" in body["detail"]
    assert "nothing was executed" in body["detail"]


def test_the_licence_is_not_accepted_on_the_worker(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MMM_LICENSE_ACCEPTED")
    status, body = ask(tmp_path, embedded_redis, stand_in)
    assert status == 422
    assert "MMM_LICENSE_ACCEPTED" in body["detail"]


def test_a_worker_with_other_settings_does_not_answer_for_ours(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The backend and its worker are given different tile sizes, as two machines may be: the slide waits for one that fits."""
    with served(tmp_path, embedded_redis, stand_in, predict_wait_s=30, devices="cpu") as (client, services):
        slide = write(services.settings.slide_roots[0] / "slide.tif", stroma(900, 900))
        pool = WorkerPool(services.settings.model_copy(update={"tile_px": 240}))
        pool.start()
        try:
            answer = client.post("/predict", json=predict_body(task(1, slide=str(slide), image=str(slide))))
        finally:
            pool.stop()
        assert not list(services.store.keys())
    assert (answer.status_code, answer.json()["results"]) == (200, [[]])
    assert "1 jobs need another model or other settings" in capfd.readouterr().err


def test_redis_is_down_when_the_backend_starts(tmp_path: Path, stand_in: Path) -> None:
    class Nowhere:
        url = "redis://127.0.0.1:9/0"

    with served(tmp_path, Nowhere(), stand_in) as (client, services):  # type: ignore[arg-type]
        slide = write(services.settings.slide_roots[0] / "slide.tif", stroma(900, 900))
        answer = client.post("/predict", json=predict_body(task(1, slide=str(slide), image=str(slide))))
        assert client.get("/health").status_code == 200
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "queue_unavailable"
    assert "REDIS_URL" in answer.json()["detail"]
