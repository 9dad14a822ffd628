"""The main job, whole: slides are imported into a real Label Studio, analysed by real workers, and come back pre-annotated."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from label_studio_sdk.converter.brush import decode_rle
from running_backend import Backend, wait_for
from studio import Editor, Studio

from backend.commands.import_slides import Imported, import_slides
from backend.jobs import scripts
from backend.slides.synthetic import SyntheticSlide, write_synthetic_slide

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def slides(backend: Backend) -> list[SyntheticSlide]:
    root = backend.services.settings.slide_roots[0]
    return [
        write_synthetic_slide(root / f"slide-{seed}.tif", size=(2600, 2200), mpp=0.5, seed=seed) for seed in (1, 2, 3)
    ]


@pytest.fixture(scope="module")
def imported(backend: Backend, slides: list[SyntheticSlide]) -> Imported:
    """A project of three slides, imported while no worker runs, so that nothing is ready when it is first asked for."""
    return import_slides(backend.services, [slide.path for slide in slides], project="Three slides")


@pytest.fixture(scope="module")
def tasks(imported: Imported, label_studio: Studio) -> list[int]:
    listed = label_studio.call("GET", f"/api/tasks/?project={imported.project}&fields=all")
    return sorted(int(task["id"]) for task in listed["tasks"])


@pytest.fixture(scope="module")
def published(backend: Backend, tasks: list[int], label_studio: Studio) -> dict[int, dict[str, Any]]:
    """The workers are started, and each task's one prediction is waited for."""
    assert all(label_studio.predictions(task) == [] for task in tasks), "no worker ran, and yet something was answered"
    backend.pool.start()
    for task in tasks:
        wait_for(f"the prediction of task {task}", lambda task=task: label_studio.predictions(task))
    return {task: label_studio.predictions(task)[0] for task in tasks}


def region(prediction: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(r for r in prediction["result"] if r["type"] == kind)


def test_unfinished_slides_are_answered_empty_and_pushed_once(
    published: dict[int, dict[str, Any]], label_studio: Studio, backend: Backend
) -> None:
    time.sleep(2)  # a second push would come now
    for task in published:
        predictions = label_studio.predictions(task)
        assert len(predictions) == 1
        assert predictions[0]["model_version"] == backend.version
        assert backend.version.startswith("stand-in-")
        kinds = {r["type"] for r in predictions[0]["result"]}
        assert {"brushlabels", "rectanglelabels", "textarea"} <= kinds


def test_the_project_counts_these_predictions(
    imported: Imported, published: dict[int, dict[str, Any]], label_studio: Studio, backend: Backend
) -> None:
    assert label_studio.project(imported.project)["model_version"] == backend.version


def test_a_second_retrieve_changes_nothing(
    imported: Imported, published: dict[int, dict[str, Any]], label_studio: Studio
) -> None:
    label_studio.retrieve_predictions(imported.project)
    time.sleep(2)
    for task, prediction in published.items():
        assert [p["id"] for p in label_studio.predictions(task)] == [prediction["id"]]


def test_importing_again_adds_nothing(
    backend: Backend, imported: Imported, slides: list[SyntheticSlide], published: dict[int, Any], label_studio: Studio
) -> None:
    again = import_slides(backend.services, [slide.path for slide in slides], project="Three slides")
    assert again.project == imported.project
    assert (len(again.added), len(again.present)) == (0, 3)
    assert len(label_studio.call("GET", f"/api/ml/?project={imported.project}")) == 1


def test_three_people_opening_one_task_at_once_get_one_prediction(
    backend: Backend, imported: Imported, tasks: list[int], published: dict[int, Any], label_studio: Studio
) -> None:
    """The slide is stored; its prediction is deleted; three ask at the same moment, as three browsers would."""
    task = tasks[0]
    for prediction in label_studio.predictions(task):
        label_studio.call("DELETE", f"/api/predictions/{prediction['id']}/")
    # The right to hand it out is held for a while after the push; here that time is over.
    redis = backend.services.redis
    for claim in redis.scan_iter(scripts.answer_key(imported.project, task, backend.version)):
        redis.delete(claim)
    openers = [
        threading.Thread(target=label_studio.call, args=("GET", f"/api/tasks/{task}/?project={imported.project}"))
        for _ in range(3)
    ]
    for opener in openers:
        opener.start()
    for opener in openers:
        opener.join()
    assert len(wait_for("a prediction", lambda: label_studio.predictions(task))) == 1


def test_the_planted_region_is_where_the_heatmap_says(
    tasks: list[int], slides: list[SyntheticSlide], published: dict[int, dict[str, Any]], label_studio: Studio
) -> None:
    for task, prediction in published.items():
        name = label_studio.call("GET", f"/api/tasks/{task}/")["data"]["name"]
        slide = next(s for s in slides if s.path.name == name)
        brush = region(prediction, "brushlabels")
        width, height = brush["original_width"], brush["original_height"]
        alpha = decode_rle(brush["value"]["rle"]).reshape(height, width, 4)[:, :, 3]
        step = slide.size[0] / width
        y, x = np.mgrid[0:height, 0:width]
        planted = slide.is_planted((x + 0.5) * step, (y + 0.5) * slide.size[1] / height)
        inside, outside = alpha[planted & (alpha > 0)].mean(), alpha[~planted & (alpha > 0)].mean()
        assert inside > 1.5 * outside, f"{name}: {inside:.0f} inside, {outside:.0f} outside"
        box = region(prediction, "rectanglelabels")["value"]
        centre = (
            (box["x"] + box["width"] / 2) / 100 * slide.size[0],
            (box["y"] + box["height"] / 2) / 100 * slide.size[1],
        )
        assert slide.is_planted(np.array([centre[0]]), np.array([centre[1]]))[0]


def test_a_pathologist_sees_the_regions_in_the_editor(
    imported: Imported, tasks: list[int], published: dict[int, dict[str, Any]], browser_page: Editor
) -> None:
    task = tasks[1]
    regions = published[task]["result"]
    browser_page.open_task(imported.project, task, regions=len(regions))
    picture = browser_page.screenshot("preannotated-task")
    assert picture.stat().st_size > 50_000
    assert "Attention" in browser_page.region_labels()
    assert browser_page.region_labels().count("Hot tile") == sum(r["type"] == "rectanglelabels" for r in regions)
    assert browser_page.problems == []


def test_the_real_slide_comes_back_pre_annotated(
    backend: Backend, published: dict[int, Any], test_data: Path, label_studio: Studio, browser_page: Editor
) -> None:
    slide = test_data / "slides" / "CMU-1-Small-Region.svs"
    imported = import_slides(backend.services, [slide], project="Real tissue")
    (task,) = [int(t["id"]) for t in label_studio.call("GET", f"/api/tasks/?project={imported.project}")["tasks"]]
    (prediction,) = wait_for("the prediction", lambda: label_studio.predictions(task))
    brush = region(prediction, "brushlabels")
    assert (brush["original_width"], brush["original_height"]) == (1496, 2000)
    summary = region(prediction, "textarea")["value"]["text"][0]
    assert "0.499 µm/px" in summary
    assert "stand-in" in summary
    browser_page.open_task(imported.project, task, regions=len(prediction["result"]))
    picture = browser_page.screenshot("real-slide")
    assert picture.stat().st_size > 50_000
    assert browser_page.problems == []


def test_submitting_keeps_the_embedding_in_the_export(
    imported: Imported, tasks: list[int], published: dict[int, dict[str, Any]], label_studio: Studio
) -> None:
    task = tasks[2]
    label_studio.annotate(task, published[task]["result"], parent_prediction=published[task]["id"])
    exported = label_studio.call("GET", f"/api/projects/{imported.project}/export?exportType=JSON")
    result = next(t for t in exported if t["id"] == task)["annotations"][0]["result"]
    assert any(len(r.get("meta", {}).get("embedding", [])) == 768 for r in result)


def test_an_unknown_slide_fails_with_its_reason_and_without_a_prediction(
    imported: Imported, backend: Backend, published: dict[int, Any], label_studio: Studio
) -> None:
    root = backend.services.settings.slide_roots[0]
    (root / "broken.svs").write_bytes(b"II*\0 this is no slide")
    thumbnail = label_studio.call("GET", f"/api/tasks/{next(iter(published))}/")["data"]["image"]
    (task,) = label_studio.import_tasks(
        imported.project, [{"image": thumbnail, "slide": str(root / "broken.svs"), "name": "broken.svs"}]
    )
    label_studio.retrieve_predictions(imported.project, [task])
    failed = wait_for("the failure", lambda: backend.services.queue.jobs(50, "failed"))
    assert failed[0].error["code"] == "slide_unreadable"
    assert label_studio.predictions(task) == []


def test_settings_of_the_run_reach_the_workers(backend: Backend) -> None:
    workers = wait_for("the workers", backend.services.queue.workers)
    assert {worker["device"] for worker in workers if worker["device"]} == {"cpu"}
