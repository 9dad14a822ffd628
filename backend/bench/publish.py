"""From a finished bag to its prediction in Label Studio, and the push itself; against a stub that answers at once."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import httpx
from rq.job import Job
from rq.serializers import JSONSerializer

from backend.bench.answers import CONFIG, NotAnswered, process_of, serving
from backend.bench.measure import Figure, Plan, percentile
from backend.bench.studio import PROJECT, Studio, studio
from backend.inference.checkpoint import STAND_IN_FILE, ensure_checkpoint
from backend.jobs.queue import WaitingTask
from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.publisher import push
from backend.label_studio.services import Services
from backend.settings import load_settings
from backend.slides.synthetic import write_synthetic_slide

_LIMIT_S = 120.0
_STUB = "a stub for Label Studio, which answers at once"


def run(plan: Plan) -> list[Figure]:
    """Milliseconds from the end of a bag's job to its prediction being stored, and of one push."""
    folder = plan.folder / "publish"
    slides = folder / "slides"
    slides.mkdir(parents=True)
    checkpoint = ensure_checkpoint(plan.settings)
    if not plan.settings.model:
        (folder / "cache" / "models").mkdir(parents=True)
        (folder / "cache" / "models" / STAND_IN_FILE).symlink_to(checkpoint)
    side = plan.pick(448, 1024, 1024)
    slide = write_synthetic_slide(slides / "slide.tif", size=(side, side), mpp=0.5, seed=3).path
    count = 1 + plan.pick(1, 5, 15)
    with EmbeddedRedis(folder) as redis, studio(CONFIG) as label_studio:
        settings = load_settings(
            model=plan.settings.model,
            model_dir=folder,
            slide_roots=(slides,),
            redis_url=redis.url,
            devices=plan.device,
            predict_wait_s=0.0,
            rank_tasks=False,
            log_level="WARNING",
            label_studio_url=label_studio.url,
            label_studio_api_key="a-token-for-a-stub",
            results_url="",
            basic_auth_user="",
        )
        services = Services(settings)
        try:
            with serving(settings) as port, process_of(settings, "workers", "--devices", plan.device):
                waits = [_published(port, services, label_studio, slide, number) for number in range(1, count + 1)]
            pushes = _pushes(services, label_studio)
        finally:
            services.close()
    warm = waits[1:]  # the first one imports what pushing needs
    note = f"{len(warm)} slides, one at a time; {_STUB}"
    return [
        Figure("publish", "bag finished to prediction stored, p50", 1000 * percentile(warm, 50), "ms", note=note),
        Figure("publish", "bag finished to prediction stored, longest", 1000 * max(warm), "ms"),
        Figure("publish", "push of a new prediction, p50", 1000 * percentile(pushes["created"], 50), "ms", note=_STUB),
        Figure("publish", "push of one that is there, p50", 1000 * percentile(pushes["kept"], 50), "ms", note=_STUB),
    ]


def _published(port: int, services: Services, label_studio: Studio, slide: Path, task: int) -> float:
    """Seconds from the end of a new slide's job to its prediction."""
    path = slide.with_name(f"new-{task}.tif")
    shutil.copyfile(slide, path)
    data = label_studio.tasks[task] = {"image": str(path)}
    body = {"tasks": [{"id": task, "data": data}], "project": f"{PROJECT}.0", "label_config": CONFIG, "params": {}}
    httpx.post(f"http://127.0.0.1:{port}/predict", json=body, timeout=60, trust_env=False).raise_for_status()
    key = services.key(services.resolver.resolve(str(path)))
    deadline = time.monotonic() + _LIMIT_S
    while task not in label_studio.stored_at:
        state = services.queue.state(key)
        if state is not None and state.status == "failed":
            raise NotAnswered(f"The benchmark's slide failed: {state.error}.", hint="See the worker's log.")
        if time.monotonic() > deadline:
            raise NotAnswered(f"Nothing was pushed within {_LIMIT_S:g} s.", hint="Run `wsc-backend doctor`.")
        time.sleep(0.05)
    ended = Job.fetch(key, services.redis, serializer=JSONSerializer).ended_at
    if ended is None:
        raise NotAnswered("The job of a pushed bag has no end.")
    return label_studio.stored_at[task] - float(ended.timestamp())


def _pushes(services: Services, label_studio: Studio) -> dict[str, list[float]]:
    """Seconds of pushes in this process, for another task of each slide: of a prediction that is not there, and of one that is."""
    seconds: dict[str, list[float]] = {"created": [], "kept": []}
    tasks = {len(label_studio.tasks) + task: data for task, data in label_studio.tasks.items()}
    label_studio.tasks |= tasks
    for outcome, found in seconds.items():
        for task, data in tasks.items():
            waiting = WaitingTask(
                project=PROJECT, task=task, model_version=services.model.model_version, label_config=CONFIG
            )
            key = services.key(services.resolver.resolve(data["image"]))
            started = time.perf_counter()
            done = push(services, key, waiting)
            if done != outcome:
                raise NotAnswered(f"A push ended as {done} and not as {outcome}.")
            found.append(time.perf_counter() - started)
            # The right to answer for a task is held for some seconds, so that nobody answers twice: the next push need not wait for that.
            services.queue.release_claim(PROJECT, task, services.versions.version(PROJECT))
    return seconds
