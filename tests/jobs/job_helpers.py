"""Real worker processes with a small computation in place of the model: what they did is written to ledgers in MODEL_DIR."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from synthetic_bags import synthetic_result

from backend.errors import DownloadFailed, LabelStudioUnreachable, NoTissue
from backend.jobs import tasks, worker
from backend.jobs.pool import settings_environ
from backend.jobs.queue import BagQueue, BagRequest, WaitingTask
from backend.jobs.redis_server import connect
from backend.results.bag import digest
from backend.settings import Settings

WORKER = (sys.executable, str(Path(__file__)))
# The folder of `synthetic_bags`, and the repository for a checkout that is not installed.
PYTHONPATH = os.pathsep.join(str(Path(__file__).parents[i]) for i in (1, 2))
TILES = 12


def key(name: str) -> str:
    """A bag key."""
    return digest({"slide": name})


def bag(name: str, **slide: Any) -> BagRequest:
    """A request; ``slide`` says how the analyser below behaves."""
    return BagRequest(key(name), {"name": name, **slide})


def waiting(task: int, version: str = "WSC test 1") -> WaitingTask:
    return WaitingTask(project=1, task=task, label_config="<View/>", model_version=version)


def ledger(settings: Settings, name: str) -> list[str]:
    """The lines of a ledger, none if it was never written."""
    path = settings.model_dir / name
    return path.read_text().splitlines() if path.exists() else []


def note(settings: Settings, name: str, line: str) -> None:
    with (settings.model_dir / name).open("a") as file:  # O_APPEND: whole lines, whoever writes
        file.write(line + "\n")


def eventually(condition: Callable[[], Any], what: str, timeout_s: float = 90) -> Any:
    """Wait for something that another process does; the limit is only there to end a test that has failed."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"did not happen within {timeout_s} s: {what}")


@contextmanager
def workers(
    settings: Settings, count: int = 1, queues: str = "interactive,batch,publish", *more: str, fits: str = ""
) -> Iterator[list[Any]]:
    """Worker processes, killed at the end. Their log is ``worker.log`` in MODEL_DIR. ``fits``: as if their model and settings had this digest."""
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, "WSC_TEST_FITS": fits}
    environment = {**os.environ, **settings_environ(settings), **ours}
    with (settings.model_dir / "worker.log").open("a") as log:
        processes = [
            subprocess.Popen([*WORKER, "--queues", queues, *more], env=environment, stdout=log, stderr=log)
            for _ in range(count)
        ]
        try:
            yield processes
        finally:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                process.wait()


# --- what the worker processes run ---------------------------------------------------------------------------------------


def analyse(
    slide: dict[str, Any],
    *,
    key: str,
    settings: Settings,
    engine: Any,
    store: Any,
    progress: Callable[[str, int, int], None],
) -> object:
    """Compute a real (small) result, tile by tile, and store it; or fail as ``slide`` says."""
    note(settings, "analysed", f"{slide['name']} {os.getpid()} {engine}")
    tries = sum(line.split()[0] == slide["name"] for line in ledger(settings, "analysed"))
    match slide.get("fail"):
        case "no tissue":
            raise NoTissue(f"There is no tissue on {slide['name']}.", hint="Look at the slide.")
        case "download once" if tries == 1:
            raise DownloadFailed("The slide's host does not answer.")
        case "defect":
            raise ZeroDivisionError("a defect")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
    for done in range(TILES):
        progress("encode", done, TILES)
        time.sleep(slide.get("tile_s", 0.0))
    while slide.get("until") and not (settings.model_dir / slide["until"]).exists():
        time.sleep(0.02)
    result = synthetic_result((4_000, 3_000), 0.5, planted=(1, 1, 2, 2))
    progress("store", TILES, TILES)
    store.put(key, result)
    return result


def publish(settings: Settings, redis: Any, key: str, waiting: WaitingTask) -> None:
    """Write down the push. While a file ``label-studio-down`` exists, there is nobody to push to."""
    if (settings.model_dir / "label-studio-down").exists():
        note(settings, "refused", waiting.id)
        raise LabelStudioUnreachable("Label Studio does not answer.")
    note(settings, "published", f"{waiting.id} {key} torch={'torch' in sys.modules}")


def train(settings: Settings, redis: Any, project: int, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Write down the beginning and the end; the first one waits for the file ``go-on``."""
    note(settings, "training", f"begin {project}")
    progress("fit", 0, 1)
    while not (settings.model_dir / "go-on").exists():
        time.sleep(0.02)
    note(settings, "training", f"end {project}")
    return {"project": project, "message": "trained"}


def prepare(context: tasks.WorkerContext) -> None:
    context.analyser = analyse
    context.publisher = publish
    context.trainer = train
    context.load_engine = lambda _settings, device: f"engine-on-{device}"
    # As if its model and settings were others: what they are is told by a variable.
    needs = os.environ.get("WSC_TEST_FITS", "")
    context.find_fit = lambda _settings, _engine: tasks.Fit(needs, f"wsc-{needs[:6]}")


def submit_from_elsewhere(settings: Settings, name: str, tasks_from: int, count: int) -> list[str]:
    """Submit one bag ``count`` times, each for another task; run in a process of its own."""
    queue = BagQueue(settings, connect(settings))
    return [queue.submit(bag(name), priority="batch", waiting=waiting(tasks_from + i)).status for i in range(count)]


if __name__ == "__main__":
    sys.exit(worker.main(prepare=prepare))
