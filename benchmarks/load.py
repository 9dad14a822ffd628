"""Many people at once, on loopback, bounded in count and time: latencies, errors, memory, and what is left in the queue.

    MMM_LICENSE_ACCEPTED="i accept" .venv/bin/python benchmarks/load.py [--repeats 10] [--record]

A real server, a real Redis and real workers with the stand-in model; Label Studio is a stub that counts predictions. Each round: 200 annotators open a
task at once (half of the slides are stored, half are new), 1 000 webhooks arrive in a burst, 100 panels watch; before the rounds one "retrieve
predictions" of 10 000 tasks. Afterwards: how much slower slides are while 50 panels watch.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.bench.answers import CONFIG, _store, process_of, serving
from backend.bench.measure import percentile
from backend.bench.studio import studio
from backend.inference.checkpoint import STAND_IN_FILE, ensure_checkpoint
from backend.jobs.queue import BagRequest
from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.events import WEBHOOK_SECRET_HEADER
from backend.label_studio.services import Services
from backend.settings import load_settings
from backend.slides.synthetic import write_synthetic_slide
from backend.web.signing import SlideSigner

LIMIT_S = 1200.0


@dataclass(frozen=True)
class Size:
    """How many of each at once.

    Attributes
    ----------
    opens, webhooks, streams
        Annotators who open a task, events in a burst beside them, panels that watch meanwhile; in each of ``rounds``.
    rounds
        Memory is compared between the second and the last.
    retrieve
        Tasks of the one large request before the rounds.
    panels, slides
        Panels that watch while the rate of so many new slides is measured.
    turns
        How often that is measured, with and without the panels.
    """

    opens: int = 200
    webhooks: int = 1_000
    streams: int = 100
    rounds: int = 10
    retrieve: int = 10_000
    panels: int = 50
    slides: int = 60
    turns: int = 5


class Load:
    """One set-up, and what is done to it."""

    def __init__(
        self, size: Size, port: int, services: Services, label_studio: Any, slides: Path, stored: Sequence[Path]
    ) -> None:
        self.size, self.port, self.services = size, port, services
        self.studio, self.slides, self.stored = label_studio, slides, stored
        self.signer = SlideSigner(services.settings.model_dir)
        self.errors: Counter[str] = Counter()
        self.first_error = ""
        self.fresh = 0
        self.new_tasks: set[int] = set()
        self.tasks = 0

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> float:
        """One request on a connection of its own; its seconds. What is no 2xx is counted as an error."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        started = time.perf_counter()
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
            if not 200 <= answer.status < 300:
                self.errors[f"{path} {answer.status}"] += 1
                self.first_error = self.first_error or f"{path} {answer.status}: {text[:300]}"
        except OSError as error:
            self.errors[f"{path} {type(error).__name__}"] += 1
        finally:
            connection.close()
        return time.perf_counter() - started

    def task(self, slide: Path, *, new: bool = False) -> dict[str, Any]:
        self.tasks += 1
        if new:
            self.new_tasks.add(self.tasks)
        data = {"image": str(slide), "slide": str(slide)}
        self.studio.tasks[self.tasks] = data
        return {"id": self.tasks, "data": data}

    def predict(self, tasks: Sequence[dict[str, Any]]) -> float:
        body = {"tasks": list(tasks), "project": "1.0", "label_config": CONFIG, "params": {}}
        return self.request("POST", "/predict", body)

    def new_slide(self) -> Path:
        self.fresh += 1
        path = self.slides / f"new-{self.fresh}.tif"
        shutil.copyfile(self.slides / "slide.tif", path)
        return path

    def opens(self) -> list[float]:
        asked = [
            self.task(self.stored[i % len(self.stored)] if i % 2 else self.new_slide(), new=not i % 2)
            for i in range(self.size.opens)
        ]
        return at_once(self.size.opens, lambda i: self.predict([asked[i]]))

    def webhooks(self) -> list[float]:
        body = {"action": "ANNOTATION_CREATED", "project": {"id": 1}, "annotation": {"id": 1, "result": []}}
        secret = {WEBHOOK_SECRET_HEADER: self.services.webhook_secret}
        return at_once(self.size.webhooks, lambda _: self.request("POST", "/webhook", body, secret), threads=64)

    def watch(self, count: int) -> ExitStack:
        """So many event streams that stay open, each read by a thread."""
        stack, ref = ExitStack(), self.services.resolver.resolve(str(self.slides / "slide.tif"))
        for _ in range(count):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)
            connection.request("GET", f"/panel/events?slide={self.signer.token(ref, 1)}")
            if connection.getresponse().status != 200:
                self.errors["/panel/events"] += 1
            stack.callback(connection.close)
        return stack

    def drained(self) -> bool:
        """Wait until nothing is queued."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            depths = self.services.queue.depths()
            if not any(depths[name] for name in ("interactive", "batch", "publish")):
                states = self.services.queue.jobs(1000)
                if not any(s.status in ("queued", "started") and s.queue != "train" for s in states):
                    return True
            time.sleep(0.5)
        return False

    def slides_per_s(self, count: int) -> float:
        """How fast new slides are analysed."""
        paths = [self.new_slide() for _ in range(count)]
        refs = [self.services.resolver.resolve(str(path)) for path in paths]
        requests = [BagRequest(self.services.key(ref), ref.to_json()) for ref in refs]
        started = time.perf_counter()
        self.services.queue.submit_many([(request, None) for request in requests], "batch")
        keys = [request.key for request in requests]
        while any(not state.settled for state in self.services.queue.states(keys).values()):
            time.sleep(0.1)
        return count / (time.perf_counter() - started)


def at_once(count: int, do: Callable[[int], float], threads: int | None = None) -> list[float]:
    """``do(0)`` … from so many threads that start together; the seconds."""
    with ThreadPoolExecutor(threads or count) as pool:
        return list(pool.map(do, range(count)))


def resident_mib(pid: int) -> float:
    """Main memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(size: Size, checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Start everything, load it, end it; the rows of the table. ``checkpoint`` is the stand-in model's file."""
    with tempfile.TemporaryDirectory(prefix="wsc-load-") as name, studio(CONFIG) as label_studio:
        folder = Path(name)
        slides = folder / "slides"
        slides.mkdir()
        (folder / "cache" / "models").mkdir(parents=True)
        (folder / "cache" / "models" / STAND_IN_FILE).symlink_to(checkpoint)
        with EmbeddedRedis(folder) as redis:
            settings = load_settings(
                model_dir=folder,
                slide_roots=(slides,),
                redis_url=redis.url,
                devices="cpu",
                predict_wait_s=2.0,
                predict_batch_budget_s=60.0,
                rank_tasks=False,
                log_level="WARNING",
                label_studio_url=label_studio.url,
                label_studio_api_key="a-token-for-a-stub",
                results_url="",
                basic_auth_user="",
            )
            services = Services(settings)
            write_synthetic_slide(slides / "slide.tif", size=(448, 448), mpp=0.5, seed=3)
            stored = _store(services, slides / "slide.tif", 100)
            with serving(settings) as port, process_of(settings, "workers", "--devices", "cpu"):
                while len(services.queue.workers()) < 3:
                    time.sleep(0.2)
                rows = everything(Load(size, port, services, label_studio, slides, stored))
            services.close()
    return rows


def main() -> None:
    """Run, print, and with ``--record`` write down for docs/RELIABILITY.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="rounds")
    parser.add_argument("--retrieve", type=int, default=10_000, help="tasks of the one large request")
    parser.add_argument("--record", action="store_true", help="note the figures for docs/RELIABILITY.md")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends with us
    rows = run(Size(rounds=given.repeats, retrieve=given.retrieve), ensure_checkpoint(load_settings()))
    for row, counts in rows.items():
        print(f"{row}: " + ", ".join(f"{k} {v}" for k, v in counts.items()))
    if given.record:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
        from reliability_report import record

        for row, counts in rows.items():
            record("load", row, **counts)


def everything(load: Load) -> dict[str, dict[str, Any]]:
    """The rows of the table."""
    size, retrieve, repeats = load.size, load.size.retrieve, load.size.rounds
    tasks = [load.task(load.stored[i % len(load.stored)]) for i in range(retrieve)]
    retrieved = load.predict(tasks)
    seconds: dict[str, list[float]] = {"opens": [], "webhooks": []}
    pids = {f"{w['queues'][0]} worker": int(w["pid"]) for w in load.services.queue.workers()}
    pids["server"] = next(int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _serves(p, load.port))
    memory: dict[str, list[float]] = {name: [] for name in pids}
    drained = load.drained()
    for _ in range(repeats):
        with load.watch(size.streams):
            hooks: list[float] = []
            burst = threading.Thread(target=lambda hooks=hooks: hooks.extend(load.webhooks()))
            burst.start()
            seconds["opens"] += load.opens()
            burst.join()
            seconds["webhooks"] += hooks
        drained = load.drained() and drained
        for process, pid in pids.items():
            memory[process].append(resident_mib(pid))
    doubled = sum(n > 1 for n in Counter(p["task"] for p in load.studio.predictions.values()).values())
    # Of those that are new: what is stored is answered, and stays with whoever asked.
    without = len(load.new_tasks - {int(p["task"]) for p in load.studio.predictions.values()})
    rates: dict[int, list[float]] = {0: [], size.panels: []}
    for _ in range(size.turns):
        for panels, found in rates.items():
            with load.watch(panels):
                found.append(load.slides_per_s(size.slides))
    slower = 1 - statistics.median(b / a for a, b in zip(rates[0], rates[size.panels], strict=True))
    growth = {name: round(found[-1] - found[min(1, len(found) - 1)], 1) for name, found in memory.items()}
    return {
        f"{size.opens} annotators open a task at once, × {repeats}": _latency(seconds["opens"]),
        f"{size.webhooks} webhooks in a burst beside it, × {repeats}": _latency(seconds["webhooks"]),
        f"one retrieve of {retrieve} tasks": {"requests": 1, "seconds": round(retrieved, 1)},
        f"{size.streams} event streams open meanwhile, × {repeats}": {"requests": size.streams * repeats},
        "all of it": {
            "errors": sum(load.errors.values()),
            "queue_drained": str(drained).lower(),
            "predictions_pushed": len(load.studio.predictions),
            "doubled": doubled,
            "without_prediction": without,
            **({"first_error": load.first_error or next(iter(load.errors))} if load.errors else {}),
        },
        "memory, second round to last (MiB)": growth,
        f"slides/s lost while {size.panels} panels watch": {
            "percent": round(100 * slower, 1),
            "without": round(statistics.median(rates[0]), 1),
            "with": round(statistics.median(rates[size.panels]), 1),
        },
    }


def _serves(process: Path, port: int) -> bool:
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"serve" in words and str(port).encode() in words


def _latency(seconds: Sequence[float]) -> dict[str, Any]:
    p50, p99 = (round(1000 * percentile(seconds, p)) for p in (50, 99))
    return {"requests": len(seconds), "p50_ms": p50, "p99_ms": p99}


if __name__ == "__main__":
    main()
