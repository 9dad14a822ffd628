"""A small Label Studio over HTTP: one project with tasks, annotations, a connection and a webhook, and what the learning commands ask of it.

``tests/e2e`` teaches with a real one; here a project is made, and its annotators change their minds, within milliseconds.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

PROJECT = 7
TITLE = "Lymph nodes"
CONFIG = """<View>
  <Image name="image" value="$image"/>
  <BrushLabels name="attention" toName="image"><Label value="Attention"/></BrushLabels>
  <Choices name="diagnosis" toName="image"><Choice value="Tumour"/><Choice value="No tumour"/></Choices>
  <Choices name="seen" toName="image" choice="multiple"><Choice value="Folds"/><Choice value="Ink/pen"/></Choices>
  <Rating name="quality" toName="image"/>
</View>"""


class AnnotatedStudio:
    """The project, as plain values that a test reads and changes."""

    def __init__(self) -> None:
        self.project: dict[str, Any] = {
            "id": PROJECT,
            "title": TITLE,
            "label_config": CONFIG,
            "model_version": "none",
            "created_at": "2026-11-25T00:00:00Z",
        }
        self.tasks: dict[int, dict[str, Any]] = {}
        self.annotations: dict[int, list[dict[str, Any]]] = {}
        self.connection: dict[str, Any] = {"id": 1, "project": PROJECT, "title": "wsc-000000", "url": "http://ours:1"}
        self.webhooks: list[dict[str, Any]] = []
        self.down = False
        self.url = ""
        self._number = 0

    def add_task(self, **data: Any) -> int:
        """A task; returns its number."""
        number = len(self.tasks) + 101
        self.tasks[number] = data
        return number

    def annotate(self, task: int, by: int = 1, **answers: Any) -> None:
        """Somebody submits: a text or list for choices, a number for a rating; replaces what they said of it before."""
        results = []
        for name, said in answers.items():
            kind = "rating" if isinstance(said, int) else "choices"
            value = {kind: [said] if isinstance(said, str) else said}
            results.append({"from_name": name, "to_name": "image", "type": kind, "origin": "manual", "value": value})
        self._number += 1
        kept = [a for a in self.annotations.get(task, []) if a["completed_by"] != by]
        mine = {
            "id": self._number,
            "completed_by": by,
            "result": results,
            "updated_at": f"2025-01-01T{self._number:06d}",
        }
        self.annotations[task] = [*kept, mine]

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        """Status and JSON."""
        if self.down:
            return 503, {"detail": "away"}
        if query.get("page", ["1"]) != ["1"]:
            return 404, {"detail": "Invalid page."}
        match (method, *path.strip("/").split("/")[1:]):
            case ("GET", "projects"):
                return 200, {"count": 1, "results": [self.project]}
            case ("GET", "projects", number, "export") if int(number) == PROJECT:
                made = [
                    {"id": task, "data": self.tasks[task], "annotations": a} for task, a in self.annotations.items()
                ]
                return 200, made
            case (method, "projects", number) if int(number) == PROJECT:
                self.project |= body or {}
                return 200, self.project
            case ("GET", "ml"):
                return 200, [self.connection]
            case ("PATCH", "ml", _):
                self.connection |= body
                return 200, self.connection
            case ("GET", "webhooks"):
                return 200, self.webhooks
            case ("POST", "webhooks"):
                self.webhooks.append({"id": len(self.webhooks) + 1, **body})
                return 201, self.webhooks[-1]
            case ("PATCH", "webhooks", number):
                self.webhooks[int(number) - 1] |= body
                return 200, self.webhooks[int(number) - 1]
            case ("GET", "tasks"):
                tasks = [{"id": number, "data": data} for number, data in self.tasks.items()]
                return 200, {"tasks": tasks, "total": len(tasks), "total_annotations": 0, "total_predictions": 0}
            case ("POST", "dm", "actions"):
                written = [number for number in body["selectedItems"]["included"] if number in self.tasks]
                value = body["value"] if body["value_type"] == "Number" else None
                for number in written:
                    self.tasks[number] = {**self.tasks[number], body["value_name"]: value}
                return 200, {"detail": f"Updated {len(written)} tasks"}
            case ("GET", "tasks", number) if int(number) in self.tasks:
                return 200, {"id": int(number), "data": self.tasks[int(number)]}
        return 404, {"detail": "Not found."}


@contextmanager
def answering(studio: AnnotatedStudio) -> Iterator[AnnotatedStudio]:
    """``studio`` at a free port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            asked = urlsplit(self.path)
            status, value = studio.answer(self.command, asked.path, parse_qs(asked.query), body)
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PATCH = serve

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    studio.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield studio
    finally:
        server.shutdown()
        server.server_close()
