"""The HTTP protocol that Label Studio speaks with a backend: /health /setup /predict /webhook /versions."""

from __future__ import annotations

import hmac
import logging
from typing import Annotated, Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, Depends, Header, HTTPException, Query, Response
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

from backend import __version__
from backend.errors import RequestInvalid
from backend.label_studio.events import START_TRAINING, WEBHOOK_SECRET_HEADER, take_event
from backend.label_studio.json_texts import JsonTexts
from backend.label_studio.labeling_config import parse_config
from backend.label_studio.model import WholeSlideBackend
from backend.label_studio.predictor import MAX_PROJECT, project_id
from backend.label_studio.services import Services

log = logging.getLogger(__name__)

# Each waiting /predict holds a thread; /health and /setup must be answered within a second all the same.
_PREDICT_THREADS = 64


class PredictRequest(BaseModel):
    """Body of /predict."""

    model_config = ConfigDict(extra="allow")

    tasks: list[dict[str, Any]] = Field(description="Tasks as Label Studio serialises them: at least id and data.")
    project: str | int | None = Field(None, description="Project as `id.created`, such as `1.1795461014`.")
    label_config: str | None = Field(None, description="The project's labelling config, XML.")
    params: dict[str, Any] | None = Field(None, description="login, password, context (for smart tools).")


class PredictResponse(BaseModel):
    """Answer of /predict."""

    results: list[dict[str, Any] | list[Any]] = Field(
        description="One slot a task: a prediction, or `[]` while its slide is being analysed (it is pushed later)."
    )
    model_version: str


class SetupRequest(BaseModel):
    """Body of /setup."""

    model_config = ConfigDict(extra="allow")

    project: str | int | None = None
    label_config: str | None = Field(None, alias="schema")
    hostname: str | None = None
    access_token: str | None = None
    extra_params: Any = None


class WebhookRequest(BaseModel):
    """Body of /webhook."""

    model_config = ConfigDict(extra="allow")

    action: str = Field(pattern="^[A-Za-z_]{1,80}$", description="What happened, such as `ANNOTATION_CREATED`.")
    project: dict[str, Any] | None = None


def label_studio_router(services: Services, require_user: Any) -> APIRouter:
    """The protocol's routes. ``require_user`` is the dependency that checks basic authentication."""
    router = APIRouter(tags=["Label Studio"])
    backend = WholeSlideBackend(services=services)
    texts = JsonTexts()
    limiter = anyio.CapacityLimiter(_PREDICT_THREADS)
    user = [Depends(require_user)]

    @router.get("/health", dependencies=user)
    async def health() -> dict[str, str]:
        """Whether the backend is up; asked before every prediction."""
        return {
            "status": "UP",
            "model_class": "WholeSlideBackend",
            "model_version": services.model.model_version,
            "version": __version__,
        }

    @router.post("/setup", dependencies=user)
    async def setup(body: SetupRequest) -> dict[str, str]:
        """States the model version; refuses a labelling config that has nothing to fill, and says what to add."""
        if body.label_config:
            parse_config(body.label_config)
        return {"model_version": services.versions.version(project_id(body.project, ()))}

    @router.post("/predict", dependencies=user, response_model=PredictResponse)
    async def predict(body: PredictRequest) -> Response:
        """Predictions of finished slides; `[]` for those that are being analysed."""
        context = (body.params or {}).get("context")
        if context is not None and not isinstance(context, dict):
            raise RequestInvalid(
                "params.context is no object.", hint="It is null, or {'result': [regions]} of a smart tool."
            )
        number = project_id(body.project, body.tasks)

        def answer() -> tuple[int, bytes]:
            slots = backend.predict(
                body.tasks, context=context, project=body.project, label_config=body.label_config or ""
            )
            version = to_json(services.versions.version(number))
            body_text = b",".join(map(texts.of, slots))
            return sum(map(bool, slots)), b'{"results":[%b],"model_version":%b}' % (body_text, version)

        answered, text = await anyio.to_thread.run_sync(answer, limiter=limiter)
        log.info("predict: project %s, %d tasks, %d answered", number, len(body.tasks), answered)
        return Response(text, media_type="application/json")

    @router.post("/webhook")
    async def webhook(
        body: WebhookRequest,
        secret: Annotated[str | None, Header(alias=WEBHOOK_SECRET_HEADER)] = None,
        authorization: Annotated[str | None, Header()] = None,
    ) -> dict[str, str]:
        """Takes an event; what has to be done goes to the `train` queue.

        Events of annotations carry the secret that `import` registers. Label Studio sends START_TRAINING as it sends /predict: without it, with
        basic authentication where that is set.
        """
        wanted = (await anyio.to_thread.run_sync(lambda: services.webhook_secret)).encode()
        if not hmac.compare_digest((secret or "").encode(), wanted):
            if body.action != START_TRAINING:
                log.warning(
                    "webhook: %s without the secret, refused: `wsc-backend train PROJECT` registers it", body.action
                )
                raise HTTPException(401, f"The header {WEBHOOK_SECRET_HEADER} is missing or wrong.")
            await require_user(authorization)
        number = (body.project or {}).get("id")
        if isinstance(number, bool) or not isinstance(number, int) or not 0 < number < MAX_PROJECT:
            raise RequestInvalid(
                f"The event {body.action[:80]!r} names no project.", hint="Label Studio sends project: {id: …}."
            )
        event = body.model_dump()
        answer = await anyio.to_thread.run_sync(lambda: take_event(services, body.action, number, event))
        log.info("webhook: %s of project %s: %s", body.action, number, answer)
        return {"status": "received", "action": body.action, "training": answer}

    @router.get("/versions", dependencies=user)
    async def versions(project: Annotated[int | None, Query(ge=0, lt=MAX_PROJECT)] = None) -> dict[str, list[str]]:
        """The model versions that can be chosen: the model, and the heads trained for a project (or for any)."""
        return {"versions": await anyio.to_thread.run_sync(lambda: services.versions.versions(project))}

    return router
