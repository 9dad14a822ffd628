"""Tasks from storages keep what users have in them, from the sync to the ranking, and each slide is analysed once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from field_studio import StudioBelow
from s3 import S3
from web_client import CONFIG, served

from backend.jobs.queue import WaitingTask
from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.publisher import push
from backend.label_studio.services import Services
from backend.label_studio.trainer import TrainingReport, train
from backend.results.bag import BagResult
from backend.slides.reader import open_slide
from backend.slides.source import SlideRef
from backend.slides.synthetic import SyntheticSlide
from backend.slides.tiling import make_bag

pytestmark = pytest.mark.e2e

KINDS = CONFIG.replace(
    "</View>", '<Choices name="kind" toName="image"><Choice value="A"/><Choice value="B"/></Choices></View>'
)
OURS = {"priority", "novelty", "confidence"}
N = 6


@pytest.fixture
def services(
    studio: StudioBelow, tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path
) -> Iterator[Services]:
    more = {
        "label_studio_url": studio.public_url,
        "label_studio_api_key": studio.token,
        "remote_stores": ("s3",),
        "train_min_labels": 4,
    }
    with served(tmp_path, embedded_redis, stand_in, **more) as (_, services):
        yield services


@pytest.fixture
def bucket(s3: S3, synthetic_slide: SyntheticSlide) -> str:
    """With N slides in it, as ``s3://…``."""
    bucket = s3.bucket()
    content = synthetic_slide.path.read_bytes()
    for i in range(N):
        put(s3, f"{bucket}/slide {i}.tif", content)
    return bucket


def put(s3: S3, url: str, content: bytes) -> None:
    httpx.put(f"{s3.endpoint}/{url.removeprefix('s3://')}", content=content, trust_env=False).raise_for_status()


def keys_of_s3(s3: S3, bucket: str) -> dict[str, Any]:
    return {
        "bucket": bucket.removeprefix("s3://"),
        "s3_endpoint": s3.endpoint,
        "aws_access_key_id": "test",
        "aws_secret_access_key": "test",
        "region_name": "us-east-1",
        "presign": False,
    }


def analyse(services: Services, key: str, seed: int) -> None:
    """What a worker does for a slide that Label Studio has asked about: it is fetched from where it lies. The numbers are made up."""
    request = services.queue.request(key)
    assert request is not None
    ref = SlideRef.from_json(request.slide)
    (path,) = services.resolver.fetch(ref)
    with open_slide(path, services.settings) as slide:
        bag = make_bag(slide, services.settings, task_mpp=None)
    rng = np.random.default_rng(seed)
    kind = (1 if seed % 2 == 0 else -1) * np.random.default_rng(99).normal(size=768)
    latents = rng.normal(size=(len(bag), 768)).astype(np.float16)
    logits = rng.normal(size=(len(bag), 8)).astype(np.float32)
    about = {
        "model_version": services.model.model_version,
        "fingerprint": services.model.fingerprint,
        "slide": path.name,
        "stand_in": True,
        "model_name": "stand-in",
        "precision": "float32",
        "mmm_release": services.model.mmm_release,
        "reader": "test",
    }
    services.store.put(key, BagResult(bag, latents, logits, (kind + rng.normal(size=768)).astype(np.float32), about))


def analyses(services: Services) -> list[str]:
    """The slides that are analysed, or are to be."""
    return [state.key for state in services.queue.jobs(1000) if state.queue in ("interactive", "batch")]


def pre_annotate(services: Services, studio: StudioBelow, project: int) -> list[str | None]:
    """Label Studio asks, the slides are analysed, the predictions pushed: what was done for each task."""
    studio.connect_backend(project, services.settings.browser_url, services.model.model_version)
    studio.retrieve_predictions(project)
    keys = analyses(services)
    waiting: list[tuple[str, WaitingTask]] = [(key, task) for key in keys for task in services.queue.waiting(key)]
    for seed, key in enumerate(keys):
        analyse(services, key, seed)
    done = [push(services, key, task) for key, task in waiting]
    assert analyses(services) == keys, "a slide is to be analysed twice"
    return done


def label_and_train(services: Services, studio: StudioBelow, project: int) -> TrainingReport:
    for i, task in enumerate(list(studio.stored(project))[:4]):
        value = {"choices": ["A" if i % 2 == 0 else "B"]}
        studio.annotate(task, [{"from_name": "kind", "to_name": "image", "type": "choices", "value": value}])
    return train(services, project, lambda *_: None)


def theirs(stored: dict[int, dict[str, Any]]) -> str:
    """What is not ours in the data of tasks, as text, in the order in which it is stored."""
    return json.dumps([[n, {k: v for k, v in data.items() if k not in OURS}] for n, data in stored.items()])


def ranks(stored: dict[int, dict[str, Any]]) -> list[float]:
    return sorted(data["priority"] for data in stored.values() if data.get("priority") is not None)


def test_tasks_from_a_bucket_keep_their_data(services: Services, studio: StudioBelow, s3: S3, bucket: str) -> None:
    tasks = s3.bucket()
    for i in range(N):
        slide = f"{bucket}/slide {i}.tif"
        # What people keep in tasks: the bucket's address also in lists and deeper.
        data = {"image": slide, "name": f"S-{i} ü", "also": [slide, {"mask": f"{bucket}/mask.tif"}], "note": None}
        put(s3, f"{tasks}/task-{i}.json", json.dumps({"data": data}).encode())
    project = studio.create_project("From a bucket", KINDS)
    # Label Studio resolves addresses of every bucket that is a storage of the project.
    studio.connect_storage(project, "s3", use_blob_urls=False, **keys_of_s3(s3, tasks))
    before = theirs(studio.stored(project))
    made = studio.call("POST", "/api/storages/s3", json={"project": project, **keys_of_s3(s3, bucket)})
    assert made["id"]
    assert pre_annotate(services, studio, project) == ["created"] * N
    report = label_and_train(services, studio, project)
    stored = studio.stored(project)
    assert theirs(stored) == before
    assert (report.slides, report.ranked) == (N, N)
    assert ranks(stored) == [1, 2] and all(0 <= data["novelty"] <= 1 for data in stored.values())
    shown = studio.call("GET", f"/api/tasks/{next(iter(stored))}/")["data"]["image"]
    assert urlsplit(shown).path.endswith("/resolve/"), "Label Studio shows an address of its own"


@pytest.mark.parametrize("kind", ["s3", "localfiles"])
def test_files_that_became_tasks_follow_the_config_after_a_ranking(
    services: Services, studio: StudioBelow, s3: S3, bucket: str, synthetic_slide: SyntheticSlide, kind: str
) -> None:
    if kind == "s3":
        where = keys_of_s3(s3, bucket)
    else:
        folder = studio.documents / "slides of the lab"
        folder.mkdir()
        for i in range(N):
            (folder / f"slide {i} é.tif").write_bytes(synthetic_slide.path.read_bytes() + bytes([i]))
        where = {"path": str(folder)}
    project = studio.create_project(f"Files of {kind}", KINDS)
    studio.connect_storage(project, kind, use_blob_urls=True, **where)
    before = theirs(studio.stored(project))
    assert pre_annotate(services, studio, project) == ["created"] * N
    assert label_and_train(services, studio, project).ranked == N
    stored = studio.stored(project)
    assert theirs(stored) == before and ranks(stored) == [1, 2]
    # Such a task has one file, whatever the config calls its field.
    studio.call("PATCH", f"/api/projects/{project}/", json={"label_config": KINDS.replace("$image", "$scan")})
    shown = studio.call("GET", "/api/tasks", params={"project": project, "resolve_uri": "false"})["tasks"]
    assert all("scan" in task["data"] and "image" not in task["data"] for task in shown)


def test_an_edit_made_while_ranks_are_written_stays(
    services: Services, studio: StudioBelow, s3: S3, bucket: str
) -> None:
    project = studio.create_project("Edited meanwhile", KINDS)
    data = [{"image": f"{bucket}/slide {i}.tif", "note": "as imported"} for i in range(N)]
    studio.import_tasks(project, data)
    pre_annotate(services, studio, project)
    edited: set[int] = set()

    def edit(method: str, path: str) -> None:
        """Right before a task is written to, somebody writes a note into it."""
        if method not in ("PATCH", "POST") or not ("/api/tasks/" in path or "/api/dm/actions" in path):
            return
        for number, now in studio.stored(project).items():
            if number not in edited:
                edited.add(number)
                studio.call("PATCH", f"/api/tasks/{number}/", json={"data": {**now, "note": f"note of {number}"}})

    for i, task in enumerate(list(studio.stored(project))[:4]):
        value = {"choices": ["A" if i % 2 == 0 else "B"]}
        studio.annotate(task, [{"from_name": "kind", "to_name": "image", "type": "choices", "value": value}])
    studio.proxy.before = edit
    try:
        report = train(services, project, lambda *_: None)
    finally:
        studio.proxy.before = lambda _method, _path: None
    stored = studio.stored(project)
    assert edited == set(stored) and report.ranked == N
    assert {number: data["note"] for number, data in stored.items()} == {n: f"note of {n}" for n in stored}
    assert ranks(stored) == [1, 2]
