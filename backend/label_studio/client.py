"""Label Studio's API through its SDK: errors made ours, predictions pushed so that repeating it changes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, TypeVar

import httpx
from label_studio_sdk import LabelStudio
from label_studio_sdk.core.api_error import ApiError
from label_studio_sdk.core.request_options import RequestOptions

from backend.certificates import ssl_context
from backend.errors import LabelStudioError, LabelStudioUnreachable, ProjectNotFound, PushUnsure
from backend.label_studio.api_errors import RedirectRefused, TaskGone, something_else, typed, unreachable, was_sent
from backend.label_studio.export_stream import tasks_of
from backend.label_studio.versions import is_ours, model_of
from backend.learning.project_owner import Owner
from backend.redaction import shown_address
from backend.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")
Prediction = Mapping[str, Any]
Pushed = Literal["created", "updated", "kept"]
_TIMEOUT_S = 30.0
_EXPORT_TIMEOUT_S = 300.0
_PAGE_TASKS = 500
_TITLES_TOLD = 10
# Without it, Label Studio answers with an address of its own in place of what the task says (`s3://…`), another one for each task.
_RAW: RequestOptions = {"additional_query_parameters": {"resolve_uri": "false"}}


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
        hooks = {"response": [self._refuse_another_place]}
        return httpx.Client(verify=ssl_context(), timeout=_TIMEOUT_S, follow_redirects=True, event_hooks=hooks)

    def _refuse_another_place(self, response: httpx.Response) -> None:
        # httpx would send the body again wherever a 307 or 308 leads, and that body may be the token.
        if not response.has_redirect_location:
            return
        asked = response.request.url
        with contextlib.suppress(httpx.InvalidURL):  # of which httpx makes an error of its own
            to = asked.join(response.headers["location"])
            if (to.scheme, to.host, to.port) != (asked.scheme, asked.host, asked.port):
                there = shown_address(f"{to.scheme}://{to.netloc.decode()}{httpx.URL(self.url).path}").rstrip("/")
                raise RedirectRefused(
                    f"What answers at {shown_address(self.url)} leads to another address, where the token is not sent.",
                    hint=f"If Label Studio is there, set LABEL_STUDIO_URL={there}; if not, something stands in between.",
                )

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
        made = self._call(lambda: LabelStudio(base_url=self.url, api_key=key, httpx_client=self._http))
        # Where it exchanges a token it joins addresses so that without a final slash the last part of ours would be lost, as in http://name/ls.
        made._client_wrapper._tokens_client._base_url = f"{self.url}/"
        return made

    def authorization(self) -> Mapping[str, str]:
        """The ``Authorization`` header for Label Studio's own files, with a token that is valid now."""
        headers = self._call(lambda: self.sdk._client_wrapper.get_headers())
        return {"Authorization": headers["Authorization"]} if "Authorization" in headers else {}

    def whoami(self) -> str:
        """The user that the token belongs to."""
        email = getattr(self._call(lambda: self.sdk.users.whoami()), "email", None)
        if not isinstance(email, str):  # the SDK takes any JSON for a user
            raise something_else(self.url, "other JSON")
        return email

    def task(self, task: int) -> dict[str, Any]:
        """The ``data`` of a task, as it is now: its own, not as Label Studio would show it in a browser."""
        return dict(self._call(lambda: self.sdk.tasks.get(id=str(task), request_options=_RAW)).data)

    def label_config(self, project: int) -> str:
        """The labelling config of a project, as it is now."""
        return str(self._call(lambda: self.sdk.projects.get(id=project)).label_config or "")

    def owner(self, project: int) -> Owner:
        """Which project a number stands for in this Label Studio."""
        found = self._call(lambda: self.sdk.projects.get(id=project))
        return Owner(int(found.created_at.timestamp()), self.url, str(found.title or ""))

    def push_prediction(
        self,
        task: int,
        prediction: Prediction,
        *,
        outdated: Callable[[object], bool] | None = None,
        before_creating: Callable[[], None] = lambda: None,
    ) -> Pushed:
        """Make ``prediction`` the task's only prediction of its model version.

        An equal one is kept, another one of that version is updated, surplus ones of that version are deleted. Then those of other versions that
        ``outdated`` names are deleted; all others are left alone. ``before_creating`` is called right before a new one is stored, and may raise.

        Raises
        ------
        PushUnsure
            A new prediction was sent, and no answer came. To be called again, and once more some time after that has succeeded: Label Studio may
            store late what it was sent first.
        """
        version = prediction["model_version"]
        with_cluster = "cluster" in prediction
        wanted = _content(prediction["result"], prediction.get("score"), prediction.get("cluster"))
        found = self._call(lambda: self.sdk.predictions.list(task=task))
        ours: Sequence[Any] = [p for p in found if p.model_version == version]
        old = [int(p.id) for p in found if p.model_version != version and outdated and outdated(p.model_version)]
        right = [int(p.id) for p in ours if _content(p.result, p.score, p.cluster if with_cluster else None) == wanted]
        done: Pushed
        if right:
            done, kept = "kept", right[0]
        elif ours:
            done, kept = "updated", int(ours[0].id)
            try:
                self._call(lambda: self.sdk.predictions.update(id=kept, **prediction))
            except TaskGone:  # only that prediction was deleted meanwhile; if the task is gone too, creating says so
                done = "created"
        else:
            done = "created"
        if done == "created":
            before_creating()
            self._create(task, prediction)
            ours = self._predictions(task, version)  # another process may have done the same at the same time
            kept = min(int(p.id) for p in ours) if ours else 0
        for surplus in sorted({int(p.id) for p in ours} - {kept}) + old:
            with contextlib.suppress(TaskGone):  # another process was faster
                self._call(lambda surplus=surplus: self.sdk.predictions.delete(id=surplus))  # type: ignore[misc]
        return done

    def _create(self, task: int, prediction: Prediction) -> None:
        try:
            self._call(lambda: self.sdk.predictions.create(task=task, **prediction))
        except LabelStudioUnreachable as error:
            if isinstance(error, RedirectRefused) or not was_sent(error.__cause__):
                raise
            raise PushUnsure(error.message, hint=error.hint) from error

    def _predictions(self, task: int, version: str) -> Sequence[Any]:
        found = self._call(lambda: self.sdk.predictions.list(task=task))
        return [p for p in found if p.model_version == version]

    # --- projects, for `import` ---

    def find_project(self, title_or_id: str) -> Any | None:
        """The project with this id, or the first with this title; ``None`` if there is none."""
        if title_or_id.isdecimal():
            try:
                return self._call(lambda: self.sdk.projects.get(id=int(title_or_id)))
            except TaskGone:
                return None
        return self._call(lambda: next((p for p in self.sdk.projects.list() if p.title == title_or_id), None))

    def need_project(self, title_or_id: str) -> Any:
        """As :meth:`find_project`, but raises :class:`~backend.errors.ProjectNotFound`, naming the projects that there are."""
        found = self.find_project(title_or_id)
        if found is None:
            titles = self._call(lambda: [f"{p.id} {p.title!r}" for p in self.sdk.projects.list()])
            more = f" and {len(titles) - _TITLES_TOLD} more" if len(titles) > _TITLES_TOLD else ""
            raise ProjectNotFound(
                f"There is no project {title_or_id!r} in {shown_address(self.url)}.",
                hint=f"There are: {', '.join(titles[:_TITLES_TOLD]) or 'none'}{more}.",
            )
        return found

    def projects_of_model(self, model_version: str) -> list[dict[str, Any]]:
        """The projects at ``model_version`` or at heads on top of it: id, title, tasks, labelled, predictions, version."""
        found = self._call(
            lambda: [p for p in self.sdk.projects.list() if model_of(str(p.model_version or "")) == model_version]
        )
        return [
            {
                "id": int(p.id),
                "title": str(p.title),
                "tasks": int(p.task_number or 0),
                "labelled": int(p.num_tasks_with_annotations or 0),
                "predictions": int(p.total_predictions_number or 0),
                "model_version": str(p.model_version),
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
        return {str(data[field]) for _, data in self.tasks(project) if field in data}

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
        auth = self._basic_auth()
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

    def _basic_auth(self) -> dict[str, str]:
        user, password = self._settings.basic_auth_user, self._settings.basic_auth_pass.get_secret_value()
        if not user:
            return {"auth_method": "NONE"}
        return {"auth_method": "BASIC_AUTH", "basic_auth_user": user, "basic_auth_pass": password}

    def settle_model_version(self, project: int, version: str) -> None:
        """Make sure that a project counts the predictions of ``version``.

        Connecting a backend does so by itself; but Label Studio updates a project from several threads at once while tasks are imported,
        and the last one to save an older copy wins.
        """
        if self._call(lambda: self.sdk.projects.get(id=project)).model_version != version:
            log.info("project %d: model version set to %s", project, version)
            self._call(lambda: self.sdk.projects.update(id=project, model_version=version))

    def follow_version(self, project: int, url: str, version: str) -> bool:
        """Give the project's connection to this backend, and the project itself, the name of ``version``.

        Whether it is connected; Label Studio refuses a version that no connection has.
        """
        connections = self._connections(project, url)
        for backend in connections:
            if backend.title != version:
                # Label Studio asks /health and /setup now; the title, the answer of /setup and the predictions agree from here on.
                self._call(
                    lambda backend=backend: self.sdk.ml.update(  # type: ignore[misc]
                        id=backend.id, title=version, url=backend.url, project=project, **self._basic_auth()
                    )
                )
        if connections:
            self.settle_model_version(project, version)
        return bool(connections)

    def connected_urls(self, project: int, url: str) -> list[str]:
        """The addresses under which a project is connected to this backend, see :meth:`follow_version`; without a final slash."""
        return list(dict.fromkeys(str(b.url).rstrip("/") for b in self._connections(project, url)))

    def _connections(self, project: int, url: str) -> list[Any]:
        """Those with our ``url``, or a title that only we give (where Label Studio reaches us under another address)."""
        found = self._call(lambda: list(self.sdk.ml.list(project=project)))
        ours = {url, *self._settings.own_urls}
        return [b for b in found if str(b.url or "").rstrip("/") in ours or is_ours(b.title)]

    def secure_webhook(self, project: int, url: str, header: str, secret: str) -> None:
        """Have the project's webhook to ``url`` carry ``secret``; make one for annotations and the project if there is none."""
        found = [w for w in self._call(lambda: self.sdk.webhooks.list(project=str(project))) if w.url == url]
        for webhook in found:
            if (webhook.headers or {}).get(header) != secret:
                headers = {**(webhook.headers or {}), header: secret}
                self._call(lambda w=webhook, h=headers: self.sdk.webhooks.update(id=w.id, url=w.url, headers=h))  # type: ignore[misc]
        if not found:
            self._call(
                lambda: self.sdk.webhooks.create(
                    project=project, url=url, headers={header: secret}, send_payload=True, send_for_all_actions=True
                )
            )

    # --- tasks and annotations, for learning ---

    def tasks(self, project: int) -> list[tuple[int, dict[str, Any]]]:
        """Id and own data (see :meth:`task`) of every task of a project, in the order of the ids."""
        pages = self._call(
            lambda: [
                (int(t.id), dict(t.data or {}))
                for t in self.sdk.tasks.list(
                    project=project, fields="task_only", page_size=_PAGE_TASKS, resolve_uri=False
                )
            ]
        )
        return sorted(pages, key=lambda task: task[0])

    def annotated_tasks(self, project: int, read: Callable[[Iterator[dict[str, Any]]], T]) -> T:
        """What ``read`` makes of the tasks of a project that have annotations, skipped ones included, as Label Studio
        exports them: with their own data, not as the browser is shown it.

        They are given one after the other as they arrive: with what machines drew on ten thousand slides, an export is
        larger than memory.
        """

        # The SDK would take the answer for a file, and parse nothing.
        path = f"/api/projects/{project}/export?exportType=JSON&download_all_tasks=false"

        def export() -> T:
            _ = self.sdk  # says what is missing, before anything is asked
            headers = dict(self.authorization())
            with self._http.stream("GET", self.url + path, headers=headers, timeout=_EXPORT_TIMEOUT_S) as answer:
                if not answer.is_success:
                    answer.read()
                    raise ApiError(status_code=answer.status_code, body=_json_or_text(answer))
                return read(tasks_of(answer.iter_bytes(), f"project {project} from {shown_address(self.url)}"))

        return self._call(export)

    def set_task_field(self, project: int, task: int, name: str, value: float | None) -> None:
        """Set one field of a task's data; ``None`` is ``null``. The others stay, and so does what is edited meanwhile.

        This is the Data Manager's *Add Or Modify Data Field*. Changing the task itself replaces all of its data, so that an edit since it
        was read is lost; and a file that came from a storage is kept under a name (``$undefined$``) that no answer shows, in place of
        which all show the config's first field.

        Raises
        ------
        TaskGone
            There is no such task.
        """
        # The action has no type for null, only an expression that picks one of the values listed.
        typed_value = ("Number", value) if value is not None else ("Expression", "choices([null])")
        body = {
            "selectedItems": {"all": False, "included": [task]},
            "value_name": name,
            "value_type": typed_value[0],
            "value": typed_value[1],
        }
        answer = self._call(
            lambda: self._ask("POST", f"/api/dm/actions?id=add_data_field&project={project}", json=body)
        )
        if answer.json().get("detail") == "Updated 0 tasks":
            raise TaskGone(
                f"Label Studio at {shown_address(self.url)} does not know task {task} of project {project} any more."
            )

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

    def _ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        """A request that the SDK has no method for, its errors as the SDK has them; to be made within :meth:`_call`."""
        _ = self.sdk  # says what is missing, before anything is asked
        answer = self._http.request(method, self.url + path, headers=dict(self.authorization()), **more)
        if not answer.is_success:
            raise ApiError(status_code=answer.status_code, body=_json_or_text(answer))
        return answer

    def _call(self, function: Callable[[], T]) -> T:
        try:
            return function()
        except httpx.HTTPError as error:
            raise unreachable(error, self.url) from error
        except ApiError as error:
            if error.status_code == 401:
                # The next call begins anew: Label Studio may have forgotten a token that has not run out, as after a restart.
                self.__dict__.pop("sdk", None)
            raise typed(error, self.url) from error
        except json.JSONDecodeError as error:  # the SDK, while it exchanges a token
            raise something_else(self.url, "no JSON") from error


def _json_or_text(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return answer.text[:300]


def _content(result: Any, score: Any, cluster: Any = None) -> str:
    """What makes two predictions of one version the same: regions, score and cluster, as JSON."""
    text = json.dumps([result, None if score is None else round(float(score), 6), cluster], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
