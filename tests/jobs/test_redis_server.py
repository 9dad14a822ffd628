"""The embedded Redis: private, persistent, shared, and back again after every kind of accident."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from job_helpers import eventually
from redis import Redis

from backend.errors import QueueUnavailable, SettingsError
from backend.jobs.redis_server import EmbeddedRedis, connect, socket_path
from backend.settings import Settings, load_settings

SECOND_PROCESS = """
import sys
from pathlib import Path
from redis import Redis
from backend.jobs.redis_server import EmbeddedRedis
server = EmbeddedRedis(Path(sys.argv[1]))
with Redis.from_url(server.url) as redis:
    print(server.owner, redis.info("server")["process_id"], flush=True)
    redis.set("from", "second")
if sys.argv[2] == "hang":
    sys.stdin.read()
"""


def client(server: EmbeddedRedis) -> Redis:
    return Redis.from_url(server.url, socket_timeout=5)


def server_pid(server: EmbeddedRedis) -> int:
    with client(server) as redis:
        return int(redis.info("server")["process_id"])


def second_process(model_dir: Path, then: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SECOND_PROCESS, str(model_dir), then],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_what_is_queued_survives_a_restart(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server, client(server) as redis:
        redis.rpush("list", "a", "b")
    with EmbeddedRedis(tmp_path) as server, client(server) as redis:
        assert redis.lrange("list", 0, -1) == [b"a", b"b"]


def test_it_listens_on_no_port_and_nobody_else_can_reach_its_folder(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server, client(server) as redis:
        assert redis.config_get("port")["port"] == "0"
        assert redis.config_get("appendfsync")["appendfsync"] == "everysec"
        assert server.url.startswith("unix:///")
        assert stat.S_IMODE((tmp_path / "redis").stat().st_mode) == 0o700
        assert stat.S_IMODE(socket_path(tmp_path).parent.stat().st_mode) == 0o700


def test_a_second_process_shares_the_running_server_and_leaves_it_running(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        output, _ = second_process(tmp_path, "end").communicate()
        assert output.split() == ["False", str(server_pid(server))]
        with client(server) as redis:
            assert redis.get("from") == b"second"


def test_a_server_whose_owner_was_killed_is_taken_over_and_stopped_by_the_next(tmp_path: Path) -> None:
    owner = second_process(tmp_path, "hang")
    assert owner.stdout is not None and owner.stdin is not None
    said, pid = owner.stdout.readline().split()
    assert said == "True"
    owner.kill()
    owner.communicate()
    with EmbeddedRedis(tmp_path) as server:
        assert server.owner
        assert server_pid(server) == int(pid)
    with pytest.raises(QueueUnavailable):
        connect(Settings(model_dir=tmp_path))


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        pid = server_pid(server)
    path = socket_path(tmp_path)
    path.touch()
    with EmbeddedRedis(tmp_path) as server:
        assert server_pid(server) != pid


def test_a_tail_cut_short_costs_the_tail_only(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server, client(server) as redis:
        redis.set("first", "kept")
        redis.set("last", "x" * 100)
    file = tmp_path / "redis" / "appendonly.aof"
    os.truncate(file, file.stat().st_size - 20)
    with EmbeddedRedis(tmp_path) as server, client(server) as redis:
        assert redis.get("first") == b"kept"
        assert redis.get("last") is None


def test_a_damaged_file_is_named_and_what_to_do(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server, client(server) as redis:
        redis.set("first", "kept")
    file = tmp_path / "redis" / "appendonly.aof"
    file.write_bytes(b"this is no append-only file\r\n" + file.read_bytes())
    with pytest.raises(QueueUnavailable, match=r"Bad file format.*move .*appendonly\.aof away"):
        EmbeddedRedis(tmp_path)
    file.unlink()
    with EmbeddedRedis(tmp_path) as server:
        assert server.owner


def test_a_server_that_is_killed_comes_back_with_its_data(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        with client(server) as redis:
            redis.config_set("appendfsync", "always")
            redis.set("queued", "slide")
        os.kill(server_pid(server), signal.SIGKILL)

        def answer() -> bytes | None:
            try:
                return connect(Settings(model_dir=tmp_path)).get("queued")  # type: ignore[return-value]
            except QueueUnavailable:
                return None

        assert eventually(answer, "the server is started again") == b"slide"


def test_a_model_dir_too_long_for_a_socket_works(tmp_path: Path) -> None:
    model_dir = tmp_path / ("long-" * 30)
    with EmbeddedRedis(model_dir) as server, client(server) as redis:
        redis.set("a", "1")
        assert connect(Settings(model_dir=model_dir)).get("a") == b"1"
        assert (model_dir / "redis" / "appendonly.aof").exists()
    socket_path(model_dir).parent.rmdir()


def test_without_any_redis_the_error_says_what_to_start(tmp_path: Path) -> None:
    with pytest.raises(QueueUnavailable) as caught:
        connect(Settings(model_dir=tmp_path))
    assert str(tmp_path) in caught.value.message
    assert "wsc-backend serve" in caught.value.hint and "REDIS_URL" in caught.value.hint
    assert caught.value.http_status == 503


def test_a_redis_that_is_down_is_named_without_its_password(tmp_path: Path) -> None:
    settings = Settings(model_dir=tmp_path, redis_url="redis://user:geheim@127.0.0.1:1/0")
    with pytest.raises(QueueUnavailable) as caught:
        connect(settings)
    assert "redis://…@127.0.0.1:1/0" in caught.value.message
    assert "geheim" not in str(caught.value)
    assert "geheim" not in repr(caught.value)


def test_an_address_that_is_no_redis_url_is_a_bad_setting(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="REDIS_URL") as caught:
        connect(load_settings(model_dir=tmp_path, redis_url="http://me:geheim@localhost"))
    assert "geheim" not in str(caught.value)


def test_more_threads_than_the_client_likes_may_ask_at_once(tmp_path: Path) -> None:
    settings = Settings(model_dir=tmp_path)
    with EmbeddedRedis(tmp_path), connect(settings) as redis, ThreadPoolExecutor(200) as threads:
        answers = list(threads.map(lambda _: redis.blpop(["nothing"], timeout=2), range(200)))
    assert answers == [None] * 200, "each had a connection of its own for two seconds"
