"""Label Studio's API through its SDK: errors made ours, predictions pushed so that repeating it changes nothing."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, TypeVar

import httpx
from label_studio_sdk import LabelStudio
from label_studio_sdk.core.api_error import ApiError

from backend.errors import LabelStudioError, LabelStudioUnreachable
from backend.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")
Prediction = Mapping[str, Any]
Pushed = Literal["created", "updated", "kept"]
_TIMEOUT_S = 30.0


class TokenRefused(LabelStudioUnreachable):
    """The token is not accepted (any more). An operator can change that, and then what waits goes on."""

    code = "token_refused"


class TaskGone(LabelStudioError):
    """The task or project was deleted in Label Studio: there is nothing to push to."""

    code = "task_gone"


class LabelStudioClient:
    """What this backend asks of Label Studio.

    Every method raises :class:`LabelStudioUnreachable` where trying later can help (no answer, 5xx, 429), :class:`TaskGone` for 404, and
    :class:`LabelStudioError` otherwise. No error and no log line contains the token.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.url = settings.label_studio_url

    @cached_property
    def _http(self) -> httpx.Client:
        # Ours, because the SDK gives no way to close its own.
        return httpx.Client(timeout=_TIMEOUT_S, follow_redirects=True)

    def close(self) -> None:
        """Close the connections. The client opens new ones if it is used again."""
        if "_http" in self.__dict__:
            self._http.close()
            self.__dict__.pop("_http")
            self.__dict__.pop("sdk", None)

    @cached_property
    def sdk(self) -> LabelStudio:
        """The SDK's client. It takes a legacy token or a personal access token, and refreshes the latter."""
        if not self.url:
            raise LabelStudioError(
                "LABEL_STUDIO_URL is not set.", hint="Set it to Label Studio's address, such as http://localhost:8080."
            )
        key = self._settings.label_studio_api_key.get_secret_value()
        if not key:
            raise LabelStudioError(
                "LABEL_STUDIO_API_KEY is not set, so finished predictions cannot be pushed.",
                hint="In Label Studio: Account & Settings → Personal Access Token; set it as LABEL_STUDIO_API_KEY.",
            )
        return self._call(lambda: LabelStudio(base_url=self.url, api_key=key, httpx_client=self._http))

    def authorization(self) -> Mapping[str, str]:
        """The ``Authorization`` header for Label Studio's own files, with a token that is valid now."""
        headers = self._call(lambda: self.sdk._client_wrapper.get_headers())
        return {"Authorization": headers["Authorization"]} if "Authorization" in headers else {}

    def whoami(self) -> str:
        """The user that the token belongs to."""
        return str(self._call(lambda: self.sdk.users.whoami()).email)

    def task(self, task: int) -> dict[str, Any]:
        """The ``data`` of a task, as it is now."""
        return dict(self._call(lambda: self.sdk.tasks.get(id=str(task))).data)

    def label_config(self, project: int) -> str:
        """The labelling config of a project, as it is now."""
        return str(self._call(lambda: self.sdk.projects.get(id=project)).label_config or "")

    def push_prediction(self, task: int, prediction: Prediction) -> Pushed:
        """Make ``prediction`` the task's only prediction of its model version.

        An equal one is kept, another one of that version is updated, surplus ones of that version are deleted. Other versions and
        other models' predictions are left alone.
        """
        version = prediction["model_version"]
        wanted = _content(prediction["result"], prediction.get("score"))
        ours = self._predictions(task, version)
        right = [int(p.id) for p in ours if _content(p.result, p.score) == wanted]
        done: Pushed
        if right:
            done, kept = "kept", right[0]
        elif ours:
            done, kept = "updated", int(ours[0].id)
            self._call(lambda: self.sdk.predictions.update(id=kept, **prediction))
        else:
            done = "created"
            self._call(lambda: self.sdk.predictions.create(task=task, **prediction))
            ours = self._predictions(task, version)  # another process may have done the same at the same time
            kept = min(int(p.id) for p in ours) if ours else 0
        for surplus in {int(p.id) for p in ours} - {kept}:
            self._call(lambda surplus=surplus: self.sdk.predictions.delete(id=surplus))  # type: ignore[misc]
        return done

    def _predictions(self, task: int, version: str) -> Sequence[Any]:
        found = self._call(lambda: self.sdk.predictions.list(task=task))
        return [p for p in found if p.model_version == version]

    # --- projects, for `import` ---

    def find_project(self, title_or_id: str) -> Any | None:
        """The project with this id, or the first with this title; ``None`` if there is none."""
        if title_or_id.isdigit():
            return self._call(lambda: self.sdk.projects.get(id=int(title_or_id)))
        return self._call(lambda: next((p for p in self.sdk.projects.list() if p.title == title_or_id), None))

    def projects_of_version(self, model_version: str) -> list[dict[str, Any]]:
        """The projects whose predictions count if they are of ``model_version``: id, title, tasks, labelled, predictions."""
        found = self._call(lambda: [p for p in self.sdk.projects.list() if p.model_version == model_version])
        return [
            {
                "id": int(p.id),
                "title": str(p.title),
                "tasks": int(p.task_number or 0),
                "labelled": int(p.num_tasks_with_annotations or 0),
                "predictions": int(p.total_predictions_number or 0),
            }
            for p in found
        ]

    def create_project(self, title: str, label_config: str) -> Any:
        """A new project."""
        return self._call(
            lambda: self.sdk.projects.create(
                title=title,
                label_config=label_config,
                description="Whole-slide images, pre-labelled. Research use only, no diagnostic use.",
            )
        )

    def task_field_values(self, project: int, field: str) -> set[str]:
        """The values of one data field over all tasks of a project."""
        return self._call(
            lambda: {str(t.data[field]) for t in self.sdk.tasks.list(project=project) if field in (t.data or {})}
        )

    def import_tasks(self, project: int, tasks: Sequence[Mapping[str, Any]]) -> int:
        """Add tasks (their ``data``) to a project; returns how many were added."""
        done = self._call(
            lambda: self.sdk.projects.import_tasks(id=project, request=[{"data": dict(task)} for task in tasks])
        )
        return int(done.task_count or 0)

    def connect_backend(self, project: int, url: str, title: str) -> int:
        """Connect this backend to a project, or update the connection; returns its id.

        ``title`` must be the model version: Label Studio makes it the project's ``model_version``, and only predictions of
        that version count.
        """
        user, password = self._settings.basic_auth_user, self._settings.basic_auth_pass.get_secret_value()
        auth = (
            {"auth_method": "BASIC_AUTH", "basic_auth_user": user, "basic_auth_pass": password}
            if user
            else {"auth_method": "NONE"}
        )
        present = self._call(lambda: [b for b in self.sdk.ml.list(project=project) if b.url.rstrip("/") == url])
        if present:
            backend = present[0]
            if backend.title != title:
                self._call(lambda: self.sdk.ml.update(id=backend.id, title=title, url=url, project=project, **auth))
            return int(backend.id)
        created = self._call(
            lambda: self.sdk.ml.create(
                project=project, url=url, title=title, is_interactive=True, timeout=100.0, **auth
            )
        )
        return int(created.id)

    def settle_model_version(self, project: int, version: str) -> None:
        """Make sure that a project counts the predictions of ``version``.

        Connecting a backend does so by itself; but Label Studio updates a project from several threads at once while tasks are imported,
        and the last one to save an older copy wins.
        """
        if self._call(lambda: self.sdk.projects.get(id=project)).model_version != version:
            log.info("project %d: model version set to %s", project, version)
            self._call(lambda: self.sdk.projects.update(id=project, model_version=version))

    def retrieve_predictions(self, project: int) -> None:
        """Have Label Studio ask its backend for predictions of all tasks that lack one."""
        self._call(
            lambda: self.sdk.actions.create(
                project=project,
                id="retrieve_tasks_predictions",
                selected_items={"all": True, "excluded": []},
                request_options={"timeout_in_seconds": 120},
            )
        )

    def _call(self, function: Callable[[], T]) -> T:
        try:
            return function()
        except httpx.HTTPError as error:
            raise LabelStudioUnreachable(
                f"Label Studio at {self.url} does not answer ({type(error).__name__}).",
                hint="It is tried again by itself; check LABEL_STUDIO_URL and that Label Studio runs.",
            ) from error
        except ApiError as error:
            raise _typed(error, self.url) from error


def _typed(error: ApiError, url: str) -> LabelStudioError:
    status = error.status_code or 0
    if status >= 500 or status == 429:
        return LabelStudioUnreachable(f"Label Studio at {url} answers {status}.", hint="It is tried again by itself.")
    if status in (401, 403):
        return TokenRefused(
            f"Label Studio at {url} refuses the token ({status}).",
            hint="Set LABEL_STUDIO_API_KEY to a current token of a user who may edit the project.",
        )
    if status == 404:
        return TaskGone(f"Label Studio at {url} does not know this any more (404).")
    return LabelStudioError(f"Label Studio at {url} refuses the request ({status}): {str(error.body)[:300]}")


def _content(result: Any, score: Any) -> str:
    """What makes two predictions of one version the same: regions and score, as JSON."""
    text = json.dumps([result, None if score is None else round(float(score), 6)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
