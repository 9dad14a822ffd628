"""A worker process: one device, one model that stays warm. ``python -m backend.jobs.worker --device cuda:0``."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from redis import Redis

from backend.errors import BackendError, DeviceUnavailable
from backend.jobs import tasks
from backend.jobs.bag_worker import GRACE_S, BagWorker
from backend.jobs.devices import pin_device
from backend.jobs.redis_server import connect
from backend.jobs.states import ANALYSIS_QUEUES, QUEUES
from backend.logs import configure_logging
from backend.redaction import redactor_of
from backend.settings import Settings, load_settings

log = logging.getLogger("backend.jobs.worker")  # run as a program, __name__ is __main__

EXIT_DEVICE_UNAVAILABLE = 3


def run_worker(
    settings: Settings,
    device: str,
    queues: Sequence[str],
    *,
    grace_s: float = GRACE_S,
    parent_pid: int | None = None,
    status_file: Path | None = None,
    prepare: Callable[[tasks.WorkerContext], None] | None = None,
) -> int:
    """Tie this process to ``device`` (``cpu``, ``cuda:N``) and work until stopped; returns the exit status.

    ``prepare`` may replace parts of the :class:`~backend.jobs.tasks.WorkerContext` before work begins.
    """
    try:
        engine_device = pin_device(device, os.environ)
        redis: Redis = connect(settings, check=False)
        context = tasks.WorkerContext(settings, redis, device=device, engine_device=engine_device)
        if prepare is not None:
            prepare(context)
        worker = BagWorker(context, queues, grace_s=grace_s, parent_pid=parent_pid, status_file=status_file)
        worker.work(logging_level="WARNING")  # its lines per job say less than ours
    except DeviceUnavailable as error:
        log.critical("%s", error)
        return EXIT_DEVICE_UNAVAILABLE
    except BackendError as error:
        log.critical("%s", error)
        return 1
    return 0


def main(argv: Sequence[str] | None = None, *, prepare: Callable[[tasks.WorkerContext], None] | None = None) -> int:
    """Entry of a worker process; settings come from the environment."""
    parser = argparse.ArgumentParser(prog="python -m backend.jobs.worker", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--queues", default=",".join(ANALYSIS_QUEUES), help="names in order of urgency")
    parser.add_argument(
        "--grace-s", type=float, default=GRACE_S, help="seconds that a job may go on after SIGTERM; 0: no limit"
    )
    parser.add_argument("--parent-pid", type=int, help="stop when this is no longer the parent process")
    parser.add_argument("--status-file", type=Path, help="where to write which job runs since when")
    given = parser.parse_args(argv)
    queues = given.queues.split(",")
    if not re.fullmatch(r"cpu|cuda:\d+", given.device) or not set(queues) <= set(QUEUES):
        parser.error(f"--device {given.device!r} must be cpu or cuda:N, --queues {given.queues!r} some of {QUEUES}")
    try:
        settings = load_settings()
    except BackendError as error:
        print(error, file=sys.stderr)
        return 1
    name = f"worker[{given.device}:{queues[0]}]"
    configure_logging(settings.log_level, name, settings.log_format, redactor_of(settings, os.environ))
    return run_worker(
        settings,
        given.device,
        queues,
        grace_s=given.grace_s,
        parent_pid=given.parent_pid,
        status_file=given.status_file,
        prepare=prepare,
    )


if __name__ == "__main__":
    sys.exit(main())
