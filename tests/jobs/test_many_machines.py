"""Three machines: one asks, two compute. They share a Redis over the network (password, TLS) and a store, and nothing else.

A machine is a group of processes with a MODEL_DIR of its own; all of them run here, on loopback.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from job_helpers import bag, eventually, key, ledger, workers
from redis import Redis
from redis_programs import redis_program
from reliability_report import record
from s3 import S3

from backend.errors import QueueUnavailable
from backend.jobs.queue import BagQueue
from backend.jobs.redis_server import connect
from backend.results.store import ResultStore
from backend.settings import Settings

PASSWORD = "geheim-und-lang"
SLIDES = [f"slide-{i}" for i in range(9)]


@contextmanager
def redis_server(folder: Path, *options: str) -> Iterator[str]:
    """The program of a Redis with a password, running with ``options``."""
    program = redis_program()
    folder.mkdir()
    command = [
        "redis-server",
        "--requirepass",
        PASSWORD,
        "--dir",
        str(folder),
        "--save",
        "",
        "--bind",
        "127.0.0.1",
        *options,
    ]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(command, executable=program, stdout=log, stderr=log) as process,
    ):
        try:
            yield program
        finally:
            process.terminate()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def machine(folder: Path, name: str, redis_url: str, store: str = "") -> Settings:
    """The settings of one machine: scratch of its own, the store that all share."""
    (folder / name).mkdir()
    return Settings(
        model_dir=folder / name,
        results_url=store or f"file://{folder / 'store'}",
        redis_url=redis_url,
        heartbeat_ttl_s=5,
        job_retries=2,
        devices="cpu",
    )


@pytest.fixture
def password_url(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    with redis_server(tmp_path / "redis", "--port", str(port)):
        url = f"redis://:{PASSWORD}@127.0.0.1:{port}/0"
        eventually(lambda: _answers(url), "Redis answers")
        yield url


def _answers(url: str, **options: object) -> bool:
    from redis.exceptions import ConnectionError

    try:
        with Redis.from_url(url, **options) as redis:  # type: ignore[arg-type]
            return bool(redis.ping())
    except ConnectionError:
        return False


JOINS_WITHIN_S = 5
"""From a worker's being ready to its first job of a batch that others are at."""


@pytest.mark.parametrize("store", ["a shared folder", "S3"])
def test_a_machine_that_joins_takes_work_and_one_that_leaves_loses_nothing(
    tmp_path: Path, password_url: str, store: str, s3: S3
) -> None:
    shared = f"{s3.bucket()}/results" if store == "S3" else ""
    asking, first, second = (machine(tmp_path, name, password_url, shared) for name in ("asking", "first", "second"))
    with connect(asking) as redis, workers(first):
        queue = BagQueue(asking, redis)
        queue.submit_many([(bag(name, tile_s=0.08), None) for name in SLIDES], "batch")
        eventually(lambda: ledger(first, "analysed"), "the first machine has begun")
        with workers(second) as [leaving]:
            log = second.model_dir / "worker.log"
            eventually(lambda: ": ready, queues" in log.read_text(), "the second machine is ready")
            ready = time.monotonic()
            eventually(lambda: ledger(second, "analysed"), "it takes work too")
            joined_s = time.monotonic() - ready
            assert joined_s < JOINS_WITHIN_S, "it does not wait for the batch to end"
            eventually(lambda: len(ledger(second, "analysed")) > 1, "and more of it")
            leaving.kill()
        states = eventually(
            lambda: (s := queue.states([key(n) for n in SLIDES])) and all(x.settled for x in s.values()) and s,
            "the end",
        )
    assert {state.status for state in states.values()} == {"finished"}
    results = ResultStore(asking.results_location)
    read = [results.get(key(name)) for name in SLIDES]
    assert all(result is not None for result in read), "whoever computed it, everybody reads it"
    done = [line.split()[0] for settings in (first, second) for line in ledger(settings, "analysed")]
    assert set(done) == set(SLIDES)
    again = len(done) - len(SLIDES)
    assert again <= 1, "only what the machine that left was at is computed again"
    row = f"a machine joins a batch, and is killed; results in {store}"
    record("machines", row, slides=len(SLIDES), lost=0, computed_again=again, takes_work_after_s=round(joined_s, 1))


def test_a_wrong_password_is_said_and_the_right_one_is_not(tmp_path: Path, password_url: str) -> None:
    wrong = machine(tmp_path, "wrong", password_url.replace(PASSWORD, "falsch"))
    with pytest.raises(QueueUnavailable) as caught:
        BagQueue(wrong, connect(wrong)).ping()
    assert PASSWORD not in str(caught.value) and "falsch" not in str(caught.value)


def test_redis_over_tls(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the certificate of a Redis with TLS is made by openssl, which is not here: install it")
    certificate, secret = tmp_path / "redis.crt", tmp_path / "redis.key"
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    made = ["-keyout", str(secret), "-out", str(certificate), "-days", "2", "-nodes"]
    subprocess.run([openssl, "req", "-x509", "-newkey", "rsa:2048", *made, *name], check=True, capture_output=True)
    port = free_port()
    tls = ["--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no", "--tls-ca-cert-file", str(certificate)]
    files = ["--tls-cert-file", str(certificate), "--tls-key-file", str(secret)]
    with redis_server(tmp_path / "redis", *tls, *files) as program:
        url = f"rediss://:{PASSWORD}@127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
        time.sleep(0.5)
        if "FATAL CONFIG" in (tmp_path / "redis" / "log").read_text():
            pytest.skip(f"{Path(program).name} was built without TLS: install Debian's redis-tools")
        eventually(lambda: _answers(url), "Redis answers")
        asking, computing = (machine(tmp_path, name, url) for name in ("asking", "computing"))
        with connect(asking) as redis, workers(computing):
            queue = BagQueue(asking, redis)
            queue.submit(bag("a"), priority="batch")
            eventually(lambda: (s := queue.state(key("a"))) and s.status == "finished", "the bag is computed")
        stranger = machine(tmp_path, "stranger", url.split("?")[0])
        with pytest.raises(QueueUnavailable):
            BagQueue(stranger, connect(stranger)).ping()  # it does not trust this certificate, and says nothing
    assert ResultStore(asking.results_location).has(key("a"))
    record("machines", "Redis with password and TLS", slides=1, lost=0)
