"""Secrets are planted in every setting, everything that can fail is made to fail at log level DEBUG, and then they are looked for.

In the logs of all processes, in every answer, and in all that lies in Redis.
"""

from __future__ import annotations

import base64
import json
import os
import random
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from faults.redis_rig import free_port
from redis import Redis
from redis.exceptions import RedisError
from redis_programs import redis_program
from reliability_report import record
from slides.slide_makers import stroma, write
from web_client import CONFIG, predict_body, task

REPOSITORY = Path(__file__).resolve().parents[2]
USER = "label-studio"
SECRETS = {
    "LABEL_STUDIO_API_KEY": "planted-api-key-3f1b",
    "BASIC_AUTH_PASS": "planted/basic pass-77aa",
    "WEBHOOK_SECRET": "planted-webhook-secret-19c4",
    "password of REDIS_URL": "planted/redis@pass#word-e2d0",
    "access_token of /setup": "planted-access-token-5b5b",
    "password in params of /predict": "planted-login-password-8d13",
}
SIGNATURE = "planted-signature-c0ffee"  # in a slide's address: the job needs it, nobody else


@contextmanager
def label_studio() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A Label Studio that gives tasks and refuses predictions, repeating what it was sent, the token too. Also a host whose slides fail."""
    asked: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            self.rfile.read(length)
            asked.append((self.command, self.path))
            status, body = 400, {"detail": "No.", "you sent": str(self.headers), "to": self.path}
            if self.command == "GET" and self.path.startswith("/api/tasks/"):
                number = int(self.path.split("/")[3].split("?")[0])
                status, body = 200, {"id": number, "data": self.server.tasks[number], "project": 7}  # type: ignore[attr-defined]
            elif self.command == "GET" and self.path.startswith("/api/projects/7"):
                status, body = 200, {"id": 7, "label_config": CONFIG}
            elif self.command == "GET" and self.path.startswith("/api/predictions"):
                status, body = 200, []
            elif self.path.startswith("/slides/"):
                status = 500
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = do_PATCH = do_DELETE = _answer

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.tasks = TASKS  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


TASKS: dict[int, dict[str, Any]] = {}


def eventually(condition: Callable[[], Any], what: str, timeout_s: float = 150) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"did not happen within {timeout_s} s: {what}")


@contextmanager
def redis_with_password(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    port, password = free_port(), SECRETS["password of REDIS_URL"]
    folder.mkdir()
    with (folder / "redis.log").open("ab") as log:
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
        process = subprocess.Popen(
            [*command, "--requirepass", password], executable=redis_program(), stdout=log, stderr=log
        )
    url = f"redis://:{quote(password, safe='')}@127.0.0.1:{port}/0"

    def answers() -> bool:
        try:
            with Redis.from_url(url) as client:
                return bool(client.ping())
        except RedisError:
            return False

    try:
        eventually(answers, "Redis answers", 30)
        yield url, process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def everything_in(url: str) -> bytes:
    """All keys and values of a Redis; compressed job data is opened."""
    found = []
    with Redis.from_url(url) as redis:
        for key in redis.scan_iter(count=1000):
            kind = redis.type(key)
            value: Any = {
                b"string": lambda key=key: [redis.get(key)],
                b"hash": lambda key=key: [part for pair in redis.hgetall(key).items() for part in pair],
                b"list": lambda key=key: redis.lrange(key, 0, -1),
                b"set": lambda key=key: list(redis.smembers(key)),
                b"zset": lambda key=key: redis.zrange(key, 0, -1),
                b"stream": lambda key=key: [
                    part for _, entry in redis.xrange(key) for pair in entry.items() for part in pair
                ],
            }[kind]()
            for part in [key, *value]:
                found.append(part)
                with suppress(zlib.error):
                    found.append(zlib.decompress(part))
                with suppress(ValueError):
                    found.append(base64.b64decode(part, validate=True))
    return b"\n".join(found)


def disguises(secret: bytes) -> set[bytes]:
    """How a secret may appear."""
    shapes = {
        secret,
        quote(secret).encode(),
        quote(secret, safe="").encode(),
        base64.b64encode(secret).rstrip(b"="),
        base64.urlsafe_b64encode(secret).rstrip(b"="),
        secret.hex().encode(),
    }
    return shapes | {repr(secret)[2:-1].encode(), json.dumps(secret.decode("latin-1"))[1:-1].encode()}


def test_no_secret_is_in_a_log_an_answer_or_redis(tmp_path: Path, stand_in: Path) -> None:
    slides, model_dir = tmp_path / "slides", tmp_path / "state"
    slides.mkdir()
    (model_dir / "cache" / "models").mkdir(parents=True)
    (model_dir / "cache" / "models" / stand_in.name).symlink_to(stand_in)
    good = write(slides / "good.tif", stroma(600, 520))
    (slides / "damaged.svs").write_bytes(b"II*\0" + random.Random("damaged").randbytes(3000))
    said: list[bytes] = []

    with label_studio() as (studio, asked), redis_with_password(tmp_path / "redis") as (redis_url, redis_process):
        port = free_port()
        TASKS.update({
            1: {"slide": str(good), "image": str(good)},
            2: {"slide": str(slides / "damaged.svs"), "image": "x"},
            3: {"slide": f"{studio}/slides/remote.svs?X-Amz-Signature={SIGNATURE}", "image": "x"},
            4: {"slide": str(slides / "absent.svs"), "image": "x"},
            5: {"slide": f"{studio}/data/upload/7/uploaded.svs", "image": "x"},
        })  # fmt: skip
        environment = {
            **os.environ,
            "MODEL_DIR": str(model_dir),
            "SLIDE_ROOTS": str(slides),
            "PORT": str(port),
            "REDIS_URL": redis_url,
            "LABEL_STUDIO_URL": studio,
            "ALLOWED_HOSTS": studio.removeprefix("http://"),
            "LABEL_STUDIO_API_KEY": SECRETS["LABEL_STUDIO_API_KEY"],
            "BASIC_AUTH_USER": USER,
            "BASIC_AUTH_PASS": SECRETS["BASIC_AUTH_PASS"],
            "WEBHOOK_SECRET": SECRETS["WEBHOOK_SECRET"],
            "LOG_LEVEL": "DEBUG",
            "DEVICES": "cpu",
            "PREDICT_WAIT_S": "60",
            "PREDICT_BATCH_BUDGET_S": "1",
            "JOB_RETRIES": "0",
            "PUBLISH_RETRIES": "0",
            "OMP_NUM_THREADS": "1",
        }
        log_file = tmp_path / "backend.log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "backend", "serve", "--with-workers"],
                cwd=REPOSITORY,
                env=environment,
                stdout=log,
                stderr=log,
            )
        client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", auth=(USER, SECRETS["BASIC_AUTH_PASS"]), timeout=120, trust_env=False
        )

        def ask(method: str, path: str, **more: Any) -> httpx.Response:
            answer = client.request(method, path, **more)
            said.append(f"{method} {path} {answer.status_code} {answer.headers}\n".encode() + answer.content)
            return answer

        def up() -> bool:
            assert process.poll() is None, log_file.read_text()[-3000:]
            try:
                return client.get("/health").status_code == 200
            except httpx.HTTPError:
                return False

        try:
            eventually(up, "the backend answers")
            token = {"login": "ls", "password": SECRETS["password in params of /predict"], "context": None}
            ask(
                "POST",
                "/setup",
                json={"project": "7.1", "schema": CONFIG, "access_token": SECRETS["access_token of /setup"]},
            )
            ask("GET", "/health", auth=(USER, "wrong"))
            ask(
                "POST",
                "/webhook",
                json={"action": "ANNOTATION_CREATED", "project": {"id": 7}},
                headers={"X-WSC-Webhook-Secret": "wrong"},
            )
            ask(
                "POST",
                "/webhook",
                json={"action": "ANNOTATION_CREATED", "project": {"id": 7}},
                headers={"X-WSC-Webhook-Secret": SECRETS["WEBHOOK_SECRET"]},
            )
            # Each alone, as when it is opened; then all at once, to be pushed.
            statuses = {
                n: ask("POST", "/predict", json={**predict_body(task(n, **TASKS[n])), "params": token}).status_code
                for n in (2, 3, 4, 5)
            }
            assert all(status >= 400 for status in statuses.values()), statuses
            ask("POST", "/predict", json={**predict_body(*(task(n, **TASKS[n]) for n in TASKS)), "params": token})
            ask("POST", "/predict", json={"tasks": SECRETS["password in params of /predict"]})

            def failed_push() -> bool:
                jobs = client.get("/api/jobs").json()["jobs"]
                return any(job["about"].startswith("push task 1") and job["status"] == "failed" for job in jobs)

            eventually(failed_push, "the push of task 1 is refused")
            assert any(method == "POST" and path.startswith("/api/predictions") for method, path in asked)
            for path in (
                "/api/jobs",
                "/api/overview",
                "/api/projects",
                "/api/map",
                "/metrics",
                "/",
                "/versions",
                "/health",
                "/openapi.json",
                "/panel?slide=x",
            ):
                ask("GET", path)
            said.append(everything_in(redis_url))
            in_redis = said[-1]
            redis_process.kill()
            redis_process.wait()
            for path in ("/api/jobs", "/api/overview", "/metrics", "/health"):
                ask("GET", path)
            assert ask("POST", "/predict", json=predict_body(task(1, **TASKS[1]))).status_code in (200, 503)
            time.sleep(1)  # the workers say so too
        finally:
            client.close()
            process.terminate()
            process.wait(60)

    logs = log_file.read_bytes()
    assert b" DEBUG " in logs
    assert b"damaged.svs" in logs
    assert b"does not answer" in logs, "Redis was missed"
    assert b"analyse" in in_redis
    assert b"damaged.svs" in in_redis
    looked_at = b"\n".join([logs, *said])
    secrets = {name: secret.encode() for name, secret in SECRETS.items()}
    secrets["user name and password"] = f"{USER}:{SECRETS['BASIC_AUTH_PASS']}".encode()
    keys = sorted(path for path in model_dir.rglob("*.key") if path.is_file())
    assert keys, "the key that signs addresses"
    secrets |= {path.name: path.read_bytes() for path in keys}
    found = [name for name, secret in secrets.items() if any(shape in looked_at for shape in disguises(secret))]
    assert found == []
    assert SIGNATURE.encode() not in logs + b"".join(part for part in said if part is not in_redis)
    assert all(path.stat().st_mode & 0o077 == 0 for path in keys), "nobody else on this machine may read them"
    record(
        "secrets",
        "secrets looked for in logs at DEBUG, answers and Redis",
        secrets=len(secrets) + 1,
        bytes_searched=len(looked_at),
        found=0,
    )


def test_the_search_would_find_them() -> None:
    """In each disguise that text takes in logs, JSON, headers and addresses."""
    secret = b"planted/basic pass-77aa"
    for text in (
        b'{"p": "planted/basic pass-77aa"}',
        b"planted/basic%20pass-77aa",
        b"Basic " + base64.b64encode(secret),
        secret.hex().encode(),
    ):
        assert any(shape in text for shape in disguises(secret))
    assert not any(shape in b"nothing of the kind" for shape in disguises(secret))


@pytest.mark.parametrize("name", ["redis_url", "label_studio_api_key", "basic_auth_pass", "webhook_secret"])
def test_printing_the_settings_shows_no_secret(name: str, settings: Any) -> None:
    more = {"basic_auth_user": "me"} if name == "basic_auth_pass" else {}
    made = settings(**{name: "redis://:planted@h/0" if name == "redis_url" else "planted"}, **more)
    assert "planted" not in repr(made) + str(made) + str(made.model_dump()) + made.model_dump_json()
