"""``wsc-backend demo``: from nothing to a Label Studio with slides whose pre-annotations arrive while one watches."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from backend.commands.import_slides import Imported, import_slides
from backend.demo.label_studio_process import LabelStudioProcess
from backend.demo.slides import demo_slides
from backend.errors import LicenceNotAccepted
from backend.jobs.pool import WorkerPool
from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.services import Services
from backend.settings import Settings, licence_accepted, load_settings
from backend.slides.discover import find_slides
from backend.web.server import ServerThread, bind

log = logging.getLogger(__name__)

PROJECT = "Whole slides"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Running:
    """A demo that is up.

    Attributes
    ----------
    label_studio_url, username, password
        Where to look, and how to log in.
    backend_url
        Where the backend answers.
    services
        To follow the work.
    imported
        The project.
    """

    label_studio_url: str
    username: str
    password: str
    backend_url: str
    services: Services
    imported: Imported

    def progress(self) -> tuple[int, int, list[str]]:
        """(tasks with a prediction, tasks, what is being done now and what failed, a line each)."""
        client = self.services.client
        tasks = list(client.sdk.tasks.list(project=self.imported.project, fields="all"))
        done = sum(1 for task in tasks if task.total_predictions)
        lines = []
        for job in self.services.queue.jobs(50):
            if job.queue not in ("interactive", "batch"):
                continue
            if job.status == "started":
                rate = f", {job.tiles_per_s:.1f} tiles/s" if job.tiles_per_s else ""
                lines.append(f"{job.device or 'worker'}: {job.stage} {job.done}/{job.total} tiles{rate}")
            elif job.status == "failed":
                lines.append(f"failed: {(job.error or {}).get('message', 'no reason given')}")
        return done, len(tasks), lines


@contextmanager
def running_demo(
    folder: Path,
    *,
    label_studio_venv: Path,
    slides: Path | None = None,
    label_studio_port: int = 8080,
    template_dir: Path | None = None,
    say: Say = lambda _: None,
) -> Iterator[Running]:
    """Start everything; on leaving the context, end everything that was started.

    Parameters
    ----------
    folder
        Where the demo keeps slides, results, Redis and Label Studio's data; used again by the next run.
    label_studio_venv
        Folder for Label Studio's own virtual environment.
    slides
        The user's slides; without it the demo's own are fetched and made.
    label_studio_port
        Port to try; another is taken if it is in use.
    say
        Told what is happening, a line at a time.
    """
    if not licence_accepted():
        raise LicenceNotAccepted
    folder = folder.resolve()
    base = load_settings()
    # Before minutes of installing: is the port free?
    listener = bind(base.host, base.port)
    with ExitStack() as stack:
        stack.callback(listener.close)
        if slides is None:
            paths = demo_slides(folder / "slides", say)
            root = folder / "slides"
        else:
            root = slides.resolve()
            found = find_slides(root)
            if found.passed_over:
                say(found.summary)
            paths = found.slides
        studio = LabelStudioProcess(
            label_studio_venv,
            folder / "label-studio",
            _free_port(label_studio_port),
            template_dir=template_dir,
        )
        studio.ensure_installed(say)
        settings = _demo_settings(base, folder, root, listener.getsockname()[1])
        redis = stack.enter_context(EmbeddedRedis(settings.model_dir))
        say(f"Redis is up on a private socket ({redis.url.split('?')[0]})")
        with closing(Services(settings)) as services:
            _say_model(services, say)
        stack.callback(studio.stop)
        studio.start(say)
        os.environ["LABEL_STUDIO_URL"] = studio.base_url
        os.environ["LABEL_STUDIO_API_KEY"] = studio.token
        settings = load_settings()
        services = stack.enter_context(closing(Services(settings)))
        pool = WorkerPool(settings)
        stack.callback(pool.stop)
        pool.start()
        say(f"Workers started on {', '.join(pool.devices)}")
        server = ServerThread(services, listener)
        stack.callback(server.stop)
        server.start()
        say(f"The backend answers on {settings.browser_url}")
        imported = import_slides(services, paths, project=PROJECT, say=say)
        yield Running(studio.base_url, studio.username, studio.password, settings.browser_url, services, imported)


def _demo_settings(base: Settings, folder: Path, root: Path, port: int) -> Settings:
    """Settings of the demo, put into the environment too: the worker processes read them there."""
    roots: Sequence[Path] = dict.fromkeys((*base.slide_roots, root)).keys()  # type: ignore[assignment]
    os.environ.update(
        MODEL_DIR=str(folder),
        SLIDE_ROOTS=",".join(map(str, roots)),
        PORT=str(port),
    )
    return load_settings()


def _say_model(services: Services, say: Say) -> None:
    if not services.settings.model:
        say("No MODEL given: using the stand-in model (it is built once; its results have no medical meaning)")
    model = services.model
    say(f"Model: {model.model_version} ({model.name}, mmm {model.mmm_release}, {model.precision})")


def _free_port(wanted: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            return 0
    return wanted


def watch(running: Running, say: Say, *, every_s: float = 1.0) -> None:
    """Say how the pre-annotations come in, until every task has one or its slide has failed."""
    last = ""
    while True:
        done, total, lines = running.progress()
        text = f"{done} of {total} slides are pre-annotated" + "".join(f"\n  {line}" for line in lines)
        if text != last:
            say(text)
            last = text
        failed = sum(line.startswith("failed") for line in lines)
        if done + failed >= total:
            return
        time.sleep(every_s)
