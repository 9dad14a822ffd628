"""The HTTP protocol that Label Studio speaks with a backend: /health /setup /predict /webhook /versions."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Protocol, TypeVar

import anyio
import anyio.to_thread
from fastapi import APIRouter, Depends, Header, HTTPException, Query, Request, Response
from pydantic import BaseModel, FailFast, Field
from pydantic_core import to_json

from backend import __version__
from backend.errors import QueueUnavailable, RequestInvalid
from backend.label_studio.events import START_TRAINING, WEBHOOK_SECRET_HEADER, take_event
from backend.label_studio.json_texts import JsonTexts
from backend.label_studio.labeling_config import parse_config
from backend.label_studio.model import WholeSlideBackend
from backend.label_studio.predictor import MAX_PROJECT, project_created, project_id
from backend.label_studio.services import Services

log = logging.getLogger(__name__)

# Each waiting /predict holds a thread; /health and /setup must be answered within a second all the same.
_PREDICT_THREADS = 64
_SETUP_THREADS = 8
# START_TRAINING, which comes without the secret, says little more than the project and its labelling config.
_UNSIGNED_MAX_BYTES = 1_000_000
# Reading a labelling config takes about a millisecond for so many characters.
_LONG_CONFIG_CHARS = 50_000

M = TypeVar("M", bound=BaseModel)


class ReadBody(Protocol):
    """Reads the body of a request, see :class:`backend.web.json_body.JsonBodies`."""

    async def __call__(self, request: Request, model: type[M]) -> M:
        """The body as a ``model``."""


class PredictRequest(BaseModel):
    """Body of /predict."""

    # The first task that is none is named, not each of a million; JSON has no names but texts, so they are not looked at.
    tasks: Annotated[list[dict[Any, Any]], FailFast()] = Field(
        description="Tasks as Label Studio serialises them: at least id and data."
    )
    project: str | int | None = Field(None, description="Project as `id.created`, such as `1.1795461014`.")
    label_config: str | None = Field(None, description="The project's labelling config, XML.")
    params: dict[Any, Any] | None = Field(None, description="login, password, context (for smart tools).")


class PredictResponse(BaseModel):
    """Answer of /predict."""

    results: list[dict[str, Any] | list[Any]] = Field(
        description="One slot a task: a prediction, or `[]` while its slide is being analysed (it is pushed later)."
    )
    model_version: str


class SetupRequest(BaseModel):
    """Body of /setup."""

    project: str | int | None = None
    label_config: str | None = Field(None, alias="schema")
    hostname: str | None = None
    access_token: str | None = None
    extra_params: Any = None


class WebhookRequest(BaseModel):
    """Body of /webhook: of what Label Studio sends, that which is read here."""

    action: str = Field(pattern="^[A-Za-z_]{1,80}$", description="What happened, such as `ANNOTATION_CREATED`.")
    project: dict[Any, Any] | None = None
    annotations: Any = None


def label_studio_router(
    services: Services,
    require_user: Any,
    read_body: ReadBody,
    describe_body: Callable[[type[BaseModel]], dict[str, Any]],
) -> APIRouter:
    """The protocol's routes.

    Parameters
    ----------
    require_user
        The dependency that checks basic authentication.
    read_body, describe_body
        Reads a body, and describes it for OpenAPI. A body that FastAPI reads, it reads before it asks ``require_user``.
    """
    router = APIRouter(tags=["Label Studio"])
    backend = WholeSlideBackend(services=services)
    texts = JsonTexts()
    limiter = anyio.CapacityLimiter(_PREDICT_THREADS)
    setup_lane, config_lane = anyio.CapacityLimiter(_SETUP_THREADS), anyio.CapacityLimiter(1)
    told: dict[int | None, list[str]] = {}  # by project, the controls that were said not to be used
    user = [Depends(require_user)]

    @router.get("/health", dependencies=user)
    async def health() -> dict[str, Any]:
        """Whether the backend is up; asked before every prediction.

        The status is ``degraded``, and ``problem`` says why, while slides cannot be queued. The answer is 200 all the same: Label Studio asks nothing
        of a backend that answers otherwise, and what is stored can still be shown.
        """
        problem = services.redis_watch.problem  # as of the last look: nothing is waited for here
        about = {
            "model_class": "WholeSlideBackend",
            "model_version": services.model.model_version,
            "version": __version__,
        }
        if problem is None:
            return {"status": "UP", **about}
        return {"status": "degraded", **about, "problem": problem.as_dict()}

    @router.post("/setup", dependencies=user, openapi_extra=describe_body(SetupRequest))
    async def setup(request: Request) -> dict[str, str]:
        """States the model version; refuses a labelling config that has nothing to fill, and says what to add."""
        body = await read_body(request, SetupRequest)
        config = body.label_config or ""
        number = project_id(body.project, ())
        services.versions.note_created(number, project_created(body.project))

        def look() -> str:
            unused = [str(control) for control in parse_config(config).unused] if config else []
            if unused != told.get(number, []):
                told[number] = unused
                for control in unused:
                    log.info("setup: project %s: not used: %s", number, control)
            if number is not None and services.redis_watch.problem is None:
                with suppress(QueueUnavailable):  # its next question says it too
                    services.training.note_connection(number, True)  # only connected backends are set up
            return services.versions.version(number)  # reads the heads' files

        # Threads of its own: Label Studio gives this three seconds, whatever else is being waited for.
        lane = config_lane if len(config) > _LONG_CONFIG_CHARS else setup_lane
        return {"model_version": await anyio.to_thread.run_sync(look, limiter=lane)}

    @router.post(
        "/predict", dependencies=user, response_model=PredictResponse, openapi_extra=describe_body(PredictRequest)
    )
    async def predict(request: Request) -> Response:
        """Predictions of finished slides; `[]` for those that are being analysed."""
        body = await read_body(request, PredictRequest)
        context = (body.params or {}).get("context")
        if context is not None and not isinstance(context, dict):
            raise RequestInvalid(
                "params.context is no object.", hint="It is null, or {'result': [regions]} of a smart tool."
            )
        number = project_id(body.project, body.tasks)
        services.versions.note_created(number, project_created(body.project))

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

    @router.post("/webhook", openapi_extra=describe_body(WebhookRequest))
    async def webhook(
        request: Request,
        secret: Annotated[str | None, Header(alias=WEBHOOK_SECRET_HEADER)] = None,
        authorization: Annotated[str | None, Header()] = None,
    ) -> dict[str, str]:
        """Takes an event; what has to be done goes to the `train` queue.

        Events of annotations carry the secret that `import` registers. Label Studio sends START_TRAINING as it sends /predict: without it, with
        basic authentication where that is set.
        """
        wanted = (await anyio.to_thread.run_sync(lambda: services.webhook_secret)).encode()
        signed = hmac.compare_digest((secret or "").encode(), wanted)
        if not signed:
            if not _is_short(request):
                raise _unsigned("an event of a long or unknown length")
            try:
                await require_user(authorization)
            except HTTPException as refused:
                raise _unsigned("an event", refused) from None
        body = await read_body(request, WebhookRequest)
        if not signed and body.action != START_TRAINING:
            raise _unsigned(body.action)
        number = (body.project or {}).get("id")
        if isinstance(number, bool) or not isinstance(number, int) or not 0 < number < MAX_PROJECT:
            raise RequestInvalid(
                f"The event {body.action[:80]!r} names no project.", hint="Label Studio sends project: {id: …}."
            )
        event = {"project": body.project, "annotations": body.annotations}
        answer = await anyio.to_thread.run_sync(lambda: take_event(services, body.action, number, event))
        log.info("webhook: %s of project %s: %s", body.action, number, answer)
        return {"status": "received", "action": body.action, "training": answer}

    @router.get("/versions", dependencies=user)
    async def versions(project: Annotated[int | None, Query(ge=0, lt=MAX_PROJECT)] = None) -> dict[str, list[str]]:
        """The model versions that can be chosen: the model, and the heads trained for a project (or for any)."""
        return {"versions": await anyio.to_thread.run_sync(lambda: services.versions.versions(project))}

    return router


def _is_short(request: Request) -> bool:
    """Whether a body is announced that is no longer than one without a signature may be."""
    length = request.headers.get("content-length", "")
    return length.isdecimal() and len(length) < 10 and int(length) <= _UNSIGNED_MAX_BYTES


def _unsigned(what: str, user: HTTPException | None = None) -> HTTPException:
    """The refusal of an event without the secret, and where it matters without basic authentication, whose refusal is ``user``."""
    log.warning("webhook: %s without the secret, refused: `wsc-backend train PROJECT` registers it", what)
    message = f"The header {WEBHOOK_SECRET_HEADER} is missing or wrong."
    if user is None:
        return HTTPException(401, message)
    return HTTPException(401, f"{message} For START_TRAINING: {user.detail}", headers=user.headers)
