"""The panel of one slide: its page, its tiles, its overlay, and where its job stands. All of it under a signed address."""

from __future__ import annotations

import logging
import time
from typing import Annotated, Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import HTMLResponse, StreamingResponse

from backend.errors import BackendError, SignatureInvalid
from backend.label_studio.services import Services
from backend.slides.source import SlideRef
from backend.web.assets import PanelAssets, message_page, page_headers
from backend.web.deepzoom import DeepZoom, Picture, Pyramid
from backend.web.events import StatusHub, read_statuses
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
from backend.web.signing import SlideSigner
from backend.web.slide_cache import SlideCache

log = logging.getLogger(__name__)

# Decoding is bound by the cores; more at once would only take the threads that other requests need.
_READERS = 4
_PRIVATE = "private, max-age=31536000, immutable"  # the address names the slide's content, and is a secret

Token = Annotated[str, Query(alias="slide", description="The signed reference that `import` wrote into the task.")]
Tag = Annotated[str | None, Header(alias="if-none-match")]


class Panel:
    """What the panel's routes share: open slides, cut tiles, results, the hub of events."""

    def __init__(self, services: Services, extras: Extras | None = None) -> None:
        self.services = services
        self.signer = SlideSigner(services.settings.model_dir)
        self.extras = LearntExtras(services, self.signer) if extras is None else extras
        self.slides = SlideCache(services.settings, services.resolver)
        self.deepzoom = DeepZoom(self.slides)
        self.results = ShownResults(services)
        self.hub = StatusHub(services)
        self.readers = anyio.CapacityLimiter(_READERS)

    def slide(self, ref: SlideRef) -> dict[str, Any]:
        """The slide's size and scale; its error if it is gone or was replaced since the address was made."""
        self.slides.check(ref)
        with self.slides.slide(ref) as slide:
            return slide_json(ref, slide, self.services)

    def heatmap(self, ref: SlideRef) -> Picture:
        """The whole slide with its heatmap, if there is one yet."""
        key = self.services.key(ref)
        result = self.results.get(key)
        etag = f'"heatmap-{key}-{result is not None}"'
        with self.slides.slide(ref) as slide:
            return Picture(heatmap_picture(slide, result), etag)

    def state(self, token: str) -> dict[str, Any]:
        """All that the page shows beside the slide itself."""
        signed = self.signer.read(token)
        key = self.services.key(signed.ref)
        status = read_statuses(self.services, [key])[key]
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
    def page(token: Token = "") -> HTMLResponse:
        """The page of one slide, made to be framed by Label Studio."""
        try:
            panel.signer.read(token)
            return HTMLResponse(assets.page("index.html"), headers=page_headers(settings))
        except BackendError as error:
            title = "This address is not valid" if isinstance(error, SignatureInvalid) else "The panel cannot be shown"
            return message_page(title, error.message, error.hint, error.http_status, settings)

    @router.get("/panel/slide")
    async def slide(token: Token) -> dict[str, Any]:
        """Name, size and scale of the slide. It is opened for this, and downloaded first if it lies elsewhere."""
        ref = panel.signer.read(token).ref
        return await anyio.to_thread.run_sync(panel.slide, ref, limiter=panel.readers)

    @router.get("/panel/state")
    def state(token: Token) -> dict[str, Any]:
        """Where the slide's analysis stands, and what is known of its result."""
        return panel.state(token)

    @router.get("/panel/events", response_class=StreamingResponse)
    async def events(token: Token) -> StreamingResponse:
        """The status in `/panel/state` each time it changes, as server-sent events named `status`; `end` is the last."""
        signed = panel.signer.read(token)
        key = panel.services.key(signed.ref)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would hold the events back
        return StreamingResponse(panel.hub.stream(key), media_type="text/event-stream", headers=headers)

    @router.get("/panel/weights")
    def weights(token: Token, if_none_match: Tag = None) -> Response:
        """The tiles' columns and rows (int32) and weights (float32; mean, then each head), little-endian."""
        key = panel.services.key(panel.signer.read(token).ref)
        result = panel.results.get(key) or panel.services.store.need(key, latents=False)
        etag = f'"weights-{key}"'
        headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
        if if_none_match == etag:
            return Response(status_code=304, headers=headers)
        return Response(weights_block(result), media_type="application/octet-stream", headers=headers)

    @router.get("/panel/heatmap.jpg")
    async def heatmap(token: Token, if_none_match: Tag = None) -> Response:
        """The whole slide with its heatmap; before it is analysed, the slide. For configs without a frame."""
        ref = panel.signer.read(token).ref
        picture = await anyio.to_thread.run_sync(panel.heatmap, ref, limiter=panel.readers)
        headers = {"ETag": picture.etag, "Cache-Control": "private, no-cache"}
        if if_none_match == picture.etag:
            return Response(status_code=304, headers=headers)
        return Response(picture.jpeg, media_type="image/jpeg", headers=headers)

    @router.get("/deepzoom/{token}/slide.dzi")
    async def descriptor(token: str) -> Response:
        """The slide as a Deep Zoom Image, for any viewer that reads them."""
        ref = panel.signer.read(token).ref
        pyramid: Pyramid = await anyio.to_thread.run_sync(panel.deepzoom.pyramid, ref, limiter=panel.readers)
        return Response(pyramid.descriptor(), media_type="application/xml", headers={"Cache-Control": "no-store"})

    @router.get("/deepzoom/{token}/slide_files/{level}/{column}_{row}.jpg")
    async def tile(token: str, level: int, column: int, row: int, if_none_match: Tag = None) -> Response:
        """One Deep Zoom tile, JPEG."""
        ref = panel.signer.read(token).ref
        found = panel.deepzoom.cached_tile(ref, level, column, row)
        if found is None:
            found = await anyio.to_thread.run_sync(panel.deepzoom.tile, ref, level, column, row, limiter=panel.readers)
        return _picture(found, if_none_match)

    @router.get("/deepzoom/{token}/region.jpg")
    async def region(token: str, x: int, y: int, size: int, px: int = 224, if_none_match: Tag = None) -> Response:
        """The square at level-0 (x, y) with an edge of `size` level-0 pixels, as a picture of `px` pixels."""
        ref = panel.signer.read(token).ref
        made = await anyio.to_thread.run_sync(panel.deepzoom.region, ref, x, y, size, px, limiter=panel.readers)
        return _picture(made, if_none_match)

    return router


def _picture(picture: Picture, if_none_match: str | None) -> Response:
    headers = {"ETag": picture.etag, "Cache-Control": _PRIVATE}
    if if_none_match is not None and picture.etag in if_none_match:
        return Response(status_code=304, headers=headers)
    return Response(picture.jpeg, media_type="image/jpeg", headers=headers)
