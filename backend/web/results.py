"""What is stored of a slide, over HTTP: its picture, its state, its embedding, its heatmap."""

from __future__ import annotations

import hashlib
import io
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Response
from fastapi.responses import FileResponse
from PIL import Image

from backend.errors import ResultNotFound, SlideNotFound
from backend.jobs.states import Status
from backend.label_studio.services import Services
from backend.slides.render import heatmap_image

_IMMUTABLE = {"Cache-Control": "public, max-age=31536000, immutable"}


def results_router(services: Services, require_user: Any) -> APIRouter:
    """Routes for pictures (open to whoever knows the address) and results (behind basic authentication)."""
    router = APIRouter(tags=["results"])
    user = [Depends(require_user)]

    @router.get("/thumbnails/{name}.jpg", response_class=FileResponse)
    def thumbnail(name: str) -> FileResponse:
        """The picture of a slide for the labelling canvas. The name is a secret that `import` writes into the task."""
        path = services.thumbnails.path(name)
        if not path.is_file():
            raise SlideNotFound("There is no such thumbnail.", hint="Run `wsc-backend import` again.")
        return FileResponse(path, media_type="image/jpeg", headers=_IMMUTABLE)

    @router.get("/api/jobs", dependencies=user)
    def jobs(limit: int = 100, status: Status | None = None) -> dict[str, Any]:
        """Jobs with stage, progress and failure reason; how many wait in each queue; the workers."""
        return {
            "jobs": [job.as_dict() for job in services.queue.jobs(max(1, min(limit, 1000)), status)],
            "queues": services.queue.depths(),
            "workers": services.queue.workers(),
        }

    @router.get("/api/bags/{key}", dependencies=user)
    def bag(key: str) -> dict[str, Any]:
        """What is known of a bag: its job, and if it is stored its size, scale and provenance."""
        state = services.queue.listed([key]).get(key)
        result = services.store.get(key, latents=False)
        if state is None and result is None:
            raise ResultNotFound(f"Nothing is known of bag {key}.", hint="Its slide has not been asked for.")
        stored = None
        if result is not None:
            stored = {
                "tiles": len(result.bag),
                "mpp": result.bag.mpp,
                "mpp_source": result.bag.mpp_source,
                "slide_size": result.bag.slide_size,
                "provenance": dict(result.provenance),
            }
        return {"key": key, "job": state.as_dict() if state else None, "result": stored}

    @router.get("/api/bags/{key}/embedding", dependencies=user)
    def embedding(key: str) -> dict[str, Any]:
        """The slide embedding, float32, and the model version that made it."""
        result = services.store.need(key, latents=False)
        return {
            "key": key,
            "model_version": result.provenance.get("model_version"),
            "embedding": [float(value) for value in result.slide_embedding],
        }

    @router.get("/api/bags/{key}/heatmap.png", dependencies=user)
    def heatmap(key: str, head: int | None = None, if_none_match: Annotated[str | None, Header()] = None) -> Response:
        """The attention as a picture of one pixel a tile; mean over the heads, or one head."""
        etag = f'"{hashlib.sha256(f"{key}/{head}".encode()).hexdigest()[:32]}"'
        if if_none_match == etag:
            return Response(status_code=304, headers={"ETag": etag})
        result = services.store.need(key, latents=False)
        if head is not None and not 0 <= head < result.attention_logits.shape[1]:
            raise ResultNotFound(f"There is no head {head}; the model has {result.attention_logits.shape[1]}.")
        image: Image.Image = heatmap_image(result, head=head)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return Response(buffer.getvalue(), media_type="image/png", headers={"ETag": etag, "Cache-Control": "no-cache"})

    return router
