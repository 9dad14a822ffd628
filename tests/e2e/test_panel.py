"""The panel as people see it: inside a real Label Studio task, and as a page of its own, in a real browser."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Frame, Page, Route, expect
from running_backend import REAL_SLIDES, Backend, wait_for
from studio import SCREENSHOTS, SETTLED, Editor, Studio

from backend.commands.import_slides import import_slides
from backend.jobs.queue import BagRequest
from backend.results.bag import BagResult
from backend.results.ranks import percentile_ranks
from backend.slides.synthetic import SyntheticSlide, write_synthetic_slide
from backend.web.signing import SlideSigner

pytestmark = pytest.mark.e2e

LONG_MS = 180_000


@pytest.fixture(scope="module")
def slide(backend: Backend) -> SyntheticSlide:
    root = backend.services.settings.slide_roots[0]
    return write_synthetic_slide(root / "planted.tif", size=(5200, 4200), mpp=0.5, seed=5)


@pytest.fixture(scope="module")
def task(backend: Backend, slide: SyntheticSlide, label_studio: Studio) -> dict[str, Any]:
    """A task of a project with the triage config, imported while no worker runs."""
    done = import_slides(backend.services, [slide.path], project="Panel", template="triage", retrieve=False)
    (listed,) = label_studio.call("GET", f"/api/tasks/?project={done.project}&fields=all")["tasks"]
    return {"id": int(listed["id"]), "project": done.project, "panel": str(listed["data"]["panel"])}


@pytest.fixture(scope="module")
def analysed(backend: Backend, task: dict[str, Any], slide: SyntheticSlide) -> BagResult:
    """The result of the slide, by a real worker."""
    ref = backend.services.resolver.resolve(str(slide.path))
    backend.services.queue.submit(BagRequest(key := backend.services.key(ref), ref.to_json()), priority="interactive")
    start_workers(backend)
    return wait_for("the result", lambda: backend.services.store.get(key))  # type: ignore[no-any-return]


@pytest.fixture
def panel(browser_page: Editor, task: dict[str, Any], analysed: BagResult) -> Page:
    """The panel of the analysed slide, as a page of its own, with everything on it drawn."""
    return open_panel(browser_page.page, task["panel"])


def start_workers(backend: Backend) -> None:
    if not backend.services.queue.workers():
        backend.pool.start()


def open_panel(page: Page, url: str, width: int = 1180, height: int = 820) -> Page:
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme="light", reduced_motion="reduce")
    page.goto(url)
    expect(page.locator("#strip button")).to_have_count(12, timeout=30_000)
    page.wait_for_load_state("networkidle")
    return page


def panel_frame(page: Page) -> Frame:
    handle = page.wait_for_selector("iframe[title='The slide at full depth']", timeout=60_000)
    frame = handle.content_frame()
    assert frame is not None
    return frame


def set_value(page: Page, control: str, value: object) -> None:
    """What a person does with a slider, a list or a box."""
    page.locator(control).evaluate(
        "(e, value) => { if (e.type === 'checkbox') e.checked = value; else e.value = value; "
        "e.dispatchEvent(new Event('input', {bubbles: true})); }",
        value,
    )


def stage_picture(page: Page) -> np.ndarray:
    """The slide with its overlay as the screen shows it; what lies on top of it (buttons, legend) is taken away."""
    page.evaluate(
        "() => document.querySelectorAll('.zoom, #scalebar, #legend, #readout, .navigator')"
        ".forEach(e => { e.style.visibility = 'hidden'; })"
    )
    page.wait_for_timeout(400)
    return np.asarray(Image.open(io.BytesIO(page.locator("#stage").screenshot())).convert("RGB")).astype(int)


def keep(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


# --- inside Label Studio ------------------------------------------------------------------------------------------------


def test_in_the_task_progress_moves_to_done_and_the_reload_button_shows_the_pushed_regions(
    backend: Backend, task: dict[str, Any], label_studio: Studio, browser_page: Editor
) -> None:
    page = browser_page.page
    browser_page.open_task(task["project"], task["id"], regions=0)
    frame = panel_frame(page)
    expect(frame.locator("#phase")).to_have_text("waiting", timeout=30_000)
    expect(frame.locator("#job-detail")).to_contain_text("Place 1 in the queue “interactive”")
    expect(frame.locator("#reload")).to_be_hidden()
    browser_page.screenshot("panel-in-task-waiting")
    frame.evaluate(
        "() => { window.seen = []; new MutationObserver(() => seen.push(document.getElementById('phase').textContent))"
        ".observe(document.getElementById('phase'), {childList: true, characterData: true, subtree: true}); }"
    )
    start_workers(backend)
    expect(frame.locator("#phase")).to_have_text("analysed", timeout=LONG_MS)
    assert "analysing" in frame.evaluate("() => seen"), "the same page saw it run"
    expect(frame.locator("#strip button")).to_have_count(12, timeout=30_000)

    expect(frame.locator("#reload")).to_be_visible(timeout=60_000)
    expect(frame.locator("#reload")).to_have_text(re.compile("New regions were pushed to this task"))
    (prediction,) = label_studio.predictions(task["id"])
    whole_task = re.compile(rf"/api/tasks/{task['id']}/?(\?|$)")
    with page.expect_response(whole_task, timeout=60_000):
        frame.locator("#reload").click()
    page.wait_for_function(SETTLED, arg=[1, len(prediction["result"])], timeout=60_000)
    assert "Attention" in browser_page.region_labels()
    frame = panel_frame(page)
    expect(frame.locator("#strip button")).to_have_count(12, timeout=30_000)
    expect(frame.locator("#reload")).to_be_hidden()
    frame.wait_for_load_state("networkidle")
    browser_page.screenshot("panel-in-task")
    assert browser_page.problems == []


@pytest.mark.parametrize("template", ["regions", "plain", "bands"])
def test_every_shipped_config_opens_in_label_studio(
    template: str,
    backend: Backend,
    analysed: BagResult,
    slide: SyntheticSlide,
    label_studio: Studio,
    browser_page: Editor,
) -> None:
    done = import_slides(backend.services, [slide.path], project=f"Config {template}", template=template)
    (listed,) = label_studio.call("GET", f"/api/tasks/?project={done.project}&fields=all")["tasks"]
    # As the editor asks for it: a new project counts the predictions of this version only after a moment.
    asked = f"/api/tasks/{listed['id']}/?project={done.project}"
    (prediction,) = wait_for("the prediction", lambda: label_studio.call("GET", asked)["predictions"])
    browser_page.open_task(done.project, int(listed["id"]), regions=len(prediction["result"]))
    frames = browser_page.page.locator("iframe[title='The slide at full depth']")
    if template == "regions":
        expect(panel_frame(browser_page.page).locator("#strip button")).to_have_count(12, timeout=30_000)
    else:
        assert frames.count() == 0, "no frame where none is allowed"
    browser_page.screenshot(f"config-{template}")
    assert browser_page.problems == []


def test_the_config_for_patches_opens_in_label_studio(
    backend: Backend, task: dict[str, Any], label_studio: Studio, browser_page: Editor
) -> None:
    from backend.label_studio.labeling_config import load_template

    picture = label_studio.call("GET", f"/api/tasks/{task['id']}/")["data"]["image"]
    project = label_studio.create_project("Config patches", load_template("patches"))
    (number,) = label_studio.import_tasks(project, [{"patches": [picture, picture]}])
    browser_page.open_task(project, number, regions=0)
    assert browser_page.problems == []


# --- the overlay -----------------------------------------------------------------------------------------------------------


def where_tiles_are(result: BagResult, chosen: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """bool (h, w): which pixels of the stage lie in the chosen tiles, the whole slide being fitted into the stage."""
    height, width = shape
    slide_w, slide_h = result.bag.slide_size
    scale = min(width / slide_w, height / slide_h)
    left, top = (width - slide_w * scale) / 2, (height - slide_h * scale) / 2
    y, x = np.mgrid[0:height, 0:width] + 0.5
    x0, y0 = (x - left) / scale, (y - top) / scale
    inside = (x0 >= 0) & (y0 >= 0) & (x0 < slide_w) & (y0 < slide_h)
    edge = result.bag.tile_size_level0
    grid = np.zeros(result.bag.grid_size[::-1], bool)
    grid[result.bag.grid[chosen, 1], result.bag.grid[chosen, 0]] = True
    column = np.clip((x0 / edge).astype(int), 0, grid.shape[1] - 1)
    row = np.clip((y0 / edge).astype(int), 0, grid.shape[0] - 1)
    return grid[row, column] & inside


def painted(page: Page) -> np.ndarray:
    """bool (h, w): the pixels of the stage that the overlay changes."""
    with_overlay = stage_picture(page)
    set_value(page, "#shown", False)
    without = stage_picture(page)
    set_value(page, "#shown", True)
    return np.asarray(np.abs(with_overlay - without).max(axis=2) > 8)


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_the_overlay_lies_on_the_planted_region_to_the_pixel(
    panel: Page, analysed: BagResult, slide: SyntheticSlide
) -> None:
    set_value(panel, "#colours", "magma")
    set_value(panel, "#opacity", 90)
    ranks = percentile_ranks(analysed.mean_attention)
    for threshold in (0, 85):
        set_value(panel, "#threshold", threshold)
        seen = painted(panel)
        wanted = where_tiles_are(analysed, ranks >= np.float32(threshold / 100), seen.shape)
        assert agreement(seen, wanted) > 0.97, f"threshold {threshold}"
    # And these tiles are where the dense nuclei were planted.
    height, width = seen.shape
    scale = min(width / slide.size[0], height / slide.size[1])
    y, x = np.nonzero(seen)
    level0 = ((x - (width - slide.size[0] * scale) / 2) / scale, (y - (height - slide.size[1] * scale) / 2) / scale)
    assert slide.is_planted(*level0).mean() > 0.5, "most of what is marked hot was planted"
    assert slide.is_planted(*level0).mean() > 4 * slide.tumour_mask.mean()


def test_the_head_selector_changes_the_overlay(panel: Page, analysed: BagResult) -> None:
    set_value(panel, "#threshold", 60)
    set_value(panel, "#opacity", 100)
    pictures = {}
    for head in (-1, 2, 7):
        set_value(panel, "#head", head)
        seen = painted(panel)
        weights = analysed.mean_attention if head < 0 else analysed.attention[:, head]
        wanted = where_tiles_are(analysed, percentile_ranks(weights) >= np.float32(0.6), seen.shape)
        assert agreement(seen, wanted) > 0.97, f"head {head}"
        pictures[head] = stage_picture(panel)
        name = "Mean of 8" if head < 0 else f"Head {head}"
        assert panel.locator("#head option:checked").inner_text() == name
    assert np.abs(pictures[2] - pictures[7]).max() > 50
    expect(panel.locator("#legend-text")).to_contain_text("head 7")


def test_changes_of_the_overlay_ask_the_server_for_nothing(panel: Page) -> None:
    asked: list[str] = []
    panel.on("request", lambda request: asked.append(request.url))
    before = stage_picture(panel)
    for control, value in (
        ("#opacity", 80),
        ("#threshold", 40),
        ("#colours", "coolwarm"),
        ("#smooth", True),
        ("#shown", False),
        ("#shown", True),
    ):
        set_value(panel, control, value)
    assert np.abs(stage_picture(panel) - before).max() > 50
    expect(panel.locator("#legend-text")).to_contain_text("display only")
    assert asked == []
    set_value(panel, "#head", 3)
    panel.wait_for_load_state("networkidle")
    assert all("/region.jpg?" in url for url in asked), "only the pictures of that head's hot tiles"


def test_a_hot_tile_is_flown_to_and_framed(panel: Page, analysed: BagResult) -> None:
    far = panel.locator("#scalebar").get_attribute("data-um")
    buttons = panel.locator("#strip button")
    expect(buttons.first).to_have_attribute("aria-label", re.compile(r"Hot tile 1 of 12: [\d.]+ % of the attention"))
    buttons.first.click()
    expect(buttons.first).to_have_attribute("aria-current", "true")
    near = panel.locator("#scalebar").get_attribute("data-um")
    assert float(near or 0) < float(far or 0)
    box = panel.locator("#stage").bounding_box()
    assert box is not None
    panel.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(panel.locator("#readout")).to_contain_text("rank 100")
    keep(panel, "panel-hot-tile")


def test_the_scale_bar_is_as_long_as_it_says(panel: Page, analysed: BagResult) -> None:
    um = float(panel.locator("#scalebar").get_attribute("data-um") or 0)
    line = panel.locator("#scalebar-line").bounding_box()
    stage = panel.locator("#stage").bounding_box()
    assert line is not None and stage is not None
    width, height = analysed.bag.slide_size
    um_per_px = analysed.bag.mpp / min(stage["width"] / width, stage["height"] / height)
    assert line["width"] * um_per_px == pytest.approx(um, rel=0.02)
    expect(panel.locator("#scalebar-text")).to_have_text(f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} µm")


def test_the_keyboard_reaches_everything(panel: Page) -> None:
    um = lambda: float(panel.locator("#scalebar").get_attribute("data-um") or 0)  # noqa: E731
    home = um()
    panel.locator("#viewer").focus()
    for _ in range(4):
        panel.keyboard.press("+")
    panel.wait_for_timeout(300)
    assert um() < home
    panel.keyboard.press("0")
    panel.wait_for_timeout(300)
    assert um() == home
    before = stage_picture(panel)
    panel.keyboard.press("o")
    assert not panel.locator("#shown").is_checked()
    assert np.abs(stage_picture(panel) - before).max() > 20
    panel.keyboard.press("o")
    panel.keyboard.press("n")
    panel.keyboard.press("n")
    expect(panel.locator("#strip button").nth(1)).to_have_attribute("aria-current", "true")
    panel.keyboard.press("p")
    expect(panel.locator("#strip button").first).to_have_attribute("aria-current", "true")
    panel.keyboard.press("h")
    assert panel.locator("#head").input_value() == "0"
    panel.keyboard.press("?")
    expect(panel.locator("#keys")).to_be_visible()


# --- looks and access ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system(
    scheme: Any, browser_page: Editor, backend: Backend, analysed: BagResult
) -> None:
    page = browser_page.page
    path = REAL_SLIDES / "CMU-1-Small-Region.svs"
    if not path.is_file():
        pytest.skip(f"the real slide is not here: no {path} (set WSC_TEST_DATA)")
    ref = backend.services.resolver.resolve(str(path))
    backend.services.queue.submit(BagRequest(key := backend.services.key(ref), ref.to_json()), priority="interactive")
    wait_for("the real slide's result", lambda: backend.services.store.has(key))
    open_panel(page, SlideSigner(backend.services.settings.model_dir).panel_url(backend.url, ref))
    page.emulate_media(color_scheme=scheme)
    page.wait_for_timeout(500)
    shade = page.evaluate("() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert (shade > 200) if scheme == "light" else (shade < 60)
    keep(page, f"panel-{scheme}")
    page.click("#theme")
    switched = page.evaluate("() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert (switched < 60) if scheme == "light" else (switched > 200)
    assert browser_page.problems == []


def test_at_320_pixels_nothing_is_cut_off(browser_page: Editor, task: dict[str, Any], analysed: BagResult) -> None:
    page = open_panel(browser_page.page, task["panel"], width=320, height=720)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 320
    for control in ("#head", "#colours", "#opacity", "#threshold", "#smooth", "#zoom-in", "#theme", "#help"):
        box = page.locator(control).bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 320, control
    stage = page.locator("#stage").bounding_box()
    assert stage is not None and stage["height"] >= 280
    keep(page, "panel-320")


def test_a_screen_reader_finds_a_name_for_everything_that_can_be_used(panel: Page, backend: Backend) -> None:
    unnamed = """() => [...document.querySelectorAll('button, input, select, a[href], progress, [role=application], dialog')]
        .filter(e => !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.labels?.[0]?.textContent.trim()
                       || e.textContent.trim()))
        .map(e => e.outerHTML)"""
    assert panel.evaluate(unnamed) == []
    panel.goto(backend.url)
    expect(panel.locator("#jobs tr").first).to_be_visible()
    assert panel.evaluate(unnamed) == []


# --- what goes wrong ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(backend: Backend, request: pytest.FixtureRequest) -> Iterator[tuple[Path, str]]:
    """A file that is no slide, and the address of its panel."""
    path = backend.services.settings.slide_roots[0] / f"broken-{request.node.name}.svs"
    path.write_bytes(b"II*\0 this is no slide")
    ref = backend.services.resolver.resolve(str(path))
    backend.services.queue.submit(BagRequest(backend.services.key(ref), ref.to_json()), priority="interactive")
    yield path, SlideSigner(backend.services.settings.model_dir).panel_url(backend.url, ref)
    path.unlink()


def test_a_failure_shows_its_reason_and_what_to_do(
    broken: tuple[Path, str], analysed: BagResult, browser_page: Editor
) -> None:
    page = browser_page.page
    page.goto(broken[1])
    expect(page.locator("#phase")).to_have_text("failed", timeout=60_000)
    expect(page.locator("#failure")).to_contain_text(f"The analysis failed. {broken[0].name}")
    assert page.locator("#failure-hint").inner_text().strip()
    expect(page.locator("#problem")).to_be_visible()
    keep(page, "panel-failed")


def test_a_slide_that_is_gone_is_a_message_and_not_a_broken_picture(
    backend: Backend, slide: SyntheticSlide, browser_page: Editor
) -> None:
    path = slide.path.with_name("gone.tif")
    shutil.copy(slide.path, path)
    ref = backend.services.resolver.resolve(str(path))
    url = SlideSigner(backend.services.settings.model_dir).panel_url(backend.url, ref)
    path.unlink()
    browser_page.page.goto(url)
    expect(browser_page.page.locator("#problem-reason")).to_contain_text("There is no file", timeout=30_000)
    expect(browser_page.page.locator("#name")).to_have_text("gone.tif")
    expect(browser_page.page.locator("#problem-hint")).not_to_be_empty()


def test_a_tampered_address_is_refused_in_words(task: dict[str, Any], browser_page: Editor) -> None:
    answer = browser_page.page.goto(task["panel"][:-3] + "abc")
    assert answer is not None and answer.status == 403
    expect(browser_page.page.locator("h1")).to_have_text("This address is not valid")


def test_without_event_streams_the_page_asks_again_and_again(
    broken: tuple[Path, str], analysed: BagResult, browser_page: Editor
) -> None:
    page = browser_page.page
    page.route("**/panel/events**", lambda route: route.abort())
    first = {"phase": "queued", "job": None, "pushes": [], "waiting": [], "error": None}
    answers = iter([first])

    def state(route: Any) -> None:
        body = route.fetch().json()
        body["status"] = next(answers, body["status"])
        route.fulfill(json=body)

    page.route("**/panel/state**", state)
    page.goto(broken[1])
    expect(page.locator("#phase")).to_have_text("failed", timeout=60_000)


# --- the overview -----------------------------------------------------------------------------------------------------------------


def test_the_overview_shows_the_failure_and_tries_it_again(
    broken: tuple[Path, str], backend: Backend, analysed: BagResult, browser_page: Editor
) -> None:
    page = browser_page.page
    page.set_viewport_size({"width": 1280, "height": 900})
    wait_for("the failure", lambda: backend.services.queue.jobs(50, "failed"))
    page.goto(backend.url)
    name = broken[0].name
    row = page.locator("#jobs tr", has_text=name)
    expect(row.locator(".chip")).to_have_text("failed", timeout=30_000)
    expect(row.locator(".reason")).to_contain_text(name)
    expect(page.locator("#workers tr").first).to_contain_text("cpu")
    expect(page.locator("#workers tr").first).to_contain_text("iB")
    expect(page.locator("#projects a").first).to_be_visible(timeout=30_000)
    keep(page, "overview")
    failed = next(job for job in backend.services.queue.jobs(50, "failed") if name in job.about)
    row.get_by_role("button", name=re.compile("^Retry")).click()
    expect(page.locator("#said")).to_contain_text("is tried again")
    again = lambda: (state := backend.services.queue.state(failed.key)) and state.settled and state  # noqa: E731
    assert wait_for("the retry", again).ended_at > failed.ended_at
    page.get_by_role("button", name=re.compile("^Running")).click()
    expect(page.locator("#jobs tr", has_text=name)).to_have_count(0)


def test_a_point_of_the_map_opens_its_slide(
    backend: Backend, slide: SyntheticSlide, analysed: BagResult, browser_page: Editor
) -> None:
    path = slide.path.with_name("second.tif")
    write_synthetic_slide(path, size=(2000, 2000), mpp=0.5, seed=9)
    ref = backend.services.resolver.resolve(str(path))
    backend.services.queue.submit(BagRequest(key := backend.services.key(ref), ref.to_json()), priority="interactive")
    wait_for("the second result", lambda: backend.services.store.has(key))
    page = browser_page.page
    page.goto(backend.url)
    point = page.locator("#map a", has=page.locator("title", has_text="second.tif"))
    expect(point).to_be_visible(timeout=30_000)
    point.locator(".mark").click(force=True)
    expect(page.locator("#name")).to_have_text("second.tif", timeout=30_000)
    expect(page.locator("#phase")).to_have_text("analysed")


def test_a_slide_that_is_still_being_downloaded_is_asked_for_until_it_is_there(
    browser_page: Editor, task: dict[str, Any], analysed: BagResult
) -> None:
    """The answer is the backend's own for a slide on a slow host (see tests/web/test_panel_downloads.py), given twice here."""
    page = browser_page.page
    way = {
        "code": "download_under_way",
        "message": "far.tif is being downloaded: 1.2 of 3.4 MB have come.",
        "hint": "It goes on by itself.",
    }
    answers = iter([503, 503])

    def not_yet(route: Route) -> None:
        status = next(answers, None)
        if status is None:
            route.continue_()
        else:
            route.fulfill(status=status, json={"detail": way["message"], "error": way})

    page.route("**/panel/slide?*", not_yet)
    try:
        page.goto(task["panel"])
        expect(page.locator("#problem h2")).to_have_text("The slide is on its way")
        expect(page.locator("#problem-reason")).to_have_text(way["message"])
        keep(page, "panel-download")
        expect(page.locator("#problem")).to_be_hidden(timeout=30_000)
        expect(page.locator("#strip button")).to_have_count(12, timeout=30_000)
        expect(page.locator("#legend")).to_be_visible()
    finally:
        page.unroute("**/panel/slide?*")
