"""One worker process for each device, one for publishing and one for training; started again when they die. Never imports torch."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import SecretStr

from backend.jobs.devices import available_cores, devices_from
from backend.jobs.status_file import Busy, StatusFile
from backend.settings import Settings

log = logging.getLogger(__name__)

WORKER_COMMAND = (sys.executable, "-m", "backend.jobs.worker")
ANALYSIS = "interactive,batch"
PUBLISHING = "publish"
TRAINING = "train"

WATCH_EVERY_S = 0.2
WATCHDOG_MARGIN_S = 60.0
"""How much longer than a job's own limit a worker may be busy with it. RQ's own timeout is a signal, which code in C never sees."""
LET_GO_AFTER_S = 30.0
BACKOFF_FIRST_S = 1.0
BACKOFF_CAP_S = 60.0
HEALTHY_AFTER_S = 60.0
"""A worker that has lived so long starts again without delay when it dies."""
STOP_GRACE_S = 4.0
"""How long running jobs may go on once the pool is to stop. With what follows it must stay below the ten seconds that containers are given."""
KILL_AFTER_S = 5.0


@dataclass
class _Child:
    name: str
    device: str
    queues: str
    status_file: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    start_at: float = 0.0
    backoff_s: float = 0.0
    restarts: int = 0
    last_exit: int | None = None
    killed_at: float | None = None

    def busy(self) -> Busy | None:
        """The job that runs; ``None`` when idle."""
        return None if self.process is None else StatusFile(self.status_file).read(self.process.pid)


class WorkerPool:
    """Runs the workers as child processes (fresh interpreters, no forks), from :meth:`start` to :meth:`stop`.

    Parameters
    ----------
    settings
        Handed to the workers through their environment.
    devices
        One analysis worker for each; default: what ``settings.devices`` means.
    command
        Starts a worker when given the arguments of :mod:`backend.jobs.worker`.
    backoff_first_s, healthy_after_s
        A worker that dies is started again after ``backoff_first_s``, twice as long each time (a minute at most), and
        as at first once it has lived for ``healthy_after_s``.
    watchdog_s
        A worker busy with one job for so long is killed. Default: the job's own limit and a minute.
    let_go_after_s
        A worker that still runs so long after it was killed is left to itself, and another is started, in seconds.

    Raises
    ------
    SettingsError
        The devices are not a list of ``cpu`` and ``cuda:N``.
    """

    def __init__(
        self,
        settings: Settings,
        devices: Sequence[str] | None = None,
        *,
        command: Sequence[str] = WORKER_COMMAND,
        backoff_first_s: float = BACKOFF_FIRST_S,
        healthy_after_s: float = HEALTHY_AFTER_S,
        watchdog_s: float | None = None,
        let_go_after_s: float = LET_GO_AFTER_S,
    ) -> None:
        self.settings = settings
        self.devices = devices_from(settings.devices if devices is None else ",".join(devices))
        self._command = tuple(command)
        self._backoff_first_s = backoff_first_s
        self._healthy_after_s = healthy_after_s
        self._watchdog_s = watchdog_s
        self._let_go_after_s = let_go_after_s
        self._held: list[subprocess.Popen[bytes]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="wsc-workers-")
        folder = Path(self._folder.name)
        self._children = [_Child(d, d, ANALYSIS, folder / f"{d.replace(':', '')}.json") for d in self.devices]
        # Two of them: a training takes seconds to minutes, and nobody's prediction should wait for it.
        self._children.append(_Child("publish", "cpu", PUBLISHING, folder / "publish.json"))
        self._children.append(_Child("train", "cpu", TRAINING, folder / "train.json"))
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._stop_asked_at = 0.0
        self._supervisor = threading.Thread(target=self._supervise, name="worker-pool", daemon=True)

    def __enter__(self) -> WorkerPool:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start every worker, and the thread that watches them."""
        with self._lock:
            for child in self._children:
                self._spawn(child)
        self._supervisor.start()

    def begin_stop(self) -> None:
        """Tell the workers to take no more jobs, and do not wait for them: :meth:`stop` does, and counts its time from here."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        if self._supervisor.ident is not None:
            self._supervisor.join()
        self._stop_asked_at = time.monotonic()
        for child in self._children:
            if child.process is not None:
                child.process.send_signal(signal.SIGTERM)

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Let the workers finish their jobs for ``grace_s``, then interrupt them (the job goes back to its queue), then kill them."""
        self.begin_stop()
        running = [child.process for child in self._children if child.process is not None]
        for wait_s, number in (
            (self._stop_asked_at + grace_s - time.monotonic(), None),
            (KILL_AFTER_S, signal.SIGTERM),
            (KILL_AFTER_S, signal.SIGKILL),
        ):
            for process in running:
                if number is not None:
                    process.send_signal(number)
            deadline = time.monotonic() + wait_s
            for process in running:
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    log.warning("worker %d still runs after %.0f s", process.pid, wait_s)
            running = [process for process in running if process.poll() is None]
            if not running:
                break
        for child in self._children:
            if child.process is not None:
                child.last_exit, child.process = child.process.returncode, None
        self._folder.cleanup()

    def run(self, grace_s: float = STOP_GRACE_S) -> None:
        """Start, wait for SIGTERM or SIGINT, stop. For the main thread of a process that does nothing else."""
        asked = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: asked.set())
        self.start()
        while not asked.wait(1.0):  # with a timeout, so that the signal's handler gets its turn
            pass
        self.stop(grace_s)

    def status(self) -> list[dict[str, Any]]:
        """For each worker: name, device, queues, pid, state (running, restarting, stopped), restarts, last_exit, job, busy_s, restart_in_s."""
        with self._lock:
            return [self._status(child) for child in self._children]

    def _status(self, child: _Child) -> dict[str, Any]:
        busy = child.busy()
        running = child.process is not None
        return {
            "name": child.name,
            "device": child.device,
            "queues": child.queues.split(","),
            "pid": child.process.pid if child.process is not None else None,
            "state": "running" if running else "stopped" if self._stopping.is_set() else "restarting",
            "restarts": child.restarts,
            "last_exit": child.last_exit,
            "job": busy.job if busy else None,
            "busy_s": round(busy.seconds, 1) if busy else 0.0,
            "restart_in_s": 0.0 if running else max(0.0, child.start_at - time.monotonic()),
        }

    def _spawn(self, child: _Child) -> None:
        # fmt: off
        command = [
            *self._command, "--device", child.device, "--queues", child.queues,
            "--grace-s", "0",  # stop() measures the time
            "--parent-pid", str(os.getpid()), "--status-file", str(child.status_file),
        ]
        # fmt: on
        environment = {**os.environ, **settings_environ(self.settings)}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // len(self.devices))))
        # A session of its own: Ctrl+C in the terminal is for the pool, which passes it on in its own way.
        child.process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        child.started, child.killed_at = time.monotonic(), None
        log.info("worker %s: started (pid %d, queues %s)", child.name, child.process.pid, child.queues)

    def _supervise(self) -> None:
        while not self._stopping.wait(WATCH_EVERY_S):
            with self._lock:
                self._held = [process for process in self._held if process.poll() is None]
                for child in self._children:
                    try:
                        self._watch(child)
                    except OSError as error:  # no memory for a process, no descriptors: may pass
                        log.error("worker %s: %s", child.name, error)
                        child.start_at = time.monotonic() + BACKOFF_CAP_S

    def _watch(self, child: _Child) -> None:
        at = time.monotonic()
        if child.process is None:
            if at >= child.start_at:
                child.restarts += 1
                self._spawn(child)
            return
        status = child.process.poll()
        if status is not None:
            healthy = at - child.started >= self._healthy_after_s
            child.backoff_s = (
                self._backoff_first_s if healthy or not child.backoff_s else min(BACKOFF_CAP_S, child.backoff_s * 2)
            )
            child.start_at = at + child.backoff_s
            child.last_exit, child.process = status, None
            log.error("worker %s: %s; starting it again in %.1f s", child.name, _ended(status), child.backoff_s)
            return
        if child.killed_at is not None:
            self._let_go(child, at)
            return
        busy = child.busy()
        if busy is None:
            return
        longest_s = busy.limit_s + WATCHDOG_MARGIN_S if self._watchdog_s is None else self._watchdog_s
        if busy.seconds > longest_s:
            log.error("worker %s: stuck in job %s for %.0f s; killing it", child.name, busy.job, busy.seconds)
            child.process.kill()
            child.killed_at = at

    def _let_go(self, child: _Child, at: float) -> None:
        """Start another in place of a worker that was killed and does not end: a disk that does not answer holds it, whatever signal comes."""
        assert child.process is not None and child.killed_at is not None
        if at - child.killed_at < self._let_go_after_s:
            return
        log.error(
            "worker %s: process %d was killed and does not end (a disk or network file system that does not answer?); starting another beside it",
            child.name, child.process.pid,
        )  # fmt: skip
        self._held.append(child.process)
        child.process, child.start_at = None, at


def _ended(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"


def settings_environ(settings: Settings) -> Mapping[str, str]:
    """The variables from which another process reads the same settings: those that are not at their default here."""
    values = {}
    for name in settings.model_fields_set:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        if isinstance(value, tuple):
            value = ",".join(str(part) for part in value)
        values[name.upper()] = "" if value is None else str(value)
    return values
