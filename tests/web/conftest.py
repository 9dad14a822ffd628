"""Shared by the tests of the web room."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from learnt_project import Learnt, learnt_backend

from backend.jobs.redis_server import EmbeddedRedis
from backend.slides.synthetic import SyntheticSlide


@pytest.fixture(scope="session")
def learnt(
    tmp_path_factory: pytest.TempPathFactory,
    embedded_redis: EmbeddedRedis,
    stand_in: Path,
    synthetic_slide: SyntheticSlide,
) -> Iterator[Learnt]:
    """A backend whose projects have learnt something. Tests put back what they change."""
    folder = tmp_path_factory.mktemp("learnt")
    slide = folder / "slide.tif"
    shutil.copy(synthetic_slide.path, slide)
    with learnt_backend(folder / "backend", embedded_redis, stand_in, slide) as backend:
        yield backend
