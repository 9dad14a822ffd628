"""Panels of slides that lie on other machines: what is said while they are downloaded, and that nobody else waits for them."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from slides.file_server import Answer, Server, serving
from web_client import served

from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.services import Services
from backend.slides.synthetic import SyntheticSlide
from backend.web.signing import SlideSigner

LONG_S = 60
"""Only ends a test that fails."""


class Panels:
    """A backend with one slide beside it and one on ``host``."""

    def __init__(self, client: httpx.Client, services: Services, host: Server) -> None:
        self.client, self.services, self.host = client, services, host
        self.here = self.token("Lymph node 1.tif")
        self.far = self.token(f"{host.url}/far.tif")

    def token(self, location: str) -> str:
        return SlideSigner(self.services.settings.model_dir).token(self.services.resolver.resolve(location), project=3)

    def slide(self, token: str, timeout_s: float = LONG_S) -> httpx.Response:
        return self.client.get("/panel/slide", params={"slide": token}, timeout=timeout_s)

    def slide_later(self, token: str, status: int, text: str = "") -> httpx.Response:
        """The first answer of this status and with this text, asked for as by someone who opens the page again and again."""
        until = time.monotonic() + LONG_S
        while (
            (answer := self.slide(token)).status_code != status or text not in answer.text
        ) and time.monotonic() < until:
            time.sleep(0.05)
        return answer

    def tile(self, token: str) -> httpx.Response:
        return self.client.get(f"/deepzoom/{token}/slide_files/9/0_0.jpg")


@pytest.fixture
def host(synthetic_slide: SyntheticSlide) -> Iterator[Server]:
    with serving() as server:
        server.answers["/far.tif"] = Answer(synthetic_slide.path.read_bytes(), headers={"ETag": '"1"'})
        yield server


@pytest.fixture
def panels(
    tmp_path: Path,
    redis: object,
    embedded_redis: EmbeddedRedis,
    stand_in: Path,
    synthetic_slide: SyntheticSlide,
    host: Server,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[Panels]:
    monkeypatch.setattr("backend.web.panel_routes._PAGE_WAIT_S", 0.3)
    (tmp_path / "slides").mkdir()
    shutil.copy(synthetic_slide.path, tmp_path / "slides" / "Lymph node 1.tif")
    options = {"allowed_hosts": (host.host,), "download_timeout_s": getattr(request, "param", LONG_S)}
    with served(tmp_path, embedded_redis, stand_in, **options) as (client, services):
        yield Panels(client, services, host)


@pytest.fixture
def held(host: Server) -> Iterator[threading.Event]:
    """The host sends no slide before this is set."""
    go_on = threading.Event()
    host.before_body = lambda: go_on.wait(LONG_S)
    yield go_on
    go_on.set()


def test_a_slide_beside_the_backend_is_shown_while_a_slow_host_is_asked_by_many(
    panels: Panels, host: Server, held: threading.Event
) -> None:
    for _ in range(8):
        with pytest.raises(httpx.ReadTimeout):
            panels.slide(panels.far, timeout_s=0.1)
    with ThreadPoolExecutor(8) as pool:
        pictures = [pool.submit(panels.tile, panels.far) for _ in range(8)]
        assert panels.slide(panels.here).json()["width"] == 2048
        assert panels.tile(panels.here).headers["content-type"] == "image/jpeg"
        assert not any(picture.done() for picture in pictures), "all of them waited meanwhile"
        held.set()
        assert {picture.result().status_code for picture in pictures} == {200}
    assert host.gets("/far.tif") == 1


def test_the_panel_says_how_far_the_download_is_and_shows_the_slide_once_it_is_here(
    panels: Panels, host: Server, held: threading.Event
) -> None:
    size = f"{len(host.answers['/far.tif'].body) / 1e6:.1f}"
    error = panels.slide_later(panels.far, 503, f" of {size} MB").json()["error"]
    assert (error["code"], error["retryable"]) == ("download_under_way", True)
    assert f"far.tif' is being downloaded: 0.0 of {size} MB have come." in error["message"]
    assert "goes on by itself" in error["hint"]
    held.set()
    assert panels.slide_later(panels.far, 200).json()["width"] == 2048
    assert panels.tile(panels.far).status_code == 200
    assert host.gets("/far.tif") == 1


@pytest.mark.parametrize("panels", [1], indirect=True, ids=["given up after a second"])
def test_a_host_that_hardly_sends_anything_is_given_up_and_the_panel_says_why(panels: Panels, host: Server) -> None:
    host.answers["/far.tif"].every_s = 0.05  # a byte each time
    failed = panels.slide_later(panels.far, 502).json()["error"]
    assert (failed["code"], failed["retryable"]) == ("download_failed", True)
    assert "comes too slowly" in failed["message"] and "copy the slide to this machine" in failed["hint"]


def test_a_download_that_failed_is_told_when_the_page_is_opened_again_and_then_tried_again(
    panels: Panels, host: Server, held: threading.Event
) -> None:
    good = host.answers["/far.tif"]
    host.answers["/far.tif"] = Answer(b"half", length=7_000_000)
    panels.slide_later(panels.far, 503, " of 7.0 MB")
    host.answers["/far.tif"] = good
    held.set()
    assert panels.slide_later(panels.far, 502).json()["error"]["code"] == "download_failed"
    assert panels.slide_later(panels.far, 200).json()["width"] == 2048
    assert host.gets("/far.tif") == 2
