"""Shared by all tests. Being here, it also puts this folder on the path, so that tests import helpers such as `synthetic_bags`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from redis import Redis
    from s3 import S3

    from backend.jobs.redis_server import EmbeddedRedis
    from backend.settings import Settings
    from backend.slides.synthetic import SyntheticSlide

REPOSITORY = Path(__file__).resolve().parents[1]
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session", autouse=True)
def _only_the_settings_that_tests_make() -> Iterator[None]:
    """What the person who runs the tests has set for a backend of their own (MODEL, REDIS_URL, …) must not reach the tests."""
    from backend.settings import Settings

    with pytest.MonkeyPatch.context() as patch:
        for name in Settings.model_fields:
            patch.delenv(name.upper(), raising=False)
        yield


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real slides and checkpoints (`WSC_TEST_DATA`), used in place and never written to."""
    default = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("WSC_TEST_DATA") or default).resolve()
    if not (folder / "slides").is_dir():
        pytest.skip(f"the real slides and checkpoints are not here: no {folder} (set WSC_TEST_DATA)")
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Settings]:
    """Makes settings with everything that is kept below `tmp_path`; keyword arguments as of `load_settings`."""
    from backend.settings import load_settings

    def make(**overrides: Any) -> Settings:
        return load_settings(**{"model_dir": tmp_path / "model-dir", **overrides})

    return make


@pytest.fixture(scope="session")
def synthetic_slide(tmp_path_factory: pytest.TempPathFactory) -> SyntheticSlide:
    """A synthetic slide of 2048 x 2048 px at 0.5 µm/px with a planted region: read it, do not change it."""
    from backend.slides.synthetic import write_synthetic_slide

    return write_synthetic_slide(tmp_path_factory.mktemp("synthetic") / "slide.tif", size=(2048, 2048), mpp=0.5, seed=7)


@pytest.fixture(scope="session")
def embedded_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """A real Redis for the whole run; use `redis` for an empty one."""
    from backend.jobs.redis_server import EmbeddedRedis

    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis(embedded_redis: EmbeddedRedis) -> Iterator[Redis]:
    """A connection to the run's Redis, emptied before the test."""
    from redis import Redis

    with Redis.from_url(embedded_redis.url, socket_timeout=5) as connection:
        connection.flushall()
        yield connection


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """A server of the S3 protocol for the whole run."""
    from s3 import S3

    server = S3()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in model's file, built once for the run as a user's first start builds it."""
    from backend.inference.standin import build_stand_in

    path = tmp_path_factory.mktemp("stand-in") / "stand-in.pt.zip"
    build_stand_in(path)
    return path


@pytest.fixture(scope="session")
def label_studio_venv() -> Path:
    """Label Studio's virtual environment: ``LABEL_STUDIO_VENV``, else ``.venv-label-studio`` in the repository."""
    from backend.demo.label_studio_venv import LABEL_STUDIO_VERSION, installed_version

    venv = REPOSITORY / os.environ.get("LABEL_STUDIO_VENV", ".venv-label-studio")
    if installed_version(venv) != LABEL_STUDIO_VERSION:
        pytest.skip(f"no Label Studio {LABEL_STUDIO_VERSION} in {venv}: `make test` installs it")
    return venv


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """The browser that this machine has; none is downloaded."""
    found = next((path for path in map(shutil.which, CHROMIUM_NAMES) if path), None)
    if found is None:
        pytest.skip(f"none of {', '.join(CHROMIUM_NAMES)} is installed: `make test` as root installs chromium")
    return found
