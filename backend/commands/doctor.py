"""``wsc-backend doctor``: what is installed, what is reachable, what is missing and what to do about it."""

from __future__ import annotations

import importlib.metadata
import ipaddress
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
from PIL import Image

from backend.commands.hints import explain
from backend.errors import BackendError, LicenceNotAccepted
from backend.inference.checkpoint import MMM_DISTRIBUTION, file_sha256, locate
from backend.jobs.devices import devices_from
from backend.jobs.queue import BagQueue
from backend.jobs.redis_server import connect
from backend.label_studio.client import LabelStudioClient
from backend.paths import StrPath
from backend.results.bag import MppSource
from backend.results.store import ResultStore
from backend.settings import Settings, licence_accepted
from backend.slides.reader import open_slide
from backend.slides.render import SHOWN_MAX_PX
from backend.slides.tiling import locate_tissue, make_bag, slide_mpp
from backend.slides.tissue_file import tissue_file_beside
from backend.slides.tissue_picture import draw_tissue

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
) -> Iterator[Finding]:
    """All findings, one after the other. Nothing here raises: a failed check is a finding.

    ``mpp`` is µm per pixel of slides that do not say; with ``force`` of all. ``pictures``: a folder into which a picture
    of each slide with its tissue is written.
    """
    yield from _packages()
    yield _licence()
    yield _checkpoint(settings)
    yield from _devices(settings)
    yield from _redis(settings)
    yield from _label_studio(settings)
    yield _storage(settings)
    yield _roots(settings)
    for slide in slides:
        yield from _slide(settings, Path(slide), mpp, force)
        if pictures is not None:
            yield _picture(settings, Path(slide), mpp, force, Path(pictures))


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
        yield Finding("ok", subject, ", ".join(versions))
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _licence() -> Finding:
    if licence_accepted():
        return Finding(
            "ok", "licence", "accepted by MMM_LICENSE_ACCEPTED: non-commercial research only, no diagnostic use"
        )
    return Finding("problem", "licence", str(LicenceNotAccepted()))


def _checkpoint(settings: Settings) -> Finding:
    if not settings.model:
        return Finding(
            "warning",
            "checkpoint",
            "MODEL is not set: the stand-in model is used, whose results have no medical meaning",
        )
    if settings.model.startswith(("http://", "https://")):
        return Finding("ok", "checkpoint", f"{settings.model} (downloaded when first used)")
    try:
        path = locate(settings.model)
        sha256 = file_sha256(path)
    except BackendError as error:
        return Finding("problem", "checkpoint", str(error))
    if settings.model_sha256 and sha256 != settings.model_sha256:
        return Finding("problem", "checkpoint", f"{path} has SHA-256 {sha256}, not MODEL_SHA256")
    return Finding("ok", "checkpoint", f"{path}, SHA-256 {sha256[:16]}…{' (pinned)' if settings.model_sha256 else ''}")


def _devices(settings: Settings) -> Iterator[Finding]:
    try:
        devices = devices_from(settings.devices)
    except BackendError as error:
        yield Finding("problem", "devices", str(error))
        return
    cores = f"{os.cpu_count()} cores"
    yield Finding("ok", "devices", f"DEVICES={settings.devices}: {', '.join(devices)} ({cores}); one worker on each")
    if devices == ["cpu"] and settings.precision != "float32":
        yield Finding("warning", "devices", f"PRECISION={settings.precision} is slower than float32 on most CPUs")


def _redis(settings: Settings) -> Iterator[Finding]:
    try:
        queue = BagQueue(settings, connect(settings))
        queue.ping()
    except BackendError as error:
        yield Finding("warning" if not settings.redis_url.get_secret_value() else "problem", "redis", str(error))
        return
    depths = ", ".join(f"{name} {depth}" for name, depth in queue.depths().items())
    where = "REDIS_URL" if settings.redis_url.get_secret_value() else "the embedded one"
    yield Finding("ok", "redis", f"{where} answers; waiting jobs: {depths}")
    workers = queue.workers()
    if workers:
        names = ", ".join(f"{w.get('device') or 'cpu'} ({w.get('state')})" for w in workers)
        yield Finding("ok", "workers", f"{len(workers)}: {names}")
    else:
        yield Finding(
            "warning", "workers", "none is running: slides are queued and not analysed. Start: wsc-backend workers"
        )


def _label_studio(settings: Settings) -> Iterator[Finding]:
    if not settings.label_studio_url:
        yield Finding("warning", "label studio", "LABEL_STUDIO_URL is not set: finished predictions cannot be pushed")
        return
    try:
        with closing(LabelStudioClient(settings)) as client:
            user = client.whoami()
        yield Finding("ok", "label studio", f"{settings.label_studio_url} answers; the token belongs to {user}")
    except BackendError as error:
        yield Finding("problem", "label studio", str(error))
    url = f"{settings.browser_url}/health"
    auth = (settings.basic_auth_user, settings.basic_auth_pass.get_secret_value()) if settings.basic_auth_user else None
    try:
        answer = httpx.get(url, timeout=3.0, auth=auth)
        verdict: Verdict = "ok" if answer.status_code == 200 else "problem"
        yield Finding(verdict, "this backend", f"{url} answers {answer.status_code} from here")
    except httpx.HTTPError as error:
        yield Finding(
            "warning", "this backend", f"{url} does not answer ({type(error).__name__}). Start: wsc-backend serve"
        )
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


def _is_private(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return host == "localhost"


def _storage(settings: Settings) -> Finding:
    folder = settings.model_dir
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 2**30
    if not os.access(existing, os.W_OK):
        return Finding("problem", "storage", f"MODEL_DIR {folder} cannot be written")
    try:
        ResultStore(settings.results_location).has("0" * 40)
    except BackendError as error:
        return Finding("problem", "storage", str(error))
    return Finding(
        "ok" if free > 5 else "warning",
        "storage",
        f"results in {settings.results_location}; {free:.0f} GiB free in {folder}",
    )


def _roots(settings: Settings) -> Finding:
    if not settings.slide_roots:
        return Finding(
            "warning", "slide roots", "SLIDE_ROOTS is not set: no slide on disk can be opened for Label Studio"
        )
    missing = [str(root) for root in settings.slide_roots if not root.is_dir()]
    if missing:
        return Finding("problem", "slide roots", f"no such folder: {', '.join(missing)}")
    return Finding("ok", "slide roots", ", ".join(map(str, settings.slide_roots)))


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


def _picture(settings: Settings, path: Path, mpp: float | None, force: bool, folder: Path) -> Finding:
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
        return Finding("problem", path.name, f"no picture of its tissue: {explain(error)}")
    except OSError as error:
        return Finding("problem", path.name, f"{target} cannot be written: {error.strerror}")
    return Finding("ok", path.name, f"its tissue: {target}")
