"""Who may see what, and what a Label Studio or a disk that does not answer may hold up."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from learnt_project import LEARNT, Learnt
from redis import Redis
from web_client import CONFIG, served

from backend.commands.doctor import examine
from backend.errors import LicenceNotAccepted, SettingsError
from backend.inference.checkpoint import locate
from backend.jobs.pushes import note_push
from backend.jobs.queue import WaitingTask
from backend.jobs.redis_server import EmbeddedRedis
from backend.redaction import redactor_of, shown_address
from backend.settings import Settings, load_settings
from backend.slides.synthetic import SyntheticSlide
from backend.web.signing import SlideSigner

Make = Callable[..., Settings]
TOKEN = re.compile(r"[A-Za-z0-9_-]{20,}\.[A-Za-z0-9_-]{43}")


# --- a signed address ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(
    tmp_path_factory: pytest.TempPathFactory,
    embedded_redis: EmbeddedRedis,
    stand_in: Path,
    synthetic_slide: SyntheticSlide,
) -> Iterator[Learnt]:
    """A backend with a password, whose projects have learnt of thirty slides."""
    folder = tmp_path_factory.mktemp("learnt-with-password")
    slide = folder / "slide.tif"
    slide.write_bytes(synthetic_slide.path.read_bytes())
    options = {"basic_auth_user": "ls", "basic_auth_pass": "secret"}
    with served(folder / "backend", embedded_redis, stand_in, **options) as (client, services):
        yield Learnt(client, services, slide)


def test_from_one_signed_address_nothing_of_another_slide_is_found(learnt: Learnt) -> None:
    """Every route is asked by whoever has the address and no password, and whatever an answer leads to."""
    services, client = learnt.services, learnt.client
    path, key = learnt.slides[1]
    ref = services.resolver.resolve(str(path))
    own = SlideSigner(services.settings.model_dir).token(ref, LEARNT)
    note_push(services.queue, key, LEARNT, 2)
    note_push(services.queue, key, 4711, 99)  # another project has this slide too
    services.queue.put_back_waiting(
        key, [WaitingTask(4711, 98, "<View/>", "v"), WaitingTask(LEARNT, 3, "<View/>", "v")]
    )
    described = client.get("/openapi.json", auth=("ls", "secret")).json()["paths"]
    values = {"token": own, "name": key, "key": key, "version": "0", "level": "0", "column": "0", "row": "0"}
    asked = {
        re.sub(r"{(\w+)(?::\w+)?}", lambda m: values[m[1]], route) for route, how in described.items() if "get" in how
    }
    to_ask, answers = [f"{route}?slide={own}&x=0&y=0&size=500" for route in sorted(asked)], []
    to_ask += [f"/slides/{key}?project={LEARNT}", f"/slides/{key}/similar?project={LEARNT}"]
    to_ask += [f"/{route}/{other}" for _, other in learnt.slides[:3] for route in ("slides", "api/bags")]
    seen: set[str] = set()
    while to_ask:
        address = to_ask.pop()
        if address in seen:
            continue
        seen.add(address)
        with client.stream("GET", address) as answer:
            if "events" in address:
                text = "".join(line + "\n" for _, line in zip(range(3), answer.iter_lines(), strict=False))
            else:
                text = answer.read().decode("latin-1")
        answers.append((address, answer.status_code, text))
        if answer.headers.get("content-type", "").startswith(("application/json", "text/")):
            to_ask += re.findall(r"/(?:panel|slides|thumbnails|deepzoom|api)[^\s\"'<>\\]*", text)
    opened = [address for address, status, _ in answers if status == 200]
    assert any("/panel/state" in address for address in opened), "the slide itself is shown"
    everything = "\n".join(text for _, _, text in answers)
    others = [(p.name, k) for p, k in learnt.slides if k != key]
    assert [name for name, k in others if name in everything or k in everything.replace("\n", "")] == [], (
        "no name, no key"
    )
    assert {
        token
        for token in TOKEN.findall(everything)
        if "." in token and SlideSigner(services.settings.model_dir).read(token).ref != ref
    } == set()
    assert "4711" not in everything, "no number of another project"
    state = next(json.loads(text) for address, status, text in answers if "/panel/state" in address and status == 200)
    assert [push["project"] for push in state["status"]["pushes"]] == [LEARNT]
    assert state["status"]["waiting"] == [f"{LEARNT}:3"]
    assert "No tumour" in everything, "its own suggestion"
    closed = {
        status for address, status, _ in answers if address.startswith(("/slides", "/api", "/metrics", "/openapi"))
    }
    assert closed == {401}, "the rest asks for the password, the page of its neighbours too"
    assert client.get(state["similar_page"], auth=("ls", "secret")).text.count("<li>") == 5


# --- passwords ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("set_one", "missing"), [("basic_auth_user", "BASIC_AUTH_PASS"), ("basic_auth_pass", "BASIC_AUTH_USER")]
)
def test_half_a_password_is_an_error_rather_than_none(set_one: str, missing: str) -> None:
    with pytest.raises(SettingsError, match=f"{missing} is not: set both"):
        load_settings(**{set_one: "x"})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5"])
def test_listening_to_the_network_without_a_password_is_said(host: str, settings: Make) -> None:
    told = [f.text for f in examine(settings(host=host), []) if f.subject == "this backend" and f.verdict == "warning"]
    assert any(f"HOST={host}" in text and "BASIC_AUTH_PASS" in text for text in told)
    safe = settings(host=host, basic_auth_user="a", basic_auth_pass="b")
    assert not any("HOST=" in f.text for f in examine(safe, []))


@pytest.mark.parametrize("model", ["https://models.invalid/m.pt.zip", "wsc-mtl-tiny"])
def test_no_model_is_downloaded_before_its_licence_is_accepted(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MMM_LICENSE_ACCEPTED", raising=False)
    with pytest.raises(LicenceNotAccepted):
        locate(model, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "backend", "serve", "--port", "0"],
        env={**os.environ, "MODEL": model, "MODEL_DIR": str(tmp_path / "state")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "LicenceNotAccepted" in done.stderr and "Traceback" not in done.stderr


# --- secrets in addresses -----------------------------------------------------------------------------------------------

PASSWORDS = ("pa/ss", "p@ss/word", "a#b@c", "q?x@y", "12/34", "a:b@c", "[x]@", "%zz/", "sl/ash@and#hash?")


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize(
    "address",
    ["redis://user:{}@host:6379/0", "redis://:{}@host/1", "s3://key:{}@bucket/results", "https://u:{}@h:8080/ls"],
)
def test_no_part_of_a_password_is_shown_whether_the_address_parses_or_not(address: str, password: str) -> None:
    written = address.format(password)
    shown = shown_address(written)
    pieces = [piece for piece in re.split(r"[/@#?:\[\]]", password) if piece]
    left = re.sub(r"^\w+://", "", shown)
    assert not any(piece in re.split(r"[/@:.…]", left) for piece in pieces), shown


def test_the_options_of_an_address_are_not_taken_out_of_ordinary_sentences(settings: Make) -> None:
    made = settings(redis_url="rediss://:planted-pw@host:6379/0?ssl_cert_reqs=none&ssl_password=planted-too")
    said = redactor_of(made, {})("none of the slides: planted-pw, planted-too")
    assert said.startswith("none of the slides: ") and "planted" not in said


ENCODED = "planted/re@dis#pw"
PLANTED = {
    "REDIS_URL": ("redis://:{}@127.0.0.1:1/0", ENCODED),
    "RESULTS_URL": ("s3://key:{}@bucket-of-nobody/results", "planted-store-pw"),
    "LABEL_STUDIO_URL": ("http://user:{}@127.0.0.1:1", "planted-studio-pw"),
    "LABEL_STUDIO_PUBLIC_URL": ("http://user:{}@studio.invalid", "planted-public-pw"),
    "MODEL": ("https://127.0.0.1:1/m.pt.zip?token={}", "planted-model-token"),
    "HTTPS_PROXY": ("http://me:{}@127.0.0.1:1", "planted-proxy-pw"),
    "LABEL_STUDIO_API_KEY": ("{}", "planted-api-key-77"),
}


def planted(**only: str) -> dict[str, str]:
    return {name: form.format(quote(secret, safe="")) for name, (form, secret) in PLANTED.items()} | only


@pytest.mark.parametrize(
    "command", [["doctor"], ["serve", "--port", "0"], ["workers"], ["train", "1"], ["import", "."]]
)
def test_no_command_prints_a_secret_of_an_address(command: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, **planted(), "MODEL_DIR": str(tmp_path), "LOG_LEVEL": "DEBUG", "DEVICES": "cpu"}
    log = tmp_path / "said"
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "backend", *command], env=environment, stdout=said, stderr=said
        )
        try:
            process.wait(8 if command == ["workers"] else 120)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(60)
    text = log.read_text()
    assert len(text) > 50
    for name, (_, secret) in PLANTED.items():
        assert secret not in text and quote(secret, safe="") not in text, name
        assert base64.b64encode(secret.encode()).decode() not in text, name


@pytest.mark.parametrize("command", [["doctor"], ["serve"], ["workers"]])
@pytest.mark.parametrize("password", ["pa/planted-one@x", "12/planted-one", "planted-one#x/"])
def test_a_password_that_was_not_encoded_is_not_printed_and_what_to_encode_is_said(
    password: str, command: list[str], tmp_path: Path
) -> None:
    environment = {**os.environ, "REDIS_URL": f"redis://:{password}@127.0.0.1:1/0", "MODEL_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "backend", *command], env=environment, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in said
    assert "REDIS_URL" in said and "%2F" in said and "percent-encoded" in said.replace("\n", " ")
    assert "planted-one" not in said.replace("\n", "") and "pa/" not in said


# --- who does not answer holds up nobody ----------------------------------------------------------------------------------


@contextmanager
def silent() -> Iterator[str]:
    """The address of a Label Studio that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=200) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_polls_of_a_silent_label_studio_starve_nobody(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Redis, stand_in: Path
) -> None:
    """Forty-five overviews that are open, where the server has forty threads."""
    with silent() as studio:
        options = {"label_studio_url": studio, "label_studio_api_key": "a" * 40}
        with served(tmp_path, embedded_redis, stand_in, **options) as (client, _):
            polls = ThreadPoolExecutor(45)
            asked = [polls.submit(client.get, "/api/projects", timeout=120) for _ in range(45)]
            deadline = time.monotonic() + 30
            while _threads_asking() < 1:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert client.get("/api/jobs").status_code == 200, "a route that needs one of the forty threads"
            assert client.get("/thumbnails/none.jpg").status_code == 404
            assert client.post("/setup", json={"project": "1.1", "schema": CONFIG}).status_code == 200
            assert client.get("/health").json()["status"] == "UP"
            assert _threads_asking() <= 2, "one asks for all of them"
            answers = [poll.result().json() for poll in asked]
            polls.shutdown()
    assert all(answer["projects"] == [] and answer["problem"] for answer in answers)


def _threads_asking() -> int:
    return sum("projects_of_model" in _where(frame) for frame in sys._current_frames().values())


def _where(frame: object) -> list[str]:
    found = []
    while frame is not None:
        found.append(frame.f_code.co_name)  # type: ignore[attr-defined]
        frame = frame.f_back  # type: ignore[attr-defined]
    return found


def test_health_is_answered_while_setup_waits_for_a_disk(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Redis, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path, embedded_redis, stand_in) as (client, services):
        reading, go_on = threading.Event(), threading.Event()
        version = services.versions.version

        def slow(project: int | None) -> str:
            reading.set()
            go_on.wait(60)
            return version(project)

        monkeypatch.setattr(services.versions, "version", slow)
        with ThreadPoolExecutor(1) as pool:
            setup = pool.submit(client.post, "/setup", json={"project": "1.1", "schema": CONFIG})
            assert reading.wait(30)
            assert client.get("/health").status_code == 200, "though the disk has not answered yet"
            go_on.set()
            assert setup.result().json()["model_version"] == services.model.model_version
