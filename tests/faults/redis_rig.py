"""A Redis that a test may kill, fill, pause and lock, and a proxy that makes it slow or cuts its connections."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError
from redis_programs import redis_program


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class OwnRedis:
    """A redis-server at a port of loopback, with an append-only file, as an operator runs one beside the backend."""

    def __init__(self, folder: Path, *, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.program = redis_program()
        self.port = free_port()
        self.environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self, *options: str) -> None:
        """Start it, and return once it answers."""
        persistent = ("--appendonly", "yes", "--appendfsync", "always", "--save", "")
        with (self.folder / "redis.log").open("ab") as log:
            command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
            self._process = subprocess.Popen(
                [*command, *persistent, *options],
                executable=self.program,
                stdout=log,
                stderr=log,
                env=self.environment,
            )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                with self.client() as client:
                    client.ping()
                return
            except RedisError:
                time.sleep(0.02)
        self.stop()
        raise AssertionError((self.folder / "redis.log").read_text()[-2000:])

    def client(self) -> Redis:
        return Redis.from_url(self.url, socket_timeout=5)

    def kill(self) -> None:
        """``kill -9``."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        if self.alive():
            self.kill()


class RedisProxy:
    """Passes TCP on to a Redis. ``delay_s`` holds back every message; ``refuse`` cuts all connections and lets none in."""

    def __init__(self, target_port: int) -> None:
        self.delay_s = 0.0
        self.requests = 0
        self.on_request: Callable[[int, bytes], str] = lambda _number, _data: "pass"
        self._target = target_port
        self._refusing = threading.Event()
        self._ended = False
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @contextmanager
    def slow(self, delay_s: float) -> Iterator[None]:
        """Every message takes so long while inside, in seconds."""
        self.delay_s = delay_s
        try:
            yield
        finally:
            self.delay_s = 0.0

    def refuse(self) -> None:
        """Cut what is connected; new connections are closed at once."""
        self._refusing.set()
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            _close(*pair)

    def accept(self) -> None:
        """Let connections in again."""
        self._refusing.clear()

    def stop(self) -> None:
        self._ended = True
        self._listener.close()
        self.refuse()

    def _accept(self) -> None:
        while not self._ended:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing.is_set():
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._target), 5)
                server.settimeout(None)
            except OSError:
                client.close()
                continue
            with self._lock:
                self._pairs.add((client, server))
            for source, sink, asks in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pump, args=(source, sink, asks, (client, server)), daemon=True).start()

    def _pump(
        self, source: socket.socket, sink: socket.socket, asks: bool, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        try:
            while data := source.recv(1 << 16):
                if asks:
                    if self.delay_s:
                        time.sleep(self.delay_s)
                    with self._lock:
                        self.requests += 1
                        number = self.requests
                    what = self.on_request(number, data)
                    if what == "cut before":
                        return
                    sink.sendall(data)
                    if what == "cut after":
                        time.sleep(0.02)  # let Redis do it; the answer is lost with the connection
                        return
                else:
                    sink.sendall(data)
        except OSError:
            pass  # the other direction has closed both
        finally:
            _close(*pair)
            with self._lock:
                self._pairs.discard(pair)


def _close(*sockets: socket.socket) -> None:
    for each in sockets:
        with suppress(OSError):  # the other side was faster
            each.shutdown(socket.SHUT_RDWR)
        each.close()
