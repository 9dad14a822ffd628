"""What was learnt, as people see it: the panel and the overview in a real browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from learnt_project import DAMAGED, LEARNT, SLIDES, UNTAUGHT, Learnt
from playwright.sync_api import ConsoleMessage, Page, expect, sync_playwright

from backend.web.signing import SlideSigner

SCREENSHOTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"
CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: `make test` as root installs it"),
]


@pytest.fixture
def page() -> Iterator[Page]:
    """A headless page; at the end, it must have had no error."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        problems: list[str] = []

        def note(message: ConsoleMessage) -> None:
            if message.type == "error":
                problems.append(message.text)

        opened = browser.new_context(viewport={"width": 1280, "height": 820}, locale="en-GB").new_page()
        opened.on("console", note)
        opened.on("pageerror", lambda error: problems.append(str(error)))
        try:
            yield opened
        finally:
            browser.close()
        assert problems == []


def panel(learnt: Learnt, page: Page, number: int, project: int) -> Page:
    ref = learnt.services.resolver.resolve(str(learnt.slides[number][0]))
    base = str(learnt.client.base_url).rstrip("/")
    page.goto(SlideSigner(learnt.services.settings.model_dir).panel_url(base, ref, project))
    expect(page.locator("#strip button").first).to_be_visible(timeout=60_000)
    return page


def keep(page: Page, name: str, *, full: bool = False) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_load_state("networkidle")
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=full)


def pictures_are_there(page: Page) -> bool:
    """Whether every neighbour's picture has arrived."""
    return bool(
        page.evaluate("() => [...document.querySelectorAll('li img')].every(i => i.complete && i.naturalWidth > 0)")
    )


def test_the_panel_shows_the_suggestion_and_the_slides_that_are_alike(learnt: Learnt, page: Page) -> None:
    panel(learnt, page, 25, LEARNT)
    suggested = page.locator("#suggested")
    expect(suggested.locator("h3")).to_have_text(["diagnosis", "grade"])
    first = suggested.locator("li").first
    expect(first.locator(".label")).to_have_text("No tumour")
    expect(first.locator(".sure")).to_have_text(re.compile(r"^(> 99|[5-9]\d) %$"))
    expect(suggested).to_contain_text("Research use only")
    expect(suggested).to_contain_text(learnt.version)
    expect(suggested).to_contain_text("not calibrated yet")
    expect(page.locator("#learning")).to_be_hidden()
    stage, beside = page.locator("#stage").bounding_box(), page.locator("#learnt").bounding_box()
    assert stage is not None and beside is not None
    assert stage["width"] > 900 and beside["x"] >= stage["x"] + stage["width"], "beside the slide, not upon it"
    keep(page, "learnt-panel-light")
    page.emulate_media(color_scheme="dark")
    keep(page, "learnt-panel-dark")
    with page.expect_popup() as popup:
        page.locator("#similar-link").click()
    similar = popup.value
    expect(similar.locator("li")).to_have_count(5)
    expect(similar.locator("li").first).to_contain_text("No tumour")
    similar.wait_for_load_state("networkidle")
    assert pictures_are_there(similar)
    similar.locator("li a").first.click()
    expect(similar.locator("#phase")).to_have_text("analysed", timeout=60_000)


def test_at_320_pixels_what_was_learnt_is_below_the_slide(learnt: Learnt, page: Page) -> None:
    page.set_viewport_size({"width": 320, "height": 720})
    panel(learnt, page, 25, LEARNT)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 320
    stage, below = page.locator("#stage").bounding_box(), page.locator("#learnt").bounding_box()
    assert stage is not None and below is not None
    assert below["y"] >= stage["y"] + stage["height"] and stage["height"] >= 280
    keep(page, "learnt-panel-320", full=True)


@pytest.mark.parametrize("project", [UNTAUGHT, DAMAGED])
def test_without_heads_a_quiet_line_says_why(project: int, learnt: Learnt, page: Page) -> None:
    panel(learnt, page, 25, project)
    expect(page.locator("#suggested")).to_be_hidden()
    expect(page.locator("#similar-link")).to_be_visible()
    words = learnt.few.message if project == UNTAUGHT else "cannot be read"
    expect(page.locator("#learning")).to_contain_text(words)
    keep(page, f"learnt-panel-without-heads-{project}")


def test_the_overview_draws_the_curve_and_colours_the_map(learnt: Learnt, page: Page) -> None:
    page.goto(str(learnt.client.base_url))
    card = page.locator(".card", has_text=f"Project {LEARNT}")
    expect(card.locator("figure")).to_have_count(2, timeout=60_000)
    expect(card.locator("figcaption").first).to_contain_text("diagnosis: Balanced accuracy")
    expect(card.locator("svg").first.locator("circle")).to_have_count(3)
    expect(card.locator("svg .band")).to_have_count(1)
    expect(card.locator("svg").first).to_contain_text("labelled slides")
    expect(page.locator(".card", has_text=f"Project {UNTAUGHT}")).to_contain_text("more labelled slides")
    expect(page.locator(".card", has_text=f"Project {DAMAGED}").locator(".bad")).to_contain_text("cannot be read")

    legend = page.locator("#map-legend")
    expect(legend).to_contain_text("No tumour 15")
    expect(legend).to_contain_text("Tumour 15")
    expect(legend).to_contain_text("outlined: suggested (6)")
    expect(page.locator("#map .mark")).to_have_count(SLIDES)
    fill: Any = "e => getComputedStyle(e).fill"
    by_label = set(
        page.locator("#map .mark:not(.suggested)").evaluate_all("all => all.map(e => getComputedStyle(e).fill)")
    )
    assert len(by_label) == 2
    keep(page, "learnt-overview-light", full=True)
    page.get_by_role("button", name="Confidence").click()
    expect(legend).to_contain_text("100 % confidence, research use only")
    assert page.locator("#map .mark").first.evaluate(fill) not in by_label
    page.emulate_media(color_scheme="dark")
    keep(page, "learnt-overview-dark", full=True)
    page.get_by_role("button", name="Label").click()
    keep(page, "learnt-overview-dark-labels", full=True)
    page.set_viewport_size({"width": 320, "height": 720})
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 320
    keep(page, "learnt-overview-320", full=True)
