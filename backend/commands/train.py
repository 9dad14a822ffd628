"""``wsc-backend train``: have a project's heads trained, by a worker if there is one, else here; wait for it and say what was learnt."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from backend.errors import ProjectNotFound, TrainingFailed, WorkerDied
from backend.label_studio.events import WEBHOOK_SECRET_HEADER
from backend.label_studio.services import Services
from backend.label_studio.teaching import Progress
from backend.label_studio.trainer import TrainingReport, train

Said = Callable[[str], None]

_ASK_EVERY_S = 0.3
_WORKERS_GONE_S = 90.0
"""A worker that died is started again within seconds; a queued training is not waited for longer than this without one."""


@dataclass(frozen=True)
class Trained:
    """What a training did, and the issues that it found (up to 200, where the report of a worker has 20)."""

    project: int
    title: str
    report: TrainingReport
    issues: Sequence[Mapping[str, Any]]
    publishers: bool
    """Whether a worker is there that pushes what was queued."""


def train_project(
    services: Services,
    project: str,
    *,
    backend_url: str = "",
    progress: Progress = lambda *_: None,
    say: Said = lambda _: None,
) -> Trained:
    """Have Label Studio's events of ``project`` (number or title) reach us, train its heads now, and wait until that has settled.

    Parameters
    ----------
    backend_url
        Address under which *Label Studio* reaches this backend; ``PUBLIC_URL`` if empty.
    progress, say
        Told where it is, and what is happening, a line at a time.

    Raises
    ------
    ProjectNotFound
        There is no such project; further errors as of :func:`~backend.label_studio.trainer.train`.
    TrainingFailed
        A worker tried, and failed.
    WorkerDied
        The workers that could train are gone.
    TrainingRuns
        There is no worker, and somebody else trains the project right now.
    """
    found = services.client.need_project(project)
    number = int(found.id)
    services.queue.ping()
    connect_webhook(services, number, backend_url, say)
    if _workers(services, "train"):
        report = _by_worker(services, number, progress)
    else:
        say("No worker for training is running: training here")
        with services.training.alone(number):
            services.training.begin(number)
            report = train(services, number, progress)
    snapshot = services.versions.snapshot(number)
    issues = report.issues if snapshot is None else snapshot.about["issues"]
    return Trained(number, str(found.title), report, issues, _workers(services, "publish"))


def connect_webhook(services: Services, project: int, backend_url: str = "", say: Said = lambda _: None) -> None:
    """Have the webhooks of ``project`` to this backend carry our secret, so that its annotations teach from now on.

    ``import`` does the same; a project that was connected in Label Studio's settings has a webhook without the secret.
    """
    client = services.client
    url = (backend_url or services.settings.browser_url).rstrip("/")
    urls = client.connected_urls(project, url)
    for address in urls:
        client.secure_webhook(project, f"{address}/webhook", WEBHOOK_SECRET_HEADER, services.webhook_secret)
    if not urls:
        say(
            f"The project is not connected to this backend at {url}, so new annotations will not start a training: "
            "connect it in Settings → Model, or say --backend-url"
        )


def _workers(services: Services, queue: str) -> bool:
    """Whether a worker takes what we put into a queue: one with another model or other settings leaves it."""
    fits = ("", services.needs)
    return any(queue in worker["queues"] and worker["fits"] in fits for worker in services.queue.workers())


def _by_worker(services: Services, project: int, progress: Progress) -> TrainingReport:
    training = services.training
    before = training.runs().get(project, 0)
    training.train_now(project)
    alone_since: float | None = None
    while True:
        # In this order: when the note is gone, the run that it asked for is queued.
        again, state = training.again(project), training.state(project)
        begun = training.runs().get(project, 0) > before
        if state is None:
            raise TrainingFailed(f"The training of project {project} is not listed any more.", hint="Start it again.")
        if begun and not again and state.status == "finished":
            break
        if begun and not again and state.error is not None and state.status != "started":
            hint = "It is tried again by itself." if state.status == "queued" else str(state.error.get("hint", ""))
            raise TrainingFailed(f"{state.error.get('message', state.error)}", hint=hint)
        progress(state.stage if state.status == "started" else state.status, state.done, state.total)
        if _workers(services, "train"):
            alone_since = None
        elif alone_since is None:
            alone_since = time.monotonic()
        elif time.monotonic() - alone_since > _WORKERS_GONE_S:
            raise WorkerDied(
                f"The worker that was to train project {project} is gone.",
                hint="The training stays queued: start `wsc-backend workers`.",
            )
        time.sleep(_ASK_EVERY_S)
    said = training.report(project) or {}
    if "version" not in said:
        raise ProjectNotFound(f"Project {project}: {said.get('message', 'the worker left no report')}.")
    return TrainingReport(**{field.name: said[field.name] for field in fields(TrainingReport) if field.name in said})
