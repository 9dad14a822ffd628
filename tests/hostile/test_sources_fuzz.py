"""Whatever a task says of where its slide is: only files in the roots and servers that are allowed are ever opened.

What is tested here is what happens, not what is returned: the interpreter reports each file that is opened and each connection that is made.
"""

from __future__ import annotations

import io
import json
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openslide
import pytest
from hostile.watching import Seen, watching
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from reliability_report import record
from slides.file_server import Answer, Server, serving

from backend.errors import BackendError, SourceError, SourceRefused
from backend.settings import Settings, load_settings
from backend.slides.reader import open_slide
from backend.slides.source import SlideRef, SourceResolver

SECRET = "Token of-label-studio"
FUZZ = hypothesis_settings(
    max_examples=600,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@dataclass
class World:
    """A backend's view of the world: a root with traps in it, an allowed server, Label Studio, and a server that must never be asked."""

    folder: Path
    root: Path
    outside: Path
    settings: Settings
    allowed: Server
    studio: Server
    forbidden: Server

    def resolver(self) -> SourceResolver:
        return SourceResolver(self.settings, label_studio_headers=lambda: {"Authorization": SECRET})

    def place_names(self) -> dict[str, str]:
        """What the words of the generated locations stand for."""
        return {
            "ROOT": str(self.root),
            "OUT": str(self.outside),
            "ALLOWED": self.allowed.host,
            "STUDIO": self.studio.host,
            "FORBIDDEN": self.forbidden.host,
            "PORT": str(self.forbidden.port),
        }

    def check(self, seen: Seen) -> None:
        """Fail unless all that was opened lies in the roots, our own cache, or Python's libraries, and only the two servers were asked."""
        ours = [self.root, self.settings.model_dir]
        for path in map(Path, seen.files):
            # The folder of the tests may itself lie below a library's (a checkout that is installed in place).
            library = any(map(path.is_relative_to, _LIBRARIES)) and not path.is_relative_to(self.folder)
            assert library or any(map(path.is_relative_to, ours)), f"{path} was opened"
        servers = {("127.0.0.1", self.allowed.port), ("127.0.0.1", self.studio.port)}
        assert {address[:2] for address in seen.addresses} <= servers
        assert self.forbidden.requests == []
        for method, path, token in self.allowed.requests:
            assert token is None, f"the token went to another server: {method} {path}"
        for method, path, _ in self.studio.requests:
            assert method in ("HEAD", "GET")
            assert path.split("?")[0].startswith(
                ("/data/", "/storage-data/uploaded/", "/tasks/", "/api/tasks/", "/projects/", "/api/projects/")
            ), path


_LIBRARIES = [
    Path(os.path.realpath(p))
    for p in {sys.prefix, sys.base_prefix, *filter(None, sys.path[1:])}
    if Path(p).is_dir() and "tests" not in p
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    root, outside = folder / "slides", folder / "outside"
    (root / "sub").mkdir(parents=True)
    outside.mkdir()
    for path in (root / "a.svs", root / "sub" / "b c.svs", root / "ünï.svs", root / "%2e%2e", root / "data"):
        path.write_bytes(b"inside")
    for name in ("secret.svs", "secret.png", "Data0000.dat", "1.dcm"):
        (outside / name).write_bytes(b"outside")
    (folder / "slides-not").mkdir()
    (folder / "slides-not" / "a.svs").write_bytes(b"a neighbour by name")
    (root / "link.svs").symlink_to(outside / "secret.svs")
    (root / "out").symlink_to(outside)
    (root / "sub" / "up").symlink_to(folder)
    (root / "loop.svs").symlink_to("loop.svs")
    (root / "proc.svs").symlink_to("/proc/self/environ")
    (root / "m.mrxs").write_bytes(b"index")
    (root / "m").symlink_to(outside)
    with serving() as allowed, serving() as studio, serving() as forbidden:
        for server in (allowed, studio):
            for path in (
                "/x.svs",
                "/data/upload/1/x.svs",
                "/data/local-files/?d=far.svs",
                "/tasks/1/resolve/?fileuri=czM6Ly9i",
            ):
                server.answers[path] = Answer(b"served", headers={"ETag": '"1"'})
        settings = load_settings(
            model_dir=folder / "model-dir",
            slide_roots=(root,),
            allowed_hosts=(allowed.host, "allowed.example"),
            label_studio_url=studio.url,
            remote_stores=("memory",),
            download_timeout_s=5,
        )
        yield World(folder, root, outside, settings, allowed, studio, forbidden)


@pytest.fixture(autouse=True)
def no_real_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name of a host resolves to this machine, as an attacker's own name may: a rule that looks at addresses only would be fooled."""
    real = socket.getaddrinfo

    def inside(host: Any, *arguments: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        sys.audit("hostile.resolved", name)
        try:
            socket.inet_pton(socket.AF_INET6 if ":" in str(name) else socket.AF_INET, str(name))
        except (OSError, ValueError):
            host = "127.0.0.1"
        return real(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", inside)


# --- how locations are made ---------------------------------------------------------------------------------------

_SEGMENT = st.sampled_from(
    ["a.svs", "sub", "b c.svs", "b%20c.svs", "ünï.svs", "..", ".", "%2e%2e", "%2E.", "..%2f..", "%252e%252e", "..;", "", "link.svs", "out", "up", "secret.svs",
     "secret.png", "loop.svs", "proc.svs", "m.mrxs", "m", "data", "etc", "passwd", "proc", "self", "environ", "․․", "．．", "∕etc", "a.svs\x00.png", "..\\..", "*", "~", "$HOME",
     "upload", "local-files", "1", "x.svs", "tasks", "resolve", "presign", "api", "users"]
)  # fmt: skip
_PATH = st.lists(_SEGMENT, min_size=1, max_size=6).map("/".join)
_START = st.sampled_from(
    [
        "",
        "/",
        "//",
        "///",
        "ROOT/",
        "ROOT-not/",
        "OUT/",
        "ROOT/../",
        "/data/",
        "/data/upload/",
        "/data/local-files/?d=",
        "~/",
        "./",
    ]
)
_HOST = st.sampled_from(
    ["ALLOWED", "STUDIO", "FORBIDDEN", "127.0.0.1", "localhost:PORT", "127.1:PORT", "2130706433:PORT", "0x7f000001:PORT", "0177.0.0.1:PORT", "[::1]:PORT",
     "[::ffff:127.0.0.1]:PORT", "0.0.0.0:PORT", "169.254.169.254", "[fe80::1%25lo]", "metadata.google.internal", "inside.example:PORT", "allowed.example.evil.example:PORT",
     "allowed.example.:PORT", "ALLOWED.evil.example", "①②⑦.⓪.⓪.①:PORT", "127。0。0。1:PORT", "ⓐllowed.example:PORT", "allowed.example\\@FORBIDDEN", "FORBIDDEN#@ALLOWED",
     "ALLOWED@FORBIDDEN", "ALLOWED:x@FORBIDDEN", "FORBIDDEN?ALLOWED", "ALLOWED%00.FORBIDDEN", "ALLOWED%2f@FORBIDDEN", "ALLOWED,FORBIDDEN", "ALLOWED\tFORBIDDEN", " ALLOWED", ""]
)  # fmt: skip
_SCHEME = st.sampled_from(
    [
        "http",
        "https",
        "HTTP",
        "hTTp",
        "file",
        "FILE",
        "ftp",
        "gopher",
        "memory",
        "local",
        "s3",
        "simplecache::http",
        "http::file",
        "data",
        "jar",
        "unix",
        "git+file",
    ]
)
_QUERY = st.sampled_from(
    [
        "",
        "?d=../../outside/secret.svs",
        "?d=/etc/passwd",
        "?d=a.svs",
        "?d=a.svs&d=../outside/secret.svs",
        "?fileuri=ZmlsZTovLy9ldGMvcGFzc3dk",
        "#@FORBIDDEN/",
        "?x=http://FORBIDDEN/",
        "?",
    ]
)
_URL = st.builds(
    lambda scheme, slashes, host, path, query: f"{scheme}:{slashes}{host}/{path}{query}",
    _SCHEME,
    st.sampled_from(["//", "//", "//", "/", "", "///", "\\\\"]),
    _HOST,
    _PATH,
    _QUERY,
)
_LOCAL = st.builds(lambda start, path, query: f"{start}{path}{query}", _START, _PATH, _QUERY)
_FILE_URL = st.builds(
    lambda host, start, path: f"file://{host}{start}{path}",
    st.sampled_from(["", "localhost", "evil.example", "127.0.0.1"]),
    _START,
    _PATH,
)
_NOISE = st.text(max_size=40)
_OPEN = st.sampled_from(
    ["a.svs", "sub/b c.svs", "ROOT/ünï.svs", "file://ROOT/a.svs", "file://localhostROOT/sub/b%20c.svs", "http://ALLOWED/x.svs", "/data/upload/1/x.svs",
     "http://STUDIO/data/upload/1/x.svs", "/data/local-files/?d=a.svs", "/data/local-files/?d=far.svs", "/tasks/1/resolve/?fileuri=czM6Ly9i"]
)  # fmt: skip


def _with(insert: str) -> st.SearchStrategy[str]:
    """A location that is open, with ``insert`` put in somewhere."""
    return _OPEN.flatmap(lambda text: st.integers(0, len(text)).map(lambda at: text[:at] + insert + text[at:]))


_ALMOST = st.sampled_from(
    ["../", "%2e%2e/", "@", "FORBIDDEN", "\\", "\u202e", ":", "//", "?", "#", "\t", " ", ";", "::", "\ud800", "..", "é"]
).flatmap(_with)
LOCATION = st.one_of(_OPEN, _ALMOST, _URL, _LOCAL, _FILE_URL, _NOISE)


def named(world: World, text: str) -> str:
    for word, meaning in world.place_names().items():
        text = text.replace(word, meaning)
    return text


def use(world: World, value: Any) -> str:
    """Resolve and fetch as a request and its worker do; ``"opened"`` or the error's code. Anything but a BackendError fails the test."""
    resolver = world.resolver()
    try:
        ref = SlideRef.from_json(json.loads(json.dumps(resolver.resolve(value).to_json())))
        paths = resolver.fetch(ref)
    except BackendError as error:
        return error.code
    for path in paths:
        real = Path(os.path.realpath(path))
        assert real.is_relative_to(world.root) or real.is_relative_to(world.settings.model_dir)
        assert path.read_bytes() in (b"inside", b"served", b"index")
    return "opened"


def forget(world: World) -> None:
    for server in (world.allowed, world.studio, world.forbidden):
        server.requests.clear()


# --- properties ---------------------------------------------------------------------------------------------------


def test_no_location_opens_anything_but_the_allowed_places(world: World) -> None:
    outcomes: list[str] = []

    @FUZZ
    @given(LOCATION)
    def tried(text: str) -> None:
        forget(world)
        with watching() as seen:
            outcomes.append(use(world, named(world, text)))
        world.check(seen)

    tried()
    assert outcomes.count("opened") >= 10, "the generator must find the ways that are open, too"
    note("locations of single slides", outcomes)


def test_no_list_of_patches_opens_anything_but_the_allowed_places(world: World) -> None:
    outcomes: list[str] = []

    @hypothesis_settings(FUZZ, max_examples=150)
    @given(st.lists(st.one_of(st.just("a.svs"), LOCATION), max_size=4))
    def tried(texts: list[str]) -> None:
        forget(world)
        with watching() as seen:
            outcomes.append(use(world, [named(world, text) for text in texts]))
        world.check(seen)

    tried()
    assert outcomes.count("opened") >= 3
    note("lists of patches", outcomes)


def test_no_redirect_leads_anywhere_but_to_the_allowed_places(world: World) -> None:
    outcomes: list[str] = []

    @hypothesis_settings(FUZZ, max_examples=250)
    @given(LOCATION, st.sampled_from([301, 302, 303, 307, 308]), st.booleans())
    def tried(target: str, status: int, from_studio: bool) -> None:
        forget(world)
        server, path = (world.studio, "/data/upload/2/jump.svs") if from_studio else (world.allowed, "/jump.svs")
        to = (
            named(world, target).replace("\r", "").replace("\n", "").encode("utf-8", "replace").decode("latin-1")
        )  # as it would go over the wire
        server.answers[path] = Answer(status=status, headers={"Location": to})
        with watching() as seen:
            outcomes.append(use(world, server.url + path))
        world.check(seen)

    tried()
    note("redirects", outcomes)


def test_no_reference_out_of_the_queue_opens_anything_but_the_allowed_places(world: World) -> None:
    """Redis may be written to by others: a reference is not believed because it was resolved once."""
    outcomes: list[str] = []
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=5,
    )
    reference = st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["file", "label_studio", "fsspec", "http", "patches"]) | anything,
            "locations": st.lists(LOCATION, min_size=1, max_size=3)
            | st.lists(LOCATION, min_size=1, max_size=1)
            | anything,
            "identity": st.text(min_size=1, max_size=8) | anything,
            "mpp": st.none() | st.floats() | anything,
        }
    )

    @hypothesis_settings(FUZZ, max_examples=300)
    @given(reference)
    def tried(value: dict[str, Any]) -> None:
        forget(world)
        if isinstance(value["locations"], list):
            value["locations"] = [named(world, v) if isinstance(v, str) else v for v in value["locations"]]
        with watching() as seen:
            try:
                world.resolver().fetch(SlideRef.from_json(value))
                outcomes.append("opened")
            except BackendError as error:
                outcomes.append(error.code)
        world.check(seen)

    tried()
    note("references put into the queue", outcomes)


def note(row: str, outcomes: list[str]) -> None:
    opened = outcomes.count("opened")
    record(
        "sources",
        row,
        tried=len(outcomes),
        opened_as_allowed=opened,
        typed_errors=len(outcomes) - opened,
        opened_elsewhere=0,
    )


def test_the_watcher_would_have_seen_it(world: World) -> None:
    """The tests above prove something only if a forbidden file or connection is noticed."""
    with watching() as seen:
        (world.outside / "secret.svs").read_bytes()
    with pytest.raises(AssertionError):
        world.check(seen)
    with watching() as seen, socket.create_connection(("127.0.0.1", world.forbidden.port)):
        pass
    with pytest.raises(AssertionError):
        world.check(seen)


# --- what changes between two looks -------------------------------------------------------------------------------


def test_a_file_that_becomes_a_link_after_it_was_resolved_is_refused(world: World) -> None:
    path = world.root / "swapped.svs"
    path.write_bytes(b"inside")
    resolver = world.resolver()
    ref = resolver.resolve(str(path))
    path.unlink()
    path.symlink_to(world.outside / "secret.svs")
    with watching() as seen, pytest.raises(SourceRefused):
        resolver.fetch(ref)
    world.check(seen)
    path.unlink()


def test_an_answer_that_redirects_only_when_it_is_fetched_is_checked_then(world: World) -> None:
    world.allowed.answers["/later.svs"] = Answer(b"served", headers={"ETag": '"1"'})
    resolver = world.resolver()
    ref = resolver.resolve(f"{world.allowed.url}/later.svs")
    world.allowed.answers["/later.svs"] = Answer(
        status=302, headers={"Location": f"{world.forbidden.url}/latest/meta-data"}
    )
    forget(world)
    with watching() as seen, pytest.raises(SourceRefused, match="A redirect leads to"):
        resolver.fetch(ref)
    world.check(seen)


# --- slides of several files --------------------------------------------------------------------------------------

VMS = "[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=1\nNoJpegRows=1\nPhysicalWidth=256000\nPhysicalHeight=256000\nMapFile={map}\nImageFile(0,0)={image}\n"


@pytest.fixture
def stolen(world: World) -> Path:
    """A picture outside the roots, of the kind that a Hamamatsu slide is made of."""
    Image.new("RGB", (512, 512), (200, 30, 90)).save(world.outside / "stolen.jpg", restart_marker_blocks=32)
    return world.outside / "stolen.jpg"


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (512, 512), (10, 200, 90)).save(buffer, "JPEG", restart_marker_blocks=32)
    return buffer.getvalue()


def test_an_index_that_names_files_outside_the_roots_is_refused_under_any_name(world: World, stolen: Path) -> None:
    folder = world.root / "index"
    folder.mkdir()
    for name in ("index.vms", "index.svs", "index.png"):
        path = folder / name
        path.write_text(VMS.format(map="../../outside/stolen.jpg", image="../../outside/stolen.jpg"))
        with openslide.OpenSlide(str(path)) as opened:  # it reads the size of the picture outside
            assert opened.dimensions == (512, 512)
        resolver = world.resolver()
        with pytest.raises(SourceRefused, match="names a file in another folder"):
            resolver.fetch(resolver.resolve(f"index/{name}"))
        path.unlink()


def test_no_white_space_hides_a_name_from_us_that_openslide_reads(world: World, stolen: Path) -> None:
    """GLib reads the index for OpenSlide, and has its own idea of what a line and a space are."""
    folder = world.root / "spaces"
    folder.mkdir()
    path, outside = folder / "index.vms", "../../outside/stolen.jpg"
    odd = [" ", "\t", "\r", "\v", "\f", "\0", "\x1c", "\x85", "\xa0", "\\s", "\\t", "\\r", "\u2028", "\ufeff"]
    opened = 0
    for before_key, before, after in [(a, b, c) for a in ["", *odd] for b in ["", *odd] for c in ["", "\r", " \r "]]:
        text = VMS.replace("MapFile", before_key + "MapFile").format(
            map=before + outside + after, image=before + outside + after
        )
        path.write_bytes(text.encode())
        try:
            with openslide.OpenSlide(str(path)) as slide:
                assert slide.dimensions == (512, 512)
        except openslide.OpenSlideError:
            continue
        opened += 1
        resolver = world.resolver()
        with pytest.raises(SourceRefused, match="names a file in another folder"):
            resolver.fetch(resolver.resolve("spaces/index.vms"))
    assert opened > 10, "there is something to hide"
    path.write_bytes(
        VMS.format(map="image.jpg", image="image.jpg").replace("\n", "\r\n").encode()
    )  # Windows' own lines
    assert world.resolver().fetch(world.resolver().resolve("spaces/index.vms")) == (path,)


def test_an_index_whose_files_lie_beside_it_is_opened(world: World) -> None:
    folder = world.root / "hamamatsu"
    folder.mkdir()
    (folder / "image.jpg").write_bytes(jpeg())
    (folder / "slide.vms").write_text(VMS.format(map="image.jpg", image="image.jpg"))
    resolver = world.resolver()
    (path,) = resolver.fetch(resolver.resolve("hamamatsu/slide.vms"))
    with open_slide(path, world.settings) as slide:
        assert slide.reader == "openslide hamamatsu"
    (folder / "image.jpg").unlink()
    (folder / "image.jpg").symlink_to(world.outside / "secret.png")
    with pytest.raises(SourceRefused, match="leads outside"):
        resolver.fetch(resolver.resolve("hamamatsu/slide.vms"))


def test_an_index_that_was_downloaded_is_refused(world: World) -> None:
    world.allowed.answers["/innocent.svs"] = Answer(
        VMS.format(map="../x.jpg", image="../x.jpg").encode(), headers={"ETag": '"v"'}
    )
    resolver = world.resolver()
    with pytest.raises(SourceRefused, match="many files"):
        resolver.fetch(resolver.resolve(f"{world.allowed.url}/innocent.svs"))


def test_links_out_of_the_roots_beside_a_slide_of_several_files_are_refused(world: World) -> None:
    dicom = world.root / "dicom"
    dicom.mkdir()
    (dicom / "1.dcm").write_bytes(bytes(128) + b"DICM")
    resolver = world.resolver()
    resolver.fetch(resolver.resolve("dicom/1.dcm"))
    (dicom / "2.dcm").symlink_to(world.outside / "1.dcm")
    with pytest.raises(SourceRefused, match=r"2\.dcm.*leads outside"):
        resolver.fetch(resolver.resolve("dicom/1.dcm"))
    mirax = world.root / "mirax"
    mirax.mkdir()
    (world.root / "mirax.mrxs").write_bytes(b"x")
    (mirax / "Slidedat.ini").write_text(
        "[HIERARCHICAL]\nINDEXFILE = Index.dat\n[DATAFILE]\nFILE_COUNT = 1\nFILE_0 = ../../outside/Data0000.dat\n"
    )
    with pytest.raises(SourceRefused, match="names a file in another folder"):
        resolver.fetch(resolver.resolve("mirax.mrxs"))
    (mirax / "Slidedat.ini").write_text(
        "[HIERARCHICAL]\nINDEXFILE = Index.dat\n[DATAFILE]\nFILE_COUNT = 1\nFILE_0 = Data0000.dat\n"
    )
    (mirax / "Data0000.dat").symlink_to(world.outside / "Data0000.dat")
    with pytest.raises(SourceRefused, match="leads outside"):
        resolver.fetch(resolver.resolve("mirax.mrxs"))
    with pytest.raises(SourceError):
        resolver.resolve("m.mrxs")  # its whole folder is a link
