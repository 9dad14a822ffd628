"""``wsc-backend doctor``: what is installed, what is reachable, what is missing and what to do about it."""

from __future__ import annotations

import importlib.metadata
import ipaddress
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
from PIL import Image

from backend.commands.hints import explain
from backend.commands.project_findings import project_findings
from backend.errors import BackendError, LicenceNotAccepted, QueueUnavailable, SlideNotFound
from backend.inference.checkpoint import MMM_DISTRIBUTION, MMM_MODELS, file_sha256, identity_without_fetching, locate
from backend.inference.key import analysis_digest
from backend.jobs.devices import count_cuda, devices_from
from backend.jobs.queue import BagQueue
from backend.jobs.redis_health import examine_redis
from backend.jobs.redis_server import connect
from backend.label_studio.client import LabelStudioClient
from backend.paths import StrPath
from backend.reasons import network_reason
from backend.redaction import redactor_of, shown_address
from backend.results.bag import MppSource
from backend.results.store import ResultStore
from backend.settings import Settings, licence_accepted
from backend.slides.discover import find_slides
from backend.slides.reader import open_slide
from backend.slides.render import SHOWN_MAX_PX
from backend.slides.tiling import locate_tissue, make_bag, slide_mpp
from backend.slides.tissue_file import tissue_file_beside
from backend.slides.tissue_picture import draw_tissue

log = logging.getLogger(__name__)

Verdict = Literal["ok", "warning", "problem"]
_PACKAGES = ("torch", "torchvision", MMM_DISTRIBUTION, "m3-sdk", "label-studio-ml", "label-studio-sdk", "redis", "rq")
_READERS = ("openslide-python", "openslide-bin", "pillow", "tifffile", "h5py")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    verdict: Verdict
    subject: str
    text: str


def examine(
    settings: Settings,
    slides: Sequence[StrPath],
    mpp: float | None = None,
    *,
    force: bool = False,
    pictures: StrPath | None = None,
    project: str = "",
) -> Iterator[Finding]:
    """All findings, one after the other, without secrets. Nothing here raises: a check that fails is a finding, whatever it fails of.

    ``mpp`` is µm per pixel of slides that do not say; with ``force`` of all. ``pictures``: a folder into which a picture
    of each slide with its tissue is written. ``project``: number or title of a project whose connection and labelling
    config are looked at.
    """
    redact = redactor_of(settings, os.environ)
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("packages", _packages),
        ("licence", _licence),
        ("checkpoint", lambda: _checkpoint(settings)),
        ("devices", lambda: _devices(settings)),
        ("redis", lambda: _redis(settings)),
        ("label studio", lambda: _label_studio(settings)),
        ("this backend", lambda: _this_backend(settings)),
        ("storage", lambda: _storage(settings)),
        ("slide roots", lambda: _roots(settings)),
    ]
    if project:
        checks.append((f"project {project}", lambda: _project(settings, project)))
    for path in map(Path, slides):
        within = [] if path.is_dir() else [path]
        if not within:
            checks.append((path.name, partial(_folder, path, within)))
        checks.append((path.name, partial(_slides, settings, within, mpp, force, pictures)))
    for subject, check in checks:
        for finding in _guarded(subject, check):
            yield replace(finding, text=redact(finding.text))


def _guarded(subject: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except BackendError as error:
        yield Finding("problem", subject, str(error))
    except Exception as error:
        log.debug("the check of %s", subject, exc_info=True)
        yield Finding("problem", subject, f"it could not be looked at: {type(error).__name__}: {error}")


def _packages() -> Iterator[Finding]:
    for subject, names in (("packages", _PACKAGES), ("readers", _READERS)):
        versions, missing = [], []
        for name in names:
            try:
                versions.append(f"{name} {importlib.metadata.version(name)}")
            except importlib.metadata.PackageNotFoundError:
                missing.append(name)
        if missing:
            yield Finding("problem", subject, f"missing: {', '.join(missing)}. Install with: pip install .")
        if versions:
            yield Finding("ok", subject, ", ".join(versions))
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _licence() -> Iterator[Finding]:
    if not licence_accepted():
        raise LicenceNotAccepted
    yield Finding("ok", "licence", "accepted by MMM_LICENSE_ACCEPTED: non-commercial research only, no diagnostic use")


def _checkpoint(settings: Settings) -> Iterator[Finding]:
    if not settings.model:
        yield Finding(
            "warning",
            "checkpoint",
            "MODEL is not set: the stand-in model is used, whose results have no medical meaning",
        )
        return
    if settings.model in MMM_MODELS or settings.model.startswith(("http://", "https://")):
        yield Finding("ok", "checkpoint", f"{shown_address(settings.model)} (downloaded when first used)")
        return
    path = locate(settings.model)
    sha256 = file_sha256(path)
    if settings.model_sha256 and sha256 != settings.model_sha256:
        yield Finding("problem", "checkpoint", f"{path} has SHA-256 {sha256}, not MODEL_SHA256")
    else:
        pinned = " (pinned)" if settings.model_sha256 else ""
        yield Finding("ok", "checkpoint", f"{path}, SHA-256 {sha256[:16]}…{pinned}")


def _devices(settings: Settings) -> Iterator[Finding]:
    devices = devices_from(settings.devices)
    cores = f"{os.cpu_count()} cores"
    yield Finding("ok", "devices", f"DEVICES={settings.devices}: {', '.join(devices)} ({cores}); one worker on each")
    count, found = count_cuda()
    if missing := [device for device in devices if device not in ("cpu", *(f"cuda:{i}" for i in range(count)))]:
        yield Finding(
            "warning", "devices", f"{', '.join(missing)} may not be there: {found}. Correct DEVICES, or set it to auto"
        )
    if devices == ["cpu"] and settings.precision != "float32":
        yield Finding("warning", "devices", f"PRECISION={settings.precision} is slower than float32 on most CPUs")


def _redis(settings: Settings) -> Iterator[Finding]:
    given = bool(settings.redis_url.get_secret_value())
    try:
        client = connect(settings)
    except QueueUnavailable as error:
        yield Finding("problem" if given else "warning", "redis", str(error))
        return
    with closing(client):
        for remark in examine_redis(client):
            yield Finding(remark.verdict, "redis", f"{remark.text}. {remark.hint}")
        yield from _queue(settings, BagQueue(settings, client), "REDIS_URL" if given else "the embedded one")


def _queue(settings: Settings, queue: BagQueue, where: str) -> Iterator[Finding]:
    depths = ", ".join(f"{name} {depth}" for name, depth in queue.depths().items())
    yield Finding("ok", "redis", f"{where} answers; waiting jobs: {depths}")
    workers = queue.workers()
    if workers:
        names = ", ".join(f"{w.get('device') or 'cpu'} ({w.get('state')})" for w in workers)
        yield Finding("ok", "workers", f"{len(workers)}: {names}")
        yield from _unfit(settings, workers)
    else:
        yield Finding(
            "warning", "workers", "none is running: slides are queued and not analysed. Start: wsc-backend workers"
        )


def _unfit(settings: Settings, workers: list[dict[str, Any]]) -> Iterator[Finding]:
    model = identity_without_fetching(settings)
    ours = "" if model is None else analysis_digest(model, settings)
    others = sorted({str(w["model_version"]) for w in workers if ours and w["fits"] not in ("", ours)})
    if others:
        yield Finding(
            "problem",
            "workers",
            f"some have another model or other settings than here ({', '.join(others)}): what is asked from here waits for others. "
            "Give backend and workers the same MODEL, PRECISION, DEFAULT_MPP, TILE_… and TISSUE_…",
        )


def _label_studio(settings: Settings) -> Iterator[Finding]:
    if not settings.label_studio_url:
        yield Finding("warning", "label studio", "LABEL_STUDIO_URL is not set: finished predictions cannot be pushed")
        return
    try:
        with closing(LabelStudioClient(settings)) as client:
            user = client.whoami()
        url = shown_address(settings.label_studio_url)
        yield Finding("ok", "label studio", f"{url} answers; the token belongs to {user}")
    except BackendError as error:
        yield Finding("problem", "label studio", str(error))


def _this_backend(settings: Settings) -> Iterator[Finding]:
    if settings.open_to_the_network:
        yield Finding(
            "warning",
            "this backend",
            f"HOST={settings.host} and no password: whoever reaches this machine may read results and ask for predictions. "
            "Set BASIC_AUTH_USER and BASIC_AUTH_PASS",
        )
    url = f"{settings.browser_url}/health"
    auth = (settings.basic_auth_user, settings.basic_auth_pass.get_secret_value()) if settings.basic_auth_user else None
    try:
        answer = httpx.get(url, timeout=3.0, auth=auth)
        yield from _health(url, answer)
    except httpx.HTTPError as error:
        reason = network_reason(error)
        why = type(error).__name__ if reason is None else reason.text
        yield Finding("warning", "this backend", f"{url} does not answer: {why}. Start: wsc-backend serve")
    if not settings.label_studio_url:
        return
    host = httpx.URL(settings.browser_url).host
    if _is_private(host):
        yield Finding(
            "warning",
            "this backend",
            f"Label Studio refuses the private address {host} unless it runs with ML_BLOCK_LOCAL_IP=false and "
            "SSRF_PROTECTION_ENABLED=false",
        )
    elif "." not in host:
        yield Finding(
            "warning",
            "this backend",
            f"Label Studio sends no webhooks to {host}: a host name needs a dot, such as ml.internal",
        )


def _health(url: str, answer: httpx.Response) -> Iterator[Finding]:
    try:
        body = answer.json()
    except ValueError:
        body = None
    if answer.status_code != 200:
        yield Finding("problem", "this backend", f"{url} answers {answer.status_code} from here")
    elif not isinstance(body, dict) or "model_version" not in body:
        yield Finding("problem", "this backend", f"at {url} something else answers: correct PUBLIC_URL or PORT")
    elif isinstance(problem := body.get("problem"), dict):
        yield Finding(
            "problem", "this backend", f"{url} answers, and says: {problem.get('message')} {problem.get('hint')}"
        )
    else:
        yield Finding("ok", "this backend", f"{url} answers 200 from here")


def _is_private(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return host == "localhost"


def _project(settings: Settings, project: str) -> Iterator[Finding]:
    for verdict, text in project_findings(settings, project):
        yield Finding(verdict, f"project {project}", text)


def _storage(settings: Settings) -> Iterator[Finding]:
    folder = settings.model_dir
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 2**30
    if not os.access(existing, os.W_OK) or not existing.is_dir():
        yield Finding("problem", "storage", f"MODEL_DIR {folder} cannot be written")
        return
    store = ResultStore(settings.results_location)
    store.has("0" * 40)
    verdict: Verdict = "ok" if free > 5 else "warning"
    yield Finding(verdict, "storage", f"results in {store.url}; {free:.0f} GiB free in {folder}")


def _roots(settings: Settings) -> Iterator[Finding]:
    if not settings.slide_roots:
        yield Finding(
            "warning", "slide roots", "SLIDE_ROOTS is not set: no slide on disk can be opened for Label Studio"
        )
        return
    missing = [str(root) for root in settings.slide_roots if not root.is_dir()]
    if missing:
        yield Finding("problem", "slide roots", f"no such folder: {', '.join(missing)}")
    else:
        yield Finding("ok", "slide roots", ", ".join(map(str, settings.slide_roots)))


def _folder(folder: Path, slides: list[Path]) -> Iterator[Finding]:
    """What a folder holds; ``slides`` gets its slides."""
    try:
        found = find_slides(folder)
    except SlideNotFound as error:
        yield Finding("problem", folder.name, explain(error))
        return
    slides += found.slides
    count = f"{len(slides)} slide{'s' if len(slides) > 1 else ''}"
    yield Finding("ok", folder.name, f"{count} in this folder. {found.summary}".strip())


def _slides(
    settings: Settings, slides: Sequence[Path], mpp: float | None, force: bool, pictures: StrPath | None
) -> Iterator[Finding]:
    for slide in slides:
        yield from _guarded(slide.name, partial(_slide, settings, slide, mpp, force))
        if pictures is not None:
            yield from _guarded(slide.name, partial(_picture, settings, slide, mpp, force, Path(pictures)))


def _slide(settings: Settings, path: Path, mpp: float | None, force: bool) -> Iterator[Finding]:
    try:
        with open_slide(path, settings) as slide:
            width, height = slide.size
            facts = f"{slide.reader}, {width} × {height} px"
            bag = make_bag(slide, settings, task_mpp=mpp, mpp_override=force, tissue_file=tissue_file_beside(path))
    except BackendError as error:
        yield Finding("problem", path.name, explain(error))
        return
    columns, rows = bag.grid_size
    yield Finding(
        "ok",
        path.name,
        f"{facts}, {bag.mpp:.4f} µm/px ({_said_by(bag.mpp_source)}), {len(bag)} tiles of {bag.tile_px} px at "
        f"{bag.tile_mpp} µm/px with tissue, of {columns * rows} in the grid",
    )
    for note in bag.notes:
        yield Finding("warning", path.name, note)


def _said_by(source: MppSource) -> str:
    return {"task": "from --mpp", "forced": "forced by --mpp"}.get(source, f"from the {source}")


def _picture(settings: Settings, path: Path, mpp: float | None, force: bool, folder: Path) -> Iterator[Finding]:
    """A picture of what is taken for tissue, and what for ink: above all where no tile was found."""
    # Not `NAME.tissue.png`: that would be a mask, should the folder be that of the slides.
    target = folder / f"{path.name}-tissue.png"
    try:
        with open_slide(path, settings) as slide:
            scale, _ = slide_mpp(slide, settings, task_mpp=mpp, mpp_override=force)
            _, record, _ = locate_tissue(slide, settings, scale, tissue_file_beside(path))
            picture = draw_tissue(Image.fromarray(slide.overview(SHOWN_MAX_PX)), record)
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(target, "PNG")
    except BackendError as error:
        yield Finding("problem", path.name, f"no picture of its tissue: {error.message}")
    except OSError as error:
        yield Finding("problem", path.name, f"{target} cannot be written: {error.strerror}")
    else:
        yield Finding("ok", path.name, f"its tissue: {target}")
