"""Slides come from where the settings allow, and from nowhere else."""

from __future__ import annotations

import json
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from file_server import Answer, Server, serving
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from backend.errors import (
    BackendError,
    DownloadFailed,
    MppUnknown,
    SettingsError,
    SlideNotFound,
    SourceError,
    SourceRefused,
    TaskFieldMissing,
)
from backend.settings import Settings
from backend.slides.places import classify, public
from backend.slides.source import SlideRef, SourceResolver

Make = Callable[..., Settings]
TOKEN = {"Authorization": "Token secret"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "slides"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.svs").write_bytes(b"slide a")
    (folder / "sub" / "b c.svs").write_bytes(b"slide b")
    (tmp_path / "secret.svs").write_bytes(b"secret")
    (tmp_path / "slides-not").mkdir()
    (tmp_path / "slides-not" / "x.svs").write_bytes(b"neighbour")
    return folder


@pytest.fixture
def studio() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def host() -> Iterator[Server]:
    with serving() as server:
        yield server


def local(settings: Make, root: Path, **more: object) -> SourceResolver:
    return SourceResolver(settings(slide_roots=(root,), **more), label_studio_headers=lambda: TOKEN)


def remote(settings: Make, studio: Server, *, hosts: tuple[str, ...] = (), **more: object) -> SourceResolver:
    made = settings(label_studio_url=studio.url, allowed_hosts=hosts, **more)
    return SourceResolver(made, label_studio_headers=lambda: TOKEN)


# --- files --------------------------------------------------------------------------------------------------------


def test_a_file_inside_a_root_is_found_by_path_url_and_local_files_address(root: Path, settings: Make) -> None:
    resolver = local(settings, root, label_studio_url="http://studio:8080")
    file = root / "sub" / "b c.svs"
    for value in (
        str(file),
        "sub/b c.svs",
        file.as_uri(),
        f"file://localhost{root}/sub/b%20c.svs",
        f"{root}/sub/../sub/b c.svs",
        "/data/local-files/?d=sub/b%20c.svs",
        "http://studio:8080/data/local-files/?d=sub/b+c.svs",
        "http://other.name/data/local-files/?d=/sub/b%20c.svs",
    ):
        ref = resolver.resolve(value)
        assert (ref.kind, ref.locations) == ("file", (str(file),))
        assert resolver.fetch(ref) == (file,)


@pytest.mark.parametrize(
    "value",
    [
        "{tmp}/secret.svs",
        "{root}/../secret.svs",
        "{root}/sub/../../secret.svs",
        "../secret.svs",
        "file://{root}/../secret.svs",
        "file://{root}/%2e%2e/secret.svs",
        "file://{root}/..%2fsecret.svs",
        "{tmp}/slides-not/x.svs",
        "{root}/link.svs",
        "{root}/out/secret.svs",
        "/data/local-files/?d=../secret.svs",
        "/data/local-files/?d=sub/../../secret.svs",
        "/data/local-files/?d=%2e%2e/secret.svs",
        "/data/local-files/?d=link.svs",
        "/data/local-files/?d=out/secret.svs",
        "/data/local-files/?d=",
        "/etc/passwd",
        "file:///etc/passwd",
        "file://evil.example{root}/a.svs",
        "/proc/self/environ",
    ],
)
def test_a_file_outside_the_roots_is_refused(root: Path, tmp_path: Path, settings: Make, value: str) -> None:
    (root / "link.svs").symlink_to(tmp_path / "secret.svs")
    (root / "out").symlink_to(tmp_path)
    with pytest.raises(SourceRefused):
        local(settings, root).resolve(value.format(root=root, tmp=tmp_path))


def test_the_refusal_says_what_to_set(root: Path, tmp_path: Path, settings: Make) -> None:
    with pytest.raises(SourceRefused, match=r"secret\.svs' lies outside the allowed folders.*SLIDE_ROOTS"):
        local(settings, root).resolve(str(tmp_path / "secret.svs"))
    with pytest.raises(SourceRefused, match=r"no folder is allowed.*SLIDE_ROOTS"):
        SourceResolver(settings()).resolve(str(root / "a.svs"))


@given(st.text(st.sampled_from("./\\%2eEfF0 asvb\0\n~:@?#"), max_size=30))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
def test_no_text_leads_out_of_the_roots(root: Path, settings: Make, text: str) -> None:
    made = settings(slide_roots=(root,), label_studio_url="http://studio:8080")
    for value in (text, f"{root}/{text}", f"file://{root}/{text}", f"/data/local-files/?d={text}"):
        try:
            place = classify(value, made)
        except BackendError:
            continue
        if place.kind == "file":
            assert Path(os.path.realpath(place.location)).is_relative_to(root)
        else:
            assert place.kind == "label_studio"
            assert place.location.startswith("http://studio:8080/data/local-files/")


def test_a_link_inside_the_roots_is_its_target(root: Path, settings: Make) -> None:
    (root / "inside.svs").symlink_to(root / "a.svs")
    ref = local(settings, root).resolve(str(root / "inside.svs"))
    assert ref.locations == (str(root / "a.svs"),)


def test_folders_pipes_and_devices_are_refused(root: Path, settings: Make) -> None:
    os.mkfifo(root / "pipe.svs")
    resolver = local(settings, root)
    with pytest.raises(SourceRefused, match="not a regular file"):
        resolver.resolve(str(root / "pipe.svs"))
    with pytest.raises(SourceRefused, match="is a folder"):
        resolver.resolve(str(root / "sub"))
    with pytest.raises(SourceRefused, match="not a regular file"):
        SourceResolver(settings(slide_roots=(Path("/dev"),))).resolve("/dev/null")


def test_a_missing_file_is_not_found(root: Path, settings: Make) -> None:
    with pytest.raises(SlideNotFound, match=r"gone\.svs"):
        local(settings, root).resolve(str(root / "gone.svs"))
    with pytest.raises(SlideNotFound, match=r"below\.svs"):
        local(settings, root).resolve(str(root / "a.svs" / "below.svs"))


def test_a_root_below_data_is_not_taken_for_label_studio(tmp_path: Path, settings: Make) -> None:
    with pytest.raises(SlideNotFound):
        SourceResolver(settings(slide_roots=(Path("/data/slides"),))).resolve("/data/slides/gone.svs")


@pytest.mark.parametrize("value", ["", "   ", []])
def test_nothing_is_a_missing_field(root: Path, settings: Make, value: object) -> None:
    with pytest.raises(TaskFieldMissing):
        local(settings, root).resolve(value)


@pytest.mark.parametrize("value", [None, 7, {"url": "x"}, ["{root}/a.svs", None]])
def test_a_value_that_is_no_text_is_an_error(root: Path, settings: Make, value: object) -> None:
    if isinstance(value, list):
        value = [v.format(root=root) if isinstance(v, str) else v for v in value]
    with pytest.raises(SourceError, match="must be text"):
        local(settings, root).resolve(value)


@pytest.mark.parametrize("value", ["a\nb", "\x00", "x" * 10_000, "a\x7f.svs"])
def test_control_characters_and_endless_text_are_refused(root: Path, settings: Make, value: str) -> None:
    with pytest.raises(SourceRefused, match="control characters or is longer"):
        local(settings, root).resolve(f"{root}/{value}z")


# --- identity -----------------------------------------------------------------------------------------------------


def test_the_identity_changes_with_the_file(root: Path, settings: Make) -> None:
    resolver, file = local(settings, root), root / "a.svs"
    first = resolver.resolve(str(file))
    assert resolver.resolve(str(file)) == first
    os.utime(file, ns=(1, 1))
    second = resolver.resolve(str(file))
    file.write_bytes(b"longer now")
    os.utime(file, ns=(1, 1))
    third = resolver.resolve(str(file))
    assert len({first.identity, second.identity, third.identity, resolver.resolve("sub/b c.svs").identity}) == 4


def test_a_file_that_changed_after_it_was_resolved_is_not_analysed_under_the_old_key(
    root: Path, settings: Make
) -> None:
    resolver = local(settings, root)
    ref = resolver.resolve(str(root / "a.svs"))
    (root / "a.svs").write_bytes(b"other bytes")
    with pytest.raises(SourceError, match="has changed since"):
        resolver.fetch(ref)


def test_the_identity_of_an_mrxs_covers_its_folder(root: Path, settings: Make) -> None:
    (root / "m.mrxs").write_bytes(b"m")
    (root / "m").mkdir()
    (root / "m" / "Data0000.dat").write_bytes(b"d")
    resolver = local(settings, root)
    first = resolver.resolve("m.mrxs").identity
    (root / "m" / "Data0001.dat").write_bytes(b"e")
    assert resolver.resolve("m.mrxs").identity != first


def dicom(series: bytes) -> bytes:
    """The head of an image of a slide (PS3.10, 7.1; explicit VR, little endian): its kind of object and its series."""

    def element(tag: bytes, uid: bytes) -> bytes:
        return tag + b"UI" + struct.pack("<H", len(uid) + len(uid) % 2) + uid + b"\0" * (len(uid) % 2)

    meta = element(b"\2\0\x10\0", b"1.2.840.10008.1.2.1")
    data = element(b"\x08\0\x16\0", b"1.2.840.10008.5.1.4.1.1.77.1.6") + element(b"\x20\0\x0e\0", series)
    return bytes(128) + b"DICM" + b"\2\0\0\0UL\4\0" + struct.pack("<I", len(meta)) + meta + data


def test_the_identity_of_a_dicom_slide_covers_its_series(root: Path, settings: Make) -> None:
    for name in ("1.dcm", "2"):
        (root / "sub" / name).write_bytes(dicom(b"1.2.3"))
    resolver = local(settings, root)
    first = resolver.resolve("sub/1.dcm").identity
    for name, data in {"other series.dcm": dicom(b"1.2.4"), "damaged.dcm": bytes(128) + b"DICM"}.items():
        (root / "sub" / name).write_bytes(data)
    assert resolver.resolve("sub/1.dcm").identity == first
    (root / "sub" / "3").write_bytes(dicom(b"1.2.3"))
    assert resolver.resolve("sub/1.dcm").identity != first


def test_a_reference_survives_json(root: Path, settings: Make) -> None:
    resolver = local(settings, root)
    for ref in (resolver.resolve("a.svs", mpp=0.25), resolver.resolve(["a.svs", "sub/b c.svs"])):
        assert SlideRef.from_json(json.loads(json.dumps(ref.to_json(), allow_nan=False))) == ref


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "shell"},
        {"kind": ["file"]},
        {"kind": None},
        {"locations": []},
        {"locations": "a.svs"},
        {"locations": [1]},
        {"locations": ["a", "b"]},
        {"identity": ""},
        {"identity": 5},
        {"mpp": "0.5"},
        {"mpp": True},
        {"mpp": float("nan")},
    ],
)
def test_nonsense_is_no_reference(change: dict[str, object]) -> None:
    good = {"kind": "file", "locations": ["/a.svs"], "identity": "x", "mpp": 0.5}
    assert SlideRef.from_json(good).mpp == 0.5
    with pytest.raises(SourceError):
        SlideRef.from_json({**good, **change})
    for other in (None, [], "x", 3):
        with pytest.raises(SourceError):
            SlideRef.from_json(other)


def test_a_scale_that_is_no_number_does_not_get_into_a_reference(root: Path, settings: Make) -> None:
    with pytest.raises(MppUnknown, match="mpp = nan"):
        local(settings, root).resolve("a.svs", mpp=float("nan"))


def test_a_poisoned_reference_is_refused(root: Path, tmp_path: Path, settings: Make, host: Server) -> None:
    host.answers["/x.svs"] = Answer(b"x")
    resolver = local(settings, root)
    good = resolver.resolve("a.svs")
    for kind, location in (
        ("file", str(tmp_path / "secret.svs")),
        ("file", f"{root}/../secret.svs"),
        ("file", f"{root}/./a.svs"),
        ("file", f"{host.url}/x.svs"),
        ("http", f"{host.url}/x.svs"),
        ("http", str(root / "a.svs")),
        ("label_studio", f"{host.url}/data/upload/1/x.svs"),
        ("fsspec", "memory://x.svs"),
        ("patches", "/etc/passwd"),
    ):
        with pytest.raises(SourceError):
            resolver.fetch(SlideRef(kind, (location,), good.identity))
    assert host.requests == []


# --- patches ------------------------------------------------------------------------------------------------------


def test_a_list_is_a_bag_of_patches_in_its_order(root: Path, settings: Make, studio: Server) -> None:
    studio.answers["/data/upload/3/p.png"] = Answer(b"uploaded", token=TOKEN["Authorization"])
    resolver = local(settings, root, label_studio_url=studio.url)
    values = ["sub/b c.svs", "/data/upload/3/p.png", "a.svs"]
    ref = resolver.resolve(values)
    assert ref.kind == "patches"
    assert studio.requests == []
    paths = resolver.fetch(SlideRef.from_json(ref.to_json()))
    assert [p.read_bytes() for p in paths] == [b"slide b", b"uploaded", b"slide a"]
    assert resolver.resolve(values[::-1]).identity != ref.identity


# --- Label Studio -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["/data/upload/22/x-1.jpg", "{url}/data/upload/22/x-1.jpg"])
def test_an_upload_is_fetched_with_the_token_and_not_asked_for_before(
    settings: Make, studio: Server, value: str
) -> None:
    studio.answers["/data/upload/22/x-1.jpg"] = Answer(b"picture", token=TOKEN["Authorization"])
    resolver = remote(settings, studio)
    ref = resolver.resolve(value.format(url=studio.url))
    assert (ref.kind, studio.requests) == ("label_studio", [])
    (path,) = resolver.fetch(ref)
    assert path.read_bytes() == b"picture"
    assert path.suffix == ".jpg"
    assert resolver.fetch(ref) == (path,)
    assert studio.requests == [("GET", "/data/upload/22/x-1.jpg", "Token secret")]


def test_a_local_file_that_is_not_here_comes_from_label_studio(settings: Make, studio: Server, root: Path) -> None:
    there = "/data/local-files/?d=slides/x.svs"
    studio.answers[there] = Answer(b"far", headers={"ETag": '"1"'}, token=TOKEN["Authorization"])
    resolver = local(settings, root, label_studio_url=studio.url)
    ref = resolver.resolve(there)
    assert ref.kind == "label_studio"
    assert '"1"' in ref.identity
    (path,) = resolver.fetch(ref)
    assert path.read_bytes() == b"far"


def test_without_a_valid_token_the_message_names_the_setting(settings: Make, studio: Server) -> None:
    studio.answers["/data/upload/1/x.jpg"] = Answer(b"x", token="Token other")
    resolver = remote(settings, studio)
    with pytest.raises(SourceRefused, match=r"HTTP 401.*LABEL_STUDIO_API_KEY"):
        resolver.fetch(resolver.resolve("/data/upload/1/x.jpg"))
    studio.answers["/data/upload/1/x.jpg"] = Answer(status=302, headers={"Location": "/user/login/?next=/data"})
    with pytest.raises(SourceRefused, match=r"asks for a login.*LABEL_STUDIO_API_KEY"):
        resolver.fetch(resolver.resolve("/data/upload/1/x.jpg"))


def test_a_relative_address_needs_label_studios_own(settings: Make) -> None:
    with pytest.raises(SourceRefused, match="Set LABEL_STUDIO_URL"):
        SourceResolver(settings()).resolve("/data/upload/1/x.jpg")


@pytest.mark.parametrize(
    "value",
    [
        "{url}/api/projects/1/export",
        "{url}/user/account",
        "{url}/data/../api/users",
        "{url}/data/%2e%2e/api/users",
        "{url}/data/%252e%252e/api/users",
        "{url}/data/..%2fapi/users",
        "/data/../api/users",
        "/data/upload/../../api/users",
        "{url}/data//api",
        "{url}/tasks/1/resolve/../../../api/users",
        "{url}/",
    ],
)
def test_the_token_reaches_label_studios_files_and_nothing_else(settings: Make, studio: Server, value: str) -> None:
    resolver = remote(settings, studio)
    with pytest.raises(SourceError):
        resolver.fetch(resolver.resolve(value.format(url=studio.url)))
    assert studio.requests == []


def test_a_redirect_to_a_store_is_followed_without_the_token(settings: Make, studio: Server, host: Server) -> None:
    resolve = "/tasks/5/resolve/?fileuri=czM6Ly9i"
    studio.answers[resolve] = Answer(
        status=303, headers={"Location": f"{host.url}/bucket/x.svs?signature=abc"}, token=TOKEN["Authorization"]
    )
    host.answers["/bucket/x.svs?signature=abc"] = Answer(b"stored", headers={"ETag": '"e"'}, methods=("GET",))
    with pytest.raises(SourceRefused, match=f"A redirect leads to.*{host.host} is not an allowed host"):
        remote(settings, studio).resolve(resolve)
    assert host.requests == []
    resolver = remote(settings, studio, hosts=(host.host,))
    ref = resolver.resolve(studio.url + resolve)
    assert ref.kind == "label_studio"
    (path,) = resolver.fetch(ref)
    assert path.read_bytes() == b"stored"
    assert {token for _, _, token in host.requests} == {None}
    assert {token for _, _, token in studio.requests} == {"Token secret"}


def test_our_own_thumbnails_are_not_slides(settings: Make) -> None:
    resolver = SourceResolver(
        settings(public_url="https://wsc.example:9443/ml", allowed_hosts=("wsc.example",)), label_studio_headers=dict
    )
    with pytest.raises(SourceRefused, match=r"made by this backend.*`slide`"):
        resolver.resolve("https://wsc.example:9443/ml/thumbnails/abc.jpg")
    with pytest.raises(SourceRefused, match="made by this backend"):
        SourceResolver(settings(port=9090)).resolve("http://localhost:9090/thumbnails/abc.jpg")


# --- http ---------------------------------------------------------------------------------------------------------


def test_a_slide_comes_from_an_allowed_host_without_any_token(settings: Make, studio: Server, host: Server) -> None:
    host.answers["/x.svs"] = Answer(b"bytes", headers={"ETag": '"v1"', "Last-Modified": "today"})
    for allowed in (host.host, "127.0.0.1"):
        resolver = remote(settings, studio, hosts=(allowed,))
        ref = resolver.resolve(f"{host.url}/x.svs")
        assert ref.kind == "http"
        assert resolver.fetch(ref)[0].read_bytes() == b"bytes"
    assert {token for _, _, token in host.requests} == {None}


def test_the_identity_of_a_url_follows_its_etag_and_is_asked_for_once_a_minute(
    settings: Make, studio: Server, host: Server
) -> None:
    host.answers["/x.svs"] = Answer(b"1", headers={"ETag": '"v1"'})
    resolver = remote(settings, studio, hosts=(host.host,))
    first = resolver.resolve(f"{host.url}/x.svs")
    assert resolver.resolve(f"{host.url}/x.svs") == first
    assert [method for method, _, _ in host.requests] == ["HEAD"]
    old = resolver.fetch(first)
    host.answers["/x.svs"] = Answer(b"2", headers={"ETag": '"v2"'})
    later = remote(settings, studio, hosts=(host.host,))
    second = later.resolve(f"{host.url}/x.svs")
    assert second.identity != first.identity
    new = later.fetch(second)
    assert (old[0].read_bytes(), new[0].read_bytes()) == (b"1", b"2")


@pytest.mark.parametrize(
    "value",
    [
        "{url}/x.svs",
        "http://user:pass@{host}/x.svs",
        "http://allowed.example@{host}/x.svs",
        "http://allowed.example\\@{host}/x.svs",
        "http://{host}\\.allowed.example/x.svs",
        "http://allowed.example.evil.example/x.svs",
        "http://allowed.example%2eevil.example/x.svs",
        "http:///x.svs",
        "http://[::1/x.svs",
        "http://169.254.169.254/latest/meta-data",
        "http://allowed.example:99999/x.svs",
        "ftp://allowed.example/x.svs",
        "gopher://allowed.example/",
        "data:image/png;base64,AAAA",
        "javascript:alert(1)",
        "s3://bucket/x.svs",
        "memory://x.svs",
        "simplecache::s3://bucket/x.svs",
        "github://a:b@c/x.svs",
    ],
)
def test_every_other_place_is_refused_without_asking_it(
    settings: Make, studio: Server, host: Server, value: str
) -> None:
    resolver = remote(settings, studio, hosts=("allowed.example",))
    with pytest.raises(SourceRefused):
        resolver.resolve(value.format(url=host.url, host=host.host))
    assert host.requests == studio.requests == []


def test_the_refusal_of_a_host_says_what_to_set_and_keeps_signatures_secret(settings: Make, studio: Server) -> None:
    with pytest.raises(SourceRefused) as caught:
        remote(settings, studio).resolve("https://slides.example/x.svs?signature=verysecret")
    assert "Add slides.example:443 to ALLOWED_HOSTS" in str(caught.value)
    assert "verysecret" not in str(caught.value)
    with pytest.raises(SourceRefused, match="Add s3 to REMOTE_STORES"):
        remote(settings, studio).resolve("s3://bucket/x.svs")


def test_a_redirect_is_checked_like_the_first_address(settings: Make, studio: Server, host: Server, root: Path) -> None:
    resolver = remote(settings, studio, hosts=(host.host,), slide_roots=(root,))
    for i, target in enumerate(
        (
            "http://169.254.169.254/latest",
            f"file://{root}/a.svs",
            f"{studio.url}/api/users",
            f"http://x@{host.host}/y",
            f"{host.url}/data/local-files/../x",
        )
    ):
        host.answers[f"/{i}"] = Answer(status=302, headers={"Location": target})
        with pytest.raises((SourceRefused, SlideNotFound)):
            resolver.resolve(f"{host.url}/{i}")
    assert studio.requests == []
    host.answers["/round"] = Answer(status=302, headers={"Location": "/round"})
    with pytest.raises(SourceRefused, match="redirects more than 5 times"):
        resolver.resolve(f"{host.url}/round")


@pytest.mark.parametrize(
    ("status", "error", "again"),
    [
        (404, SlideNotFound, False),
        (403, SourceRefused, False),
        (500, DownloadFailed, True),
        (429, DownloadFailed, True),
        (418, SourceError, False),
    ],
)
def test_what_the_server_says_decides_whether_trying_again_helps(
    settings: Make, studio: Server, host: Server, status: int, error: type[BackendError], again: bool
) -> None:
    host.answers["/x.svs"] = Answer(status=status)
    with pytest.raises(error, match=f"HTTP {status}") as caught:
        remote(settings, studio, hosts=(host.host,)).resolve(f"{host.url}/x.svs")
    assert caught.value.retryable is again


def test_an_absent_server_may_come_back(settings: Make, studio: Server) -> None:
    with serving() as gone:
        url = f"{gone.url}/x.svs"
    with pytest.raises(DownloadFailed) as caught:
        remote(settings, studio, hosts=("127.0.0.1",)).resolve(url)
    assert caught.value.retryable


# --- downloads ----------------------------------------------------------------------------------------------------


def cached(settings: Settings) -> list[Path]:
    return sorted((settings.model_dir / "cache" / "slides").iterdir())


def test_a_download_over_the_limit_leaves_nothing_behind(settings: Make, studio: Server, host: Server) -> None:
    host.answers["/big.svs"] = Answer(bytes(5000))
    made = settings(allowed_hosts=(host.host,), download_max_bytes=4999)
    resolver = SourceResolver(made)
    with pytest.raises(SourceRefused, match=r"larger than 4999 bytes.*DOWNLOAD_MAX_BYTES"):
        resolver.fetch(resolver.resolve(f"{host.url}/big.svs"))
    assert cached(made) == []


def test_a_compressed_answer_cannot_get_round_the_limit(settings: Make, host: Server) -> None:
    import gzip

    host.answers["/bomb.svs"] = Answer(gzip.compress(bytes(1_000_000)), headers={"Content-Encoding": "gzip"})
    made = settings(allowed_hosts=(host.host,), download_max_bytes=100_000)
    resolver = SourceResolver(made)
    with pytest.raises(SourceRefused, match="larger than 100000 bytes"):
        resolver.fetch(resolver.resolve(f"{host.url}/bomb.svs"))
    assert cached(made) == []


def test_a_download_that_breaks_off_leaves_nothing_behind(settings: Make, host: Server) -> None:
    host.answers["/cut.svs"] = Answer(bytes(500), length=1000)
    made = settings(allowed_hosts=(host.host,))
    resolver = SourceResolver(made)
    with pytest.raises(DownloadFailed):
        resolver.fetch(resolver.resolve(f"{host.url}/cut.svs"))
    assert cached(made) == []


def test_a_silent_server_does_not_hold_a_worker_for_ever(settings: Make, host: Server) -> None:
    host.answers["/slow.svs"] = Answer(b"x")
    made = settings(allowed_hosts=(host.host,), download_timeout_s=0.2)
    resolver = SourceResolver(made)
    ref = resolver.resolve(f"{host.url}/slow.svs")
    done = threading.Event()
    host.before_body = lambda: done.wait(20)
    try:
        with pytest.raises(DownloadFailed, match="did not answer in time"):
            resolver.fetch(ref)
    finally:
        done.set()


def test_a_slide_of_many_files_cannot_be_downloaded(settings: Make, host: Server) -> None:
    with pytest.raises(SourceRefused, match=r"slide of many files.*SLIDE_ROOTS"):
        SourceResolver(settings(allowed_hosts=(host.host,))).resolve(f"{host.url}/x.mrxs")


def test_the_cache_is_trimmed_oldest_first_but_not_what_is_in_use(settings: Make, host: Server) -> None:
    made = settings(allowed_hosts=(host.host,), download_cache_max_bytes=2500)
    resolver = SourceResolver(made)
    names = ["a", "b", "c"]
    for name in [*names, "d"]:
        host.answers[f"/{name}.svs"] = Answer(name.encode() * 1000)
    paths = {name: resolver.fetch(resolver.resolve(f"{host.url}/{name}.svs"))[0] for name in names}
    assert len(cached(made)) == 3  # over the limit, and all fetched just now: another process may be opening them
    hour = time.time() - 3600
    for age, name in enumerate(names):
        os.utime(paths[name], (hour + age, hour + age))
    holding, let_go = threading.Event(), threading.Event()

    def use_oldest() -> None:
        SourceResolver(made).fetch(resolver.resolve(f"{host.url}/a.svs"))
        os.utime(paths["a"], (hour, hour))
        holding.set()
        let_go.wait(20)

    user = threading.Thread(target=use_oldest)
    user.start()
    assert holding.wait(20)
    resolver.fetch(resolver.resolve(f"{host.url}/d.svs"))
    assert [paths[name].exists() for name in names] == [True, False, False]
    let_go.set()
    user.join()
    resolver.fetch(resolver.resolve(f"{host.url}/d.svs"))
    assert paths["a"].exists()  # 2000 bytes are below the limit
    resolver.fetch(resolver.resolve(f"{host.url}/b.svs"))
    assert not paths["a"].exists()


# --- fsspec -------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/x.svs", b"in store")
    yield fs
    fs.rm("/bucket", recursive=True)


def test_a_slide_comes_from_a_store_that_is_configured(settings: Make, memory: fsspec.AbstractFileSystem) -> None:
    resolver = SourceResolver(settings(remote_stores=("memory",)))
    ref = resolver.resolve("memory://bucket/x.svs")
    assert ref.kind == "fsspec"
    assert resolver.fetch(ref)[0].read_bytes() == b"in store"
    with pytest.raises(SlideNotFound):
        resolver.resolve("memory://bucket/gone.svs")
    with pytest.raises(SourceRefused, match="is a folder"):
        resolver.resolve("memory://bucket")
    with pytest.raises(SourceRefused, match="larger than 3 bytes"):
        SourceResolver(settings(remote_stores=("memory",), download_max_bytes=3, model_dir="/nonexistent")).fetch(ref)


def test_a_store_cannot_be_used_to_read_files_or_chains(settings: Make, root: Path) -> None:
    resolver = SourceResolver(settings(remote_stores=("memory", "s3")))
    for value in (f"local://{root}/a.svs", f"file://{root}/a.svs", f"memory://x::file://{root}/a.svs", "s3://k:v@b/x"):
        with pytest.raises(SourceRefused):
            resolver.resolve(value)


def test_a_store_whose_package_is_missing_is_a_setting_to_correct(settings: Make) -> None:
    with pytest.raises(SettingsError, match="nosuchstore"):
        SourceResolver(settings(remote_stores=("nosuchstore",))).resolve("nosuchstore://x.svs")


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ("s3://bucket/key@2x.svs", "s3://bucket/key@2x.svs"),
        ("gs://b/c#1?.svs", "gs://b/c#1?.svs"),
        ("azure-blob://b/a b.svs", "azure-blob://b/a b.svs"),
        ("s3://id:secret@bucket/a.svs", "s3://…@bucket/a.svs"),
        ("https://u:pw@h/a.svs?X-Amz-Signature=1", "https://…@h/a.svs"),
        ("/slides/a@2x#1.svs", "/slides/a@2x#1.svs"),
    ],
)
def test_a_location_is_shown_without_secrets_and_otherwise_whole(value, seen):
    assert public(value) == seen
