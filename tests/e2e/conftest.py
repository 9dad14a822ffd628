"""A real Label Studio for the whole run, and a real Chromium page logged in to it for each test that asks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright
from running_backend import Backend, running_backend
from studio import REPOSITORY, Editor, Studio

from backend.demo.label_studio_process import LabelStudioProcess


@pytest.fixture(scope="session")
def label_studio(label_studio_venv: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """A running Label Studio on a free port, with one user and nothing in it. Tests make projects of their own."""
    process = LabelStudioProcess(
        label_studio_venv,
        tmp_path_factory.mktemp("label-studio"),
        port=0,
        template_dir=REPOSITORY / "build" / "label-studio",
    )
    process.start(print)
    try:
        with Studio(process) as studio:
            yield studio
    finally:
        process.stop()


@pytest.fixture(scope="module")
def backend(label_studio: Studio, stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """A backend for the module's tests. Its workers are not running yet."""
    with running_backend(label_studio, stand_in, tmp_path_factory.mktemp("backend")) as backend:
        yield backend


# One browser a test: while Playwright runs, asyncio believes that this thread has a running loop, which would break every
# later test that uses asyncio.
@pytest.fixture
def browser_page(label_studio: Studio, chromium_path: str) -> Iterator[Editor]:
    """A headless page, 1600 × 1000, logged in to Label Studio, that notes every error it sees."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium_path,
            # Root has no sandbox, and small containers have a small /dev/shm.
            args=["--no-sandbox", "--disable-dev-shm-usage"],
        )
        try:
            context = browser.new_context(
                viewport={"width": 1600, "height": 1000}, storage_state=label_studio.login_state, locale="en-GB"
            )
            editor = Editor(context.new_page(), label_studio)
            if label_studio.login_state is None:
                editor.log_in()
                label_studio.login_state = context.storage_state()
            yield editor
        finally:
            browser.close()
