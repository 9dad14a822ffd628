"""A slide is downloaded once for all who want it, and a server that hardly sends anything is given up, whatever it is slow at."""

from __future__ import annotations

import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from file_server import Answer, Server, serving

from backend.errors import BackendError, DownloadFailed, SlideNotFound
from backend.settings import Settings
from backend.slides.pace import MIN_BYTES_PER_S, Watch
from backend.slides.source import SlideRef, SourceResolver
from backend.slides.underway import DownloadUnderWay, without_waiting

Make = Callable[..., Settings]
LONG_S = 60
"""Only ends a test that fails."""

DRIP = Answer(bytes(100_000), every_s=0.02)


@pytest.fixture
def host() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def other() -> Iterator[Server]:
    with serving() as server:
        yield server


def slide(server: Server, path: str) -> SlideRef:
    """The reference of a slide about which its host was asked before."""
    return SlideRef("http", (server.url + path,), "v1")


def cached(settings: Settings) -> list[Path]:
    return sorted((settings.model_dir / "cache" / "slides").iterdir())


def ask(resolver: SourceResolver, ref: SlideRef) -> DownloadUnderWay | BackendError | Path:
    """What one who does not wait is told."""
    try:
        with without_waiting():
            (path,) = resolver.fetch(ref)
        return path
    except BackendError as error:
        return error


def ask_until_over(resolver: SourceResolver, ref: SlideRef) -> DownloadUnderWay | BackendError | Path:
    """The first answer that is not that the download is under way, or the last one after a long time."""
    until = time.monotonic() + LONG_S
    while isinstance(answer := ask(resolver, ref), DownloadUnderWay) and time.monotonic() < until:
        time.sleep(0.02)
    return answer


# --- hopeless -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [None, -1], ids=["of known length", "of unknown length"])
def test_a_body_of_a_byte_now_and_then_is_given_up_with_its_rate(
    settings: Make, host: Server, length: int | None
) -> None:
    host.answers["/x.svs"] = Answer(bytes(100_000), every_s=0.02, length=length)
    made = settings(allowed_hosts=(host.host,), download_timeout_s=0.5)
    with pytest.raises(
        DownloadFailed, match=r"too slowly: [0-9.]+ kB/s over .*50 kB/s are the least.*SLIDE_ROOTS"
    ) as e:
        SourceResolver(made).fetch(slide(host, "/x.svs"))
    assert e.value.retryable
    assert cached(made) == []


def test_a_header_that_does_not_end_is_given_up(settings: Make, host: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    host.answers["/x.svs"] = Answer(header_every_s=0.02)
    made = settings(allowed_hosts=(host.host,), download_timeout_s=0.3)
    with pytest.raises(DownloadFailed, match="without a complete header"):
        SourceResolver(made).fetch(slide(host, "/x.svs"))
    monkeypatch.setattr("backend.slides.download._ASK_TIMEOUT_S", 0.3)
    with pytest.raises(DownloadFailed, match="without a complete header"):
        SourceResolver(made).resolve(f"{host.url}/x.svs")


def test_a_tls_handshake_that_does_not_end_is_given_up(settings: Make) -> None:
    ended = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            for byte in b"\x16\x03\x03\x3f\xff" + bytes(0x3FFF):  # the start of a record, and what shall be in it
                if ended.wait(0.02):
                    return
                try:
                    connection.sendall(bytes([byte]))
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        at = f"127.0.0.1:{listener.getsockname()[1]}"
        server = threading.Thread(target=drip, args=(listener,))
        server.start()
        try:
            made = settings(allowed_hosts=(at,), download_timeout_s=0.3)
            with pytest.raises(DownloadFailed, match="did not answer in time"):
                SourceResolver(made).fetch(SlideRef("http", (f"https://{at}/x.svs",), "v1"))
        finally:
            ended.set()
            server.join()


def test_a_compressed_body_of_nothing_is_given_up(settings: Make, host: Server) -> None:
    """Each of its pieces is well-formed, and none of them holds a byte of the slide."""
    nothing = zlib.compressobj(wbits=31)
    body = nothing.flush(zlib.Z_SYNC_FLUSH) + b"\0\0\0\xff\xff" * 20_000
    host.answers["/x.svs"] = Answer(body, headers={"Content-Encoding": "gzip"}, every_s=0.02)
    made = settings(allowed_hosts=(host.host,), download_timeout_s=0.5)
    with pytest.raises(DownloadFailed, match="too slowly"):
        SourceResolver(made).fetch(slide(host, "/x.svs"))


def test_a_host_that_takes_its_time_and_is_fast_enough_is_waited_for(settings: Make, host: Server) -> None:
    host.answers["/x.svs"] = Answer(b"slide" * 400_000, every_s=0.1, piece=100_000)
    made = settings(allowed_hosts=(host.host,), download_timeout_s=1)
    (path,) = SourceResolver(made).fetch(slide(host, "/x.svs"))
    assert path.read_bytes() == b"slide" * 400_000


def test_the_pace_is_that_of_the_last_while_and_not_made_up_for_by_a_fast_start() -> None:
    with Watch("'x'", silence_s=0.2, longest_s=LONG_S) as watch:
        watch.expect_body()
        watch.came(1_000_000_000)
        until = time.monotonic() + LONG_S
        with pytest.raises(DownloadFailed, match=r"too slowly.*after 1000\.0 MB"):
            while time.monotonic() < until:
                time.sleep(0.02)
                watch.came(1)


def test_a_body_that_is_fast_and_never_complete_is_given_up() -> None:
    with Watch("'x'", silence_s=0.2, longest_s=0.5) as watch:
        watch.expect_body()
        until = time.monotonic() + LONG_S
        with pytest.raises(DownloadFailed, match=r"not complete after 0\.5 s.*JOB_TIMEOUT_S"):
            while time.monotonic() < until:
                time.sleep(0.02)
                watch.came(10 * MIN_BYTES_PER_S)


# --- once ---------------------------------------------------------------------------------------------------------


def test_a_slide_that_many_want_at_once_is_downloaded_once(settings: Make, host: Server) -> None:
    host.answers["/x.svs"] = Answer(b"slide" * 100_000, every_s=0.05, piece=50_000)
    made = settings(allowed_hosts=(host.host,))
    paths: list[Path] = []
    threads = [
        # Each with a resolver of its own, as the parts of a process have them.
        threading.Thread(target=lambda: paths.extend(SourceResolver(made).fetch(slide(host, "/x.svs"))))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    assert len(paths) == 6 and len(set(paths)) == 1
    assert host.gets("/x.svs") == 1
    assert cached(made) == paths[:1]


def test_who_does_not_wait_is_told_how_far_it_is_and_finds_it_later(settings: Make, host: Server) -> None:
    go_on = threading.Event()
    host.answers["/x.svs"] = Answer(b"slide" * 100_000)
    host.before_body = lambda: go_on.wait(LONG_S)
    resolver = SourceResolver(settings(allowed_hosts=(host.host,)))
    ref = slide(host, "/x.svs")
    until = time.monotonic() + LONG_S
    while "of 0.5 MB" not in str(answer := ask(resolver, ref)) and time.monotonic() < until:
        time.sleep(0.02)  # its length is not known yet
    assert isinstance(answer, DownloadUnderWay) and answer.retryable
    assert "x.svs' is being downloaded: 0.0 of 0.5 MB have come" in str(answer)
    go_on.set()
    path = ask_until_over(resolver, ref)
    assert isinstance(path, Path) and path.read_bytes() == b"slide" * 100_000
    assert host.gets("/x.svs") == 1


def test_what_it_failed_by_is_told_to_the_next_who_asks_and_then_it_is_tried_again(
    settings: Make, host: Server
) -> None:
    resolver = SourceResolver(settings(allowed_hosts=(host.host,)))
    ref = slide(host, "/x.svs")
    failure = ask_until_over(resolver, ref)
    assert isinstance(failure, SlideNotFound) and "HTTP 404" in str(failure)
    assert host.gets("/x.svs") == 1
    host.answers["/x.svs"] = Answer(b"slide")
    path = ask_until_over(resolver, ref)
    assert isinstance(path, Path) and path.read_bytes() == b"slide"
    assert host.gets("/x.svs") == 2


def test_who_waits_and_who_does_not_share_one_download(settings: Make, host: Server) -> None:
    go_on = threading.Event()
    host.answers["/x.svs"] = Answer(b"slide")
    host.before_body = lambda: go_on.wait(LONG_S)
    resolver = SourceResolver(settings(allowed_hosts=(host.host,)))
    ref = slide(host, "/x.svs")
    assert isinstance(ask(resolver, ref), DownloadUnderWay)
    threading.Timer(0.2, go_on.set).start()
    assert resolver.fetch(ref)[0].read_bytes() == b"slide"
    assert host.gets("/x.svs") == 1


def test_a_download_whose_thread_was_interrupted_is_begun_again_by_the_next(settings: Make, host: Server) -> None:
    """As by the end of a job's time: that is the matter of this job, and no failure of the slide."""

    class TimeIsUp(Exception):
        pass

    asked_meanwhile: list[object] = []

    def interrupted() -> dict[str, str]:
        if not asked_meanwhile:
            elsewhere = threading.Thread(target=lambda: asked_meanwhile.append(ask(resolver, ref)))
            elsewhere.start()
            elsewhere.join()
            raise TimeIsUp
        return {}

    made = settings(label_studio_url=host.url)
    resolver = SourceResolver(made, label_studio_headers=interrupted)
    ref = resolver.resolve("/data/upload/1/x.svs")
    host.answers["/data/upload/1/x.svs"] = Answer(b"slide")
    with pytest.raises(TimeIsUp):
        resolver.fetch(ref)
    (told,) = asked_meanwhile
    assert isinstance(told, DownloadUnderWay) and told.download.over
    told.download.check()
    assert resolver.fetch(ref)[0].read_bytes() == b"slide"


def test_a_slow_host_holds_up_no_slide_of_another(settings: Make, host: Server, other: Server) -> None:
    resolver = SourceResolver(settings(allowed_hosts=(host.host, other.host)))
    for number in range(12):
        host.answers[f"/{number}.svs"] = DRIP
        assert isinstance(ask(resolver, slide(host, f"/{number}.svs")), DownloadUnderWay)
    other.answers["/x.svs"] = Answer(b"slide")
    path = ask_until_over(resolver, slide(other, "/x.svs"))
    assert isinstance(path, Path) and path.read_bytes() == b"slide"
    assert len(host.requests) <= 4, "the others wait their turn"
