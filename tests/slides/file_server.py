"""A real HTTP server on loopback that serves bytes as Label Studio or a file host does, and remembers who asked how."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Answer:
    """What a path is answered with.

    ``length``: what is said of the body's length, if not the truth; -1: nothing, it ends where the connection does. ``every_s``: seconds
    before each piece of ``piece`` bytes. ``header_every_s``: seconds before each byte of a header that does not end.
    """

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    methods: tuple[str, ...] = ("HEAD", "GET")
    token: str = ""
    length: int | None = None
    every_s: float = 0.0
    piece: int = 1
    header_every_s: float = 0.0


@dataclass
class Server:
    """Answers by path and query; ``requests`` holds (method, path, Authorization) of everything asked."""

    port: int
    answers: dict[str, Answer] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    before_body: Callable[[], object] = lambda: None
    ending: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def gets(self, path: str) -> int:
        """How often the file of this path was asked for, not only about."""
        return sum((method, asked) == ("GET", path) for method, asked, _ in self.requests)


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
            if answer.header_every_s:
                self._write(b"HTTP/1.0 200 OK\r\nX-Endless: " + b"x" * 100_000, answer.header_every_s, 1)
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if answer.length != -1:
                self.send_header("Content-Length", str(len(answer.body) if answer.length is None else answer.length))
            self.end_headers()
            if self.command == "GET":
                state.before_body()
                self._write(answer.body, answer.every_s, answer.piece)
                if answer.length is not None:
                    self.close_connection = True

        do_GET = do_HEAD = _serve

        def _write(self, data: bytes, every_s: float, piece: int) -> None:
            with contextlib.suppress(OSError):  # who asked has hung up
                if not every_s:
                    self.wfile.write(data)
                    return
                for at in range(0, len(data), piece):
                    if state.ending.wait(every_s):
                        self.close_connection = True
                        return
                    self.wfile.write(data[at : at + piece])

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield state
        finally:
            state.ending.set()
            server.shutdown()
            thread.join()
