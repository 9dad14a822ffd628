"""The clock of the whole machine is set while slides are computed: Redis, HTTP process and workers see it, by a preloaded library.

The library (``set_clock.c``, compiled for the test) moves the wall clock only. libfaketime would move sleeps that wait for a monotonic time
too, which no machine does. The test's own clock is the right one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_rig import Rig, assert_none_lost, eventually
from redis_rig import OwnRedis
from reliability_report import record

COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux",
    reason="the clock is set by a library that a C compiler (cc) makes for Linux",
)


class Clock:
    """The clock that the processes see."""

    def __init__(self, folder: Path) -> None:
        self._file, library = folder / "clock", folder / "set_clock.so"
        self.set(0)
        source = Path(__file__).with_name("set_clock.c")
        subprocess.run([str(COMPILER), "-O1", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        self.environment = {"LD_PRELOAD": str(library), "WSC_CLOCK": str(self._file)}

    def set(self, offset_s: int) -> None:
        """So many seconds away from the true time."""
        new = self._file.with_suffix(".new")
        new.write_text(str(offset_s))
        new.replace(self._file)


@pytest.fixture
def parts(tmp_path: Path, small_slide: Path, checkpoint: Path) -> Iterator[tuple[Rig, Clock, OwnRedis]]:
    clock = Clock(tmp_path)
    redis = OwnRedis(tmp_path / "redis", environment={**os.environ, **clock.environment})
    rig = Rig(
        tmp_path,
        small_slide,
        checkpoint,
        redis_url=redis.url,
        environment=clock.environment,
        tweaks={"backend.jobs.job_forms.PUBLISH_BACKOFF_CAP_S": 2},
        job_retries=5,
    )
    yield rig, clock, redis
    rig.close()
    redis.stop()


@pytest.mark.faults_long
@pytest.mark.parametrize("step_s", [-3600, 3600], ids=["back an hour", "on an hour"])
def test_the_clock_is_set_in_the_middle_of_everything(parts: tuple[Rig, Clock, OwnRedis], step_s: int) -> None:
    rig, clock, redis = parts
    rig.serve()
    rig.hold("running.encode", "killed.encode")
    rig.ask("running", "killed")
    first, second = rig.worker(), rig.worker()
    pids = {name: rig.reached(f"{name}.encode") for name in ("running", "killed")}
    rig.pool()
    # A push that waits for its next try, because Label Studio is away.
    rig.studio.stop()
    rig.ask("pushed-later")
    eventually(lambda: "does not answer: nothing listens there" in rig.log(), "a push has failed")

    with redis.client() as client:
        before = client.time()[0]
        clock.set(step_s)
        after = client.time()[0]
    assert abs(after - before - step_s) < 60, "the processes see the new time"

    time.sleep(3)  # its heartbeats are of the new time by now: it seems to have been at it for an hour
    victim = next(worker for worker in (first, second) if worker.pid == pids["killed"])
    victim.signal(signal.SIGKILL)
    began = time.monotonic()
    rig.studio.start()
    eventually(lambda: rig.runs("killed") == 2, "the killed worker's slide is taken over all the same", 60)
    taken_over_s = time.monotonic() - began
    time.sleep(rig.settings.heartbeat_ttl_s + 3)  # long enough to take a living worker for dead
    rig.release()
    rig.ask("afterwards")
    tally = rig.settle()
    assert_none_lost(tally, rig)
    assert rig.runs("running") == 1, "no living worker was taken for dead"
    assert taken_over_s < 60
    record("faults", f"clock set by {step_s:+d} s", **tally.counts())
