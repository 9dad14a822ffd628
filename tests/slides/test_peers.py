"""An allowed name that leads where it must not: the connection ends before anything is asked."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from file_server import Answer, Server, serving

from backend.errors import SourceRefused
from backend.settings import Settings
from backend.slides.peers import refusal
from backend.slides.source import SourceResolver

Make = Callable[..., Settings]


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::"])
def test_a_name_does_not_lead_to_this_machine(peer: str) -> None:
    assert refusal("slides.example", peer) == "this machine itself"
    assert refusal("localhost.example", peer) == "this machine itself"
    assert refusal("localhost", peer) == refusal("files.localhost.", peer) == ""


@pytest.mark.parametrize(
    "peer", ["169.254.169.254", "::ffff:169.254.169.254", "fe80::1%eth0", "fd00:ec2::254", "100.100.100.200", "168.63.129.16"]
)  # fmt: skip
def test_a_name_does_not_lead_to_what_keeps_a_clouds_credentials(peer: str) -> None:
    assert "credentials" in refusal("slides.example", peer)


def test_a_name_may_lead_into_a_network_and_an_address_is_what_it_is() -> None:
    assert refusal("pacs.hospital.example", "10.1.2.3") == refusal("files", "192.168.0.7") == ""
    assert refusal("slides.example", "93.184.216.34") == refusal("slides.example", "2606:2800::1") == ""
    assert refusal("169.254.10.2", "169.254.10.2") == refusal("[::1]", "::1") == "", "ALLOWED_HOSTS holds it literally"
    assert refusal("slides.example", "239.1.2.3") and refusal("slides.example", "ff02::1%lo")


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What names of hosts lead to."""
    leads: dict[str, str] = {}
    real = socket.getaddrinfo

    def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else str(host)
        return real(leads.get(name, name), *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return leads


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as state:
        state.answers["/x.svs"] = Answer(b"bytes", headers={"ETag": '"1"'})
        yield state


def test_an_allowed_name_that_leads_here_is_refused_before_anything_is_sent(
    settings: Make, server: Server, names: dict[str, str]
) -> None:
    names["slides.example"] = "127.0.0.1"
    resolver = SourceResolver(settings(allowed_hosts=(f"slides.example:{server.port}",)))
    with pytest.raises(SourceRefused, match=r"leads to this machine itself.*write the address itself"):
        resolver.resolve(f"http://slides.example:{server.port}/x.svs?signature=geheim")
    assert server.requests == []


def test_a_name_that_changes_between_the_question_and_the_download_is_refused(
    settings: Make, server: Server, names: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rebinding: first it leads to an address that is fine, here by calling that of loopback fine once."""
    names["slides.example"] = "127.0.0.1"
    fine = iter(["", "this machine itself"])
    monkeypatch.setattr("backend.slides.peers.refusal", lambda _host, _peer: next(fine))
    resolver = SourceResolver(settings(allowed_hosts=("slides.example",)))
    ref = resolver.resolve(f"http://slides.example:{server.port}/x.svs")
    with pytest.raises(SourceRefused, match="leads to this machine itself"):
        resolver.fetch(ref)
    assert [method for method, _, _ in server.requests] == ["HEAD"], "the download was not asked for"


def test_a_redirect_to_such_a_name_is_refused(settings: Make, server: Server, names: dict[str, str]) -> None:
    names["inside.example"] = "127.0.0.1"
    server.answers["/jump.svs"] = Answer(status=302, headers={"Location": f"http://inside.example:{server.port}/x.svs"})
    resolver = SourceResolver(settings(allowed_hosts=(server.host, "inside.example")))
    with pytest.raises(SourceRefused, match="leads to this machine itself"):
        resolver.resolve(f"{server.url}/jump.svs")
    assert [path for _, path, _ in server.requests] == ["/jump.svs"]


def test_label_studio_may_be_on_this_machine_under_any_name(
    settings: Make, server: Server, names: dict[str, str]
) -> None:
    names["label-studio.example"] = "127.0.0.1"
    server.answers["/data/local-files/?d=x.svs"] = Answer(b"bytes", headers={"ETag": '"1"'})
    made = settings(label_studio_url=f"http://label-studio.example:{server.port}")
    resolver = SourceResolver(made)
    ref = resolver.resolve("/data/local-files/?d=x.svs")
    assert resolver.fetch(ref)[0].read_bytes() == b"bytes"


def test_a_proxy_is_the_operators_own(settings: Make, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.url)
    server.answers["http://slides.example/x.svs"] = Answer(b"bytes", headers={"ETag": '"1"'})
    ref = SourceResolver(settings(allowed_hosts=("slides.example",))).resolve("http://slides.example/x.svs")
    assert ref.kind == "http" and server.requests[0][1] == "http://slides.example/x.svs"
