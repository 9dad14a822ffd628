"""One training at a time, in this process, against a real Label Studio: what teaches, what does not, and what is said of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from studio import Studio
from web_client import served, store_result

from backend.errors import LabelConfigUnsupported
from backend.jobs.queue import WaitingTask
from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio import rle
from backend.label_studio.api_errors import TaskGone
from backend.label_studio.publisher import push
from backend.label_studio.services import Services
from backend.label_studio.trainer import TrainingReport, train
from backend.slides.synthetic import SyntheticSlide

pytestmark = pytest.mark.e2e

CONFIG = """<View>
  <Image name="image" value="$image"/>
  <BrushLabels name="attention" toName="image"><Label value="Attention"/></BrushLabels>
  <BrushLabels name="classes" toName="image" model_heatmap="classes"><Label value="Dark"/><Label value="Light"/></BrushLabels>
  <RectangleLabels name="tiles" toName="image" model_skip="true"><Label value="Dark"/><Label value="Light"/></RectangleLabels>
  <Choices name="kind" toName="image"><Choice value="A"/><Choice value="B"/></Choices>
  <Choices name="seen" toName="image" choice="multiple"><Choice value="ink"/><Choice value="fold"/></Choices>
  <Number name="percent" toName="image"/>
  <Rating name="stars" toName="image"/>
  <EllipseLabels name="rounds" toName="image"><Label value="Dark"/><Label value="Light"/></EllipseLabels>
</View>"""
N = 12


@pytest.fixture
def services(
    label_studio: Studio, tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path
) -> Iterator[Services]:
    studio = {"label_studio_url": label_studio.base_url, "label_studio_api_key": label_studio.token}
    with served(tmp_path, embedded_redis, stand_in, **studio) as (_, services):
        yield services


class Class:
    """Twelve slides of two kinds, known by their embeddings: even ones are A, odd ones are B. Their tiles are dark on the left."""

    def __init__(self, services: Services, studio: Studio, slide: SyntheticSlide) -> None:
        self.services, self.studio = services, studio
        (root,) = services.settings.slide_roots
        rng = np.random.default_rng(5)
        direction, tone = rng.normal(size=(2, 768)).astype(np.float32)
        self.paths = [root / f"slide-{i}.tif" for i in range(N)]
        for path in self.paths:
            os.link(slide.path, path)
        self.keys = []
        for i, path in enumerate(self.paths):
            key = store_result(services, path)
            result = services.store.need(key)
            dark = result.bag.coords[:, 0] < 1024
            self.dark = dark
            embedding = rng.normal(size=768).astype(np.float32) + (1 if i % 2 == 0 else -1) * direction
            latents = (rng.normal(size=result.latents.shape) + np.where(dark, 1, -1)[:, None] * tone).astype(np.float16)
            services.store.put(key, replace(result, slide_embedding=embedding, latents=latents))
            self.keys.append(key)
        self.project = studio.create_project("Training", CONFIG)
        data = [{"image": str(path), "slide": str(path), "name": path.name} for path in self.paths]
        self.tasks = studio.import_tasks(self.project, data)
        studio.connect_backend(self.project, services.settings.browser_url, services.model.model_version)

    def say(self, kind: str, control: str, value: Any, **more: Any) -> dict[str, Any]:
        return {"from_name": control, "to_name": "image", "type": kind, "value": {kind: value}, **more}

    def label(self, i: int, choice: str, *more: dict[str, Any], **fields: Any) -> int:
        return self.studio.annotate(self.tasks[i], [self.say("choices", "kind", [choice]), *more], **fields)

    def train(self) -> TrainingReport:
        return train(self.services, self.project, lambda *_: None)

    def prediction(self, i: int) -> dict[str, Any]:
        """Of slide ``i``, pushed now."""
        waiting = WaitingTask(self.project, self.tasks[i], "", self.services.versions.version(self.project))
        self.services.queue.release_claim(self.project, self.tasks[i], waiting.model_version)
        push(self.services, self.keys[i], waiting)
        (prediction,) = self.studio.predictions(self.tasks[i])
        return prediction


@pytest.fixture
def taught(services: Services, label_studio: Studio, synthetic_slide: SyntheticSlide) -> Class:
    return Class(services, label_studio, synthetic_slide)


def answer(prediction: dict[str, Any], control: str) -> Any:
    (region,) = [r for r in prediction["result"] if r["from_name"] == control]
    return region["value"][region["type"]]


def codes(report: TrainingReport) -> list[tuple[int, str]]:
    return [(int(issue["task_id"]), str(issue["code"])) for issue in report.issues]


def test_every_kind_of_answer_is_learnt_and_suggested(taught: Class) -> None:
    for i in range(8):
        even = i % 2 == 0
        taught.label(
            i,
            "A" if even else "B",
            taught.say("choices", "seen", ["ink", "fold"] if even else ["fold"] if i == 1 else []),
            taught.say("number", "percent", 80 + i if even else 10 + i),
            taught.say("rating", "stars", 5 if even else 2),
        )
    report = taught.train()
    assert report.version == f"{taught.services.model.model_version}-h1"
    assert [head["control"] for head in report.heads] == ["kind", "seen", "percent", "stars"]
    prediction = taught.prediction(10)
    assert answer(prediction, "kind") == ["A"] and answer(prediction, "stars") == 5
    assert "ink" in answer(prediction, "seen") and 60 < answer(prediction, "percent") < 110
    assert prediction["score"] == pytest.approx(min(r["score"] for r in prediction["result"] if "score" in r), abs=1e-3)
    assert answer(taught.prediction(11), "kind") == ["B"]
    assert isinstance(prediction["cluster"], int)


def test_drawn_regions_teach_tiles_and_the_class_map_appears(taught: Class) -> None:
    width, height = taught.services.store.need(taught.keys[0]).bag.slide_size

    def box(x: float, wide: float, label: str, **more: Any) -> dict[str, Any]:
        value = {"x": x, "y": 0, "width": wide, "height": 100, "rotation": 0, "rectanglelabels": [label]}
        frame = {"original_width": width, "original_height": height, "image_rotation": 0}
        return {"from_name": "tiles", "to_name": "image", "type": "rectanglelabels", "value": value, **frame, **more}

    for i in range(2):
        machine = box(0, 100, "Light", origin="prediction", readonly=True)
        taught.studio.annotate(taught.tasks[i], [box(0, 50, "Dark"), box(50, 50, "Light"), machine])
    report = taught.train()
    assert [(head["control"], head["level"]) for head in report.heads] == [("tiles", "tile")]
    assert any("kind" in str(few["message"]) for few in report.too_few), "what the others need is said"
    prediction = taught.prediction(5)
    assert prediction["score"] is None, "nothing is suggested for the slide as a whole"
    painted = {
        r["value"]["brushlabels"][0]: rle.decode(r["value"]["rle"]).reshape(height, width, 4)[..., 3]
        for r in prediction["result"]
        if r["type"] == "brushlabels"
    }
    assert set(painted) == {"Attention", "Dark", "Light"}
    assert not painted["Dark"][:, width // 2 + 300 :].any() and not painted["Light"][:, : width // 2 - 300].any()
    assert painted["Dark"].any() and painted["Light"].any()


def test_skipped_contradicting_and_unusable_annotations_teach_nothing_and_are_named(taught: Class) -> None:
    nan = taught.services.store.need(taught.keys[8])
    taught.services.store.put(taught.keys[8], replace(nan, slide_embedding=np.full(768, np.nan, np.float32)))
    for i in range(6):
        taught.label(i, "A" if i % 2 == 0 else "B")
    before = taught.train()
    taught.label(6, "A", was_cancelled=True)
    taught.label(7, "C, never offered")
    taught.label(8, "A")
    broken = taught.studio.import_tasks(taught.project, [{"image": "gone.png", "slide": "gone.svs"}])[0]
    taught.studio.annotate(broken, [taught.say("choices", "kind", ["A"])])
    report = taught.train()
    assert set(codes(report)) == {
        (taught.tasks[6], "skipped"),
        (taught.tasks[7], "label_removed"),
        (taught.tasks[8], "embedding_invalid"),
        (taught.tasks[8], "no_embedding"),
        (broken, "no_embedding"),
    }
    assert report.version == before.version, "what is learnt from is the same, and so are the heads"
    assert report.slides == N - 1 and report.unanalysed == 2


def test_a_choice_taken_out_of_the_config_is_forgotten(taught: Class) -> None:
    for i in range(6):
        taught.label(i, "A" if i % 2 == 0 else "B")
    assert taught.train().version.endswith("-h1")
    without = CONFIG.replace('<Choice value="B"/>', '<Choice value="C"/>')
    taught.studio.call("PATCH", f"/api/projects/{taught.project}/", json={"label_config": without})
    odd = taught.prediction(11)
    assert [r for r in odd["result"] if r["from_name"] == "kind"] == [], "'B' is not offered any more"
    report = taught.train()
    assert report.heads == [] and report.version == taught.services.model.model_version
    assert {code for _, code in codes(report)} == {"label_removed"}


def test_a_restored_version_counts_and_old_predictions_go(taught: Class) -> None:
    for i in range(4):
        taught.label(i, "A" if i % 2 == 0 else "B")
    first = taught.train().version
    assert taught.prediction(9)["model_version"] == first
    taught.label(4, "A")
    second = taught.train().version
    assert taught.prediction(9)["model_version"] == second, "and the older one is gone"
    taught.services.versions.registry.restore(taught.project, first)
    assert taught.services.versions.version(taught.project) == first
    assert taught.prediction(9)["model_version"] == first


def test_a_project_or_config_that_is_gone_is_said(taught: Class, services: Services) -> None:
    with pytest.raises(TaskGone):
        train(services, 10_000_000, lambda *_: None)
    text = '<View><Text name="t" value="$slide"/><Choices name="kind" toName="t"><Choice value="A"/></Choices></View>'
    number = taught.studio.create_project("No image", text)
    with pytest.raises(LabelConfigUnsupported):
        train(services, number, lambda *_: None)
