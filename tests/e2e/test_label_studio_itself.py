"""The end-to-end fixtures hold: a real Label Studio, a real browser, and helpers that see what a person would see."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from label_studio_sdk import LabelStudio
from PIL import Image
from studio import Editor, EditorCrashed, Studio

from backend.demo.label_studio_process import LabelStudioProcess
from backend.errors import LabelStudioNotStarted

pytestmark = pytest.mark.e2e

CONFIG = """
<View>
  <Image name="image" value="$image"/>
  <RectangleLabels name="tiles" toName="image"><Label value="Tile" background="#ff0000"/></RectangleLabels>
</View>
"""
TITLE = "two-rectangles-1"


def rectangle(number: int, from_name: str = "tiles") -> dict[str, Any]:
    """A region of 20 × 20 per cent, the ``number``-th from the left."""
    value = {"x": 10 + 30 * number, "y": 40, "width": 20, "height": 20, "rotation": 0, "rectanglelabels": ["Tile"]}
    return {
        "id": f"tile-{number}",
        "from_name": from_name,
        "to_name": "image",
        "type": "rectanglelabels",
        "original_width": 400,
        "original_height": 300,
        "image_rotation": 0,
        "value": value,
    }


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A grey image of 400 × 300 px."""
    path = tmp_path / "grey.png"
    Image.new("RGB", (400, 300), (128, 128, 128)).save(path)
    return path


@pytest.fixture
def two_rectangles_backend() -> Iterator[tuple[str, list[str]]]:
    """The smallest ML backend there is: its address, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"status": "UP", "model_class": "TwoRectangles"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
            one = {"result": [rectangle(0), rectangle(1)], "score": 0.75, "model_version": TITLE}
            self.answer({"model_version": TITLE, "results": [one for _ in body.get("tasks", [])]})

        def answer(self, content: dict[str, Any]) -> None:
            asked.append(self.path)
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """The test looks at ``asked``."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_label_studio_knows_our_token_as_the_sdk_sends_it(label_studio: Studio) -> None:
    with httpx.Client() as http:
        me = LabelStudio(base_url=label_studio.base_url, api_key=label_studio.token, httpx_client=http).users.whoami()
    assert me.email == label_studio.process.username


def test_browser_is_logged_in_and_sees_a_project(label_studio: Studio, browser_page: Editor, picture: Path) -> None:
    project = label_studio.create_project("Project of slides", CONFIG)
    label_studio.upload_images(project, [picture])
    browser_page.page.goto(f"{label_studio.base_url}/projects/")
    browser_page.page.get_by_text("Project of slides").wait_for()
    browser_page.page.goto(f"{label_studio.base_url}/projects/{project}/data")
    browser_page.page.locator("img[src*='/data/upload/']").first.wait_for()
    browser_page.screenshot("label-studio-project")
    assert browser_page.problems == []


def test_predictions_of_a_backend_are_retrieved_once_and_shown_in_the_editor(
    label_studio: Studio, browser_page: Editor, picture: Path, two_rectangles_backend: tuple[str, list[str]]
) -> None:
    url, asked = two_rectangles_backend
    project = label_studio.create_project("Predicted", CONFIG)
    tasks = label_studio.upload_images(project, [picture, picture])
    label_studio.connect_backend(project, url, TITLE)
    assert label_studio.project(project)["model_version"] == TITLE

    label_studio.retrieve_predictions(project)
    label_studio.retrieve_predictions(project)
    assert asked.count("/predict") == 1
    for task in tasks:
        (prediction,) = label_studio.predictions(task)
        assert (prediction["score"], prediction["model_version"], len(prediction["result"])) == (0.75, TITLE, 2)

    browser_page.open_task(project, tasks[0], regions=2)
    browser_page.screenshot("label-studio-editor")
    assert browser_page.region_labels() == ["Tile", "Tile"]
    assert [line.split()[:2] for line in browser_page.outliner()] == [["1", "Tile"], ["2", "Tile"]]
    shown = browser_page.canvas_picture()
    inside, beside = (shown.getpixel((round(shown.width * x), round(shown.height * 0.5))) for x in (0.2, 0.95))
    assert isinstance(inside, tuple) and isinstance(beside, tuple)
    assert inside[0] > inside[1] + 20, "the rectangle is red"
    assert max(beside) - min(beside) <= 2, "beside it the image is grey"
    assert browser_page.problems == []


def test_an_editor_that_crashes_is_noticed(label_studio: Studio, browser_page: Editor, picture: Path) -> None:
    project = label_studio.create_project("Crashing", CONFIG)
    (task,) = label_studio.upload_images(project, [picture])
    junk = {"task": task, "result": [{"foo": "bar"}], "score": 0.5, "model_version": "junk"}
    label_studio.call("POST", "/api/predictions/", json=junk)
    with pytest.raises(EditorCrashed, match="Cannot read properties"):
        browser_page.open_task(project, task, timeout_s=20)
    browser_page.screenshot("label-studio-crash")
    assert browser_page.problems != []


def test_imported_and_annotated_tasks_are_there(label_studio: Studio) -> None:
    project = label_studio.create_project("Imported", CONFIG)
    first, second = label_studio.import_tasks(
        project, [{"image": "/a.png", "slide": "a"}, {"image": "/b.png", "slide": "b"}]
    )
    assert label_studio.call("GET", f"/api/tasks/{second}/")["data"]["slide"] == "b"
    label_studio.annotate(first, [rectangle(0)])
    assert label_studio.project(project)["num_tasks_with_annotations"] == 1


def test_after_a_restart_its_user_and_projects_are_still_there(
    label_studio: Studio, label_studio_venv: Path, tmp_path: Path
) -> None:
    template = label_studio.process.template_dir
    with (
        LabelStudioProcess(label_studio_venv, tmp_path, 0, template_dir=template) as process,
        Studio(process) as studio,
    ):
        project = studio.create_project("Kept", CONFIG)
    with LabelStudioProcess(label_studio_venv, tmp_path, 0) as again, Studio(again) as studio:
        assert studio.project(project)["title"] == "Kept"
    with pytest.raises(LabelStudioNotStarted, match="does not know the token of annotator@localhost"):
        LabelStudioProcess(label_studio_venv, tmp_path, 0, token="f" * 40).start()
