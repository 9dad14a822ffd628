"""Why Label Studio cannot be asked: each reason reads differently, and a key that no header can hold is named at the start."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from faults.redis_rig import free_port
from hypothesis import HealthCheck, given
from hypothesis import settings as trying
from hypothesis import strategies as st

from backend.commands.doctor import examine
from backend.errors import BackendError, LabelStudioUnreachable, SettingsError
from backend.label_studio.client import LabelStudioClient
from backend.settings import Settings, load_settings

Make = Callable[..., Settings]


@contextmanager
def server(status: int, content_type: str, body: bytes, certificate: tuple[Path, Path] | None = None) -> Iterator[str]:
    """Answers everything alike."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_CONNECT = _answer

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        scheme = "http"
        if certificate is not None:
            context, scheme = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), "https"
            context.load_cert_chain(*certificate)
            made.socket = context.wrap_socket(made.socket, server_side=True)
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"{scheme}://127.0.0.1:{made.server_port}"
        finally:
            made.shutdown()
            thread.join()


@contextmanager
def silent() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def why(settings: Make, url: str, **more: Any) -> str:
    with closing(LabelStudioClient(settings(label_studio_url=url, label_studio_api_key="a" * 40, **more))) as client:
        with pytest.raises(BackendError) as caught:
            client.whoami()
        assert isinstance(caught.value, LabelStudioUnreachable), "an operator can end it, and then what waits goes on"
        return str(caught.value)


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the certificate is made by openssl, which is not here: install it")
    crt, key = tmp_path / "studio.crt", tmp_path / "studio.key"
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["-keyout", str(key), "-out", str(crt), "-days", "2", "-nodes", *name]
    subprocess.run([openssl, "req", "-x509", "-newkey", "rsa:2048", *made], check=True, capture_output=True)
    return crt, key


def test_each_reason_reads_differently(
    settings: Make, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from backend.label_studio import client

    monkeypatch.setattr(client, "_TIMEOUT_S", 1.0)
    said = {
        "nobody": why(settings, f"http://127.0.0.1:{free_port()}"),
        "no such name": why(settings, "http://studio.invalid"),
    }
    with silent() as url:
        said["silent"] = why(settings, url)
    with server(200, "application/json", b"{}", certificate) as url:
        said["untrusted"] = why(settings, url)
        said["plain at a TLS port"] = why(settings, url.replace("https", "http"))
    with server(200, "text/html", b"<html>Welcome to nginx</html>") as url:
        said["a page"] = why(settings, url)
        said["TLS at a plain port"] = why(settings, url.replace("http", "https"))
    with server(200, "application/json", b'{"tagline": "You Know, for Search"}') as url:
        said["other JSON"] = why(settings, url)
    with server(502, "text/html", b"<html>502 Bad Gateway</html>") as url:
        said["a gateway"] = why(settings, url)
    with server(500, "application/json", b'{"detail": "oops"}') as url:
        said["an error of its own"] = why(settings, url)
    with server(401, "application/json", b'{"detail": "Invalid token."}') as url:
        said["token refused"] = why(settings, url)
    with server(407, "text/html", b"<html>Proxy Authentication Required</html>") as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.replace("//", "//me:planted-pw@"))
        monkeypatch.setenv("HTTPS_PROXY", proxy.replace("//", "//me:planted-pw@"))
        said["a proxy, http"] = why(settings, "http://studio.invalid")
        said["a proxy, https"] = why(settings, "https://studio.invalid")
    texts = [text.replace("https", "http").split("127.0.0.1", 1)[-1].lstrip(":0123456789") for text in said.values()]
    assert len(set(texts)) == len(texts), said
    expected = {
        "nobody": "nothing listens",
        "no such name": "DNS",
        "silent": "no answer came in time",
        "untrusted": "certificate",
        "plain at a TLS port": "https://",
        "a page": "no JSON",
        "TLS at a plain port": "does not speak TLS",
        "other JSON": "other JSON",
        "a gateway": "proxy in front",
        "an error of its own": "answers 500",
        "token refused": "LABEL_STUDIO_API_KEY",
        "a proxy, http": "HTTP_PROXY",
        "a proxy, https": "HTTP_PROXY",
    }
    for kind, text in said.items():
        assert expected[kind] in text, (kind, text)
        assert "planted-pw" not in text


def test_the_certificate_is_trusted_where_it_is_said_to_be(
    settings: Make, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(200, "application/json", b'{"email": "me@here", "id": 1}', certificate) as url:
        assert "SSL_CERT_FILE" in why(settings, url)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        with closing(LabelStudioClient(settings(label_studio_url=url, label_studio_api_key="a" * 40))) as client:
            assert client.whoami() == "me@here"


# --- keys ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", ["{}\n", " {}", "{}\r\n", "\t{}\n\n"])
def test_a_key_copied_with_the_end_of_its_line_is_the_key(around: str) -> None:
    key = "0123456789abcdef"
    made = load_settings(label_studio_api_key=around.format(key), basic_auth_user="u", basic_auth_pass="pw\n")
    assert made.label_studio_api_key.get_secret_value() == key
    assert made.basic_auth_pass.get_secret_value() == "pw"


@pytest.mark.parametrize(
    ("key", "place"), [("abc\ndef", "4 of 7"), ("“abc”", "1 of 5"), ("abc def", "4 of 7"), ("ab\u200bcd", "3 of 5")]
)
def test_a_key_that_no_header_can_hold_is_refused_at_the_start_naming_the_place(key: str, place: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(label_studio_api_key=key)
    assert f"character {place}" in str(caught.value) and "LABEL_STUDIO_API_KEY" in str(caught.value)
    assert "abc" not in str(caught.value) and "def" not in str(caught.value)


# --- doctor -------------------------------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [
            "http://", "http://[::1", "http://h:99999", "https://x y", "http://127.0.0.1:1", "http://\u2603.invalid", "//", "~nobody/x",
            "/proc/self/mem", "/dev/null", "\ud800", "s3://", "gs://b", "foo://x", "file:///", "/" + "a" * 300, "memory://x",
            "unix://", "unix:///dev/null", "redis://[", "redis://127.0.0.1:1/x", "rediss://127.0.0.1:1", "cuda:0", "zip://a::file:///b",
        ]
    ),
)  # fmt: skip
NAMES = (
    "model", "model_sha256", "devices", "results_url", "redis_url", "label_studio_url", "label_studio_public_url",
    "label_studio_api_key", "public_url", "host", "basic_auth_user", "basic_auth_pass", "slide_roots", "webhook_secret",
)  # fmt: skip


@trying(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(values=st.dictionaries(st.sampled_from(NAMES), TEXTS, max_size=3), slide=TEXTS)
def test_doctor_never_ends_in_a_traceback(tmp_path: Path, values: dict[str, str], slide: str) -> None:
    """Whatever the settings say, they are refused by name, or each check ends as a finding."""
    try:
        made = load_settings(model_dir=tmp_path, **values)
    except SettingsError as error:
        assert any(name.upper() in str(error) for name in values)
        return
    found = list(examine(made, [Path(slide)]))
    assert {finding.subject for finding in found} >= {
        "packages",
        "licence",
        "checkpoint",
        "redis",
        "storage",
        "this backend",
    }
    assert all(finding.text for finding in found), "no line is empty"


@pytest.mark.parametrize(
    "variables",
    [
        {"HTTPS_PROXY": "nonsense://x", "LABEL_STUDIO_URL": "https://127.0.0.1:1", "LABEL_STUDIO_API_KEY": "a"},
        {"HTTP_PROXY": "http://[", "LABEL_STUDIO_URL": "http://127.0.0.1:1", "LABEL_STUDIO_API_KEY": "a"},
        {"SSL_CERT_FILE": "/none", "LABEL_STUDIO_URL": "https://127.0.0.1:1", "LABEL_STUDIO_API_KEY": "a"},
        {"MODEL_DIR": "/dev/null/x"},
        {"MODEL_DIR": "~nobody-of-this-name/x"},
        {"MODEL": "/dev/zero"},
        {"MODEL": os.fsdecode(b"/\xff.zip")},
        {"RESULTS_URL": "gs://bucket"},
        {"LOG_LEVEL": "debug", "PORT": "99999"},
        {"PUBLIC_URL": "http://\u2603.invalid:1"},
    ],
    ids=lambda variables: " ".join(variables),
)
def test_doctor_as_it_is_typed_never_ends_in_a_traceback(variables: dict[str, str], tmp_path: Path) -> None:
    environment = {**os.environ, "MODEL_DIR": str(tmp_path), "COLUMNS": "300", **variables}
    command = [sys.executable, "-m", "backend", "doctor", os.fsdecode(b"/none/\xff[/b].svs")]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    said = (done.stdout + done.stderr).decode()
    assert "Traceback" not in said, said[-2000:]
    assert done.returncode in (1, 2)
    assert done.returncode == 2 or "[/b].svs" in said
