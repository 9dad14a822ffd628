"""A Label Studio of our own, for the demo and the tests, in its own virtual environment.

It gets an environment made from nothing, because it reads many common names (``HOST``, ``PORT``, ``PASSWORD``, ``REDIS_…``)
and must not see the backend's secrets. It ends when the process that started it ends, however that happens.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType

import httpx

from backend.demo.label_studio_venv import (
    LABEL_STUDIO_VERSION,
    LOG_LINES_SHOWN,
    Progress,
    ensure_installed,
    installed_version,
    python_of,
    quiet,
)
from backend.errors import LabelStudioNotStarted

DEFAULT_USERNAME = "annotator@localhost"
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 10.0

# Runs inside Label Studio's interpreter. Standard input is a pipe whose other end only we hold: it closes when we are
# gone, even by SIGKILL, and the group ends itself. Nothing is ever written to it.
_LAUNCHER = """
import os, signal, sys, threading
def end_with_parent():
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGTERM)
threading.Thread(target=end_with_parent, daemon=True).start()
sys.argv[0] = "label-studio"
from label_studio.server import main
sys.exit(main())
"""


class LabelStudioProcess:
    """One Label Studio with SQLite, its folder and its user.

    Parameters
    ----------
    venv
        Folder of Label Studio's virtual environment; made by :meth:`ensure_installed`.
    data_dir
        Folder for its database, uploads, log (``label-studio.log``) and credentials (``credentials.json``, mode 0600).
    port
        Port to listen on; 0 picks a free one at :meth:`start`.
    host
        Address to listen on. Its accounts are those of a demo: think before giving anything but loopback.
    username, password, token
        The user made at the first start. Password and token are made up when not given, and remembered in ``data_dir``.
    document_root
        If given, Label Studio serves local files below it (a local storage must be a sub-folder of it).
    template_dir
        If given, a migrated and otherwise empty database is kept there for each Label Studio version, so that every later
        first start takes seconds instead of a minute.

    Used as a context manager it starts on entry and stops on exit.
    """

    def __init__(
        self,
        venv: Path,
        data_dir: Path,
        port: int = 8080,
        *,
        host: str = "127.0.0.1",
        username: str = "",
        password: str = "",
        token: str = "",
        document_root: Path | None = None,
        template_dir: Path | None = None,
    ) -> None:
        self.venv = venv.absolute()
        self.data_dir = data_dir.absolute()
        self.port = port
        self.host = host
        self.username = username
        self.password = password
        self.token = token
        self.document_root = document_root.absolute() if document_root else None
        self.template_dir = template_dir.absolute() if template_dir else None
        self.log_path = self.data_dir / "label-studio.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        """Where it answers, without a final slash. Before :meth:`start`, port 0 is not yet a real port."""
        name = "localhost" if self.host in ("", "0.0.0.0", "127.0.0.1", "localhost") else self.host
        return f"http://{name}:{self.port}"

    @property
    def running(self) -> bool:
        """Whether the process that this object started is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Process id, while one is running."""
        return self._process.pid if self._process is not None and self.running else None

    def ensure_installed(self, on_progress: Progress = quiet) -> None:
        """Make the virtual environment unless it is there and right; see :func:`~backend.demo.label_studio_venv.ensure_installed`."""
        ensure_installed(self.venv, on_progress)

    def start(self, on_progress: Progress = quiet, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start it and wait until it answers with our user's token. Nothing happens if it is running.

        Raises
        ------
        LabelStudioNotStarted
            Not installed, port taken, ended or silent for ``timeout_s`` seconds (with the last lines of its log), or its
            folder belongs to another user or token.
        """
        if self.running:
            return
        if installed_version(self.venv) != LABEL_STUDIO_VERSION:
            raise LabelStudioNotStarted(
                f"Label Studio {LABEL_STUDIO_VERSION} is not installed in {self.venv}.",
                hint=f"Install it: python -m backend.demo.label_studio_venv {self.venv}",
            )
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._settle_credentials()
        self.port = self.port or _free_port(self.host)
        _require_free(self.host, self.port)
        self._prepare_database(on_progress, timeout_s)
        on_progress(f"Starting Label Studio {LABEL_STUDIO_VERSION} at {self.base_url}")
        self._process = self._spawn(
            "start", "--no-browser", "--internal-host", self.host or "127.0.0.1", "--port", str(self.port)
        )
        try:
            self._wait_until_it_answers(on_progress, timeout_s)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it and everything it started: politely, then by force. Nothing happens if it is not running."""
        process, self._process = self._process, None
        if process is not None:
            _end_group(process)

    def __enter__(self) -> LabelStudioProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def environment(self) -> dict[str, str]:
        """The whole environment that Label Studio gets; of ours only the search path, locale, time zone and TMPDIR."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR") if name in os.environ}
        serve = self.document_root is not None
        return kept | {
            # Its caches and dot files stay in its own folder.
            "HOME": str(self.data_dir),
            "PYTHONNOUSERSITE": "1",
            "PYTHONUNBUFFERED": "1",
            "LABEL_STUDIO_BASE_DATA_DIR": str(self.data_dir),
            "LABEL_STUDIO_USERNAME": self.username,
            "LABEL_STUDIO_PASSWORD": self.password,
            "LABEL_STUDIO_USER_TOKEN": self.token,
            "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
            # Both are needed before it speaks to a backend on this machine.
            "ML_BLOCK_LOCAL_IP": "false",
            "SSRF_PROTECTION_ENABLED": "false",
            "LOCAL_FILES_SERVING_ENABLED": str(serve).lower(),
            "LOCAL_FILES_DOCUMENT_ROOT": str(self.document_root or self.data_dir),
            "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
            "COLLECT_ANALYTICS": "false",
            "LATEST_VERSION_CHECK": "false",
            "SENTRY_DSN": "",
            "FRONTEND_SENTRY_DSN": "",
        }

    def log_tail(self, lines: int = LOG_LINES_SHOWN) -> str:
        """The last lines of its log, or an empty string."""
        if not self.log_path.exists():
            return ""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def _settle_credentials(self) -> None:
        path = self.data_dir / "credentials.json"
        known: dict[str, str] = {}
        if path.exists():
            try:
                known = dict(json.loads(path.read_text()))
            except ValueError:
                raise LabelStudioNotStarted(
                    f"{path} is not readable as JSON.", hint="Give username, password and token, or remove the folder."
                ) from None
        self.username = self.username or known.get("username") or DEFAULT_USERNAME
        self.password = self.password or known.get("password") or secrets.token_urlsafe(12)
        self.token = self.token or known.get("token") or secrets.token_hex(20)
        text = json.dumps({"username": self.username, "password": self.password, "token": self.token})
        part = path.with_name(path.name + ".part")
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        part.replace(path)

    def _prepare_database(self, on_progress: Progress, timeout_s: float) -> None:
        database = self.data_dir / "label_studio.sqlite3"
        if database.exists() or self.template_dir is None:
            return
        template = self.template_dir / f"label-studio-{LABEL_STUDIO_VERSION}.sqlite3"
        if not template.exists():
            on_progress("Preparing Label Studio's database (about a minute, only once)")
            # `version` migrates and ends before any user is made: the template holds nobody's password.
            process = self._spawn("version")
            try:
                status = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise self._failure(f"did not prepare its database within {timeout_s:.0f} s") from None
            finally:
                _end_group(process)
            if status != 0:
                raise self._failure(f"ended with status {status} while preparing its database")
            self.template_dir.mkdir(parents=True, exist_ok=True)
            _copy_whole(database, template)
        else:
            _copy_whole(template, database)

    def _spawn(self, *arguments: str) -> subprocess.Popen[bytes]:
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                [str(python_of(self.venv)), "-c", _LAUNCHER, *arguments],
                cwd=self.data_dir,
                env=self.environment(),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_until_it_answers(self, on_progress: Progress, timeout_s: float) -> None:
        assert self._process is not None
        began = time.monotonic()
        log_start = self.log_path.stat().st_size
        next_word = began + 10
        with httpx.Client(base_url=self.base_url, timeout=10, trust_env=False) as http:
            while True:
                status = self._process.poll()
                if status is not None:
                    raise self._failure(f"ended with status {status} before it answered")
                with contextlib.suppress(httpx.TransportError):
                    if http.get("/health").status_code == 200:
                        break
                # It would move on to another port by itself, where nobody looks for it.
                if b"Trying to start at" in self.log_path.read_bytes()[log_start:]:
                    raise self._failure(f"found port {self.port} taken")
                now = time.monotonic()
                if now - began > timeout_s:
                    raise self._failure(f"did not answer within {timeout_s:.0f} s")
                if now >= next_word:
                    on_progress(f"Label Studio is still starting ({now - began:.0f} s)")
                    next_word = now + 10
                time.sleep(0.25)
            answer = http.get("/api/current-user/whoami", headers={"Authorization": f"Token {self.token}"})
            if answer.status_code == 401:
                raise LabelStudioNotStarted(
                    f"The Label Studio in {self.data_dir} does not know the token of {self.username}.",
                    hint="The folder was made with another user or token: give those, or remove the folder.",
                )
            if answer.status_code != 200 or answer.json().get("email") != self.username:
                raise self._failure(f"answered {answer.status_code} to a question about {self.username}")
        on_progress(f"Label Studio answers at {self.base_url}")

    def _failure(self, what: str) -> LabelStudioNotStarted:
        return LabelStudioNotStarted(
            f"Label Studio {what}. The end of its log:\n{self.log_tail() or '(empty)'}",
            hint=f"\nThe whole log: {self.log_path}",
        )


def _copy_whole(source: Path, target: Path) -> None:
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    shutil.copyfile(source, part)
    part.replace(target)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the session that ``process`` leads. Until it has been waited for, its id cannot be anybody else's."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host or "127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _require_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host or "127.0.0.1", port))
        except OSError as error:
            raise LabelStudioNotStarted(
                f"Label Studio cannot listen on {host or '127.0.0.1'}:{port}: {error.strerror}.",
                hint="End what runs there, or choose another port.",
            ) from None
