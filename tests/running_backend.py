"""The backend as an operator runs it, for one Label Studio: embedded Redis, a worker pool, the HTTP server."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from studio import REPOSITORY, Studio

from backend.jobs.pool import WorkerPool
from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.services import Services
from backend.settings import load_settings
from backend.web.server import ServerThread, bind

DEADLINE_S = 180
REAL_SLIDES = Path(os.environ.get("WSC_TEST_DATA") or REPOSITORY / ".." / "shared" / "data").resolve() / "slides"


def wait_for(what: str, condition: Callable[[], Any], timeout_s: float = DEADLINE_S) -> Any:
    """Poll until ``condition`` gives something true, and return that."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.3)
    raise AssertionError(f"waited {timeout_s:.0f} s for {what}")


class Backend:
    """A running backend. Its workers are started by whoever needs them: ``pool.start()``."""

    def __init__(self, services: Services, pool: WorkerPool) -> None:
        self.services = services
        self.pool = pool
        self.url = services.settings.browser_url
        self.version = services.model.model_version


@contextmanager
def running_backend(label_studio: Studio, stand_in: Path, folder: Path, **more: str) -> Iterator[Backend]:
    """A backend that keeps everything below ``folder``; slides may lie in ``folder/slides`` and among the real ones.

    ``more`` are further settings, by the names of their variables.
    """
    (folder / "slides").mkdir()
    model_dir = folder / "state"
    (model_dir / "cache" / "models").mkdir(parents=True)
    (model_dir / "cache" / "models" / stand_in.name).symlink_to(stand_in)
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    environment = {
        "MODEL_DIR": str(model_dir),
        "SLIDE_ROOTS": f"{folder / 'slides'},{REAL_SLIDES}",
        "PORT": str(port),
        "PUBLIC_URL": f"http://localhost:{port}",
        "LABEL_STUDIO_URL": label_studio.base_url,
        "LABEL_STUDIO_API_KEY": label_studio.token,
        "DEVICES": "cpu",
        "PREDICT_WAIT_S": "1",
        **more,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        settings = load_settings()
        with EmbeddedRedis(model_dir), closing(Services(settings)) as services:
            pool = WorkerPool(settings)
            server = ServerThread(services, listener)
            server.start()
            try:
                yield Backend(services, pool)
            finally:
                pool.stop()
                server.stop()
