"""The panel of one slide: its page, its tiles, its overlay, and where its job stands. All of it under a signed address."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import anyio
import anyio.to_thread
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse

from backend.errors import BackendError, ResultNotFound, SignatureInvalid
from backend.label_studio.services import Services
from backend.slides.source import SlideRef
from backend.slides.underway import DownloadUnderWay
from backend.web.assets import PanelAssets, message_page, page_headers
from backend.web.deepzoom import DeepZoom, Picture, Pyramid
from backend.web.events import StatusHub, for_project, read_statuses
from backend.web.panel_data import (
    Extras,
    ShownResults,
    heatmap_picture,
    result_json,
    slide_json,
    slide_name,
    weights_block,
)
from backend.web.panel_extras import LearntExtras
from backend.web.prefix import prefix_of
from backend.web.signing import SlideSigner
from backend.web.slide_cache import SlideCache

log = logging.getLogger(__name__)

# Decoding is bound by the cores; more at once would only take the threads that other requests need.
_READERS = 4
# Panels that ask for their state wait for a slow store or Redis among themselves.
_POLL_THREADS = 8
# How long an answer is held back for a slide that is being downloaded. The page can say in words how far that is; a picture cannot.
_PAGE_WAIT_S = 4.0
_PICTURE_WAIT_S = 50.0
_LOOK_EVERY_S = 0.1
_PRIVATE = "private, max-age=31536000, immutable"  # the address names the slide's content, and is a secret

Token = Annotated[str, Query(alias="slide", description="The signed reference that `import` wrote into the task.")]
Tag = Annotated[str | None, Header(alias="if-none-match")]
Seen = TypeVar("Seen")


class Panel:
    """What the panel's routes share: open slides, cut tiles, results, the hub of events."""

    def __init__(self, services: Services, extras: Extras | None = None) -> None:
        self.services = services
        self.signer = SlideSigner(services.settings.model_dir)
        self.extras = LearntExtras(services) if extras is None else extras
        self.slides = SlideCache(services.settings, services.resolver)
        self.deepzoom = DeepZoom(self.slides)
        self.results = ShownResults(services)
        self.hub = StatusHub(services)
        self.readers = anyio.CapacityLimiter(_READERS)
        self.polls = anyio.CapacityLimiter(_POLL_THREADS)

    async def read(self, look: Callable[..., Seen], *arguments: Any, wait_s: float = _PICTURE_WAIT_S) -> Seen:
        """``look(*arguments)`` in one of the reader threads, of which none is held by a slide that is still being downloaded.

        Raises
        ------
        DownloadUnderWay
            The slide is not here after ``wait_s`` seconds; its download goes on.
        SourceError, SlideError
            As ``look``; of the download, if that fails within ``wait_s`` or has failed since it was last asked for.
        """
        until = anyio.current_time() + wait_s
        while True:
            try:
                return await anyio.to_thread.run_sync(look, *arguments, limiter=self.readers)
            except DownloadUnderWay as error:
                download = error.download
            while not download.over:
                if anyio.current_time() > until:
                    raise DownloadUnderWay(download)
                await anyio.sleep(_LOOK_EVERY_S)
            download.check()

    def key(self, ref: SlideRef) -> str:
        """The bag key of an address's slide with the tissue mask that lies beside it now, if one does."""
        return self.services.key(self.services.resolver.with_tissue_beside(ref))

    def tissue(self, ref: SlideRef) -> tuple[bytes, str]:
        """What was taken for tissue and what for ink, as a PNG over the slide's rectangle, and its entity tag.

        Raises
        ------
        ResultNotFound
            The slide has no result, or one that does not say it.
        """
        key = self.key(ref)
        result = self.results.get(key) or self.services.store.need(key, latents=False)
        if result.bag.tissue is None:
            raise ResultNotFound(
                "What was taken for tissue was not kept with this result.",
                hint="It is once the slide is analysed again.",
            )
        return result.bag.tissue.png, f'"tissue-{key}"'

    def slide(self, ref: SlideRef) -> dict[str, Any]:
        """The slide's size and scale; its error if it is gone or was replaced since the address was made."""
        self.slides.check(ref)
        with self.slides.slide(ref) as slide:
            return slide_json(ref, slide, self.services)

    def heatmap(self, ref: SlideRef) -> Picture:
        """The whole slide with its heatmap, if there is one yet."""
        key = self.key(ref)
        result = self.results.get(key)
        etag = f'"heatmap-{key}-{result is not None}"'
        with self.slides.slide(ref) as slide:
            return Picture(heatmap_picture(slide, result), etag)

    def state(self, token: str) -> dict[str, Any]:
        """All that the page shows beside the slide itself."""
        signed = self.signer.read(token)
        key = self.key(signed.ref)
        status = for_project(read_statuses(self.services, [key])[key], signed.project)
        result = self.results.get(key) if status["phase"] == "done" else None
        shown: dict[str, Any] = {
            "key": key,
            "name": slide_name(signed.ref),
            "project": signed.project,
            "now": time.time(),
            "status": status,
            "result": result_json(result) if result else None,
        }
        return {**shown, **self.extras(signed.project, key, result)}


def panel_router(panel: Panel, assets: PanelAssets) -> APIRouter:
    """The panel's routes. Their signature is what opens them: a frame inside Label Studio cannot ask for a password."""
    router = APIRouter(tags=["panel"])
    settings = panel.services.settings

    @router.get("/panel", response_class=HTMLResponse)
    def page(request: Request, token: Token = "") -> HTMLResponse:
        """The page of one slide, made to be framed by Label Studio."""
        try:
            panel.signer.read(token)
            return HTMLResponse(assets.page("index.html", prefix_of(request)), headers=page_headers(settings))
        except BackendError as error:
            title = "This address is not valid" if isinstance(error, SignatureInvalid) else "The panel cannot be shown"
            return message_page(title, error.message, error.hint, error.http_status, settings)

    @router.get("/panel/slide")
    async def slide(token: Token) -> dict[str, Any]:
        """Name, size and scale of the slide. It is opened for this. If it lies elsewhere it is downloaded first: 503 says how far that is."""
        ref = panel.signer.read(token).ref
        return await panel.read(panel.slide, ref, wait_s=_PAGE_WAIT_S)

    @router.get("/panel/state")
    async def state(token: Token) -> dict[str, Any]:
        """Where the slide's analysis stands, and what is known of its result."""
        return await anyio.to_thread.run_sync(panel.state, token, limiter=panel.polls)

    @router.get("/panel/events", response_class=StreamingResponse)
    async def events(token: Token) -> StreamingResponse:
        """The status in `/panel/state` each time it changes, as server-sent events named `status`; `end` is the last."""
        signed = panel.signer.read(token)
        key = await anyio.to_thread.run_sync(panel.key, signed.ref)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would hold the events back
        return StreamingResponse(panel.hub.stream(key, signed.project), media_type="text/event-stream", headers=headers)

    @router.get("/panel/weights")
    def weights(token: Token, if_none_match: Tag = None) -> Response:
        """The tiles' columns and rows (int32) and weights (float32; mean, then each head), little-endian."""
        key = panel.key(panel.signer.read(token).ref)
        result = panel.results.get(key) or panel.services.store.need(key, latents=False)
        etag = f'"weights-{key}"'
        headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
        if if_none_match == etag:
            return Response(status_code=304, headers=headers)
        return Response(weights_block(result), media_type="application/octet-stream", headers=headers)

    @router.get("/panel/tissue.png")
    def tissue(token: Token, if_none_match: Tag = None) -> Response:
        """What was taken for tissue, a PNG with a palette over the slide's rectangle: 0 glass, 1 tissue, 2 taken as ink."""
        png, etag = panel.tissue(panel.signer.read(token).ref)
        headers = {"ETag": etag, "Cache-Control": "private, no-cache", "X-Content-Type-Options": "nosniff"}
        if if_none_match == etag:
            return Response(status_code=304, headers=headers)
        return Response(png, media_type="image/png", headers=headers)

    @router.get("/panel/heatmap.jpg")
    async def heatmap(token: Token, if_none_match: Tag = None) -> Response:
        """The whole slide with its heatmap; before it is analysed, the slide. For configs without a frame."""
        ref = panel.signer.read(token).ref
        picture = await panel.read(panel.heatmap, ref)
        headers = {"ETag": picture.etag, "Cache-Control": "private, no-cache"}
        if if_none_match == picture.etag:
            return Response(status_code=304, headers=headers)
        return Response(picture.jpeg, media_type="image/jpeg", headers=headers)

    @router.get("/deepzoom/{token}/slide.dzi")
    async def descriptor(token: str) -> Response:
        """The slide as a Deep Zoom Image, for any viewer that reads them."""
        ref = panel.signer.read(token).ref
        pyramid: Pyramid = await panel.read(panel.deepzoom.pyramid, ref)
        return Response(pyramid.descriptor(), media_type="application/xml", headers={"Cache-Control": "no-store"})

    @router.get("/deepzoom/{token}/slide_files/{level}/{column}_{row}.jpg")
    async def tile(token: str, level: int, column: int, row: int, if_none_match: Tag = None) -> Response:
        """One Deep Zoom tile, JPEG."""
        ref = panel.signer.read(token).ref
        found = panel.deepzoom.cached_tile(ref, level, column, row)
        if found is None:
            found = await panel.read(panel.deepzoom.tile, ref, level, column, row)
        return _picture(found, if_none_match)

    @router.get("/deepzoom/{token}/region.jpg")
    async def region(token: str, x: int, y: int, size: int, px: int = 224, if_none_match: Tag = None) -> Response:
        """The square at level-0 (x, y) with an edge of `size` level-0 pixels, as a picture of `px` pixels."""
        ref = panel.signer.read(token).ref
        made = await panel.read(panel.deepzoom.region, ref, x, y, size, px)
        return _picture(made, if_none_match)

    return router


def _picture(picture: Picture, if_none_match: str | None) -> Response:
    headers = {"ETag": picture.etag, "Cache-Control": _PRIVATE}
    if if_none_match is not None and picture.etag in if_none_match:
        return Response(status_code=304, headers=headers)
    return Response(picture.jpeg, media_type="image/jpeg", headers=headers)
