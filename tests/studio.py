"""What tests do to a real Label Studio: through its API (`Studio`) and through a browser (`Editor`)."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import ConsoleMessage, Page, Response
from playwright.sync_api import TimeoutError as PlaywrightTimeout

from backend.demo.label_studio_process import LabelStudioProcess

REPOSITORY = Path(__file__).resolve().parents[1]
SCREENSHOTS = REPOSITORY / "build" / "screenshots"

# Label Studio asks for tips from the internet and answers 404 where there is none, and reports each frame to itself.
NOISE = re.compile(r"/heidi-tips")
REPORT_ONLY = "report-only Content Security Policy"

# True once the editor has shown the same for a second: every image of the task and its regions, or that it crashed. The
# editor draws twice, first from the list's short form of the task, in which there are no predictions.
SETTLED = """([predictions, regions]) => {
    const store = window.Htx?.annotationStore, annotation = store?.selected;
    const crashed = document.querySelector('.lsf-errors') !== null;
    let state = crashed ? 'crashed' : null;
    if (!crashed && annotation && store.predictions.length === predictions) {
        const images = [...annotation.names.values()].filter(object => object.type === 'image');
        const canvas = [...document.querySelectorAll('.konvajs-content canvas')].some(c => c.offsetWidth > 0);
        const listed = document.querySelectorAll('.lsf-outliner-item').length;
        const shown = images.length && images.every(image => image.imageIsLoaded) && canvas;
        const asked = regions === null || (annotation.regions.length === regions && (regions === 0 || listed > 0));
        if (shown && asked) state = [annotation.id, annotation.regions.length].join();
    }
    if (window.__shown?.state !== state) window.__shown = {state, since: performance.now()};
    return state !== null && performance.now() - window.__shown.since >= 1000;
}"""


class EditorCrashed(AssertionError):
    """The editor shows its error box instead of the task."""


class Studio:
    """A running Label Studio, spoken to with its user's legacy token. Every refusal is an error with Label Studio's words."""

    def __init__(self, process: LabelStudioProcess) -> None:
        self.process = process
        self.base_url = process.base_url
        self.token = process.token
        self.http = httpx.Client(
            base_url=self.base_url, headers={"Authorization": f"Token {self.token}"}, timeout=120, trust_env=False
        )
        # Cookies of a browser that has logged in: filled by the first, used by all.
        self.login_state: Any = None

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def call(self, method: str, path: str, **kwargs: Any) -> Any:
        """The decoded answer to one API call, ``None`` for an empty one."""
        answer = self.http.request(method, path, **kwargs)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text[:2000]}"
        return answer.json() if answer.content else None

    def create_project(self, title: str, label_config: str, **fields: Any) -> int:
        """The id of a new project."""
        return int(
            self.call("POST", "/api/projects", json={"title": title, "label_config": label_config, **fields})["id"]
        )

    def import_tasks(self, project: int, data: Sequence[dict[str, Any]]) -> list[int]:
        """The ids of new tasks with these ``data``, in their order."""
        path = f"/api/projects/{project}/import?return_task_ids=true"
        return [int(i) for i in self.call("POST", path, json=[{"data": fields} for fields in data])["task_ids"]]

    def upload_images(self, project: int, images: Sequence[Path]) -> list[int]:
        """The ids of new tasks, one for each uploaded image. The project's config must have one field."""
        ids: list[int] = []
        for image in images:
            path = f"/api/projects/{project}/import?return_task_ids=true"
            ids += self.call("POST", path, files={"file": (image.name, image.read_bytes())})["task_ids"]
        return ids

    def connect_backend(self, project: int, url: str, title: str, **fields: Any) -> int:
        """The id of the connected backend; Label Studio asks /health and /setup before it agrees."""
        return int(self.call("POST", "/api/ml/", json={"project": project, "url": url, "title": title, **fields})["id"])

    def retrieve_predictions(self, project: int, tasks: Sequence[int] = ()) -> None:
        """The Data Manager's "Retrieve Predictions" for these tasks (none given: all). Returns when Label Studio has the answer."""
        selected = {"all": False, "included": list(tasks)} if tasks else {"all": True, "excluded": []}
        path = f"/api/dm/actions?id=retrieve_tasks_predictions&project={project}"
        self.call("POST", path, json={"project": project, "selectedItems": selected, "ordering": []})

    def predictions(self, task: int) -> list[dict[str, Any]]:
        """All predictions of a task, oldest first."""
        return sorted(self.call("GET", "/api/predictions/", params={"task": task}), key=lambda p: int(p["id"]))

    def annotate(self, task: int, result: list[dict[str, Any]], **fields: Any) -> int:
        """The id of a submitted annotation."""
        return int(self.call("POST", f"/api/tasks/{task}/annotations/", json={"result": result, **fields})["id"])

    def project(self, project: int) -> dict[str, Any]:
        """The project as Label Studio has it."""
        return dict(self.call("GET", f"/api/projects/{project}/"))

    def task_url(self, project: int, task: int) -> str:
        """The address at which a person opens the task in the editor."""
        return f"{self.base_url}/projects/{project}/data?task={task}"


class Editor:
    """One browser page, logged in to Label Studio.

    ``problems`` collects what a developer would see in red: errors of the console, uncaught exceptions and answers of
    400 and above. Label Studio's own noise is left out.
    """

    def __init__(self, page: Page, studio: Studio) -> None:
        self.page = page
        self.studio = studio
        self.problems: list[str] = []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.problems.append(f"exception: {error}"))
        page.on("response", self._on_response)

    def log_in(self) -> None:
        """Through the login form, as a person does."""
        self.page.goto(f"{self.studio.base_url}/user/login/")
        self.page.fill("#email", self.studio.process.username)
        self.page.fill("#password", self.studio.process.password)
        self.page.click("button[type=submit]")
        self.page.wait_for_url(lambda url: "/user/login" not in url)

    def open_task(self, project: int, task: int, *, regions: int | None = None, timeout_s: float = 60) -> None:
        """Open a task and wait until the editor shows its images and, if a number is given, that many regions.

        Raises
        ------
        EditorCrashed
            The editor shows an error instead, or nothing at all after an uncaught exception.
        """
        whole_task = re.compile(rf"/api/tasks/{task}/?(\?|$)")
        # Now and then Label Studio's editor comes up without what its server has just sent (a new project counts the predictions of its
        # version only after a moment, and the editor sometimes draws its first, short form of the task and stays with it). A person
        # would open the task again, so that is done here, a few times.
        seen: list[str] = []
        for wait_s in (timeout_s / 3, timeout_s / 3, timeout_s):
            with self.page.expect_response(whole_task, timeout=timeout_s * 1000) as answer:
                self.page.goto(self.studio.task_url(project, task))
            assert answer.value.ok, f"opening task {task}: {answer.value.status} {answer.value.text()[:2000]}"
            predictions = len(answer.value.json()["predictions"])
            if regions and not predictions:
                seen.append("no predictions were sent")
                self.page.wait_for_timeout(3000)
                continue
            try:
                self.page.wait_for_function(SETTLED, arg=[predictions, regions], timeout=wait_s * 1000)
                break
            except PlaywrightTimeout:
                # Now and then the exception comes at a moment that leaves the editor empty, without its error box.
                if thrown := [problem for problem in self.problems if problem.startswith("exception: ")]:
                    raise EditorCrashed("; ".join(thrown)) from None
                shown = self.page.evaluate("() => window.Htx?.annotationStore?.selected?.regions.length")
                seen.append(f"{predictions} predictions were sent, {shown} regions shown")
        else:
            picture = self.screenshot(f"not-settled-{task}")
            raise AssertionError(f"task {task}, {regions} regions expected: {seen}; see {picture}; {self.problems}")
        if crash := self.crash():
            raise EditorCrashed(crash)

    def crash(self) -> str:
        """What the editor's error box says; empty when there is none."""
        box = self.page.locator(".lsf-errors")
        return box.first.inner_text() if box.count() else ""

    def region_labels(self) -> list[str]:
        """The labels of every region that the open annotation or prediction has, in order; '' for one without."""
        labels = self.page.evaluate(
            "() => Htx.annotationStore.selected.regions.map(r => (r.labeling?.mainValue ?? []).join(','))"
        )
        return [str(label) for label in labels]

    def outliner(self) -> list[str]:
        """The lines that the list of regions shows. Beyond what fits into the panel Label Studio leaves lines out."""
        return [" ".join(text.split()) for text in self.page.locator(".lsf-outliner-item").all_inner_texts()]

    def canvas_picture(self) -> Image.Image:
        """The image with the regions on it, as RGB pixels of the screen."""
        return Image.open(io.BytesIO(self.page.locator(".konvajs-content").first.screenshot())).convert("RGB")

    def screenshot(self, name: str) -> Path:
        """Keep what the page shows as ``build/screenshots/NAME.png``."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        self.page.screenshot(path=path)
        return path

    def _on_console(self, message: ConsoleMessage) -> None:
        address = str(message.location.get("url", ""))
        if message.type == "error" and not NOISE.search(address) and REPORT_ONLY not in message.text:
            self.problems.append(f"console: {message.text} ({address})")

    def _on_response(self, response: Response) -> None:
        if response.status >= 400 and not NOISE.search(response.url):
            self.problems.append(f"{response.status}: {response.url}")
