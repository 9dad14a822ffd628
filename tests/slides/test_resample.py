"""Scaled pixels agree with the exact area average."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from slide_makers import psnr

from backend.slides.images import DecodedImage
from backend.slides.levels import ImageSlide
from backend.slides.resample import best_level
from backend.slides.synthetic import SyntheticSlide


@pytest.fixture(scope="module")
def picture(synthetic_slide: SyntheticSlide) -> np.ndarray:
    with Image.open(synthetic_slide.path) as image:
        x0, y0, *_ = synthetic_slide.tumour_box
        return np.asarray(image.convert("RGB").crop((x0 - 100, y0 - 100, x0 + 900, y0 + 700)))


def area_average(picture: np.ndarray, x: float, y: float, size: float, out: int) -> np.ndarray:
    def weights(start: float, length: int) -> np.ndarray:
        edges = start + size / out * np.arange(out + 1)
        low, high = np.maximum(edges[:-1, None], np.arange(length)), np.minimum(edges[1:, None], np.arange(length) + 1)
        return np.clip(high - low, 0, None) / (size / out)

    rows = np.tensordot(weights(y, picture.shape[0]), picture.astype(np.float64), 1)
    return np.tensordot(rows, weights(x, picture.shape[1]), ((1,), (1,))).transpose(0, 2, 1)


@pytest.mark.parametrize("scale", [1.002, 1.2, 1.4, 1.984, 2.004, 2.5, 3.3, 4.008])
@pytest.mark.parametrize("offset", [0.0, 0.37])
def test_a_region_is_the_area_average_of_what_it_covers(picture: np.ndarray, scale: float, offset: float) -> None:
    slide = ImageSlide(DecodedImage(Image.fromarray(picture), "png", None))
    out = min(224, int(700 / scale))
    found = slide.read_region(11 + offset, 7 + offset, out * scale, out)
    exact = area_average(picture, 11 + offset, 7 + offset, out * scale, out)
    assert psnr(found, exact) > 40
    assert abs(float(found.mean()) - float(exact.mean())) < 0.5


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_whole_scales_on_whole_pixels_are_exact(picture: np.ndarray, scale: int) -> None:
    slide = ImageSlide(DecodedImage(Image.fromarray(picture), "png", None))
    found = slide.read_region(10, 20, 150 * scale, 150)
    assert np.abs(found - area_average(picture, 10, 20, 150 * scale, 150)).max() <= 1


def test_scale_one_returns_the_pixels_themselves(picture: np.ndarray) -> None:
    slide = ImageSlide(DecodedImage(Image.fromarray(picture), "png", None))
    assert np.array_equal(slide.read_region(33, 44, 224, 224), picture[44 : 44 + 224, 33 : 33 + 224])


def test_neighbouring_regions_meet_without_a_seam(picture: np.ndarray) -> None:
    slide = ImageSlide(DecodedImage(Image.fromarray(picture), "png", None))
    whole = slide.read_region(10.3, 10.3, 600, 240)
    left, right = slide.read_region(10.3, 10.3, 300, 120), slide.read_region(310.3, 10.3, 300, 120)
    assert np.abs(np.hstack([left, right]).astype(int) - whole[:120]).max() <= 1


def test_the_coarsest_level_that_is_fine_enough_is_read() -> None:
    levels = (1.0, 2.0003, 4.0, 16.0)
    assert best_level(levels, 0.7) == 0
    assert best_level(levels, 1.99) == 1  # within 1 %
    assert best_level(levels, 2.0) == 1
    assert best_level(levels, 3.9) == 1
    assert best_level(levels, 100) == 3
    assert best_level(levels, 100, {3, 2}) == 1
