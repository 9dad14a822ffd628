"""A Redis that cannot keep the queue's promise is told so, and why one does not answer: with a real one of each kind."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from faults.redis_rig import free_port
from redis import Redis
from redis.exceptions import RedisError
from redis_programs import redis_program

from backend.commands.doctor import examine
from backend.errors import QueueUnavailable, RedisUnfit
from backend.jobs.redis_health import unavailable
from backend.jobs.redis_server import connect
from backend.jobs.redis_watch import RedisWatch
from backend.settings import Settings

Make = Callable[..., Settings]
DURABLE = ("--appendonly", "yes")
PASSWORD = "pa/ss@wo#rd+x"


@contextmanager
def running(folder: Path, *options: str, password: str = "", scheme: str = "redis") -> Iterator[str]:
    """A redis-server as an operator runs it; its address."""
    port = next(
        port for port in iter(free_port, 0) if port < 55_000
    )  # a cluster uses the one that is 10 000 higher too
    folder.mkdir(parents=True, exist_ok=True)
    options += ("--requirepass", password) if password else ()
    command = ["redis-server", "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    ports = ["--port", str(port)] if scheme == "redis" else ["--port", "0", "--tls-port", str(port)]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen([*command, *ports, *options], executable=redis_program(), stdout=log, stderr=log)
    user = f":{quote(password, safe='')}@" if password else ""
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.02)
        yield f"{scheme}://{user}127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()


def said_by_doctor(settings: Settings) -> list[tuple[str, str]]:
    return [(f.verdict, f.text) for f in examine(settings, []) if f.subject == "redis"]


def said_at_start(settings: Settings, caplog: pytest.LogCaptureFixture) -> str:
    """What `serve` and `workers` log when they look; raises what ends them."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        watch = RedisWatch(settings)
        try:
            watch.need()
            watch.look()
        finally:
            watch.close()
    return caplog.text


def test_one_that_is_durable_and_evicts_nothing_is_met_with_silence(
    tmp_path: Path, settings: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with running(tmp_path / "redis", *DURABLE) as url:
        made = settings(redis_url=url)
        assert [verdict for verdict, _ in said_by_doctor(made)] == ["ok"]
        assert said_at_start(made, caplog) == ""


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_one_that_evicts_is_warned_of(
    policy: str, tmp_path: Path, settings: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with running(tmp_path / "redis", *DURABLE, "--maxmemory", "50mb", "--maxmemory-policy", policy) as url:
        made = settings(redis_url=url)
        (verdict, text), ok = said_by_doctor(made)
        assert (verdict, ok[0]) == ("warning", "ok") and policy in text and "noeviction" in text
        log = said_at_start(made, caplog)
        assert log.count(policy) == 1, "once, though it was looked at twice"


def test_one_that_keeps_nothing_on_disk_is_warned_of(
    tmp_path: Path, settings: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with running(tmp_path / "redis") as url:
        log = said_at_start(settings(redis_url=url), caplog)
        assert "keeps nothing on disk" in log and "appendonly yes" in log
    with running(tmp_path / "snapshots", "--save", "3600 1") as url:
        assert "only snapshots (3600 1)" in said_at_start(settings(redis_url=url), caplog)


def test_a_managed_one_that_answers_no_config_is_judged_by_info(tmp_path: Path, settings: Make) -> None:
    with running(tmp_path / "redis", "--maxmemory-policy", "allkeys-lfu", "--maxmemory", "50mb") as url:
        with Redis.from_url(url) as redis:
            redis.execute_command("ACL", "SETUSER", "app", "on", ">pw", "~*", "&*", "+@all", "-config")
        made = settings(redis_url=url.replace("//", "//app:pw@"))
        texts = [text for _, text in said_by_doctor(made)]
        assert any("allkeys-lfu" in text for text in texts) and any("append-only" in text for text in texts)


def test_one_that_is_nearly_full_is_warned_of(tmp_path: Path, settings: Make) -> None:
    with running(tmp_path / "redis", *DURABLE, "--maxmemory", "4mb") as url, Redis.from_url(url) as redis:
        try:
            for i in range(1000):
                redis.set(f"filling-{i}", b"x" * 20_000)
        except RedisError:
            redis.delete("filling-0", "filling-1")
        found = dict(said_by_doctor(settings(redis_url=url)))
        assert "MiB are used" in found["warning"]


@pytest.mark.parametrize(
    ("options", "says"), [(("--cluster-enabled", "yes"), "cluster"), (("--replicaof", "127.0.0.1", "1"), "replica")]
)
def test_what_cannot_work_is_refused_at_start(
    options: tuple[str, ...], says: str, tmp_path: Path, settings: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with running(tmp_path / "redis", *DURABLE, *options) as url:
        made = settings(redis_url=url)
        with pytest.raises(RedisUnfit, match=says) as caught:
            said_at_start(made, caplog)
        assert "REDIS_URL" in caught.value.hint
        assert ("problem", says) in [(v, says) for v, text in said_by_doctor(made) if says in text]


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port at which something else listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    answer(client)

        threading.Thread(target=serve, daemon=True).start()
        yield int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)


def as_redis_5(client: socket.socket) -> None:
    client.recv(1000)
    client.sendall(b"-ERR unknown command `HELLO`, with args beginning with: `3`, \r\n")


def as_a_web_server(client: socket.socket) -> None:
    client.recv(1000)
    client.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/html\r\n\r\n<html></html>")


def why(settings: Settings) -> str:
    with pytest.raises(QueueUnavailable) as caught:
        connect(settings)
    return str(caught.value)


def test_each_reason_reads_differently_and_leads_to_its_setting(tmp_path: Path, settings: Make) -> None:
    said: dict[str, str] = {}
    said["nobody"] = why(settings(redis_url=f"redis://127.0.0.1:{free_port()}/0"))
    said["no such name"] = why(settings(redis_url="redis://redis.invalid:6379/0"))
    said["no such socket"] = why(settings(redis_url=f"unix://{tmp_path}/none.sock"))
    with running(tmp_path / "a", password=PASSWORD) as url:
        connect(settings(redis_url=url)).close()
        said["no password"] = why(settings(redis_url=url.replace(quote(PASSWORD, safe=""), "").replace(":@", "")))
        said["wrong password"] = why(settings(redis_url=url.replace(quote(PASSWORD, safe=""), "falsch")))
        said["TLS at a plain port"] = why(settings(redis_url=url.replace("redis:", "rediss:")))
    with running(tmp_path / "b") as url, Redis.from_url(url) as redis:
        redis.execute_command("ACL", "SETUSER", "app", "on", ">pw", "~rq:*", "+@read", "-ping")
        said["not allowed"] = why(settings(redis_url=url.replace("//", "//app:pw@")))
    with running(tmp_path / "c", "--maxmemory", "1") as url, connect(settings(redis_url=url)) as redis:
        with pytest.raises(RedisError) as full:
            redis.set("a", "b")
        said["full"] = str(unavailable(full.value, settings(redis_url=url)))
    with answering(as_redis_5) as port:
        said["old"] = why(settings(redis_url=f"redis://127.0.0.1:{port}/0"))
    with answering(as_a_web_server) as port:
        said["web server"] = why(settings(redis_url=f"redis://127.0.0.1:{port}/0"))
    openssl = shutil.which("openssl")
    if openssl is not None:
        said |= tls_reasons(openssl, tmp_path, settings)
    assert len({text.split(" does not answer: ")[1] for text in said.values()}) == len(said), said
    expected = {
        "nobody": "nothing listens",
        "no such name": "DNS",
        "no such socket": "no such socket",
        "no password": "wants a password",
        "wrong password": "%2F",
        "TLS at a plain port": "write redis://",
        "not allowed": "ACL SETUSER",
        "full": "its memory is full",
        "old": "6.0.6",
        "web server": "no Redis",
        "plain at a TLS port": "rediss://",
        "untrusted": "certificate is not trusted",
    }
    for kind, text in said.items():
        assert expected[kind] in text, (kind, text)
        assert PASSWORD not in text and quote(PASSWORD, safe="") not in text and "falsch" not in text


def tls_reasons(openssl: str, folder: Path, settings: Make) -> dict[str, str]:
    certificate, secret = folder / "redis.crt", folder / "redis.key"
    made = ["-keyout", str(secret), "-out", str(certificate), "-days", "2", "-nodes", "-subj", "/CN=localhost"]
    name = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([openssl, "req", "-x509", "-newkey", "rsa:2048", *made, *name], check=True, capture_output=True)
    files = ["--tls-cert-file", str(certificate), "--tls-key-file", str(secret)]
    options = ["--tls-auth-clients", "no", "--tls-ca-cert-file", str(certificate), *files]
    with running(folder / "tls", *options, scheme="rediss") as url:
        if "FATAL CONFIG" in (folder / "tls" / "log").read_text():
            return {}
        return {
            "untrusted": why(settings(redis_url=url)),
            "plain at a TLS port": why(settings(redis_url=url.replace("rediss:", "redis:"))),
        }


def test_with_a_wrong_password_serve_says_so_at_start_and_in_health(tmp_path: Path, stand_in: Path) -> None:
    (tmp_path / "state" / "cache" / "models").mkdir(parents=True)
    (tmp_path / "state" / "cache" / "models" / stand_in.name).symlink_to(stand_in)
    port = free_port()
    with running(tmp_path / "redis", *DURABLE, "--requirepass", PASSWORD) as url:
        wrong = url.replace("//", "//:falsch@")
        environment = {**os.environ, "MODEL_DIR": str(tmp_path / "state"), "REDIS_URL": wrong, "PORT": str(port)}
        log = (tmp_path / "log").open("wb")
        process = subprocess.Popen([sys.executable, "-m", "backend", "serve"], env=environment, stdout=log, stderr=log)
        try:
            health = answered(f"http://127.0.0.1:{port}/health", process)
            said = (tmp_path / "log").read_text()
            assert "refuses the user or password" in said and "percent-encoded" in said
            assert health["status"] == "degraded" and health["model_version"], "Label Studio goes on asking"
            assert "refuses the user or password" in health["problem"]["message"]
            with Redis.from_url(url.replace("//", f"//:{quote(PASSWORD, safe='')}@")) as redis:
                redis.config_set("requirepass", "falsch")
            deadline = time.monotonic() + 60
            while (now := answered(f"http://127.0.0.1:{port}/health", process))["status"] != "UP":
                assert time.monotonic() < deadline, now
                time.sleep(0.2)
            assert "problem" not in now, "noticed by itself"
        finally:
            process.terminate()
            process.wait(60)
            log.close()
    assert "falsch" not in (tmp_path / "log").read_text()


def answered(address: str, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None
        with suppress(httpx.HTTPError):
            answer = httpx.get(address, timeout=10, trust_env=False)
            assert answer.status_code == 200
            return dict(answer.json())
        time.sleep(0.1)
    raise AssertionError("it did not answer")
