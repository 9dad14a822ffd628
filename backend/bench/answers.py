"""/predict over real HTTP, from a server process of its own with a real Redis; and how soon a submitted slide shows progress."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from backend.bench.material import some_result
from backend.bench.measure import Figure, Plan, at_least, below, percentile
from backend.errors import BackendError
from backend.inference.checkpoint import STAND_IN_FILE, ensure_checkpoint
from backend.jobs.pool import settings_environ
from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.services import Services
from backend.settings import Settings, load_settings
from backend.slides.reader import open_slide
from backend.slides.synthetic import write_synthetic_slide
from backend.slides.tiling import make_bag

CONFIG = """<View>
  <Image name="image" value="$image"/>
  <BrushLabels name="attention" toName="image"><Label value="Attention"/></BrushLabels>
  <RectangleLabels name="hot" toName="image"><Label value="Hot tile"/></RectangleLabels>
  <TextArea name="summary" toName="image"/>
</View>"""
_BATCH = 100
_LIMIT_S = 120.0


class NotAnswered(BackendError):
    """A request of the benchmark was not answered as it should be."""

    code = "not_answered"


def run(plan: Plan) -> list[Figure]:
    """Latencies and rate of stored bags, for 1 and 100 tasks, and the way from a submission to its first progress."""
    folder = plan.folder / "answers"
    slides = folder / "slides"
    slides.mkdir(parents=True)
    checkpoint = ensure_checkpoint(plan.settings)
    if not plan.settings.model:
        (folder / "cache" / "models").mkdir(parents=True)
        (folder / "cache" / "models" / STAND_IN_FILE).symlink_to(checkpoint)
    with EmbeddedRedis(folder) as redis:
        settings = load_settings(
            model=plan.settings.model,
            model_dir=folder,
            slide_roots=(slides,),
            redis_url=redis.url,
            devices=plan.device,
            predict_wait_s=0.0,
            log_level="WARNING",
            # Nothing of the user's own set-up is touched: no Label Studio, no shared results; and no password to send.
            label_studio_url="",
            results_url="",
            basic_auth_user="",
        )
        with serving(settings) as port:
            side = plan.pick(448, 2048, 4096)
            first = write_synthetic_slide(slides / "slide.tif", size=(side, side), mpp=0.5, seed=3).path
            with closing(Services(settings)) as services:
                stored = _store(services, first, plan.pick(3, _BATCH, _BATCH))
            return [
                *_stored_one(port, stored, plan),
                *_stored_many(port, stored, plan),
                *_rate(port, stored, plan),
                *_first_progress(port, first, settings, plan),
            ]


def _stored_one(port: int, stored: Sequence[Path], plan: Plan) -> list[Figure]:
    with PredictClient(port) as client:
        first = [client.predict([path]) for path in stored]  # reads the bag and makes its regions, then remembers them
        seconds = [client.predict([stored[i % len(stored)]]) for i in range(plan.pick(4, 200, 1000))]
    p50, p99 = (1000 * percentile(seconds, p) for p in (50, 99))
    return [
        below("answers", "stored bag, 1 task, p50", p50, 10, "ms", f"{len(stored)} bags, each answered before"),
        below("answers", "stored bag, 1 task, p99", p99, 50, "ms", f"{len(seconds)} requests"),
        Figure("answers", "stored bag, 1 task, never answered before, p50", 1000 * percentile(first, 50), "ms"),
    ]


def _stored_many(port: int, stored: Sequence[Path], plan: Plan) -> list[Figure]:
    with PredictClient(port) as client:
        seconds = [client.predict(stored) for _ in range(plan.pick(2, 10, 30))]
    tasks = f"{len(stored)} tasks"
    return [
        Figure("answers", f"stored bags, {tasks}, p50", 1000 * percentile(seconds, 50), "ms"),
        Figure("answers", f"stored bags, {tasks}, p99", 1000 * percentile(seconds, 99), "ms"),
    ]


def _rate(port: int, stored: Sequence[Path], plan: Plan) -> list[Figure]:
    clients, each = plan.pick(2, 4, 4), plan.pick(3, 100, 500)

    def ask(number: int) -> None:
        with PredictClient(port) as client:
            for i in range(each):
                client.predict([stored[(number + i) % len(stored)]])

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(clients)))
    rate = clients * each / (time.perf_counter() - started)
    note = f"{clients} connections; the asking process shares the cores"
    return [at_least("answers", "stored bag, 1 task", rate, 200, "requests/s", note)]


def _first_progress(port: int, slide: Path, settings: Settings, plan: Plan) -> list[Figure]:
    """From the moment of asking for a new slide to its first encoded tiles in Redis, with a warm worker."""
    seconds = []
    with (
        closing(Services(settings)) as services,
        process_of(settings, "workers", "--devices", plan.device),
        PredictClient(port) as client,
    ):
        for number in range(1 + plan.pick(1, 3, 7)):
            path = slide.with_name(f"new-{number}.tif")
            shutil.copyfile(slide, path)
            key = services.key(services.resolver.resolve(str(path)))
            started = time.perf_counter()
            client.predict([path], empty=True)
            while True:
                state = services.queue.state(key)
                if state is not None and state.status == "failed":
                    raise NotAnswered(f"The benchmark's slide failed: {state.error}.", hint="See the worker's log.")
                if state is not None and (state.done or state.status == "finished"):
                    break
                if time.perf_counter() - started > _LIMIT_S:
                    raise NotAnswered(f"No progress after {_LIMIT_S:g} s.", hint="Run `wsc-backend doctor`.")
                time.sleep(0.002)
            seconds.append(time.perf_counter() - started)
    warm = sorted(seconds[1:])
    note = "the first slide waits for the model"
    return [
        Figure("answers", "submit to first progress, new worker", 1000 * seconds[0], "ms", note=note),
        Figure("answers", "submit to first progress, warm worker", 1000 * percentile(warm, 50), "ms"),
    ]


def _store(services: Services, slide: Path, number: int) -> list[Path]:
    paths = []
    for i in range(number):
        path = slide.with_name(f"stored-{i}.tif")
        shutil.copyfile(slide, path)
        with open_slide(path, services.settings) as opened:
            bag = make_bag(opened, services.settings, task_mpp=None)
        services.store.put(services.key(services.resolver.resolve(str(path))), some_result(bag, i))
        paths.append(path)
    return paths


class PredictClient:
    """One kept connection, as Label Studio's worker has, of the standard library: little of its own time is measured."""

    _task_ids = count(1)
    _lock = threading.Lock()

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def predict(self, slides: Sequence[Path], *, empty: bool = False) -> float:
        """Ask for tasks never asked for before, check that each is answered, and return the seconds it took."""
        with self._lock:
            ids = [next(self._task_ids) for _ in slides]
        tasks = [{"id": i, "data": {"image": str(path)}} for i, path in zip(ids, slides, strict=True)]
        # A new slide is asked for as a preview, without a project: there is no Label Studio to push its prediction to.
        body = json.dumps({"tasks": tasks, "project": None if empty else "1.0", "label_config": CONFIG, "params": {}})
        started = time.perf_counter()
        self._connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        text = response.read()
        seconds = time.perf_counter() - started
        slots: list[Any] = json.loads(text).get("results", []) if response.status == 200 else []
        if len(slots) != len(slides) or any(bool(slot) is empty for slot in slots):
            raise NotAnswered(f"/predict said {response.status}: {text[:300]!r}", hint="Run `wsc-backend doctor`.")
        return seconds

    def __enter__(self) -> PredictClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


@contextmanager
def serving(settings: Settings) -> Iterator[int]:
    """``wsc-backend serve`` in a process of its own; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with process_of(settings, "serve", "--host", "127.0.0.1", "--port", str(port)) as process:
        deadline = time.monotonic() + _LIMIT_S
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                said = (settings.model_dir / "serve.log").read_text()[-300:]
                raise NotAnswered(f"The server did not start: {said}", hint="Run `wsc-backend doctor`.")
            time.sleep(0.05)
        yield port


@contextmanager
def process_of(settings: Settings, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """``wsc-backend`` with a command that runs until it is ended; what it logs goes to a file named after it."""
    environment = {**os.environ, **settings_environ(settings)}
    with (settings.model_dir / f"{command[0]}.log").open("wb") as log:
        arguments = [sys.executable, "-m", "backend", *command]
        process = subprocess.Popen(arguments, env=environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
