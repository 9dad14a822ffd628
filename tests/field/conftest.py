"""Field cases: each is made when a test first asks for it, once for the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tifffile
from field_slides import Maker, Picture

from backend.settings import Settings

if TYPE_CHECKING:
    from field_studio import StudioBelow


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Picture:
    """H&E at 0.499 µm/px: the real slide CMU-1-Small-Region, or a synthetic one where that is not."""
    data = Path(os.environ.get("WSC_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    real = data / "slides" / "CMU-1-Small-Region.svs"
    if real.is_file():
        return np.asarray(tifffile.imread(real, key=0))
    from backend.slides.synthetic import write_synthetic_slide

    made = write_synthetic_slide(tmp_path_factory.mktemp("picture") / "slide.tif", size=(2220, 2967), mpp=0.499, seed=7)
    return np.asarray(tifffile.imread(made.path, key=0))


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory, picture: Picture) -> Callable[[Maker], Path]:
    """The file (or folder) of a maker of ``field_slides``, made once: read it, do not change it."""
    folder = tmp_path_factory.mktemp("cases")
    made: dict[Maker, Path] = {}

    def get(maker: Maker) -> Path:
        if maker not in made:
            made[maker] = maker(picture, folder)
        return made[maker]

    return get


@pytest.fixture
def anywhere(settings: Callable[..., Settings]) -> Settings:
    """Settings with all defaults."""
    return settings()


@pytest.fixture(scope="session")
def studio(label_studio_venv: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioBelow]:
    """A real Label Studio below a path, for the run."""
    from field_studio import studio_below_a_path

    with studio_below_a_path(label_studio_venv, tmp_path_factory.mktemp("studio")) as studio:
        yield studio
