"""A backend under a real HTTP server for tests, without workers unless a test starts them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.services import Services
from backend.results.bag import SLIDE_REF, BagResult
from backend.settings import Settings, load_settings
from backend.slides.reader import open_slide
from backend.slides.tiling import make_bag
from backend.slides.tissue_file import tissue_file_beside
from backend.web.server import ServerThread, bind

CONFIG = """<View>
  <Image name="image" value="$image"/>
  <BrushLabels name="attention" toName="image"><Label value="Attention"/></BrushLabels>
  <RectangleLabels name="hot" toName="image" smart="true"><Label value="Hot tile"/></RectangleLabels>
  <TextArea name="summary" toName="image"/>
</View>"""


@contextmanager
def served(
    folder: Path, redis: EmbeddedRedis, stand_in: Path, **overrides: Any
) -> Iterator[tuple[httpx.Client, Services]]:
    """The application on a free port of loopback, and a client for it. Slides may lie in ``folder/slides``."""
    models = folder / "cache" / "models"
    models.mkdir(parents=True, exist_ok=True)
    if not (models / stand_in.name).exists():
        (models / stand_in.name).symlink_to(stand_in)
    (folder / "slides").mkdir(exist_ok=True)
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    settings: Settings = load_settings(
        **{
            "model_dir": folder,
            "slide_roots": (folder / "slides",),
            "redis_url": redis.url,
            "port": port,
            "predict_wait_s": 0.2,
            **overrides,
        }
    )
    services = Services(settings)
    server = ServerThread(services, listener)
    server.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            yield client, services
    finally:
        server.stop()
        services.close()


def store_result(services: Services, slide: Path, *, mpp: float | None = None) -> str:
    """Put a made-up result for a slide into the store, as a worker would have; returns its key."""
    with open_slide(slide, services.settings) as opened:
        bag = make_bag(opened, services.settings, task_mpp=mpp, tissue_file=tissue_file_beside(slide))
    rng = np.random.default_rng(0)
    ref = services.resolver.resolve(str(slide), mpp=mpp)
    result = BagResult(
        bag,
        rng.normal(size=(len(bag), 768)).astype(np.float16),
        rng.normal(size=(len(bag), 8)).astype(np.float32),
        rng.normal(size=768).astype(np.float32),
        {
            "model_version": services.model.model_version,
            "fingerprint": services.model.fingerprint,
            "model_name": "stand-in",
            "stand_in": True,
            "precision": "float32",
            "mmm_release": services.model.mmm_release,
            "slide": slide.name,
            "reader": "test",
            SLIDE_REF: json.dumps(ref.to_json()),
        },
    )
    key = services.key(ref)
    services.store.put(key, result)
    return key


def task(number: int, **data: Any) -> dict[str, Any]:
    """A task as Label Studio serialises it."""
    return {"id": number, "data": data, "meta": {}, "project": 7, "annotations": [], "predictions": []}


def predict_body(*tasks: dict[str, Any], config: str = CONFIG, context: Any = None) -> dict[str, Any]:
    """The body of /predict as Label Studio sends it."""
    return {
        "tasks": list(tasks),
        "project": "7.1795461014",
        "label_config": config,
        "params": {"login": None, "password": None, "context": context},
    }
