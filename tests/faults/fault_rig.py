"""The backend under faults: real processes of it around a Redis and a stubbed Label Studio, and a count of what became of every slide."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from fault_processes import TWEAKS
from label_studio_stub import CONFIG, StudioStub
from redis.exceptions import RedisError
from redis_rig import OwnRedis, RedisProxy, free_port

from backend.jobs.pool import settings_environ
from backend.jobs.queue import BagQueue
from backend.jobs.redis_server import connect
from backend.jobs.states import JobState
from backend.label_studio.answers import slide_ref
from backend.label_studio.labeling_config import parse_config
from backend.label_studio.services import Services
from backend.settings import Settings, load_settings

PROGRAM = (sys.executable, str(Path(__file__).with_name("fault_processes.py")))
# The repository, for a checkout that is not installed.
PYTHONPATH = os.pathsep.join([str(Path(__file__).parents[2])])
SHORTENED_CLAIM_S = 3.0
LOOK_FOR_RESULT_S = 2
"""So long after it was not there a result is looked for again, by the tests' backend."""
STORES_LATE_S = 8
"""So long after a push that was not sure the tests' backend looks again. Its default is made for a real Label Studio."""
QUICK = {
    "backend.label_studio.predictor.CLAIM_TTL_S": SHORTENED_CLAIM_S,
    "backend.label_studio.publisher.CLAIM_TTL_S": SHORTENED_CLAIM_S,
}
"""How long the right to hand out one prediction is held is a minute, made for a real Label Studio. Tests do not wait that long."""


def eventually(condition: Callable[[], Any], what: str, timeout_s: float = 90) -> Any:
    """Wait for something that another process does; the limit is only there to end a test that has failed."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"did not happen within {timeout_s} s: {what}")


@dataclass
class Tally:
    """What became of the slides that were asked for."""

    tried: int = 0
    predicted: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """For the table of results."""
        return {
            "tried": self.tried,
            "survived": self.predicted,
            "failed_with_reason": len(self.failed),
            "lost": len(self.lost),
            "doubled": len(self.doubled),
        }


class Process:
    """A child process; its log is the rig's."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self.popen = popen
        self.pid = popen.pid

    def alive(self) -> bool:
        return self.popen.poll() is None

    def kill(self) -> None:
        """``kill -9``."""
        self.signal(signal.SIGKILL)
        self.popen.wait()

    def signal(self, number: int) -> None:
        if self.alive():
            self.popen.send_signal(number)

    def wait(self, timeout_s: float = 60) -> int:
        return self.popen.wait(timeout_s)


class Rig:
    """One backend: settings, processes, slides, tasks.

    Parameters
    ----------
    folder
        MODEL_DIR, slides and the log of all processes.
    slide
        A slide's file; every task gets a hard link to it, which is another slide for the backend.
    checkpoint
        The stand-in model's file, or one in its place: only its digest is used, unless workers with a real model are started.
    tweaks
        Module constants to change in the child processes, see :data:`fault_processes.TWEAKS`.
    environment
        More variables for the child processes.
    settings
        As of :func:`backend.settings.load_settings`.
    """

    def __init__(
        self,
        folder: Path,
        slide: Path,
        checkpoint: Path,
        *,
        tweaks: dict[str, float] | None = None,
        environment: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.folder = folder
        self._environment = environment or {}
        self.studio = StudioStub()
        self.backend_url = ""
        self._slide = slide
        self._tweaks = QUICK | (tweaks or {})
        self._stack = ExitStack()
        self._asked: dict[str, int] = {}
        for name in ("slides", "hold", "do", "cache/models"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        models = folder / "cache" / "models" / checkpoint.name
        if not models.exists():
            models.symlink_to(checkpoint)
        self.settings: Settings = load_settings(
            **{
                "model_dir": folder,
                "slide_roots": (folder / "slides",),
                "heartbeat_ttl_s": 5,
                "job_retries": 2,
                "devices": "cpu",
                "predict_wait_s": 0.1,
                "label_studio_url": self.studio.url,
                "label_studio_api_key": "a" * 40,
                **settings,
            }
        )
        self.redis = connect(self.settings, check=False)
        self.queue = BagQueue(self.settings, self.redis)
        self.services = Services(self.settings, self.redis)
        model = self.services.model
        facts = {name: getattr(model, name) for name in ("model_version", "fingerprint", "mmm_release", "precision")}
        (folder / "model.json").write_text(json.dumps({**facts, "model_name": model.name, "stand_in": model.stand_in}))

    def close(self) -> None:
        self._stack.close()
        self.services.close()
        if not self.settings.redis_url.get_secret_value():
            with suppress(RedisError):  # it outlives a process that was killed, as it should, but not the test
                self.redis.shutdown(nosave=True)
        self.redis.close()
        self.studio.stop()

    # --- processes ---

    def start(self, *command: str, environment: dict[str, str] | None = None) -> Process:
        """Run one of the backend's commands, by :mod:`fault_processes`."""
        variables = {
            **os.environ,
            **settings_environ(self.settings),
            "OMP_NUM_THREADS": "1",
            "MMM_LICENSE_ACCEPTED": "i accept",
            "PYTHONPATH": PYTHONPATH,
            TWEAKS: json.dumps(self._tweaks),
            **self._environment,
            **(environment or {}),
        }
        with (self.folder / "log").open("ab") as log:
            popen = subprocess.Popen(
                [*PROGRAM, *command], env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        process = Process(popen)
        self._stack.callback(process.kill)
        return process

    def serve(self, *options: str) -> Process:
        """The HTTP process, answering."""
        port = free_port()
        process = self.start("serve", "--port", str(port), *options)
        self.backend_url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            assert process.alive(), self.log()[-3000:]
            try:
                return httpx.get(f"{self.backend_url}/health", timeout=2, trust_env=False).status_code == 200
            except httpx.HTTPError:
                return False

        eventually(answers, "the HTTP process answers")
        return process

    def pool(self) -> Process:
        """The pool of workers, as `wsc-backend workers` runs it."""
        return self.start("workers")

    def worker(self, queues: str = "interactive,batch", **environment: str) -> Process:
        """A single worker."""
        return self.start("worker", "--queues", queues, environment=environment)

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    # --- slides and tasks ---

    def slide(self, name: str) -> Path:
        """A slide of this name."""
        path = self.folder / "slides" / f"{name}.tif"
        if not path.exists():
            os.link(self._slide, path)
        return path

    def ask(self, *names: str) -> httpx.Response:
        """Open a task for each slide: one request, as Label Studio sends it."""
        for name in names:
            if name not in self._asked:
                self._asked[name] = self.studio.add_task(self.slide(name))
        return self.studio.ask(self.backend_url, [self._asked[name] for name in names])

    def ask_until_taken(self, *names: str) -> list[httpx.Response]:
        """As :meth:`ask`, and again while the backend says that it cannot now: what a person does. Returns the refusals."""
        refusals = []
        deadline = time.monotonic() + 60
        while True:
            try:
                answer = self.ask(*names)
            except httpx.TransportError:
                answer = None  # cut, or nobody there
            if answer is not None and answer.status_code == 200:
                return refusals
            if answer is not None:
                assert answer.status_code == 503, answer.text
                refusals.append(answer)
            assert time.monotonic() < deadline, self.log()[-3000:]
            time.sleep(0.2)

    def task(self, name: str) -> int:
        return self._asked[name]

    def key(self, name: str) -> str:
        """The bag key of a slide."""
        return self.services.key(
            slide_ref(self.services, parse_config(CONFIG), {"image": str(self.folder / "slides" / f"{name}.tif")})
        )

    def hold(self, *places: str) -> None:
        """Have bags wait at a stage: ``slide.encode``."""
        for place in places:
            (self.folder / "hold" / place).touch()

    def release(self, *places: str) -> None:
        """Let them go on; all of them if none is named."""
        for place in places or [path.name for path in (self.folder / "hold").iterdir()]:
            (self.folder / "hold" / place).unlink()

    def order(self, place: str, how: str) -> None:
        """Have a bag misbehave at a stage."""
        (self.folder / "do" / place).write_text(how)

    def reached(self, place: str, timeout_s: float = 90) -> int:
        """Wait until a bag is at a stage; returns the process that has it."""
        line = eventually(
            lambda: next((x for x in reversed(self.ledger("reached")) if x.split()[0] == place), None),
            f"{place} is reached\n{self.log()[-3000:]}",
            timeout_s,
        )
        return int(line.split()[1])

    def ledger(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def runs(self, name: str) -> int:
        """How often the analysis of a slide was begun."""
        return sum(line.split()[0] == name for line in self.ledger("analysed"))

    def state(self, name: str) -> JobState | None:
        return self.queue.state(self.key(name))

    # --- what became of them ---

    def settle(self, *names: str, timeout_s: float = 120) -> Tally:
        """Wait until every slide has its prediction or its failure and nothing is under way any more; then count."""
        names = names or tuple(self._asked)

        def open_ones() -> list[str]:
            return [name for name in names if not self.studio.of(self.task(name)) and not self.failure(name)]

        deadline = time.monotonic() + timeout_s
        while (open_ones() or self._under_way(names)) and time.monotonic() < deadline:
            time.sleep(0.1)
        tally = Tally(tried=len(names))
        for name in names:
            count, failure = len(self.studio.of(self.task(name))), self.failure(name)
            if count == 1:
                tally.predicted += 1
            elif count > 1:
                tally.doubled.append(name)
            elif failure:
                tally.failed[name] = failure
            else:
                tally.lost.append(name)
        return tally

    def all_done(self) -> bool:
        """Whether every task that was asked for has a prediction."""
        return all(self.studio.of(number) for number in self._asked.values())

    def failure(self, name: str) -> str:
        """Why a slide has failed for good, as the job list says it; empty if it has not."""
        state = self.state(name)
        if state is None or state.status != "failed" or not state.error:
            about = (f"push task {self.task(name)} of", f"push what waits for {self.key(name)}")
            pushes = (job for job in self.queue.jobs(10_000, "failed") if job.about.startswith(about))
            state = next(pushes, None)
        if state is None or not state.error:
            return ""
        return f"{state.error['code']}: {state.error['message']}"

    def _under_way(self, names: Sequence[str]) -> bool:
        keys = {self.key(name) for name in names}
        tasks = {f"task {self.task(name)} of" for name in names}  # pushes, and looks at what came of them
        for job in self.queue.jobs(10_000):
            if not job.settled and (
                job.key in keys or job.key.removeprefix("publish-")[:40] in keys or any(t in job.about for t in tasks)
            ):
                return True
        return any(self.queue.waiting(key) for key in keys)


def assert_none_lost(tally: Tally, rig: Rig, *, failed: int = 0) -> None:
    """Every slide has exactly one prediction, but for ``failed`` ones, which say why."""
    said = f"{tally}\n{rig.log()[-6000:]}"
    assert tally.lost == [], said
    assert tally.doubled == [], said
    assert len(tally.failed) == failed, said
    assert tally.predicted == tally.tried - failed, said


@dataclass
class Parts:
    """A backend, the Redis that it uses, and what lies between the two."""

    rig: Rig
    server: OwnRedis
    proxy: RedisProxy

    def mend(self) -> None:
        """Undo every fault that a test has left behind."""
        if not self.server.alive():
            self.server.start()
        with self.server.client() as client:
            for setting, value in (("maxmemory", 0), ("min-replicas-to-write", 0), ("requirepass", "")):
                client.config_set(setting, value)
        self.proxy.accept()
        self.proxy.delay_s = 0.0
        self.proxy.on_request = lambda _number, _data: "pass"
        self.rig.studio.start()
        self.rig.release()
