"""The panel over HTTP: what its signed address opens, what it says of a slide, and what it answers to what is wrong."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from PIL import Image
from web_client import served, store_result

from backend.jobs.pushes import note_push
from backend.jobs.queue import BagRequest, WaitingTask
from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.services import Services
from backend.results.bag import BagResult
from backend.results.ranks import hottest_first
from backend.slides.render import _ANCHORS
from backend.slides.synthetic import SyntheticSlide
from backend.web.assets import framers
from backend.web.signing import SlideSigner

STUDIO = "http://studio.example:8080"


class Opened:
    """One slide on a served backend: its token, its key, and the addresses below."""

    def __init__(self, client: httpx.Client, services: Services, path: Path) -> None:
        self.client, self.services, self.path = client, services, path
        self.ref = services.resolver.resolve(str(path))
        self.token = SlideSigner(services.settings.model_dir).token(self.ref, project=3)
        self.key = services.key(self.ref)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.client.get(path, params={"slide": self.token}, headers=headers)

    def tile(self, level: int, column: int, row: int, **headers: str) -> httpx.Response:
        return self.client.get(f"/deepzoom/{self.token}/slide_files/{level}/{column}_{row}.jpg", headers=headers)


@pytest.fixture
def opened(
    tmp_path: Path, redis: object, embedded_redis: EmbeddedRedis, stand_in: Path, synthetic_slide: SyntheticSlide
) -> Iterator[Opened]:
    """A backend with a password, one slide on it, and no worker."""
    (tmp_path / "slides").mkdir()
    path = tmp_path / "slides" / "Lymph node 1.tif"
    shutil.copy(synthetic_slide.path, path)
    options = {"basic_auth_user": "ls", "basic_auth_pass": "secret", "label_studio_url": STUDIO}
    with served(tmp_path, embedded_redis, stand_in, **options) as (client, services):
        yield Opened(client, services, path)


def test_the_page_may_be_framed_by_the_configured_label_studio_only(opened: Opened) -> None:
    page = opened.get("/panel")
    assert page.status_code == 200
    assert "x-frame-options" not in page.headers
    policy = page.headers["content-security-policy"]
    assert f"frame-ancestors 'self' {STUDIO}" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for asset in re.findall(r'(?:href|src)="(/assets/[^"]+)"', page.text):
        answer = opened.client.get(asset)
        assert answer.status_code == 200, asset
        assert "immutable" in answer.headers["cache-control"]
        assert 'import "http' not in answer.text and 'from "http' not in answer.text
    assert "{assets}" not in page.text


def test_on_one_machine_both_names_of_it_may_frame(opened: Opened) -> None:
    local = opened.services.settings.model_copy(update={"label_studio_url": "http://localhost:8080"})
    assert framers(local) == ["http://localhost:8080", "http://127.0.0.1:8080"]
    odd = opened.services.settings.model_copy(update={"label_studio_url": "https://a.example/studio; script-src *"})
    assert framers(odd) == ["https://a.example"]


def test_the_signature_opens_the_panel_without_a_password_and_nothing_else(opened: Opened) -> None:
    assert opened.get("/panel/slide").status_code == 200
    assert opened.get("/panel/state").status_code == 200
    assert opened.tile(9, 0, 0).status_code == 200
    for path in ("/", "/api/overview", "/api/map", "/api/projects", "/api/jobs", f"/slides/{opened.key}"):
        assert opened.get(path).status_code == 401, path
    assert opened.client.post(f"/api/jobs/{opened.key}/retry").status_code == 401


def test_a_tampered_or_missing_signature_is_403_everywhere(opened: Opened) -> None:
    payload, signature = opened.token.split(".")
    forged = SlideSigner(opened.path.parent).token(opened.ref)  # right form, another key
    for token in (f"{payload}x.{signature}", f"{payload}.{signature[::-1]}", payload, forged, "x"):
        for path in ("/panel", "/panel/slide", "/panel/state", "/panel/events", "/panel/weights", "/panel/heatmap.jpg"):
            assert opened.client.get(path, params={"slide": token}).status_code == 403, path
        for path in ("slide.dzi", "slide_files/9/0_0.jpg", "region.jpg?x=0&y=0&size=224"):
            answer = opened.client.get(f"/deepzoom/{quote(token)}/{path}")
            assert answer.status_code == 403
            assert answer.json()["error"]["code"] == "signature_invalid"
    page = opened.client.get("/panel")
    assert page.status_code == 403
    assert "not valid" in page.text and page.headers["content-type"].startswith("text/html")


def test_a_tile_is_a_jpeg_that_is_asked_for_once(opened: Opened) -> None:
    tile = opened.tile(11, 3, 2)
    assert tile.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(tile.content)).size == (256, 256)
    assert "immutable" in tile.headers["cache-control"]
    assert tile.headers["etag"] == opened.tile(11, 3, 2).headers["etag"] != opened.tile(11, 2, 2).headers["etag"]
    again = opened.tile(11, 3, 2, **{"If-None-Match": tile.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    elsewhere = opened.tile(11, 3, 2, Origin=STUDIO)
    assert elsewhere.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(("level", "column", "row"), [(99, 0, 0), (11, 9, 0), (11, 0, 9), (0, 1, 0)])
def test_a_tile_outside_the_level_is_404(level: int, column: int, row: int, opened: Opened) -> None:
    answer = opened.tile(level, column, row)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "tile_outside"


def test_a_level_that_is_no_number_is_400(opened: Opened) -> None:
    assert opened.client.get(f"/deepzoom/{opened.token}/slide_files/x/0_0.jpg").status_code == 400


def test_the_descriptor_says_the_size_of_the_slide(opened: Opened) -> None:
    xml = opened.client.get(f"/deepzoom/{opened.token}/slide.dzi").text
    assert 'Width="2048"' in xml and 'Height="2048"' in xml and 'TileSize="254"' in xml and 'Overlap="1"' in xml


def test_a_slide_that_is_gone_or_replaced_is_told_in_words(opened: Opened) -> None:
    assert opened.get("/panel/slide").status_code == 200
    opened.path.write_bytes(opened.path.read_bytes() + b"\0")
    answer = opened.get("/panel/slide")
    assert answer.status_code == 400 and "has changed since" in answer.json()["detail"]
    opened.path.unlink()
    answer = opened.get("/panel/slide")
    assert answer.status_code == 404
    assert "Lymph node 1.tif" in answer.json()["detail"] and answer.json()["error"]["hint"]
    assert opened.tile(11, 5, 5).status_code == 404
    assert opened.get("/panel").status_code == 200, "the page comes all the same, and says it"


def test_before_it_is_analysed_the_panel_says_so(opened: Opened) -> None:
    state = opened.get("/panel/state").json()
    assert (state["name"], state["key"], state["project"]) == ("Lymph node 1.tif", opened.key, 3)
    assert state["status"]["phase"] == "idle"
    assert state["result"] is None
    assert "suggestion" not in state and "similar" not in state
    assert opened.get("/panel/weights").status_code == 404


def test_a_store_that_does_not_answer_is_told_in_words(opened: Opened) -> None:
    results = opened.services.settings.model_dir / "results"
    results.mkdir(exist_ok=True)
    (results / opened.key[:2]).symlink_to(results / opened.key[:2])  # a loop: the system refuses to look there
    status = opened.get("/panel/state").json()["status"]
    assert status["phase"] == "unavailable" and "store of results" in status["error"]["message"]


def test_a_waiting_slide_has_its_place_in_the_queue(opened: Opened) -> None:
    queue = opened.services.queue
    for name in ("a", "b"):
        queue.submit(BagRequest(name * 40, {"locations": [f"/{name}.tif"]}), priority="batch")
    queue.submit(BagRequest(opened.key, opened.ref.to_json()), priority="batch")
    status = opened.get("/panel/state").json()["status"]
    assert (status["phase"], status["job"]["position"], status["job"]["queue"]) == ("queued", 3, "batch")
    assert status["job"]["about"] == "analyse Lymph node 1.tif"


def test_the_weights_are_those_of_the_result(opened: Opened) -> None:
    store_result(opened.services, opened.path)
    result = opened.services.store.need(opened.key)
    state = opened.get("/panel/state").json()
    assert state["status"]["phase"] == "done"
    n, heads = state["result"]["tiles"], state["result"]["heads"]
    assert (n, heads) == (len(result.bag), 8)
    answer = opened.get("/panel/weights")
    block = answer.content
    grid = np.frombuffer(block, "<i4", 2 * n).reshape(2, n)
    weights = np.frombuffer(block, "<f4", offset=8 * n).reshape(heads + 1, n)
    assert (result.bag.grid == grid.T).all()
    assert np.array_equal(weights[0], result.mean_attention)
    assert np.array_equal(weights[1:], result.attention.T)
    assert opened.get("/panel/weights", **{"If-None-Match": answer.headers["etag"]}).status_code == 304


def test_what_heads_say_goes_into_the_panels_json_as_it_is(opened: Opened) -> None:
    """Where heads are trained, one function adds their words; nothing else changes."""
    store_result(opened.services, opened.path)
    suggestion = {"controls": [{"control": "grade", "value": 3}], "model_version": "wsc-3f2a1c-h3"}
    seen: list[tuple[int | None, str, BagResult | None]] = []

    def extras(project: int | None, key: str, result: BagResult | None) -> dict[str, object]:
        seen.append((project, key, result))
        return {"suggestion": suggestion}

    from backend.web.panel_routes import Panel

    state = Panel(opened.services, extras).state(opened.token)
    assert state["suggestion"] == suggestion
    assert seen[0][:2] == (3, opened.key) and seen[0][2] is not None


def test_the_heatmap_picture_changes_when_the_result_is_there(opened: Opened) -> None:
    before = opened.get("/panel/heatmap.jpg")
    assert before.status_code == 200
    store_result(opened.services, opened.path)
    after = opened.get("/panel/heatmap.jpg")
    assert before.headers["etag"] != after.headers["etag"] and "no-cache" in after.headers["cache-control"]
    a, b = (
        np.asarray(Image.open(io.BytesIO(r.content)).convert("RGB"))[:1500, :1500].astype(int) for r in (before, after)
    )
    assert np.abs(a - b).mean() > 10
    assert opened.get("/panel/heatmap.jpg", **{"If-None-Match": after.headers["etag"]}).status_code == 304


def test_what_was_taken_for_tissue_is_a_layer_and_its_notes_are_told(opened: Opened) -> None:
    assert opened.get("/panel/tissue.png").status_code == 404
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(opened.path.with_name("Lymph node 1.tissue.png"))
    store_result(opened.services, opened.path)
    # The address was made before somebody laid the mask beside the slide: it shows the newer result all the same.
    shown = opened.get("/panel/state").json()["result"]
    assert shown["tissue"] == {"source": "Lymph node 1.tissue.png", "share": 0.5, "ink_share": 0}
    assert "Lymph node 1.tissue.png as it is" in " ".join(shown["notes"])
    layer = opened.get("/panel/tissue.png")
    assert (layer.status_code, layer.headers["content-type"]) == (200, "image/png")
    pixels = np.asarray(Image.open(io.BytesIO(layer.content)).convert("RGBA"))
    middle = pixels.shape[1] // 2
    assert (pixels[:, : middle - 1, 3] > 0).all() and (pixels[:, middle + 1 :, 3] == 0).all(), "glass is transparent"
    assert opened.get("/panel/tissue.png", **{"If-None-Match": layer.headers["etag"]}).status_code == 304
    assert opened.client.get("/panel/tissue.png", params={"slide": "x"}).status_code == 403


def events(opened: Opened, until: str, act: object = None) -> list[dict[str, object]]:
    """The statuses that a listener is told until one of phase ``until``."""
    told: list[dict[str, object]] = []
    url = f"{opened.client.base_url}/panel/events".replace("//panel", "/panel")
    with httpx.stream("GET", url, params={"slide": opened.token}, timeout=60, trust_env=False) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: {") and '"phase"' in line:
                told.append(json.loads(line[6:]))
                if told[-1]["phase"] == until:
                    return told
                if act is not None and len(told) == 1:
                    threading.Thread(target=act).start()  # type: ignore[arg-type]
    raise AssertionError(f"the stream ended: {told}")


def test_events_tell_each_change_and_only_changes(opened: Opened) -> None:
    def act() -> None:
        opened.services.queue.submit(BagRequest(opened.key, opened.ref.to_json()), priority="batch")

    told = events(opened, "queued", act)
    assert [status["phase"] for status in told] == ["idle", "queued"]


def test_a_push_is_told_with_where_its_task_is(opened: Opened) -> None:
    store_result(opened.services, opened.path)
    waiting = WaitingTask(3, 12, "<View/>", "v")
    opened.services.queue.put_back_waiting(opened.key, [waiting])
    (status,) = events(opened, "done")
    assert (status["waiting"], status["pushes"]) == (["3:12"], [])
    note_push(opened.services.queue, opened.key, 3, 12)
    (status,) = events(opened, "done")
    (push,) = status["pushes"]  # type: ignore[misc]
    assert push["url"] == f"{STUDIO}/projects/3/data?task=12"


def test_the_page_paints_the_colours_of_the_servers_own_heatmaps() -> None:
    text = (Path(__file__).parents[2] / "backend/web/panel/colours.js").read_text()
    joined = re.sub(r'"\s*\+\s*"', "", text)
    for name, anchors in _ANCHORS.items():
        assert f'{name}:\n    "{anchors}"' in joined


@pytest.mark.skipif(
    shutil.which("node") is None,
    reason="the page's JavaScript runs in Node.js here, which is not installed; the browser tests run it too",
)
def test_ranks_and_hot_tiles_in_the_browser_are_the_servers(opened: Opened, tmp_path: Path) -> None:
    """The module itself, on the block itself: with ties, which decide whether both sides mean the same."""
    store_result(opened.services, opened.path)
    result = opened.services.store.need(opened.key)
    block = bytearray(opened.get("/panel/weights").content)
    n = len(result.bag)
    tied = np.frombuffer(bytes(block), "<f4", offset=8 * n).reshape(9, n).copy()
    tied[3] = np.round(tied[3], 2)
    block[8 * n :] = tied.tobytes()
    (tmp_path / "block").write_bytes(bytes(block))
    (tmp_path / "attention.mjs").write_text((Path(__file__).parents[2] / "backend/web/panel/attention.js").read_text())
    shown = opened.get("/panel/state").json()["result"]
    (tmp_path / "run.mjs").write_text(
        "import {readFileSync} from 'node:fs'; import {Attention} from './attention.mjs';"
        f"const b = readFileSync('block'); const a = new Attention(b.buffer.slice(b.byteOffset, b.byteOffset + b.length), {json.dumps(shown)});"
        "console.log(JSON.stringify({ranks: [...a.ranks(2)], hot: a.hottest(2, 9), corner: a.corner(a.tiles - 1),"
        " smooth: Math.max(...a.smoothed(2))}));"
    )
    done = subprocess.run(["node", "run.mjs"], cwd=tmp_path, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    from backend.results.ranks import percentile_ranks

    assert np.allclose(told["ranks"], percentile_ranks(tied[3]), atol=1e-6)
    assert told["hot"] == hottest_first(tied[3])[:9].tolist()
    assert told["corner"] == result.bag.coords[-1].tolist()
    assert 0 < told["smooth"] < 1


def test_serving_panels_imports_neither_torch_nor_mmm() -> None:
    code = "import sys, backend.web.app, backend.web.server; sys.exit(any(m in sys.modules for m in ('torch', 'mmm', 'sklearn')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
