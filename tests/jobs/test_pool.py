"""The pool: one process a device, started again when it dies, gone when the pool is."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from job_helpers import PYTHONPATH, WORKER, bag, eventually, key, ledger, waiting

from backend.jobs.pool import WorkerPool, settings_environ
from backend.jobs.queue import BagQueue
from backend.settings import Settings, load_settings


@pytest.fixture(autouse=True)
def helpers_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)


def pid_of(pool: WorkerPool, name: str) -> int | None:
    return next(worker["pid"] for worker in pool.status() if worker["name"] == name)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_bag_goes_through_an_analysis_worker_and_a_publisher_without_torch(
    settings: Settings, queue: BagQueue
) -> None:
    with WorkerPool(settings, command=WORKER) as pool:
        assert [(worker["name"], worker["queues"]) for worker in pool.status()] == [
            ("cpu", ["interactive", "batch"]),
            ("publish", ["publish"]),
            ("train", ["train"]),
        ]
        queue.submit(bag("a"), priority="batch", waiting=waiting(1))
        eventually(lambda: ledger(settings, "published"), "it is published")
        pids = [worker["pid"] for worker in pool.status()]
    assert ledger(settings, "published") == [f"1:1 {key('a')} torch=False"]
    assert not any(alive(pid) for pid in pids)
    assert [worker["state"] for worker in pool.status()] == ["stopped"] * 3
    assert queue.workers() == [], "they signed off"


def test_a_worker_that_is_killed_is_started_again_and_its_bag_is_not_lost(settings: Settings, queue: BagQueue) -> None:
    with WorkerPool(settings, command=WORKER, backoff_first_s=0.1) as pool:
        queue.submit(bag("a", until="go"), priority="interactive", waiting=waiting(1))
        eventually(lambda: pool.status()[0]["job"] == key("a"), "the pool sees what it does")
        first = pid_of(pool, "cpu")
        assert first is not None
        os.kill(first, signal.SIGKILL)
        eventually(lambda: pid_of(pool, "cpu") not in (None, first), "another is started")
        (settings.model_dir / "go").touch()
        eventually(lambda: ledger(settings, "published"), "it is published")
        status = pool.status()[0]
        assert (status["restarts"], status["last_exit"], status["state"]) == (1, -signal.SIGKILL, "running")


def test_a_worker_that_dies_at_once_is_started_ever_more_slowly(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with WorkerPool(settings, command=[sys.executable, "-c", "raise SystemExit(3)"], backoff_first_s=0.1) as pool:
        eventually(lambda: pool.status()[0]["restarts"] >= 3, "it is started again and again")
        assert pool.status()[0]["last_exit"] == 3
    said = [record.getMessage() for record in caplog.records if "worker cpu: ended" in record.getMessage()]
    assert [line.rsplit("in ", 1)[1] for line in said[:3]] == ["0.1 s", "0.2 s", "0.4 s"]
    assert "exit status 3" in said[0]


def test_a_worker_that_lived_for_a_while_starts_again_without_delay(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    with WorkerPool(settings, command=command, backoff_first_s=0.1, healthy_after_s=0.0) as pool:
        eventually(lambda: pool.status()[0]["restarts"] >= 3, "it is started again and again")
    said = [record.getMessage() for record in caplog.records if "worker cpu: ended" in record.getMessage()]
    assert Counter(line.rsplit("in ", 1)[1] for line in said) == {"0.1 s": len(said)}


def test_a_worker_that_is_stuck_is_killed_by_the_watchdog(settings: Settings, queue: BagQueue) -> None:
    with WorkerPool(settings, command=WORKER, watchdog_s=2.0, backoff_first_s=0.1) as pool:
        queue.submit(bag("a", until="never"), priority="interactive")
        eventually(lambda: pool.status()[0]["last_exit"] == -signal.SIGKILL, "it is killed")
        eventually(lambda: pool.status()[0]["pid"], "and started again")


def test_stopping_interrupts_a_long_bag_after_the_grace_period_and_keeps_it(
    settings: Settings, queue: BagQueue
) -> None:
    pool = WorkerPool(settings, command=WORKER)
    pool.start()
    queue.submit(bag("a", until="never"), priority="interactive")
    eventually(lambda: pool.status()[0]["job"], "it is being computed")
    eventually(lambda: ledger(settings, "analysed"), "in earnest")
    pool.stop(grace_s=0.5)
    state = queue.state(key("a"))
    assert state is not None
    assert (state.status, state.position) == ("queued", 1)


def test_workers_end_when_their_pool_is_killed(settings: Settings, queue: BagQueue) -> None:
    code = (
        "from backend.jobs.pool import WorkerPool; from backend.settings import load_settings;"
        "from job_helpers import WORKER; WorkerPool(load_settings(), command=WORKER).run()"
    )
    environment = {
        **os.environ,
        **settings_environ(settings),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), PYTHONPATH]),
        "TMPDIR": str(settings.model_dir),  # a killed pool leaves its folder of status files
    }
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as pool:
        workers = eventually(lambda: len(found := queue.workers()) == 3 and found, "all are ready")
        pool.kill()
    eventually(lambda: not any(alive(worker["pid"]) for worker in workers), "nothing is left behind")


def test_workers_read_the_settings_that_the_pool_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = load_settings(
        model_dir=tmp_path,
        redis_url="redis://:geheim@localhost/3",
        slide_roots=f"{tmp_path},/data",
        default_mpp=None,
        tissue_pen_rules=False,
        batch_tiles=7,
        label_studio_api_key="token",
    )
    for name, value in settings_environ(given).items():
        monkeypatch.setenv(name, value)
    assert load_settings() == given


def test_a_worker_that_no_signal_ends_is_said_once_and_another_takes_its_place(
    settings: Settings, queue: BagQueue, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In uninterruptible sleep, as on a network file system that is away. Here, a worker whose SIGKILL does not arrive."""
    lost: list[subprocess.Popen[bytes]] = []
    kill = subprocess.Popen.kill
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: lost.append(process))
    limits = {"watchdog_s": 1.0, "let_go_after_s": 1.0}
    with WorkerPool(settings, command=WORKER, **limits) as pool:
        queue.submit(bag("a", until="never"), priority="interactive")
        first = eventually(lambda: pool.status()[0]["job"] == key("a") and pid_of(pool, "cpu"), "it is at the slide")
        eventually(lambda: pid_of(pool, "cpu") not in (None, first), "another takes its place")
        queue.submit(bag("b"), priority="interactive", waiting=waiting(2))
        eventually(lambda: ledger(settings, "published"), "and does the other slides")
        said = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
        monkeypatch.setattr(subprocess.Popen, "kill", kill)
        for process in lost:
            process.kill()
            process.wait()
    assert sum("killing it" in line for line in said) == 1 == sum("starting another beside it" in line for line in said)
    assert len(lost) == 1
