"""A real HTTP server on loopback that serves bytes as Label Studio or a file host does, and remembers who asked how."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Answer:
    """What a path is answered with."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    methods: tuple[str, ...] = ("HEAD", "GET")
    token: str = ""
    length: int | None = None


@dataclass
class Server:
    """Answers by path and query; ``requests`` holds (method, path, Authorization) of everything asked."""

    port: int
    answers: dict[str, Answer] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    before_body: Callable[[], None] = lambda: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"


@contextmanager
def serving() -> Iterator[Server]:
    state = Server(0)

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            state.requests.append((self.command, self.path, self.headers.get("Authorization")))
            answer = state.answers.get(self.path, Answer(status=404))
            if answer.token and self.headers.get("Authorization") != answer.token:
                answer = Answer(status=401)
            elif self.command not in answer.methods:
                answer = Answer(status=403)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body) if answer.length is None else answer.length))
            self.end_headers()
            if self.command == "GET":
                state.before_body()
                self.wfile.write(answer.body)
                if answer.length is not None:
                    self.close_connection = True

        do_GET = do_HEAD = _serve

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
