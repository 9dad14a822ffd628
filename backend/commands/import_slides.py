"""``wsc-backend import``: slides → tasks of a Label Studio project, connected to this backend, pre-labelling started."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from backend.errors import BackendError, LabelStudioError, SourceRefused
from backend.label_studio.events import WEBHOOK_SECRET_HEADER
from backend.label_studio.labeling_config import load_template, parse_config
from backend.label_studio.services import Services
from backend.slides.reader import open_slide
from backend.web.signing import SlideSigner

log = logging.getLogger(__name__)

Said = Callable[[str], None]


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes
    ----------
    project
        Number of the project.
    url
        Address of the project in Label Studio.
    added, present
        Slides that became tasks now, and slides that were tasks already.
    refused
        Slides that could not be opened, with the reason.
    """

    project: int
    url: str
    added: list[Path] = field(default_factory=list)
    present: list[Path] = field(default_factory=list)
    refused: list[tuple[Path, BackendError]] = field(default_factory=list)


def import_slides(
    services: Services,
    slides: Sequence[Path],
    *,
    project: str,
    template: str = "triage",
    mpp: float | None = None,
    backend_url: str = "",
    retrieve: bool = True,
    say: Said = lambda _: None,
) -> Imported:
    """Make every slide a task of ``project``. Running it again adds only new slides.

    Parameters
    ----------
    slides
        Files below ``SLIDE_ROOTS``.
    project
        Title or number of the project; a title that does not exist yet is created with ``template`` as its labelling config.
    mpp
        Written into the new tasks: µm per pixel for slides that do not say.
    backend_url
        Address under which *Label Studio* reaches this backend; ``PUBLIC_URL`` if empty.
    retrieve
        Whether pre-labelling is started right away.
    say
        Told what is happening, a line at a time.
    """
    client = services.client
    found = client.find_project(project)
    if found is None:
        if project.isdigit():
            raise LabelStudioError(f"There is no project {project} in {client.url}.")
        found = client.create_project(project, load_template(template))
        say(f"Created the project “{project}”")
    parse_config(found.label_config or "")
    number = int(found.id)
    done = Imported(number, f"{client.url}/projects/{number}/data")
    signer = SlideSigner(services.settings.model_dir)
    known = client.task_field_values(number, "slide")
    tasks = []
    for slide in slides:
        path = slide.resolve()
        if str(path) in known:
            done.present.append(slide)
            continue
        try:
            task = _task(services, signer, path, mpp, number)
        except BackendError as error:
            done.refused.append((slide, error))
            say(f"{slide.name}: {error}")
            continue
        tasks.append(task)
        done.added.append(slide)
        say(f"{slide.name}: thumbnail made")
    if tasks:
        client.import_tasks(number, tasks)
    version = services.versions.version(number)
    url = (backend_url or services.settings.browser_url).rstrip("/")
    client.connect_backend(number, url, version)
    client.secure_webhook(number, f"{url}/webhook", WEBHOOK_SECRET_HEADER, services.webhook_secret)
    say(f"Connected this backend as {version}")
    if retrieve:
        client.retrieve_predictions(number)
        client.settle_model_version(number, version)
        say("Pre-labelling has started")
    return done


def _task(services: Services, signer: SlideSigner, path: Path, mpp: float | None, project: int) -> dict[str, object]:
    settings = services.settings
    if not any(path.is_relative_to(root) for root in settings.slide_roots):
        raise SourceRefused(
            f"{path} lies outside SLIDE_ROOTS.",
            hint="Add its folder to SLIDE_ROOTS of backend and workers, then import again.",
        )
    ref = services.resolver.resolve(str(path), mpp=mpp)
    with open_slide(path, settings) as slide:
        thumbnail = services.thumbnails.make(ref.identity, slide)
        states_mpp = slide.mpp is not None
    task: dict[str, object] = {
        "image": f"{settings.browser_url}/thumbnails/{thumbnail.id}.jpg",
        "slide": str(path),
        "name": path.name,
    }
    if states_mpp:
        ref = replace(ref, mpp=None)
    elif mpp is not None:
        task["mpp"] = mpp
    # Exactly what /predict will make of this task, so that the panel looks for the same bag.
    token = signer.token(ref, project)
    task["panel"] = f"{settings.browser_url}/panel?slide={token}"
    task["heatmap"] = f"{settings.browser_url}/panel/heatmap.jpg?slide={token}"
    return task
