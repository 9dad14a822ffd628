"""``wsc-backend import``: slides → tasks of a Label Studio project, connected to this backend, pre-labelling started."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from backend.commands.hints import explain
from backend.commands.one_slide import failures_named
from backend.errors import BackendError, LabelStudioError, SourceError, SourceRefused
from backend.label_studio.events import WEBHOOK_SECRET_HEADER
from backend.label_studio.labeling_config import load_template, parse_config
from backend.label_studio.services import Services
from backend.paths import StrPath
from backend.redaction import shown_address
from backend.settings import Settings
from backend.slides.dicom_series import slide_instance
from backend.slides.mpp import given_scale_note
from backend.slides.places import classify
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
    slides: Sequence[StrPath],
    *,
    project: str,
    template: str = "triage",
    mpp: float | None = None,
    force: bool = False,
    backend_url: str = "",
    retrieve: bool = True,
    say: Said = lambda _: None,
) -> Imported:
    """Make every slide a task of ``project``. Running it again adds only new slides: one that is a task under another
    name counts as present.

    Parameters
    ----------
    slides
        Files below ``SLIDE_ROOTS``.
    project
        Title or number of the project; a title that does not exist yet is created with ``template`` as its labelling
        config.
    mpp
        Written into the new tasks: µm per pixel for slides that do not say. Slides that are tasks already keep what
        their task says.
    force
        Have ``mpp`` hold also for slides that state another.
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
            raise LabelStudioError(f"There is no project {project} in {shown_address(client.url)}.")
        found = client.create_project(project, load_template(template))
        say(f"Created the project “{project}”")
    for control in parse_config(found.label_config or "").unused:
        say(f"Not used: {control}")
    number = int(found.id)
    done = Imported(number, f"{services.settings.label_studio_browser_url}/projects/{number}/data")
    signer = SlideSigner(services.settings.model_dir)
    known = _KnownSlides(client.task_field_values(number, "slide"), services.settings)
    tasks = []
    for slide in map(Path, slides):
        try:
            with failures_named(slide):
                path = slide.resolve()
                if path in known:
                    done.present.append(slide)
                    continue
                task, note = _task(services, signer, path, mpp, force, number)
                task["name"] = slide.name
        except BackendError as error:
            done.refused.append((slide, error))
            say(f"{slide.name}: {explain(error)}")
            continue
        tasks.append(task)
        known.add(path)
        done.added.append(slide)
        say(f"{slide.name}: thumbnail made{'. ' + note if note else ''}")
    if mpp is not None and done.present:
        say(
            f"{len(done.present)} slides were tasks already, and keep the scale of their tasks: --mpp {mpp:g} is not "
            "written into them. Change their `mpp` in Label Studio, or delete them and import again."
        )
    if tasks:
        client.import_tasks(number, tasks)
    services.versions.take_over(number, client.owner(number))
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


class _KnownSlides:
    """The slides of a project's tasks, under whatever name: by text, by file (all links to it), and by DICOM instance
    (copies, other levels).
    """

    def __init__(self, values: Iterable[str], settings: Settings) -> None:
        self._values = set(values)
        self._settings = settings
        self._files: dict[tuple[int, int], Path] | None = None
        self._instances: set[str] | None = None

    def __contains__(self, path: Path) -> bool:
        if str(path) in self._values:
            return True
        if not path.is_file():  # opening it says so
            return False
        if self._files is None:  # only now, as a look at every file of a large project takes its time
            self._files = dict(self._local())
        status = path.stat()
        if (status.st_dev, status.st_ino) in self._files:
            return True
        instance = slide_instance(path)
        if instance and self._instances is None:
            self._instances = set()
            for known in self._files.values():
                with suppress(OSError):  # it can no longer be read, and then it is not this one
                    self._instances.add(slide_instance(known))
        return bool(instance) and instance in (self._instances or ())

    def add(self, path: Path) -> None:
        self._values.add(str(path))
        if self._files is not None:
            status = path.stat()
            self._files[status.st_dev, status.st_ino] = path
        if self._instances is not None:
            self._instances.add(slide_instance(path))

    def _local(self) -> Iterator[tuple[tuple[int, int], Path]]:
        for value in self._values:
            with suppress(SourceError, OSError):  # a slide that is not to be opened here is none of those that are
                place = classify(value, self._settings)
                if place.kind == "file":
                    status = Path(place.location).stat()
                    yield (status.st_dev, status.st_ino), Path(place.location)


def _task(
    services: Services, signer: SlideSigner, path: Path, mpp: float | None, force: bool, project: int
) -> tuple[dict[str, object], str]:
    """The data of a slide's task, and what is to be said about its scale."""
    settings = services.settings
    if not any(path.is_relative_to(root) for root in settings.slide_roots):
        raise SourceRefused(
            f"{path} lies outside SLIDE_ROOTS.",
            hint="Add its folder to SLIDE_ROOTS of backend and workers, then import again.",
        )
    ref = services.resolver.resolve(str(path), mpp=mpp, mpp_override=force)
    with open_slide(path, settings) as slide:
        if not force:
            slide.scale.check_square(path.name)
        thumbnail = services.thumbnails.make(ref.identity, slide)
        states_mpp = slide.mpp is not None
        note = given_scale_note(slide.scale, mpp, forced=force) if mpp is not None else ""
    task: dict[str, object] = {
        "image": f"{settings.browser_url}/thumbnails/{thumbnail.id}.jpg",
        "slide": str(path),
    }
    if force:
        task |= {"mpp": mpp, "mpp_override": True}
    elif states_mpp:
        ref = replace(ref, mpp=None)
    elif mpp is not None:
        task["mpp"] = mpp
    # Exactly what /predict will make of this task, so that the panel looks for the same bag.
    token = signer.token(ref, project)
    task["panel"] = f"{settings.browser_url}/panel?slide={token}"
    task["heatmap"] = f"{settings.browser_url}/panel/heatmap.jpg?slide={token}"
    return task, note
