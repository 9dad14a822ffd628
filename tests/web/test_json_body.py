"""A body is parsed as Python parses JSON, in pieces between which others have their turn."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from web_client import predict_body, served, task

from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.services import Services
from backend.web import json_body
from backend.web.body_limit import BodyTooLarge
from backend.web.json_body import parse_in_pieces

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)
FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
OBJECTS = st.dictionaries(st.text(), VALUES | st.lists(VALUES))


@pytest.fixture(params=[None, 7], ids=["pieces as they are", "pieces of a few characters"])
def pieces(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            patch.setattr(json_body, "_PIECES", (request.param, 60, 10**9))
        yield


def test_an_object_is_read_as_python_reads_it(pieces: None) -> None:
    @FEW
    @given(OBJECTS, st.sampled_from([None, 1]), st.booleans())
    def read(value: dict[str, Any], indent: int | None, ascii_only: bool) -> None:
        text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
        assert parse_in_pieces(f" \n{text}\t ") == value

    read()


@pytest.mark.parametrize("number", [1e5, 12345678901, 1.5e-7, 1e16, -1e-300, 123456.75, -0.0])
def test_a_number_is_read_whole_wherever_a_piece_ends(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for length in range(1, 30):
        monkeypatch.setattr(json_body, "_PIECES", (length, 10**9))
        assert repr(parse_in_pieces(f'{{"a": {number!r}, "b": [{number!r}]}}')) == repr({"a": number, "b": [number]})


def test_what_python_refuses_is_refused_at_the_same_place(pieces: None) -> None:
    @FEW
    @given(OBJECTS, st.data())
    def refuse(value: dict[str, Any], data: st.DataObject) -> None:
        text = json.dumps(value)
        at = data.draw(st.integers(1, len(text)))
        text = text[:at] + data.draw(st.sampled_from(["", "]", "}", ",", ":", '"', "x", "[", "0 0"])) + text[at + 1 :]
        try:
            wanted: object = json.loads(text)
        except json.JSONDecodeError as error:
            with pytest.raises(json.JSONDecodeError) as refused:
                parse_in_pieces(text)
            # A newer Python points at the comma before what is missing.
            assert abs(refused.value.pos - error.pos) <= 2
        else:
            assert parse_in_pieces(text) == wanted

    refuse()


@pytest.mark.parametrize("text", ["", " ", "[1]", "7", '"x"', "null", "[" * 100_000])
def test_what_is_no_object_is_none(text: str) -> None:
    assert parse_in_pieces(text) is None


def test_a_part_that_would_take_long_at_a_stretch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_body, "_PIECES", (10, 100))
    for text in ('{"x": {"y": "%s"}}', '{"x": [1, {"y": "%s"}]}', '{"x": [["%s"]], "y": 1}'):
        assert parse_in_pieces(text % ("a" * 50))
        with pytest.raises(BodyTooLarge):
            parse_in_pieces(text % ("a" * 500))


def test_others_have_their_turn_while_a_large_body_is_parsed() -> None:
    """Python's own parser lets nobody else run before it is done: of the turns counted here there would be one or two."""
    text = json.dumps(
        {"tasks": [{"id": n, "data": {"slide": f"/slides/{n}.svs"}, "annotations": []} for n in range(150_000)]}
    )
    turns, ended = 0, threading.Event()

    def read() -> int:
        try:
            return len(parse_in_pieces(text)["tasks"])
        finally:
            ended.set()

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(read)
        while not ended.wait(0.001):
            turns += 1
        assert found.result() == 150_000
    assert turns > 10


# --- over HTTP ------------------------------------------------------------------------------------------------------


@pytest.fixture
def backend(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path
) -> Iterator[tuple[httpx.Client, Services]]:
    with served(tmp_path, embedded_redis, stand_in) as both:
        yield both


def test_health_is_answered_while_a_large_body_is_parsed(
    backend: tuple[httpx.Client, Services], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = backend
    began, answered, really = threading.Event(), threading.Event(), json_body.parse

    def slow(body: bytes, model: Any) -> Any:
        began.set()
        assert answered.wait(60), "nobody else was answered meanwhile"
        return really(body, model)

    monkeypatch.setattr(json_body, "parse", slow)
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(client.post, "/predict", json={**predict_body(), "more": "x" * 200_000})
        assert began.wait(60)
        assert client.get("/health").json()["status"] == "UP"
        answered.set()
        assert large.result().status_code == 200


def test_a_body_of_twelve_megabytes_of_tasks_is_answered_for_each(backend: tuple[httpx.Client, Services]) -> None:
    """As Label Studio sends ten thousand tasks to `Retrieve predictions`."""
    client, _ = backend
    tasks = [
        {**task(n, slide=f"{n}.tif", image="x"), "meta": {"note": "µ" * 400}, "created_at": "x" * 300}
        for n in range(10_000)
    ]
    body = json.dumps(predict_body(*tasks), ensure_ascii=False).encode()
    assert len(body) > 12_000_000
    answer = client.post("/predict", content=body, headers={"Content-Type": "application/json"})
    assert answer.json()["results"] == [[]] * 10_000


@pytest.mark.parametrize("part", [b"[],", b"{},", b'{"a":[]},'])
def test_a_body_of_nothing_but_brackets_is_refused_before_it_is_parsed(
    backend: tuple[httpx.Client, Services], part: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = backend
    monkeypatch.setattr(json_body, "parse", lambda *_: pytest.fail("it was parsed"))
    body = b'{"tasks": [' + part * (60_000_000 // len(part)) + b"{}]}"
    answer = client.post("/predict", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_of_a_million_wrong_tasks_the_first_is_named(backend: tuple[httpx.Client, Services]) -> None:
    client, _ = backend
    answer = client.post(
        "/predict", content=b'{"tasks": [{},' + b"1," * 1_000_000 + b"1]}", headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert "tasks.1:" in answer.json()["detail"] and len(answer.text) < 1000


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_form_of_any_site_could_send_is_no_body(backend: tuple[httpx.Client, Services], kind: str) -> None:
    client, _ = backend
    body = json.dumps(predict_body()).encode()
    answer = client.post("/predict", content=body, headers={"Content-Type": kind})
    assert answer.status_code == 400 and "Content-Type" in answer.json()["detail"]
    sound = client.post("/predict", content=body, headers={"Content-Type": "application/json; charset=utf-8"})
    assert sound.status_code == 200


def test_the_description_says_what_a_body_is(backend: tuple[httpx.Client, Services]) -> None:
    client, _ = backend
    paths = client.get("/openapi.json").json()["paths"]
    for path, needed in (("/predict", ["tasks"]), ("/webhook", ["action"]), ("/setup", [])):
        body = paths[path]["post"]["requestBody"]
        assert body["required"] and body["content"]["application/json"]["schema"].get("required", []) == needed
