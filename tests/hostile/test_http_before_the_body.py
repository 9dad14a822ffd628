"""Who asks is known from the headers: nothing of a stranger's body is read, let alone parsed."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from web_client import CONFIG, served

from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.events import WEBHOOK_SECRET_HEADER
from backend.label_studio.services import Services
from backend.web import json_body

AUTH = ("ls", "right")
LISTS = b'{"tasks": [], "action": "ANNOTATION_CREATED", "x": [' + b"[]," * 250_000 + b"[]]}"
JSON = {"Content-Type": "application/json"}
Both = tuple[httpx.Client, Services]


@pytest.fixture
def guarded(tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path) -> Iterator[Both]:
    options = {"basic_auth_user": AUTH[0], "basic_auth_pass": AUTH[1], "webhook_secret": "hush"}
    with served(tmp_path, embedded_redis, stand_in, **options) as both:
        yield both


@pytest.fixture
def unguarded(tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path) -> Iterator[Both]:
    with served(tmp_path, embedded_redis, stand_in, webhook_secret="hush") as both:
        yield both


def status_without_a_body(client: httpx.Client, path: str, length: int, **headers: str) -> int:
    """The status that headers alone are answered with; the body that they announce is never sent."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    with socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=30) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        return int(connection.recv(65_536).split()[1])


@pytest.mark.parametrize("path", ["/setup", "/predict", "/webhook"])
def test_a_stranger_is_refused_before_a_body_arrives(guarded: Both, path: str) -> None:
    assert status_without_a_body(guarded[0], path, 900_000) == 401
    assert status_without_a_body(guarded[0], path, 900_000, Authorization="Basic d3Jvbmc6d3Jvbmc=") == 401


def test_an_event_without_the_secret_that_is_too_long_to_start_a_training_is_refused_unread(unguarded: Both) -> None:
    client, _ = unguarded
    assert status_without_a_body(client, "/webhook", 1_000_001) == 401
    long = {"action": "START_TRAINING", "project": {"id": 7}, "annotation": "x" * 1_000_000}
    answer = client.post("/webhook", json=long)
    assert answer.status_code == 401 and WEBHOOK_SECRET_HEADER in answer.json()["detail"]
    chunks = (b" " * 10 for _ in range(10))  # of a length that nobody has said
    assert client.post("/webhook", content=chunks, headers=JSON).status_code == 401
    assert client.post("/webhook", json={**long, "annotation": None}).json()["training"] == "queued"


def test_nothing_of_a_strangers_body_is_parsed(guarded: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = guarded
    monkeypatch.setattr(json_body, "parse", lambda *_: pytest.fail("it was parsed"))
    for path in ("/setup", "/predict", "/webhook"):
        for content in (LISTS, b"no JSON", b""):
            answer = client.post(path, content=content, headers=JSON)
            assert answer.status_code == 401, answer.text
            assert answer.headers["www-authenticate"] == "Basic"
    assert client.get("/health", auth=AUTH).status_code == 200


def test_a_labelling_config_has_its_own_limit(guarded: Both) -> None:
    client, _ = guarded
    assert client.post("/setup", json={"schema": CONFIG}, auth=AUTH).status_code == 200
    many = "".join(f'<Label value="label {number}"/>' for number in range(5000))
    large = CONFIG.replace('<Label value="Attention"/>', f'<Label value="Attention"/>{many}')
    assert client.post("/setup", json={"schema": large}, auth=AUTH).status_code == 200
    assert client.post("/setup", json={"schema": CONFIG, "x": "x" * 1_000_000}, auth=AUTH).status_code == 413


def test_a_client_that_leaves_before_its_body_is_whole_is_no_defect(
    unguarded: Both, caplog: pytest.LogCaptureFixture
) -> None:
    client, _ = unguarded

    def defects() -> list[str]:
        """Of this process since it began: other tests are in it too."""
        return [line for line in client.get("/metrics").text.splitlines() if 'route="/predict",status="500"' in line]

    before = defects()
    with socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=30) as connection:
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        )
    for _ in range(20):
        assert client.get("/health").status_code == 200
    assert defects() == before
    assert not [record for record in caplog.records if record.exc_info]


# --- what the browser is given --------------------------------------------------------------------------------------


def test_no_page_of_ours_loads_a_strangers_script(unguarded: Both) -> None:
    client, _ = unguarded
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
        assert client.get(path).status_code == 404
    assert 'href="/openapi.json"' in client.get("/").text and "/docs" not in client.get("/").text


def test_the_description_is_for_those_who_may_ask(guarded: Both) -> None:
    client, _ = guarded
    assert client.get("/openapi.json").status_code == 401
    assert "/predict" in client.get("/openapi.json", auth=AUTH).json()["paths"]


def test_every_answer_says_that_its_type_is_what_it_says(guarded: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    client, services = guarded
    answers = {
        200: client.get("/health", auth=AUTH),
        401: client.get("/health"),
        403: client.get("/panel", params={"slide": "x.y"}),
        404: client.get("/nowhere"),
        405: client.get("/predict"),
        413: client.post("/setup", content=b" " * 1_000_001),
        400: client.post("/setup", content=b"{", headers=JSON, auth=AUTH),
    }
    assert client.get("/", auth=AUTH).headers.get_list("x-content-type-options") == ["nosniff"]
    monkeypatch.setitem(services.__dict__, "versions", None)
    answers[500] = client.get("/versions", auth=AUTH)
    assert {status: answer.status_code for status, answer in answers.items()} == {status: status for status in answers}
    for status, answer in answers.items():
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"], status
    assert json.loads(answers[500].text)["error"]["code"] == "defect"
