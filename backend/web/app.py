"""The FastAPI application: the Label Studio protocol, pictures and results, authentication, errors, metrics."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import anyio.to_thread
from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from backend import __version__
from backend.errors import BackendError
from backend.jobs.redis_watch import LOOK_EVERY_S, RedisWatch
from backend.label_studio.routes import label_studio_router
from backend.label_studio.services import Services
from backend.redaction import redactor_of
from backend.web.assets import PanelAssets
from backend.web.body_limit import BodyLimit
from backend.web.cors import NO_SNIFFING, BrowserHeaders
from backend.web.hosts import KnownNames, OnlyKnownNames
from backend.web.json_body import JsonBodies, described
from backend.web.metrics import Measured, render_metrics
from backend.web.overview import OverviewData, overview_router
from backend.web.panel_routes import Panel, panel_router
from backend.web.prefix import BelowPrefix, prefix_of
from backend.web.results import results_router

log = logging.getLogger(__name__)

WEBHOOK_MAX_BYTES = 16_000_000
"""Only its action and project are read; an annotation with a painted slide takes a few megabytes."""
SETUP_MAX_BYTES = 1_000_000
"""A labelling config, and little else."""


def create_app(services: Services) -> FastAPI:
    """The application over ``services``. It imports neither torch nor mmm."""
    settings = services.settings
    assets, panel = PanelAssets(), Panel(services)
    require_user = _basic_auth(services)
    redact = redactor_of(settings, os.environ)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Known before the first /health, which Label Studio gives one second.
        version = (await anyio.to_thread.run_sync(lambda: services.model)).model_version
        # Read now, so that no request on the event loop waits for the disk.
        await anyio.to_thread.run_sync(panel.signer.load)
        log.info("serving model %s", version)
        watching = asyncio.create_task(_watch(services.redis_watch))
        yield
        watching.cancel()
        panel.slides.close()

    app = FastAPI(
        title="Whole-slide backend for Label Studio",
        version=__version__,
        description="Pre-annotates whole-slide images. Research use only, no diagnostic use.",
        lifespan=lifespan,
        # Pages that show the description would load a stranger's script into our origin; and whom it describes to is asked below.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        # It would answer with an address made of whatever name it was asked by.
        redirect_slashes=False,
    )
    # The last one added is asked first.
    limits = {"/webhook": WEBHOOK_MAX_BYTES, "/setup": SETUP_MAX_BYTES}
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, paths=limits)
    if not settings.basic_auth_user:
        # With a password, a page that has our address under its own name has no password for that name.
        app.add_middleware(OnlyKnownNames, names=KnownNames(settings))
    app.add_middleware(BrowserHeaders)
    app.add_middleware(Measured)
    routers = [
        label_studio_router(services, require_user, JsonBodies(settings.max_body_bytes), described),
        results_router(services, require_user),
        panel_router(panel, assets),
        overview_router(services, OverviewData(services), panel.signer, assets, require_user),
        assets.router(),
    ]
    for router in routers:
        app.include_router(router)
    app.state.panel = panel

    @app.get("/metrics", tags=["operation"], dependencies=[Depends(require_user)])
    async def metrics() -> Response:
        """Prometheus metrics."""
        body, content_type = await anyio.to_thread.run_sync(lambda: render_metrics(services))
        return Response(body, media_type=content_type)

    @app.get("/openapi.json", include_in_schema=False, dependencies=[Depends(require_user)])
    def description(request: Request) -> JSONResponse:
        """What all of this answers, as OpenAPI."""
        return JSONResponse({**app.openapi(), "servers": [{"url": prefix_of(request) or "/"}]})

    routes = [route for router in (app.router, *routers) for route in router.routes]
    app.add_middleware(BelowPrefix, settings=settings, routes=routes)

    @app.exception_handler(BackendError)
    async def backend_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, BackendError)
        log.warning("%s %s: %s (%s)", request.method, request.url.path, error, error.code)
        body = redact.within({"detail": str(error), "error": error.as_dict()})
        return JSONResponse(body, error.http_status)

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> JSONResponse:
        # The traceback goes to the log by itself; the one who asked gets a sentence.
        message = f"A defect of this backend: {type(error).__name__}. Its log has the traceback."
        return JSONResponse(
            {"detail": message, "error": {"code": "defect", "message": message, "hint": ""}}, 500, NO_SNIFFING
        )

    @app.exception_handler(RequestValidationError)
    async def invalid_request(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        log.warning("%s %s: %s", request.method, request.url.path, "; ".join(problems))
        return JSONResponse({"detail": "; ".join(problems), "error": {"code": "request_invalid"}}, 400)

    return app


async def _watch(watch: RedisWatch) -> None:
    """Look at Redis again and again; for as long as the server runs."""
    lane = anyio.CapacityLimiter(1)  # a thread of its own: the others may all be waiting for that very Redis
    while True:
        await anyio.to_thread.run_sync(watch.look, limiter=lane)
        await asyncio.sleep(LOOK_EVERY_S)


def _basic_auth(services: Services) -> Any:
    """The dependency that checks basic authentication, where a user name is set."""
    settings = services.settings
    password = settings.basic_auth_pass.get_secret_value()
    # Clients disagree on how other letters than ASCII are encoded in this header (RFC 7617): both ways are right.
    wanted = [base64.b64encode(f"{settings.basic_auth_user}:{password}".encode())]
    with contextlib.suppress(UnicodeEncodeError):
        wanted.append(base64.b64encode(f"{settings.basic_auth_user}:{password}".encode("latin-1")))

    async def require_user(authorization: Annotated[str | None, Header()] = None) -> None:
        if not settings.basic_auth_user:
            return
        scheme, _, given = (authorization or "").partition(" ")
        same = [hmac.compare_digest(given.strip().encode(), value) for value in wanted]
        if scheme.lower() != "basic" or not any(same):
            # 401, not 403: Label Studio has a message of its own for it.
            raise HTTPException(401, "Wrong user name or password.", headers={"WWW-Authenticate": "Basic"})

    return require_user
