"""The overview of the backend, as a page and as JSON: queues, workers, jobs with their reasons, projects, the map of slides."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse
from pydantic import BaseModel, Field

from backend.errors import BackendError, OriginRefused, ResultNotFound
from backend.jobs.pushes import job_counts
from backend.jobs.states import Status
from backend.label_studio.predictor import MAX_PROJECT
from backend.label_studio.services import Services
from backend.results.bag import SLIDE_REF
from backend.slides.source import SlideRef
from backend.web.assets import PanelAssets, page_headers
from backend.web.embedding_map import EmbeddingMap
from backend.web.hosts import KnownNames
from backend.web.latest import Latest
from backend.web.neighbours import Neighbours
from backend.web.prefix import prefix_of
from backend.web.project_extras import ProjectLearning
from backend.web.signing import SlideSigner

PROJECTS_KEPT_S = 15.0
"""Label Studio is not asked for its projects more often than this."""
MAX_JOBS = 1000
_POLL_THREADS = 4
"""Pages that ask every few seconds wait for a slow Redis among themselves."""

Limit = Annotated[int, Query(ge=1, le=MAX_JOBS, description="How many jobs to list.")]

ProjectExtras = Callable[[int], Mapping[str, Any]]
"""From a project's number to more members of its JSON, see :class:`~backend.web.project_extras.ProjectLearning`."""


class Worker(BaseModel):
    """A worker that has shown a sign of life."""

    name: str
    device: str = Field(description="`cpu` or `cuda:N`.")
    queues: list[str]
    state: str
    job: str | None = Field(description="Id of the job it runs.")
    about: str = Field("", description="What that job is about, such as `analyse slide-1.tif`.")
    heartbeat_age_s: float
    pid: int
    host: str
    memory_bytes: int | None = Field(None, description="Main memory that it holds.")
    device_memory_bytes: int | None = Field(None, description="Memory of its CUDA device that it holds.")


class Job(BaseModel):
    """A job: an analysis, or the push of one prediction."""

    key: str
    about: str
    status: Status
    queue: str
    stage: str
    done: int
    total: int
    tiles_per_s: float | None
    position: int | None = Field(description="Place in its queue, 1 is next.")
    error: dict[str, Any] | None = Field(description="code, message, hint, retryable.")
    worker: str
    device: str
    enqueued_at: str | None
    started_at: str | None
    ended_at: str | None
    panel: str | None = Field(None, description="Where to look at the slide, if the job is an analysis.")


class Overview(BaseModel):
    """What is going on."""

    model_version: str
    stand_in: bool = Field(description="Whether the model is the stand-in, which has no medical meaning.")
    queues: dict[str, int] = Field(description="Jobs that lie in each queue.")
    counts: dict[str, int] = Field(description="Jobs by status, all of them.")
    jobs: list[Job] = Field(
        description="The first of them: running, queued in order, then failed and finished, latest first."
    )
    workers: list[Worker]


class Projects(BaseModel):
    """The projects of Label Studio that this model's predictions count in."""

    projects: list[dict[str, Any]] = Field(
        description="id, title, url, tasks, labelled, predictions; and of its learning version, heads, curve, too_few, training."
    )
    problem: str = Field("", description="Why they are not known, if they are not.")


class SlideMap(BaseModel):
    """Every analysed slide in the plane of the two principal components of the embeddings."""

    points: list[dict[str, Any]] = Field(
        description="key, x, y, slide, tiles, url; label, suggested (no annotator said it) and confidence once something was learnt."
    )
    explained: list[float] = Field(description="Part of the variance along x and along y.")
    left_out: int = Field(description="Slides beyond the most that the map shows.")
    reading: int = Field(0, description="Results that are still being read; the map appears once all are.")


def _site(address: str) -> str:
    """Host and port of an ``Origin`` header, or of an address; empty if it is none."""
    try:
        return urlsplit(address).netloc.lower()
    except ValueError:
        return ""


class OverviewData:
    """What the overview's routes share. Lives in one event loop."""

    def __init__(self, services: Services, project_extras: ProjectExtras | None = None) -> None:
        self._services = services
        self._extras = ProjectLearning(services) if project_extras is None else project_extras
        self._listed = Latest(self._list, PROJECTS_KEPT_S)
        self._found: tuple[list[dict[str, Any]], str] = ([], "")
        self._learnt = Latest(self._learn)
        self._points = EmbeddingMap(services)
        self._map = Latest(self._points.as_json)

    def overview(self, limit: int, status: Status | None) -> Overview:
        """As the page shows it; raises :class:`~backend.errors.QueueUnavailable` where Redis does not answer."""
        services = self._services
        states = services.queue.jobs(limit, status)
        workers = services.queue.workers()
        running = services.queue.listed([worker["job"] for worker in workers if worker["job"]])
        return Overview(
            model_version=services.model.model_version,
            stand_in=services.model.stand_in,
            queues=services.queue.depths(),
            counts=job_counts(services.queue),
            jobs=[
                Job(
                    **{name: value for name, value in state.as_dict().items() if name in Job.model_fields},
                    panel=f"/slides/{state.key}" if state.queue in ("interactive", "batch") else None,
                )
                for state in states
            ],
            workers=[
                Worker(**worker, about=running[worker["job"]].about if worker["job"] in running else "")
                for worker in workers
            ],
        )

    async def projects(self) -> Projects:
        """The projects, asked of Label Studio now or a moment ago, with what they have learnt until now."""
        listed = await self._listed.get()
        if listed is None:
            return Projects(projects=[], problem="Label Studio has not answered yet.")
        self._found = listed
        learnt = await self._learnt.get()
        return (
            Projects(projects=[], problem="The disk with the heads has not answered yet.") if learnt is None else learnt
        )

    def _learn(self) -> Projects:
        found, problem = self._found
        return Projects(projects=[{**p, **self._extras(int(p["id"]))} for p in found], problem=problem)

    async def slide_map(self) -> SlideMap:
        """The map, as far as its results have been read."""
        made = await self._map.get()
        if made is None:
            return SlideMap(points=[], explained=[0.0, 0.0], left_out=0, reading=self._points.reading)
        return SlideMap(**made, reading=0)

    def _list(self) -> tuple[list[dict[str, Any]], str]:
        services = self._services
        try:
            found = services.client.projects_of_model(services.model.model_version)
        except BackendError as error:
            return [], str(error)
        base = services.settings.label_studio_browser_url
        return [{**p, "url": f"{base}/projects/{p['id']}/data"} for p in found], ""

    def slide_ref(self, key: str) -> SlideRef:
        """Where the slide of a bag lies: from its stored result, or from its job.

        Raises
        ------
        ResultNotFound
            Neither says it.
        """
        result = self._services.store.get(key, latents=False)
        text = result.provenance.get(SLIDE_REF) if result else None
        if isinstance(text, str):
            return SlideRef.from_json(json.loads(text))
        request = self._services.queue.request(key)
        if request is None:
            raise ResultNotFound(
                f"Where the slide of bag {key} lies is not known any more.",
                hint="Open it from its task in Label Studio.",
            )
        return SlideRef.from_json(request.slide)


def overview_router(
    services: Services, data: OverviewData, signer: SlideSigner, assets: PanelAssets, require_user: Any
) -> APIRouter:
    """The overview's routes, all behind basic authentication where it is set."""
    router = APIRouter(tags=["overview"], dependencies=[Depends(require_user)])
    settings = services.settings
    neighbours = Neighbours(services, signer)
    polls = anyio.CapacityLimiter(_POLL_THREADS)
    names, public = KnownNames(settings), {_site(url) for url in settings.own_urls}

    @router.get("/", response_class=HTMLResponse)
    def page(request: Request) -> HTMLResponse:
        """The overview for people."""
        return HTMLResponse(assets.page("overview.html", prefix_of(request)), headers=page_headers(settings))

    @router.get("/api/overview")
    async def overview(limit: Limit = 100, status: Status | None = None) -> Overview:
        """Queues, workers, jobs."""
        return await anyio.to_thread.run_sync(data.overview, limit, status, limiter=polls)

    @router.get("/api/projects")
    async def projects() -> Projects:
        """The projects in Label Studio that this backend's model serves."""
        return await data.projects()

    @router.get("/api/map")
    async def slide_map() -> SlideMap:
        """The map of the slides that the current model has analysed."""
        return await data.slide_map()

    @router.get("/slides/{key}", response_class=RedirectResponse, status_code=307)
    def slide(
        request: Request, key: str, project: Annotated[int | None, Query(ge=0, lt=MAX_PROJECT)] = None
    ) -> RedirectResponse:
        """To the panel of a bag's slide, under a signature made for it, and for the project whose heads are to speak there."""
        return RedirectResponse(f"{prefix_of(request)}/panel?slide={signer.token(data.slide_ref(key), project)}")

    @router.get("/slides/{key}/similar", response_class=HTMLResponse)
    def similar(key: str, project: Annotated[int, Query(ge=0, lt=MAX_PROJECT)]) -> HTMLResponse:
        """The labelled slides of a project that are most like a bag's."""
        page = neighbours.page(key, project, f"../../assets/{assets.version}")
        return HTMLResponse(page, headers=page_headers(settings))

    @router.post("/api/jobs/{key}/retry")
    def retry(key: str, request: Request, origin: Annotated[str | None, Header()] = None) -> dict[str, Any]:
        """Run a failed job again, whatever it failed of."""
        # A browser adds the password to any site's request; it also says which site that was. Where it asked is the same site if a stranger's
        # name leads here: only a name that is ours makes it ours.
        site = None if origin is None else _site(origin)
        if (
            site is not None
            and site not in public
            and not (site == request.headers.get("host", "").lower() and site in names)
        ):
            raise OriginRefused(
                f"A page of {origin} may not do this.",
                hint="Use the overview of this backend. If this is it, set PUBLIC_URL to the address that your browser shows.",
            )
        return services.queue.retry(key).as_dict()

    return router
