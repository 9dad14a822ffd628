"""One small slide for all fault tests, and a rig for each that asks."""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_rig import LOOK_FOR_RESULT_S, STORES_LATE_S, Parts, Rig
from redis_rig import OwnRedis, RedisProxy


@pytest.fixture(scope="session")
def small_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic slide of 16 tiles at most."""
    from backend.slides.synthetic import write_synthetic_slide

    path = tmp_path_factory.mktemp("small-slide") / "slide.tif"
    return write_synthetic_slide(path, size=(1000, 1000), mpp=0.5, seed=3).path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the stand-in model's place: nothing but its name and digest is used, because the tests' workers compute with NumPy."""
    from backend.inference.checkpoint import STAND_IN_FILE, STAND_IN_MARKER

    path = tmp_path_factory.mktemp("checkpoint") / STAND_IN_FILE
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(STAND_IN_MARKER, "")
    return path


MakeRig = Callable[..., Rig]


@pytest.fixture
def make_rig(tmp_path: Path, small_slide: Path, checkpoint: Path) -> Iterator[MakeRig]:
    """Makes rigs; everything they start ends with the test."""
    rigs: list[Rig] = []

    def make(**settings: Any) -> Rig:
        rigs.append(Rig(tmp_path / f"rig-{len(rigs)}", small_slide, checkpoint, **settings))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[OwnRedis]:
    """A redis-server at a port, as REDIS_URL names it."""
    server = OwnRedis(tmp_path / "own-redis")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def disk_of_megabytes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | str]:
    """A file system that a test can fill, or why there is none."""
    folder = tmp_path_factory.mktemp("small-disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        yield str(error)
        return
    if done.returncode:
        yield done.stderr.strip()
        return
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_disk(disk_of_megabytes: Path | str) -> Path:
    """A file system that a test can fill."""
    if isinstance(disk_of_megabytes, str):
        pytest.skip(f"filling a disk needs a small one, which only root may mount: {disk_of_megabytes}")
    return disk_of_megabytes


@pytest.fixture(scope="package")
def standing(
    tmp_path_factory: pytest.TempPathFactory, small_slide: Path, checkpoint: Path, disk_of_megabytes: Path | str
) -> Iterator[Parts]:
    """One backend for all tests that break what is around it, and mend it again."""
    folder = tmp_path_factory.mktemp("standing")
    server = OwnRedis(folder / "redis")
    proxy = RedisProxy(server.port)
    results = disk_of_megabytes / "results" if isinstance(disk_of_megabytes, Path) else folder / "results"
    tweaks = {
        # How long an answer of Label Studio is waited for, and the longest pause between two tries of a push.
        "backend.label_studio.client._TIMEOUT_S": 2.0,
        "backend.jobs.job_forms.PUBLISH_BACKOFF_CAP_S": 2,
        "backend.jobs.tasks.LOOK_AGAIN_S": STORES_LATE_S,
        "backend.jobs.tasks.LOOK_FOR_RESULT_S": LOOK_FOR_RESULT_S,
    }
    rig = Rig(folder, small_slide, checkpoint, redis_url=proxy.url, results_url=str(results), tweaks=tweaks)
    try:
        rig.serve()
        rig.pool()
        yield Parts(rig, server, proxy)
    finally:
        rig.close()
        proxy.stop()
        server.stop()


@pytest.fixture
def parts(standing: Parts) -> Iterator[Parts]:
    """The standing backend and what it stands on, whole again after the test, whatever the test left."""
    yield standing
    standing.mend()


@pytest.fixture
def rig(parts: Parts) -> Rig:
    """The standing backend."""
    return parts.rig
