"""A stub of Label Studio for measuring pushes: the five requests that a push makes, answered at once from memory.

What it answers in takes no time worth mentioning, so that what is measured is this backend's own part. A real Label Studio adds its own: some
10 to 100 ms for each request.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

PROJECT = 1
_WHEN = "2025-01-01T00:00:00Z"


class Studio:
    """Tasks of one project and their predictions.

    Attributes
    ----------
    tasks
        The data of each task.
    predictions
        As they were pushed, by their number.
    stored_at
        When the first prediction of each task was stored, in seconds since 1970.
    """

    def __init__(self, label_config: str) -> None:
        self.label_config = label_config
        self.tasks: dict[int, dict[str, Any]] = {}
        self.predictions: dict[int, dict[str, Any]] = {}
        self.stored_at: dict[int, float] = {}
        self.url = ""
        self._numbers = itertools.count(1)

    def answer(self, method: str, address: str, body: Any) -> tuple[int, Any]:
        """Status and JSON for one request."""
        parts = [part for part in urlsplit(address).path.split("/") if part]
        if parts[:2] == ["api", "tasks"] and len(parts) == 3 and int(parts[2]) in self.tasks:
            number = int(parts[2])
            return 200, {"id": number, "data": self.tasks[number], "project": PROJECT, "created_at": _WHEN}
        if parts == ["api", "projects", str(PROJECT)]:
            return 200, {"id": PROJECT, "title": "benchmark", "label_config": self.label_config}
        if parts == ["api", "predictions"] and method == "GET":
            task = int(parse_qs(urlsplit(address).query)["task"][0])
            return 200, [prediction for prediction in list(self.predictions.values()) if prediction["task"] == task]
        if parts == ["api", "predictions"] and method == "POST":
            number = next(self._numbers)
            stored = {**body, "id": number, "project": PROJECT, "created_at": _WHEN, "updated_at": _WHEN}
            self.predictions[number] = stored
            self.stored_at.setdefault(int(body["task"]), time.time())
            return 201, stored
        return 404, {"detail": "No such thing."}


@contextmanager
def studio(label_config: str) -> Iterator[Studio]:
    """A stub that listens at a port of its own."""
    made = Studio(label_config)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # head and body in one packet

        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, value = made.answer(self.command, self.path, body)
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = _serve

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="studio")
        thread.start()
        made.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield made
        finally:
            server.shutdown()
            thread.join()
