"""``WholeSlideBackend`` under label_studio_ml's own server, as installed, and with the 2.x base class's way of calling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from web_client import CONFIG, served, store_result, task

from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.model import LabelStudioMLBase, WholeSlideBackend
from backend.label_studio.services import set_services
from backend.slides.synthetic import SyntheticSlide


@pytest.fixture
def stored(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path, synthetic_slide: SyntheticSlide
) -> Any:
    with served(tmp_path, embedded_redis, stand_in) as (_, services):
        (root,) = services.settings.slide_roots
        os.link(synthetic_slide.path, root / "slide.tif")
        store_result(services, root / "slide.tif")
        set_services(services)
        yield services, root / "slide.tif"
        set_services(None)


@pytest.mark.filterwarnings("ignore")  # label_studio_ml 1.0 and its Flask warn of what they use themselves
def test_under_label_studio_mls_own_server(stored: Any, tmp_path: Path) -> None:
    from label_studio_ml.api import init_app

    services, slide = stored
    picture = services.thumbnails.make(
        "p", __import__("backend.slides.reader", fromlist=["x"]).open_slide(slide, services.settings)
    )
    app = init_app(WholeSlideBackend, model_dir=str(tmp_path / "ml")).test_client()
    setup = app.post("/setup", json={"project": "7.1", "schema": CONFIG, "hostname": "", "access_token": ""})
    assert setup.status_code == 200, setup.data
    image = f"{services.settings.browser_url}/thumbnails/{picture.id}.jpg"
    answer = app.post(
        "/predict",
        json={
            "tasks": [task(1, slide=str(slide), image=image)],
            "project": "7.1",
            "label_config": CONFIG,
            "params": {"login": None, "password": None, "context": None},
        },
    )
    assert answer.status_code == 200, answer.data
    (prediction,) = json.loads(answer.data)["results"]
    assert {r["type"] for r in prediction["result"]} >= {"brushlabels", "rectanglelabels", "textarea"}


# The 2.x base class is on no package index: this has its constructor, cache and calls, as its documentation describes them.
BASE_2_X = """
class LabelStudioMLBase:
    cache = {}
    def __init__(self, project_id=None, label_config=None):
        self.project_id = project_id or ""
        if label_config is not None:
            self.label_config = label_config
        if not self.get("model_version"):
            self.set("model_version", "0.0.1")
        self.setup()
    def set(self, key, value):
        self.cache[self.project_id, key] = value
    def get(self, key):
        return self.cache.get((self.project_id, key))
    def setup(self):
        pass
"""

USE_2_X = """
import json, sys
from backend.label_studio.model import WholeSlideBackend
slide, config = sys.argv[1:]
model = WholeSlideBackend(project_id="7", label_config=config)
(slot,) = model.predict([{"id": 3, "data": {"image": slide, "slide": slide}}], context={}, login=None, password=None)
print(json.dumps({
    "version": model.get("model_version"),
    "types": [region["type"] for region in slot["result"]],
    "slot_version": slot["model_version"],
    "fit": model.fit("START_TRAINING", {"project": {"id": 7}}),
    "torch": "torch" in sys.modules,
}))
"""


def test_with_the_2_x_base_class(stored: Any, tmp_path: Path) -> None:
    services, slide = stored
    package = tmp_path / "packages" / "label_studio_ml"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "model.py").write_text(BASE_2_X)
    settings = services.settings
    done = subprocess.run(
        [sys.executable, "-c", USE_2_X, str(slide), CONFIG],
        env={
            **os.environ,
            "PYTHONPATH": str(package.parent),
            "MODEL_DIR": str(settings.model_dir),
            "SLIDE_ROOTS": str(settings.slide_roots[0]),
            "REDIS_URL": settings.redis_url.get_secret_value(),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["version"] == said["slot_version"] == services.model.model_version
    assert "brushlabels" in said["types"]
    assert said["fit"] == {"training": "queued"}
    assert not said["torch"]


def test_1_0s_way_of_calling_fit(stored: Any) -> None:
    model = WholeSlideBackend(label_config=CONFIG)
    assert isinstance(model, LabelStudioMLBase)
    assert model.fit((), event="ANNOTATION_CREATED", data={}) == {}
