"""A page on the web whose name leads to this machine gets nothing: without a password it is the name that is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from web_client import served

from backend.jobs.queue import BagRequest
from backend.jobs.redis_server import EmbeddedRedis
from backend.results.bag import digest
from backend.settings import Settings
from backend.slides.source import SlideRef
from backend.web.hosts import KnownNames

OURS = (
    "localhost", "localhost:9090", "LOCALHOST.", "app.localhost:1", "127.0.0.1:9090", "[::1]:9090", "10.1.2.3", "ml-backend:9090", "ml_backend", "ml.internal:9090",
    "nas.local", "pc.lan", "box.home.arpa:80", "host.docker.internal", "slides.example:9090", "Slides.Example", "gpu.hospital.example",
)  # fmt: skip
THEIRS = (
    "evil.example", "evil.example:9090", "localhost.evil.example", "127.0.0.1.evil.example", "evil-slides.example", "slides.example.evil.example", "internal.example",
    "notlocal.example", "evillocal.com", "", ":9090", "a b", "localhost/evil.example", "user@localhost", "localhost:port", "[::1", "evil.example.:80", "[evil.example]",
)  # fmt: skip


@pytest.fixture
def names() -> KnownNames:
    return KnownNames(Settings(public_url="https://slides.example:9090/x", host="gpu.hospital.example"))


@pytest.mark.parametrize("name", OURS)
def test_a_name_that_no_stranger_can_have_is_known(names: KnownNames, name: str) -> None:
    assert name in names


@pytest.mark.parametrize("name", THEIRS)
def test_any_other_name_is_not(names: KnownNames, name: str) -> None:
    assert name not in names


def test_without_a_password_a_strangers_name_is_answered_421_and_what_to_set(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path
) -> None:
    with served(tmp_path, embedded_redis, stand_in, public_url="https://slides.example") as (client, services):
        for path in ("/", "/health", "/api/overview", "/openapi.json", "/metrics", "/nowhere", "/panel?slide=x"):
            answer = client.get(path, headers={"Host": "evil.example:9090"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (421, "host_unknown")
            assert "BASIC_AUTH_USER" in answer.json()["detail"] and "PUBLIC_URL" in answer.json()["detail"]
            assert services.model.model_version not in answer.text
            assert answer.headers["x-content-type-options"] == "nosniff"
        event = {"action": "START_TRAINING", "project": {"id": 7}}
        assert client.post("/webhook", json=event, headers={"Host": "evil.example"}).status_code == 421
        assert services.queue.jobs() == []
        for name in ("localhost", "ml.internal:9090", "slides.example", "ml-backend:9090"):
            assert client.get("/health", headers={"Host": name}).status_code == 200


def test_with_a_password_every_name_does(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path
) -> None:
    with served(tmp_path, embedded_redis, stand_in, basic_auth_user="ls", basic_auth_pass="right") as (client, _):
        assert client.get("/health", headers={"Host": "slides.example"}, auth=("ls", "right")).status_code == 200
        assert client.get("/health", headers={"Host": "slides.example"}).status_code == 401


def test_a_page_under_a_strangers_name_cannot_ask_for_a_retry(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path
) -> None:
    """Also where a password is asked for, which a browser may have been told for that name."""
    options = {"basic_auth_user": "ls", "basic_auth_pass": "right", "public_url": "https://slides.example"}
    with served(tmp_path, embedded_redis, stand_in, **options) as (client, services):
        request = BagRequest(digest({"slide": "a"}), SlideRef("file", ("/slides/a.svs",), "a").to_json())
        services.queue.submit(request, priority="batch")

        def retry(origin: str, host: str) -> int:
            headers = {"Origin": origin, "Host": host}
            return client.post(f"/api/jobs/{request.key}/retry", headers=headers, auth=("ls", "right")).status_code

        assert retry("http://evil.example:9090", "evil.example:9090") == 403
        assert retry("http://10.0.0.9", "localhost:9090") == 403, "another server on the network"
        assert retry("null", "localhost:9090") == 403
        assert retry("https://slides.example", "backend:9090") == 200, "behind a proxy"
        assert retry("http://localhost:9090", "localhost:9090") == 200


def test_no_answer_is_made_of_the_name_that_was_asked(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path
) -> None:
    with served(tmp_path, embedded_redis, stand_in) as (client, _):
        for path in ("/health/", "/metrics/", "/panel/", "/api/overview/"):
            answer = client.get(path, headers={"Host": "10.9.8.7"})
            assert answer.status_code == 404
            assert "location" not in answer.headers and "10.9.8.7" not in answer.text
