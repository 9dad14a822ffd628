"""A stand-in for Label Studio: the few endpoints that this backend calls, with faults that can be switched on.

A stub is right here, because a real Label Studio cannot be made to answer 500 for a minute, to store a prediction and then lose the
answer, or to let a token expire when a test wants it. The tests in ``tests/e2e`` use a real one. Like the real one it has no uniqueness:
whoever posts twice has two predictions, and the tests count them.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import jwt

CONFIG = """<View>
  <Image name="image" value="$image"/>
  <BrushLabels name="attention" toName="image"><Label value="Attention"/></BrushLabels>
  <RectangleLabels name="hot" toName="image"><Label value="Hot tile"/></RectangleLabels>
  <TextArea name="summary" toName="image"/>
</View>"""
PROJECT = 7
_SECRET = "label-studio-signs-its-tokens-with-this"
_WHEN = "2025-01-01T00:00:00Z"


@dataclass
class Fault:
    """What happens to a request instead of, before or after its being served.

    Attributes
    ----------
    status
        Answer this status; 0: the right one.
    body
        The answer's text with ``status``: a proxy in front of Label Studio answers HTML.
    before_s, after_s
        Pause before the request takes effect, and between effect and answer, in seconds.
    effect
        Whether the request takes effect at all.
    cut
        Close the connection without an answer.
    """

    status: int = 0
    body: str = '{"detail": "a fault"}'
    before_s: float = 0.0
    after_s: float = 0.0
    effect: bool = False
    cut: bool = False


Chooser = Callable[[str, str], "Fault | None"]


class StudioStub:
    """Tasks of one project, their predictions, and a switch for faults."""

    def __init__(self) -> None:
        self.tasks: dict[int, dict[str, Any]] = {}
        self.predictions: dict[int, dict[str, Any]] = {}
        self.requests: Counter[str] = Counter()
        self.faults: Chooser = lambda _method, _path: None
        self.project_deleted = False
        self.accepted_token: str | None = None
        self._numbers = itertools.count(1)
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self.start()

    # --- the process ---

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Answer, at the same port as before, without faults."""
        self.faults = lambda _method, _path: None
        self.project_deleted, self.accepted_token = False, None
        if self._server is not None:
            return
        studio = self

        class Handler(_Handler):
            pass

        Handler.studio = studio
        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Be away: connections are refused."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
            self.faults = lambda _method, _path: Fault(cut=True)  # for connections that are open still

    @contextmanager
    def choosing(self, chooser: Chooser) -> Iterator[None]:
        """``chooser`` decides about every request while inside."""
        self.faults = chooser
        try:
            yield
        finally:
            self.faults = lambda _method, _path: None

    # --- its data ---

    def add_task(self, slide: Path) -> int:
        """A task whose picture is the slide itself; returns its number."""
        number = next(self._numbers)
        self.tasks[number] = {"image": str(slide)}
        return number

    def task_json(self, number: int) -> dict[str, Any]:
        """The task as Label Studio sends it to a backend."""
        return {"id": number, "data": self.tasks[number], "meta": {}, "project": PROJECT, "predictions": []}

    def of(self, task: int) -> list[dict[str, Any]]:
        """The predictions of a task."""
        with self._lock:
            return [p for p in self.predictions.values() if p["task"] == task]

    def forget(self, task: int) -> None:
        """Delete a task's predictions, as a person may."""
        with self._lock:
            self.predictions = {number: p for number, p in self.predictions.items() if p["task"] != task}

    def store(self, task: int, prediction: dict[str, Any]) -> dict[str, Any]:
        """Keep a prediction, whatever is there already."""
        with self._lock:
            number = next(self._ids)
            kept = {"id": number, "task": task, "project": PROJECT, "created_at": _WHEN, "updated_at": _WHEN}
            kept |= {name: prediction.get(name) for name in ("result", "score", "model_version", "cluster")}
            self.predictions[number] = kept
            return kept

    def question(self, tasks: list[int]) -> dict[str, Any]:
        """The body of a request for predictions."""
        return {
            "tasks": [self.task_json(number) for number in tasks],
            "project": f"{PROJECT}.1795461014",
            "label_config": CONFIG,
            "params": {"login": None, "password": None, "context": None},
        }

    def ask(self, backend: str, tasks: list[int], timeout_s: float = 60) -> httpx.Response:
        """Ask a backend for predictions, and store what it answers, as Label Studio does."""
        body = self.question(tasks)
        with httpx.Client(timeout=timeout_s, trust_env=False) as client:
            answer = client.post(f"{backend}/predict", json=body)
        if answer.status_code == 200:
            for number, result in zip(tasks, answer.json()["results"], strict=True):
                if result:
                    self.store(number, result)
        return answer

    # --- tokens ---

    @staticmethod
    def personal_access_token() -> str:
        """A token that must be exchanged for one that opens doors."""
        return jwt.encode({"token_type": "refresh", "exp": int(time.time()) + 10**8}, _SECRET)

    def new_access_token(self) -> str:
        """A fresh token; the ones before it open nothing any more."""
        self.accepted_token = jwt.encode({"exp": int(time.time()) + 300, "jti": str(next(self._ids))}, _SECRET)
        return self.accepted_token


@dataclass
class _Answer:
    status: int
    value: Any = None
    headers: dict[str, str] = field(default_factory=dict)


class _Handler(BaseHTTPRequestHandler):
    studio: StudioStub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"null") if length else None
        path = urlsplit(self.path).path.rstrip("/")
        self.studio.requests[f"{self.command} {re.sub(r'[0-9]+', 'N', path)}"] += 1
        fault = self.studio.faults(self.command, path)
        if fault is None:
            self._send(self._answer(path, body))
            return
        time.sleep(fault.before_s)
        answer = self._answer(path, body) if fault.effect or not (fault.status or fault.cut) else _Answer(500)
        time.sleep(fault.after_s)
        if fault.cut:
            self.close_connection = True
            self.connection.close()
        elif fault.status:
            self._write(fault.status, fault.body.encode(), "application/json" if fault.body[:1] == "{" else "text/html")
        else:
            self._send(answer)

    do_GET = do_POST = do_PATCH = do_DELETE = _serve

    def _send(self, answer: _Answer) -> None:
        self._write(answer.status, b"" if answer.status == 204 else json.dumps(answer.value).encode())

    def _write(self, status: int, body: bytes, kind: str = "application/json") -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            self.close_connection = True  # whoever asked has given up

    def _answer(self, path: str, body: Any) -> _Answer:
        studio = self.studio
        if path == "/api/token/refresh":
            return _Answer(200, {"access": studio.new_access_token()})
        if studio.accepted_token is not None:
            given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if given != studio.accepted_token:
                return _Answer(401, {"detail": "Given token not valid for any token type"})
        match [part for part in path.split("/") if part]:
            case ["api", "tasks", number] if int(number) in studio.tasks and not studio.project_deleted:
                return _Answer(200, studio.task_json(int(number)) | {"created_at": _WHEN, "updated_at": _WHEN})
            case ["api", "projects", number] if int(number) == PROJECT and not studio.project_deleted:
                return _Answer(200, {"id": PROJECT, "title": "Faults", "label_config": CONFIG, "created_at": _WHEN})
            case ["api", "predictions"] if self.command == "GET":
                task = int(parse_qs(urlsplit(self.path).query)["task"][0])
                return _Answer(200, studio.of(task))
            case ["api", "predictions"] if body["task"] in studio.tasks:
                return _Answer(201, studio.store(body["task"], body))
            case ["api", "predictions", number] if int(number) in studio.predictions:
                if self.command == "DELETE":
                    del studio.predictions[int(number)]
                    return _Answer(204)
                studio.predictions[int(number)] |= body
                return _Answer(200, studio.predictions[int(number)])
        return _Answer(404, {"status_code": 404, "detail": "No such thing matches the given query."})
