"""Bodies, headers and credentials that nobody should send, over real HTTP: typed refusals, never a server error, and the server goes on."""

from __future__ import annotations

import base64
import contextlib
import copy
import hmac
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from reliability_report import record
from web_client import CONFIG, predict_body, served, store_result, task

from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.services import Services
from backend.slides.synthetic import SyntheticSlide

Both = tuple[httpx.Client, Services]
LIMIT = 1_000_000
ODD: list[Any] = [
    None, True, False, 0, -1, 2**31, 2**63, 10**400, -0.0, 1e308, 1e-320, "", "x", "1", "²", "\ud800", "\0", "a" * 20_000, "../../etc/passwd", "<View/>",
    "{{7*7}}", "'; drop table task; --", [], [None], [[]], [{}], {}, {"": None}, {"a": {"a": {"a": []}}},
]  # fmt: skip


@pytest.fixture(scope="module")
def backend(
    tmp_path_factory: pytest.TempPathFactory, stand_in: Path, synthetic_slide: SyntheticSlide
) -> Iterator[Both]:
    folder = tmp_path_factory.mktemp("http-bodies")
    options = {"predict_wait_s": 0, "predict_batch_budget_s": 0.5, "max_body_bytes": LIMIT}
    with EmbeddedRedis(folder / "redis-home") as redis, served(folder, redis, stand_in, **options) as both:
        (root,) = both[1].settings.slide_roots
        shutil.copy(synthetic_slide.path, root / "slide.tif")
        Image.new("RGB", (600, 400), "white").save(root / "picture.png")
        store_result(both[1], root / "slide.tif")
        yield both


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places in a JSON value, itself first."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield from paths(inner, (*at, name))


def replaced(body: Any, at: tuple[Any, ...], value: Any) -> Any:
    if not at:
        return value
    changed = copy.deepcopy(body)
    target = changed
    for name in at[:-1]:
        target = target[name]
    target[at[-1]] = value
    return changed


def bodies(services: Services) -> dict[str, tuple[str, dict[str, Any]]]:
    """A sound body of each kind, with everything in it that Label Studio may send: name → (path, body)."""
    (root,) = services.settings.slide_roots
    one = task(1, slide=str(root / "slide.tif"), image=str(root / "picture.png"), mpp=0.5)
    two = task(2, slide=[str(root / "picture.png")], image=str(root / "picture.png"))
    box = {"type": "rectanglelabels", "original_width": 600, "original_height": 400, "value": {"x": 20.0, "y": 20.0, "width": 40.0, "height": 40.0, "rotation": 0}}  # fmt: skip
    annotation = {"id": 1, "task": 1, "completed_by": 1, "result": [box], "was_cancelled": False}
    return {
        "/predict, one task": ("/predict", predict_body(one)),
        "/predict, two tasks": ("/predict", predict_body(one, two)),
        "/predict, a smart tool": ("/predict", predict_body(one, context={"result": [box]})),
        "/setup": ("/setup", {"project": "7.1", "schema": CONFIG, "hostname": "http://ls", "access_token": "x", "extra_params": None}),
        "/webhook, an annotation": ("/webhook", {"action": "ANNOTATION_CREATED", "project": {"id": 7, "label_config": CONFIG}, "task": one, "annotation": annotation}),
        "/webhook, a project": ("/webhook", {"action": "PROJECT_UPDATED", "project": {"id": 7, "label_config": CONFIG}}),
    }  # fmt: skip


def test_an_odd_value_in_any_place_is_never_a_server_error(backend: Both) -> None:
    client, services = backend
    secret = {"X-WSC-Webhook-Secret": services.webhook_secret}
    for name, (path, body) in bodies(services).items():
        sound = client.post(path, json=body, headers=secret)
        assert sound.status_code == 200, sound.text
        wrong, refused, tried = [], 0, 0
        for at in paths(body):
            for value in ODD:
                text = json.dumps(replaced(body, at, value))
                answer = client.post(path, content=text, headers={"Content-Type": "application/json", **secret})
                tried += 1
                if answer.status_code >= 500:
                    wrong.append(f"{answer.status_code} for {value!r:.60} at {at}: {answer.text[:200]}")
                elif answer.status_code >= 400:
                    refused += 1
                    told = answer.json()
                    assert told["detail"] and told["error"]["code"], (at, value, told)
                services.queue.release_claim(7, 1, services.model.model_version)
        assert not wrong, "\n".join(wrong[:8])
        assert refused > 0
        record("http", f"{name}: each place replaced by {len(ODD)} odd values", examples=tried, answered_2xx_3xx=tried - refused, refused_4xx=refused, server_errors_5xx=0)  # fmt: skip
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "at"),
    [
        ("/predict", {"tasks": []}, "tasks"),
        ("/predict", {"tasks": [{}]}, "label_config"),
        ("/predict", {"tasks": [{}]}, "params"),
        ("/predict", {"tasks": [{}]}, "project"),
        ("/setup", {}, "project"),
        ("/setup", {}, "schema"),
        ("/setup", {}, "hostname"),
        ("/setup", {}, "access_token"),
        ("/webhook", {"action": "x"}, "action"),
        ("/webhook", {"action": "x"}, "project"),
    ],
)
def test_a_field_of_the_wrong_type_is_400_and_named(backend: Both, path: str, body: dict[str, Any], at: str) -> None:
    client, services = backend
    for value in ([3.5], {"x": []} if at not in ("params", "project") or path == "/setup" else 3.5):
        answer = client.post(path, json={**body, at: value}, headers={"X-WSC-Webhook-Secret": services.webhook_secret})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["code"] == "request_invalid"
        assert at in answer.json()["detail"]


def test_bytes_that_are_no_json_are_400(backend: Both) -> None:
    client, services = backend
    texts = [
        b"", b"{", b"\xff\xfe\x00", b"\x80\x04\x95cos\nsystem\n", b'{"tasks": [' * 10, b"[" * 100_000, b'{"a":' * 50_000, b"1" * 100_000, b'"\\ud800"', b"null", b"NaN",
        b'{"tasks": 3, "action": 3, "schema": 3}', b"<?xml version='1.0'?><a/>", b"tasks=1", b"\x1f\x8b\x08\x00",
    ]  # fmt: skip
    for path in ("/predict", "/setup", "/webhook"):
        for text in texts:
            for kind in (
                "application/json",
                "text/plain",
                "application/x-www-form-urlencoded",
                "multipart/form-data",
                "",
            ):
                headers = {"Content-Type": kind, "X-WSC-Webhook-Secret": services.webhook_secret}
                answer = client.post(path, content=text, headers=headers)
                assert answer.status_code == 400, (path, text[:40], kind, answer.text)
                assert answer.json()["detail"]
    assert client.get("/health").status_code == 200


def test_every_route_that_takes_a_body_has_its_limit(backend: Both) -> None:
    client, _ = backend
    schema = client.get("/openapi.json").json()
    with_body = [path for path, item in schema["paths"].items() if "requestBody" in item.get("post", {})]
    assert set(with_body) >= {"/predict", "/setup", "/webhook"}
    for path in with_body:
        assert client.post(path, content=b" " * (LIMIT + 1)).status_code == 413


def test_requests_that_are_no_http_end_without_harm(backend: Both) -> None:
    client, _ = backend
    port = client.base_url.port or 0
    start = b"POST /predict HTTP/1.1\r\nHost: x\r\n"
    for raw in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,
        b"GET " + b"/" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        start + b"Content-Length: -5\r\n\r\n",
        start + b"Content-Length: 5\r\nContent-Length: 50\r\n\r\n{}",
        start + b"Content-Length: 99999999999999999999999\r\n\r\n{}",
        start + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nzz\r\n",
        start + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
        start + b"X: " + b"a" * 300_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nAuthorization: Basic \xff\xfe\r\n\r\n",
        b"PUT /%00%ff%c0%ae/..%2f..%2fetc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            answer = b""
            with contextlib.suppress(OSError):  # the server may hang up before it has heard all
                connection.sendall(raw)
                connection.shutdown(socket.SHUT_WR)
                while piece := connection.recv(65_536):
                    answer += piece
        assert not answer.startswith(b"HTTP/1.1 5"), (raw[:60], answer[:200])
    assert client.get("/health").status_code == 200


# --- credentials --------------------------------------------------------------------------------------------------


def test_credentials_are_compared_in_constant_time(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`hmac.compare_digest` decides, and nothing else: where it says no, what is right is refused; each secret is what it is asked about."""
    options = {"basic_auth_user": "ls", "basic_auth_pass": "right", "webhook_secret": "hush"}
    event = {"action": "PROJECT_UPDATED", "project": {"id": 1}}
    with served(tmp_path, embedded_redis, stand_in, **options) as (client, _):
        asked: list[tuple[bytes, bytes]] = []

        def no(first: Any, second: Any) -> bool:
            asked.append((bytes(first), bytes(second)))
            return False

        def health(password: str) -> int:
            return client.get("/health", auth=("ls", password)).status_code

        def webhook(secret: str) -> int:
            return client.post("/webhook", json=event, headers={"X-WSC-Webhook-Secret": secret}).status_code

        assert (health("right"), health("wrong"), webhook("hush"), webhook("loud")) == (200, 401, 200, 401)
        monkeypatch.setattr(hmac, "compare_digest", no)
        assert (health("right"), webhook("hush")) == (401, 401)
        assert client.get("/panel", params={"slide": "x.y"}).status_code == 403
        assert base64.b64encode(b"ls:right") in {value for pair in asked for value in pair}
        assert b"hush" in {value for pair in asked for value in pair}
        assert len(asked) >= 3


def test_without_a_password_only_signed_and_public_addresses_answer(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path
) -> None:
    with served(tmp_path, embedded_redis, stand_in, basic_auth_user="ls", basic_auth_pass="right") as (
        client,
        services,
    ):
        opened = {}
        assert client.get("/openapi.json").status_code == 401
        for path, item in client.get("/openapi.json", auth=("ls", "right")).json()["paths"].items():
            for method in item:
                address = path.replace("{key}", "0" * 40).replace("{name}", "0" * 40).replace("{token}", "x.y")
                for name in ("{level}", "{column}", "{row}"):
                    address = address.replace(name, "0")
                query = {"slide": "x.y", "x": 0, "y": 0, "size": 9}
                body = {"tasks": [], "action": "x"} if method == "post" else None
                answer = client.request(method, address, params=query, json=body, follow_redirects=False)
                if answer.status_code != 401:
                    opened[path] = answer.status_code
    # Signed ones refuse the signature; a thumbnail's name is a secret that nobody guesses; the rest are files of the pages.
    signed = {path: status for path, status in opened.items() if path.startswith(("/panel", "/deepzoom"))}
    assert set(signed.values()) == {403}
    others = {path for path in opened if path not in signed and not path.startswith("/assets")}
    assert others == {"/thumbnails/{name}.jpg"}
    assert opened["/thumbnails/{name}.jpg"] == 404
    assert services.settings.basic_auth_pass.get_secret_value() not in str(opened)


def test_the_http_process_imports_none_of_the_old_web_frameworks_that_label_studio_ml_pins() -> None:
    code = (
        "import sys, backend.web.app, backend.web.server, backend.label_studio.model\n"
        "print(sorted({'flask', 'werkzeug', 'jinja2', 'itsdangerous', 'label_studio_ml.api', 'pickle5', 'dill'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
