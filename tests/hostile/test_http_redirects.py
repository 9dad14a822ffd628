"""Label Studio's address sends us elsewhere: the token does not go along, and the message says which address to set."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from label_studio_stub import StudioStub

from backend.errors import LabelStudioError, PushUnsure
from backend.label_studio.api_errors import RedirectRefused
from backend.label_studio.client import LabelStudioClient
from backend.settings import Settings

PREDICTION = {"model_version": "v", "result": [], "score": 0.5}


class Elsewhere(ThreadingHTTPServer):
    """A server that answers every request by one redirect, or takes down what it is sent."""

    daemon_threads = True
    status, target = 0, ""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.told: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Elsewhere

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.told.append(f"{self.command} {self.path} {self.headers} {body.decode()}")
        data = json.dumps({"access": "x", "id": 5, "data": {}}).encode()
        self.send_response(self.server.status or 200)
        if self.server.status:
            self.send_header("Location", self.server.target.replace("PATH", self.path))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PATCH = do_DELETE = _answer

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def running() -> Iterator[Elsewhere]:
    with Elsewhere() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("kind", ["personal access token", "legacy token"])
def test_the_token_goes_to_no_other_place(status: int, kind: str) -> None:
    token = StudioStub.personal_access_token() if kind.startswith("personal") else "legacy-token-of-a-user"
    with running() as studio, running() as thief:
        studio.status, studio.target = status, f"{thief.url}PATH"
        client = LabelStudioClient(Settings(label_studio_url=studio.url, label_studio_api_key=token))  # type: ignore[arg-type]
        for ask in (lambda: client.task(5), lambda: client.annotated_tasks(7, list), client.whoami):
            with pytest.raises(RedirectRefused, match=f"LABEL_STUDIO_URL={thief.url};") as refused:
                ask()
            assert isinstance(refused.value, LabelStudioError) and token not in str(refused.value)
        client.close()
        assert thief.told == []
        assert any(token in told for told in studio.told)


@pytest.mark.parametrize("target", ["https://127.0.0.1:PORTPATH", "http://localhost:PORTPATH", "//localhost:PORTPATH"])
def test_another_scheme_or_name_is_another_place(target: str) -> None:
    with running() as studio:
        studio.status, studio.target = 307, target.replace("PORT", str(studio.server_port))
        client = LabelStudioClient(Settings(label_studio_url=studio.url, label_studio_api_key="legacy"))  # type: ignore[arg-type]
        with pytest.raises(RedirectRefused):
            client.task(5)
        client.close()
        assert len(studio.told) == 1


def test_a_redirect_within_label_studio_is_followed() -> None:
    with running() as studio:
        studio.status, studio.target = 307, "/once-more"
        client = LabelStudioClient(Settings(label_studio_url=studio.url, label_studio_api_key="legacy"))  # type: ignore[arg-type]
        with pytest.raises(LabelStudioError) as refused:
            client.task(5)
        client.close()
        assert not isinstance(refused.value, RedirectRefused), "it was led round and round instead"
        assert len(studio.told) > 2


def test_a_prediction_that_was_sent_on_was_not_taken_and_waits_for_the_right_address() -> None:
    with running() as studio, running() as thief:
        client = LabelStudioClient(Settings(label_studio_url=studio.url, label_studio_api_key="legacy"))  # type: ignore[arg-type]
        studio.status, studio.target = 308, f"{thief.url}PATH"
        with pytest.raises(RedirectRefused) as refused:
            client._create(5, PREDICTION)
        client.close()
        assert refused.value.retryable and not isinstance(refused.value, PushUnsure)
        assert thief.told == []
