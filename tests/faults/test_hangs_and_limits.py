"""Slides that take too long, hang, or do not fit into memory, and an end of everything at once: each is accounted for."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_rig import Rig, assert_none_lost, eventually
from redis_rig import OwnRedis
from reliability_report import record

from backend.jobs.redis_server import EmbeddedRedis

TIME_LIMIT_S = 10  # the least that JOB_TIMEOUT_S allows
STOP_WITHIN_S = 10
"""What a container runtime gives a process between SIGTERM and SIGKILL, unless told otherwise."""


@pytest.fixture(scope="module")
def quick_to_give_up(tmp_path_factory: pytest.TempPathFactory, small_slide: Path, checkpoint: Path) -> Iterator[Rig]:
    """Two pools (so two analysis workers, each with a watchdog) and short limits."""
    folder = tmp_path_factory.mktemp("hangs")
    redis = OwnRedis(folder / "redis")
    tweaks = {"backend.jobs.pool.WATCHDOG_MARGIN_S": 1.0}
    rig = Rig(folder, small_slide, checkpoint, tweaks=tweaks, redis_url=redis.url, job_timeout_s=TIME_LIMIT_S)
    rig.serve()
    rig.pool()
    rig.pool()
    yield rig
    rig.close()
    redis.stop()


def test_slides_over_the_time_limit_and_slides_that_hang_fail_with_their_reason(quick_to_give_up: Rig) -> None:
    rig = quick_to_give_up
    rig.hold("too-slow.encode")
    rig.order("hangs.open", "hang")  # in C, where no signal is heard
    rig.ask("too-slow", "hangs", "other")
    tally = rig.settle()
    assert_none_lost(tally, rig, failed=2)
    assert tally.failed["too-slow"].startswith("job_timed_out: The job ran longer than 10 s")
    assert "'encode'" in tally.failed["too-slow"]
    assert tally.failed["hangs"].startswith("job_timed_out: The job was stuck at stage 'open'")
    assert rig.runs("too-slow") == rig.runs("hangs") == 1, "what takes too long once is not tried again"
    record("faults", "job over its time limit, and a reader that hangs in C", **tally.counts())


def test_a_pipe_in_place_of_a_slide_is_refused_at_once(rig: Rig) -> None:
    os.mkfifo(rig.folder / "slides" / "pipe.tif")
    answer = rig.ask("pipe")
    assert answer.status_code == 403 and "is not a regular file" in answer.text
    record("faults", "a FIFO among the slides", tried=1, survived=0, failed_with_reason=1, lost=0, doubled=0)


def test_a_slide_that_becomes_a_pipe_before_it_is_opened_fails_with_its_reason(rig: Rig) -> None:
    rig.hold("turns.open")
    rig.ask("turns")
    rig.reached("turns.open")
    key = rig.key("turns")
    path = rig.folder / "slides" / "turns.tif"
    path.unlink()
    os.mkfifo(path)
    rig.release("turns.open")
    state = eventually(lambda: (s := rig.queue.state(key)) and s.settled and s, "it does not hang")
    assert state.status == "failed" and state.error["code"] in ("slide_not_found", "slide_unreadable"), state
    record("faults", "a slide becomes a FIFO", tried=1, survived=0, failed_with_reason=1, lost=0, doubled=0)


@pytest.mark.faults_long
def test_a_slide_that_is_another_one_at_every_look_is_not_computed_for_ever(rig: Rig) -> None:
    """As one whose file is being written to, or whose server gives a new date at every request."""
    rig.order("restless.stored", "touch")
    rig.ask("restless")
    failed = eventually(
        lambda: [job for job in rig.queue.jobs(10_000, "failed") if f"task {rig.task('restless')} of" in job.about],
        "it is given up",
    )
    assert "is another one" in failed[0].error["message"]
    assert rig.runs("restless") <= 6
    (rig.folder / "do" / "restless.stored").unlink()
    rig.ask("restless")
    tally = rig.settle("restless")
    assert rig.studio.of(rig.task("restless")), "and when that has ended, it is analysed"
    record(
        "faults",
        "a slide's file changes during every analysis",
        tried=1,
        survived=0,
        failed_with_reason=1,
        lost=0,
        doubled=len(tally.doubled),
    )


def test_a_failed_slide_that_is_tried_again_by_hand_reaches_label_studio(rig: Rig) -> None:
    rig.order("mended.open", "refuse")
    rig.ask("mended")
    assert_none_lost(rig.settle("mended"), rig, failed=1)
    (rig.folder / "do" / "mended.open").unlink()
    rig.queue.retry(rig.key("mended"))
    tally = rig.settle("mended")
    assert_none_lost(tally, rig)
    record("faults", "a failed slide is tried again by hand", **tally.counts())


@pytest.mark.faults_long
def test_a_worker_without_a_pool_ends_itself_when_its_slide_hangs(
    make_rig: Callable[..., Rig], own_redis: OwnRedis
) -> None:
    rig = make_rig(
        redis_url=own_redis.url, job_timeout_s=TIME_LIMIT_S, tweaks={"backend.jobs.housekeeping.STUCK_MARGIN_S": 1}
    )
    rig.serve()
    rig.order("hangs.open", "hang")
    rig.ask("hangs", "other")
    stuck = rig.worker("interactive,batch")
    rig.reached("hangs.open")
    rig.worker("interactive,batch,publish")
    assert stuck.wait(60) == 70
    tally = rig.settle()
    assert_none_lost(tally, rig, failed=1)
    assert tally.failed["hangs"].startswith("job_timed_out: The job was stuck at stage 'open'")
    record("faults", "a reader that hangs in C, worker without a pool", **tally.counts())


@pytest.mark.faults_long
def test_a_worker_whose_device_fails_ends_and_another_takes_the_slide(
    make_rig: Callable[..., Rig], own_redis: OwnRedis
) -> None:
    """CUDA's own error, which is injected: there is no CUDA device here. In its process nothing would ever work again."""
    rig = make_rig(redis_url=own_redis.url)
    rig.serve()
    rig.order("first.encode", "device")
    rig.ask("first", "second")
    broken = rig.worker("interactive,batch")
    broken.wait(60)
    assert "cpu is lost to this process" in rig.log()
    (rig.folder / "do" / "first.encode").unlink()
    assert rig.runs("second") == 0, "it takes no other slide with it"
    rig.pool()
    tally = rig.settle()
    assert_none_lost(tally, rig)
    record("faults", "device fails for good (injected)", **tally.counts())


@pytest.fixture
def real_model_rig(tmp_path: Path, small_slide: Path, stand_in: Path, own_redis: OwnRedis) -> Iterator[Rig]:
    rig = Rig(tmp_path, small_slide, stand_in, redis_url=own_redis.url, batch_tiles=8)
    yield rig
    rig.close()


@pytest.mark.faults_long
def test_a_bag_that_does_not_fit_into_device_memory(real_model_rig: Rig) -> None:
    """The engine's own halving, with PyTorch's own error, which is injected: there is no CUDA device here."""
    rig = real_model_rig
    rig.serve()
    rig.order("memory-for-tiles", "3")
    rig.ask("fits-by-threes")
    rig.worker("interactive,batch,publish", WSC_REAL_MODEL="1")
    tally = rig.settle()
    assert_none_lost(tally, rig)
    assert "is out of memory; going on with batches of 4 tiles" in rig.log()
    assert "going on with batches of 2 tiles" in rig.log()
    record("faults", "device memory for three tiles only (injected)", **tally.counts())

    rig.order("memory-for-tiles", "0")
    rig.ask("never-fits")
    tally = rig.settle("never-fits")
    assert_none_lost(tally, rig, failed=1)
    assert "out_of_device_memory: Not even one tile fits" in tally.failed["never-fits"]
    record("faults", "device memory for no tile (injected)", **tally.counts())

    rig.order("memory-for-tiles", "1000")
    rig.ask("afterwards")
    tally = rig.settle("afterwards")
    assert_none_lost(tally, rig)
    record("faults", "the slide after one that did not fit", **tally.counts())


def descendants(pid: int) -> list[int]:
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()
    ]
    return children + [below for child in children for below in descendants(child)]


def is_redis(pid: int) -> bool:
    return b"redis-server" in Path(f"/proc/{pid}/cmdline").read_bytes()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(),
    reason="which processes are whose children is read from /proc, which only Linux has",
)
@pytest.mark.parametrize(
    "redis_too", [False, pytest.param(True, marks=pytest.mark.faults_long)], ids=["all but Redis", "Redis too"]
)
@pytest.mark.parametrize(
    "stage", ["encode", pytest.param("open", marks=pytest.mark.faults_long)], ids=["in Python", "in C"]
)
def test_sigterm_to_everything_at_once_ends_it_soon_and_keeps_the_jobs(
    make_rig: Callable[..., Rig], stage: str, redis_too: bool
) -> None:
    rig = make_rig()
    serve = rig.serve("--with-workers")
    if stage == "encode":
        rig.hold("running.encode")
    else:
        rig.order("running.open", "hang")
    rig.ask("running")
    rig.reached(f"running.{stage}")
    rig.ask("queued-1", "queued-2")
    everyone = [serve.pid, *(pid for pid in descendants(serve.pid) if redis_too or not is_redis(pid))]
    assert len(everyone) >= 4, "the HTTP process and three workers"
    begun = time.monotonic()
    for pid in everyone:
        os.kill(pid, signal.SIGTERM)
    serve.wait(60)
    eventually(lambda: all(gone(pid) for pid in everyone), "they end", 60)
    took_s = time.monotonic() - begun
    assert took_s < STOP_WITHIN_S, rig.log()[-4000:]
    assert "Traceback" not in rig.log(), rig.log()[-4000:]
    if not redis_too:
        with EmbeddedRedis(rig.folder):
            states = [rig.state(name) for name in ("running", "queued-1", "queued-2")]
        assert [(state.status, state.position) for state in states if state] == [
            ("queued", 1),
            ("queued", 1),
            ("queued", 2),
        ], "what ran is back in its queue (interactive), what waited is still there (batch)"
    rig.release()
    (rig.folder / "do" / f"running.{stage}").unlink(missing_ok=True)
    rig.serve("--with-workers")
    tally = rig.settle()
    assert_none_lost(tally, rig)
    row = f"SIGTERM to all processes at once{', Redis too' if redis_too else ''}, job in {'C' if stage == 'open' else 'Python'}"
    record("faults", row, **tally.counts(), ended_after_s=round(took_s, 1))
