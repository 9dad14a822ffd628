"""Label Studio and this backend below paths, under several names, by HTTPS; and stores by the names that Label Studio gives them."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import pytest
from field_studio import StudioBelow
from PIL import Image
from reverse_proxy import Behind, ReverseProxy
from s3 import S3
from web_client import predict_body, served, store_result, task

from backend.errors import LabelStudioUnreachable, SettingsError, SourceRefused
from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.api_errors import TokenRefused
from backend.label_studio.client import LabelStudioClient
from backend.label_studio.services import Services
from backend.settings import Settings, load_settings
from backend.slides.places import classify
from backend.slides.reader import open_slide
from backend.slides.synthetic import SyntheticSlide
from backend.web.signing import SlideSigner

Make = Callable[..., Settings]
real = pytest.mark.e2e


# --- Label Studio -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def access_token(studio: StudioBelow) -> str:
    """A personal access token, which is exchanged for one that opens doors."""
    studio.call("POST", "/api/jwt/settings", json={"api_tokens_enabled": True, "api_token_ttl_days": 30})
    return str(studio.call("POST", "/api/token/")["token"])


@pytest.fixture(params=["by its path", "beside it", "by HTTPS"])
def names(request: pytest.FixtureRequest, studio: StudioBelow, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The settings of somebody who reaches Label Studio in one of three ways, where its users know another name."""
    if request.param == "by its path":
        return {"label_studio_url": studio.public_url}
    if request.param == "beside it":
        return {
            "label_studio_url": studio.base_url,
            "label_studio_public_url": f"{studio.secure_url}, {studio.public_url}/",
        }
    monkeypatch.setenv("SSL_CERT_FILE", str(studio.certificate))
    return {"label_studio_url": studio.secure_url, "label_studio_public_url": studio.public_url}


@real
@pytest.mark.filterwarnings("ignore:The `parse_obj`")  # of the SDK, about itself
def test_all_that_label_studio_writes_into_tasks_is_fetched_from_it(
    studio: StudioBelow, names: dict[str, Any], access_token: str, settings: Make, s3: S3, tmp_path: Path
) -> None:
    picture = tmp_path / "picture ü.png"
    Image.new("RGB", (40, 30), "pink").save(picture)
    (studio.documents / "lab").mkdir(exist_ok=True)
    shutil.copy(picture, studio.documents / "lab")
    bucket = s3.bucket()
    httpx.put(f"{s3.endpoint}/{bucket[5:]}/x.png", content=picture.read_bytes(), trust_env=False).raise_for_status()
    project = studio.create_project("All kinds of files", '<View><Image name="image" value="$image"/></View>')
    studio.upload_images(project, [picture])
    studio.connect_storage(project, "localfiles", path=str(studio.documents / "lab"), use_blob_urls=True)
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "s3_endpoint": s3.endpoint}
    studio.connect_storage(project, "s3", bucket=bucket[5:], use_blob_urls=True, presign=False, **keys)
    asked = {"project": project, "page_size": 100}
    shown = [t["data"]["image"] for t in studio.call("GET", "/api/tasks", params=asked)["tasks"]]
    assert sorted(re.sub(r"\d+/.*", "", urlsplit(url).path) for url in shown) == [
        "/ls/data/local-files/",
        "/ls/data/upload/",
        "/ls/tasks/",
    ], shown
    # Each as it is written there, and under each name that the settings say.
    made = settings(label_studio_api_key=access_token, **names)
    below = [name for name in made.label_studio_urls if name.endswith("/ls")]
    everywhere = [*shown, *(urljoin(f"{name}/", url) for name in below for url in shown)]
    services = Services(made)
    with closing(services):
        assert services.client.whoami() == studio.process.username
        found = {}
        for url in everywhere:
            ref = services.resolver.resolve(url)
            (path,) = services.resolver.fetch(ref)
            assert path.read_bytes() == picture.read_bytes(), url
            found[url] = services.resolver.resolve(url).identity
    assert len(set(found.values())) == 3, "one identity for each, whatever name it is asked under"


@real
@pytest.mark.filterwarnings("ignore:The `parse_obj`")
def test_a_token_is_exchanged_anew_below_the_path(studio: StudioBelow, access_token: str, settings: Make) -> None:
    made = settings(label_studio_url=studio.public_url, label_studio_api_key=access_token)
    with closing(LabelStudioClient(made)) as client:
        client.whoami()
        studio.proxy.asked.clear()
        client.sdk._client_wrapper._tokens_client._access_token = None  # it has run out
        client.whoami()
    assert "/ls/api/token/refresh/" in studio.proxy.asked


@real
def test_a_certificate_that_is_not_trusted_is_named_with_what_to_do(
    studio: StudioBelow, settings: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = settings(label_studio_url=studio.secure_url, label_studio_api_key="x" * 40)
    with closing(LabelStudioClient(made)) as client, pytest.raises(LabelStudioUnreachable) as error:
        client.whoami()
    assert re.search(r"certificate .* not trusted: self-signed certificate.*SSL_CERT_FILE", str(error.value))
    with pytest.raises(Exception, match=r"not trusted: self-signed.*SSL_CERT_FILE"):
        Services(made).resolver.resolve("/data/local-files/?d=x.svs")
    monkeypatch.setenv("SSL_CERT_FILE", str(studio.certificate))
    with closing(LabelStudioClient(made)) as client, pytest.raises(TokenRefused):
        client.whoami()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "not there.pem"))
    with (
        closing(LabelStudioClient(made)) as client,
        pytest.raises(SettingsError, match=r"not there\.pem.*cannot be read"),
    ):
        client.whoami()


@pytest.mark.parametrize(
    ("urls", "value", "there"),
    [
        (("http://ls:8080", "https://h/ls"), "/ls/data/upload/3/a.jpg", "http://ls:8080/data/upload/3/a.jpg"),
        (("http://ls:8080", "https://h/ls"), "/data/upload/3/a.jpg", "http://ls:8080/data/upload/3/a.jpg"),
        (("http://ls:8080", "https://h/ls"), "https://H:443/ls/data/upload/3/a.jpg", "http://ls:8080/data/upload/3/a.jpg"),
        (("http://ls:8080/in", "https://h/ls/"), "http://ls:8080/in/tasks/4/presign/?fileuri=x", "http://ls:8080/in/tasks/4/presign/?fileuri=x"),
        (("https://h/ls", ""), "/ls/storage-data/uploaded/?filepath=upload/1/a.jpg", "https://h/ls/storage-data/uploaded/?filepath=upload/1/a.jpg"),
        (("http://localhost:8080", ""), "http://127.0.0.1:8080/data/upload/3/a.jpg", "http://localhost:8080/data/upload/3/a.jpg"),
        (("https://h", "https://h/ls,http://old.example"), "http://old.example/projects/4/resolve/?fileuri=x", "https://h/projects/4/resolve/?fileuri=x"),
    ],
)  # fmt: skip
def test_a_file_of_label_studio_is_known_under_each_of_its_names(
    settings: Make, urls: tuple[str, str], value: str, there: str
) -> None:
    place = classify(value, settings(label_studio_url=urls[0], label_studio_public_url=urls[1]))
    assert (place.kind, place.location) == ("label_studio", there)


def test_a_file_of_label_studio_below_our_own_address_is_its_own(settings: Make) -> None:
    made = settings(public_url="https://h", label_studio_url="https://h/ls")
    assert classify("https://h/ls/data/upload/3/a.svs", made).kind == "label_studio"
    with pytest.raises(SourceRefused, match="a picture made by this backend"):
        classify("https://h/thumbnails/a.jpg", made)


@pytest.mark.parametrize(
    "value",
    ["https://h/other/data/upload/3/a.jpg", "https://h/lsd/data/upload/3/a.jpg", "https://h/ls/api/users", "https://h:444/ls/data/upload/3/a.jpg"],
)  # fmt: skip
def test_what_lies_beside_label_studio_is_not_its_own(settings: Make, value: str) -> None:
    with pytest.raises(SourceRefused, match="not an allowed host"):
        classify(value, settings(label_studio_url="https://h/ls"))


@pytest.mark.parametrize(
    "value", ["s3://[x/a.svs", "file://[x/a.svs", "/tasks/1/resolve/?fileuri=czM6Ly9beC9hLnN2cw=="]
)
def test_an_address_that_is_none_is_refused_in_words(settings: Make, value: str) -> None:
    with pytest.raises(SourceRefused, match="is not a valid URL"):
        classify(value, settings(label_studio_url="https://h/ls", remote_stores="s3"))


def test_an_unknown_path_in_front_of_an_upload_is_said_with_what_to_set(settings: Make) -> None:
    with pytest.raises(SourceRefused, match=r"with /studio, to LABEL_STUDIO_PUBLIC_URL"):
        classify("/studio/data/upload/3/a.jpg", settings(label_studio_url="http://ls:8080", slide_roots=("/srv",)))


# --- this backend -------------------------------------------------------------------------------------------------


class Below:
    """A backend behind the proxy, below ``/wsc`` with a path that the proxy takes off, and below ``/kept`` with one that it does not."""

    def __init__(self, services: Services, proxy: ReverseProxy, slide: Path) -> None:
        self.services, self.proxy, self.slide = services, proxy, slide
        self.key = store_result(services, slide)
        ref = services.resolver.resolve(str(slide))
        with open_slide(slide, services.settings) as opened:
            self.thumbnail = services.thumbnails.make(ref.identity, opened)
        self.token = SlideSigner(services.settings.model_dir).token(ref, 7)

    def url(self, prefix: str, path: str) -> str:
        return self.proxy.url(f"{prefix}{path}")


@pytest.fixture(scope="module")
def below(
    embedded_redis: EmbeddedRedis,
    stand_in: Path,
    synthetic_slide: SyntheticSlide,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Below]:
    proxy = ReverseProxy()
    folder = tmp_path_factory.mktemp("below")
    public = f"{proxy.url('/wsc')},{proxy.url('/kept', 'localhost')}"
    with served(folder, embedded_redis, stand_in, public_url=public, label_studio_url="https://h/ls") as (
        client,
        services,
    ):
        proxy.routes |= {"/wsc": Behind(str(client.base_url)), "/kept": Behind(str(client.base_url), strips=False)}
        slide = folder / "slides" / "slide.tif"
        shutil.copy(synthetic_slide.path, slide)
        yield Below(services, proxy, slide)
    proxy.stop()


@pytest.mark.parametrize("prefix", ["/wsc", "/kept"])
def test_everything_of_ours_answers_below_a_path(below: Below, prefix: str) -> None:
    host = "127.0.0.1" if prefix == "/wsc" else "localhost"

    def get(path: str) -> httpx.Response:
        return httpx.get(below.proxy.url(f"{prefix}{path}", host), trust_env=False, timeout=60)

    for page, start in ((f"/panel?slide={below.token}", "Slide"), ("/", "Whole slides"), ("", "Whole slides")):
        answer = get(page)
        assert answer.status_code == 200 and f"<title>{start}" in answer.text
        linked = re.findall(r'(?:src|href)="(/[^"]*)"', answer.text)
        assert len(linked) >= 3 and all(path.startswith(f"{prefix}/") for path in linked)
        for path in linked:
            assert get(path[len(prefix) :]).status_code == 200, path
    redirected = get(f"/slides/{below.key}")
    assert redirected.headers["location"].startswith(f"{prefix}/panel?slide=")
    assert get("/openapi.json").json()["servers"] == [{"url": prefix}]
    for path in (
        f"/panel/state?slide={below.token}",
        f"/panel/heatmap.jpg?slide={below.token}",
        f"/deepzoom/{below.token}/slide_files/8/0_0.jpg",
        f"/deepzoom/{below.token}/slide.dzi",
        f"/api/bags/{below.key}",
        "/api/overview",
        "/health",
        "/metrics",
    ):
        assert get(path).status_code == 200, path
    picture = get(f"/thumbnails/{below.thumbnail.id}.jpg")
    assert picture.headers["access-control-allow-origin"] == "*"
    with httpx.stream(
        "GET", below.proxy.url(f"{prefix}/panel/events?slide={below.token}", host), trust_env=False
    ) as events:
        told = next(line for line in events.iter_lines() if line.startswith("data: "))
    assert '"phase": "done"' in told


@pytest.mark.parametrize("prefix", ["/wsc", "/kept", "/from/before"])
def test_our_thumbnail_is_known_below_each_path(below: Below, prefix: str) -> None:
    """Brush regions are of the picture's size: the heatmap would be sheared with another one."""
    image = below.proxy.url(f"{prefix}/thumbnails/{below.thumbnail.id}.jpg")
    body = predict_body(task(hash(prefix) % 10_000, image=image, slide=str(below.slide)))
    answer = httpx.post(below.proxy.url("/wsc/predict"), json=body, trust_env=False, timeout=60)
    assert answer.status_code == 200, answer.text
    (prediction,) = answer.json()["results"]
    sizes = {(r["original_width"], r["original_height"]) for r in prediction["result"] if "original_width" in r}
    assert sizes == {(below.thumbnail.width, below.thumbnail.height)}
    if prefix != "/from/before":
        host = "127.0.0.1" if prefix == "/wsc" else "localhost"
        with pytest.raises(SourceRefused, match="made by this backend"):
            classify(below.proxy.url(f"{prefix}/deepzoom/x/region.jpg", host), below.services.settings)
    beside = below.proxy.url("/other/thumbnails/x.jpg")
    with pytest.raises(SourceRefused, match="not an allowed host"):
        classify(beside, below.services.settings)


@pytest.mark.parametrize("prefix", ["/panel", "/slides", "/api"])
def test_a_path_of_the_name_of_a_page_is_no_trouble(
    prefix: str, tmp_path: Path, embedded_redis: EmbeddedRedis, stand_in: Path, synthetic_slide: SyntheticSlide
) -> None:
    proxy = ReverseProxy()
    with served(tmp_path, embedded_redis, stand_in, public_url=proxy.url(prefix)) as (client, services):
        slide = tmp_path / "slides" / "slide.tif"
        shutil.copy(synthetic_slide.path, slide)
        key = store_result(services, slide)
        token = SlideSigner(services.settings.model_dir).token(services.resolver.resolve(str(slide)))
        for strips in (True, False):
            proxy.routes[prefix] = Behind(str(client.base_url), strips=strips)
            for path, status in (
                (f"/panel?slide={token}", 200),
                (f"/slides/{key}", 307),
                ("/api/overview", 200),
                ("/", 200),
            ):
                assert httpx.get(proxy.url(prefix + path), trust_env=False).status_code == status, (path, strips)
    proxy.stop()


@pytest.mark.parametrize("prefix", ["/wsc", "/kept"])
def test_the_pages_work_below_a_path_in_a_browser(below: Below, chromium_path: str, prefix: str) -> None:
    from playwright.sync_api import sync_playwright

    host = "127.0.0.1" if prefix == "/wsc" else "localhost"
    failed: list[str] = []
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium_path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        page = browser.new_page()
        page.on("response", lambda r: (failed if r.status >= 400 else asked).append(urlsplit(r.url).path))
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.goto(below.proxy.url(f"{prefix}/panel?slide={below.token}", host))
        page.wait_for_function("() => document.querySelectorAll('#strip img').length > 0")
        page.wait_for_function(
            "() => [...document.querySelectorAll('#strip img')].every(i => i.complete && i.naturalWidth)"
        )
        assert page.inner_text("#name") == "slide.tif"
        assert any(path.startswith(f"{prefix}/deepzoom/") and "slide_files" in path for path in asked)
        page.goto(below.proxy.url(f"{prefix}/", host))
        page.wait_for_selector("#queues dd")
        page.wait_for_function("() => document.querySelector('#map-note').textContent")
        browser.close()
    assert failed == []
    assert {path.split("/")[1] for path in asked} == {prefix[1:]}


# --- stores -------------------------------------------------------------------------------------------------------


def test_stores_are_known_by_label_studios_names(settings: Make) -> None:
    for allowed in ("az", "azure-blob", "abfs"):
        place = classify("azure-blob://slides/a b#1.svs", settings(remote_stores=(allowed,)))
        assert (place.kind, place.location) == ("fsspec", "az://slides/a b#1.svs")
    for value, allowed in (("gs://b/x.svs", "gcs"), ("s3://b/x.svs", "s3"), ("gcs://b/x.svs", "gs")):
        assert classify(value, settings(remote_stores=(allowed,))).location == value


@pytest.mark.parametrize(
    ("value", "name"), [("azure-blob://b/x.svs", "az"), ("gs://b/x.svs", "gs"), ("s3://b/x", "s3")]
)
def test_the_hint_of_a_store_leads_to_one_that_is_read(settings: Make, value: str, name: str) -> None:
    with pytest.raises(SourceRefused, match=f"Add {name} to REMOTE_STORES") as refused:
        classify(value, settings())
    (told,) = re.findall(r"Add (\S+) to REMOTE_STORES", str(refused.value))
    assert classify(value, settings(remote_stores=(told,))).kind == "fsspec"


@pytest.mark.parametrize("value", ["redis://b/x.svs", "local:///etc/passwd", "nosuchstore://b/x.svs"])
def test_no_hint_names_a_store_that_cannot_be_read(settings: Make, value: str) -> None:
    with pytest.raises(SourceRefused) as refused:
        classify(value, settings())
    assert "Add " not in str(refused.value) and "s3, gs, az" in str(refused.value)


@pytest.mark.parametrize(("value", "extra"), [("azure-blob://b/x.svs", "azure"), ("gs://b/x.svs", "gcs")])
def test_a_driver_that_is_missing_is_named_by_the_extra_that_brings_it(
    settings: Make, value: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("adlfs", "gcsfs"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    services = Services(settings(remote_stores=("az", "gs")))
    with pytest.raises(SettingsError, match=rf"the extra `{extra}`.*pip install '\.\[{extra}\]'"):
        services.resolver.resolve(value)


def test_the_address_that_stands_for_an_object_is_the_object(settings: Make) -> None:
    """Label Studio writes another one for each task, and people copy them."""
    made = settings(remote_stores=("s3", "az"), label_studio_url="https://h/ls")
    for stored, location in (("s3://b/a b.svs", "s3://b/a b.svs"), ("azure-blob://c/x.svs", "az://c/x.svs")):
        encoded = base64.urlsafe_b64encode(stored.encode()).decode()
        for value in (f"/ls/tasks/4/resolve/?fileuri={encoded}", f"https://h/ls/projects/5/presign/?fileuri={encoded}"):
            assert classify(value, made).location == location
    encoded = base64.urlsafe_b64encode(b"gs://b/x.svs").decode()
    assert classify(f"/ls/tasks/4/resolve/?fileuri={encoded}", made).kind == "label_studio", (
        "not allowed: asked of Label Studio"
    )
    for stored in ("file:///etc/passwd", "http://10.0.0.1/x", "s3://b/x::file:///etc/passwd", "local:///etc/passwd"):
        encoded = base64.urlsafe_b64encode(stored.encode()).decode()
        with suppress(SourceRefused):
            assert classify(f"/ls/tasks/4/resolve/?fileuri={encoded}", made).kind == "label_studio"


def test_the_old_name_of_the_setting_is_refused_with_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSSPEC_PROTOCOLS", "s3,gs")
    with pytest.raises(SettingsError, match=r"FSSPEC_PROTOCOLS is not read any more.*REMOTE_STORES=s3,gs"):
        load_settings()
