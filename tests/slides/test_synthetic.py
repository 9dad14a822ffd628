"""Synthetic slides are real files whose truth is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backend.settings import Settings
from backend.slides.reader import open_slide
from backend.slides.synthetic import SyntheticSlide, write_synthetic_slide
from backend.slides.tiling import make_bag

Make = Callable[..., Settings]


def test_openslide_opens_it_with_its_scale(synthetic_slide: SyntheticSlide, settings: Make) -> None:
    with open_slide(synthetic_slide.path, settings()) as slide:
        assert slide.reader == "imagecodecs generic-tiff"
        assert slide.size == synthetic_slide.size == (2048, 2048)
        assert slide.mpp == pytest.approx(0.5)
        assert slide.level_downsamples == (1.0, 2.0, 4.0, 8.0)


def test_the_planted_region_is_dark_with_nuclei_and_lies_where_it_says(
    synthetic_slide: SyntheticSlide, settings: Make
) -> None:
    with open_slide(synthetic_slide.path, settings()) as slide:
        w = synthetic_slide.tumour_mask.shape[1]
        grey = slide.overview(w).mean(axis=2)
    planted, tissue = synthetic_slide.tumour_mask, synthetic_slide.tissue_mask
    assert (planted & ~tissue).sum() == 0
    assert 0.05 < planted.mean() < 0.4
    assert grey[planted].mean() < grey[tissue & ~planted].mean() - 25
    assert grey[~tissue].mean() > 225
    x0, y0, x1, y1 = synthetic_slide.tumour_box
    rows, columns = np.nonzero(planted)
    scale = synthetic_slide.size[0] / w
    assert (x0, y0) == (pytest.approx(columns.min() * scale, abs=1), pytest.approx(rows.min() * scale, abs=1))
    assert (x1, y1) == (
        pytest.approx((columns.max() + 1) * scale, abs=1),
        pytest.approx((rows.max() + 1) * scale, abs=1),
    )


def test_points_and_tiles_know_whether_they_are_planted(synthetic_slide: SyntheticSlide, settings: Make) -> None:
    x0, y0, x1, y1 = synthetic_slide.tumour_box
    assert not synthetic_slide.is_planted([-5, 0, 1e9], [5, 0, 5]).any()
    x, y = np.meshgrid(np.arange(x0, x1), np.arange(y0, y1))
    planted = synthetic_slide.is_planted(x, y)
    with open_slide(synthetic_slide.path, settings()) as slide:
        bag = make_bag(slide, settings(), task_mpp=None)
    fractions = synthetic_slide.planted_fraction(bag.coords, bag.tile_size_level0)
    assert (fractions > 0.5).sum() >= 6
    assert (fractions == 0).sum() >= 6
    edge = round(bag.tile_size_level0)
    for (left, top), fraction in zip(bag.coords, fractions, strict=True):
        inside = (x >= left) & (x < left + edge) & (y >= top) & (y < top + edge)
        assert fraction == pytest.approx(planted[inside].sum() / edge**2, abs=1e-6)


def test_the_same_seed_gives_the_same_slide_and_another_another(tmp_path: Path) -> None:
    made = [
        write_synthetic_slide(tmp_path / f"{i}.tif", size=(600, 500), seed=seed) for i, seed in enumerate((3, 3, 4))
    ]
    pixels = [np.asarray(Image.open(slide.path).convert("RGB")) for slide in made]
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])
    assert np.array_equal(made[0].tumour_mask, made[1].tumour_mask)


def test_a_plain_slide_has_nothing_planted(tmp_path: Path) -> None:
    plain = write_synthetic_slide(tmp_path / "plain.tif", size=(700, 500), seed=1, planted=False)
    assert plain.tumour_box is None
    assert not plain.tumour_mask.any()
    assert plain.tissue_mask.any()


def test_scale_and_shape_may_be_odd(tmp_path: Path, settings: Make) -> None:
    made = write_synthetic_slide(tmp_path / "odd.tif", size=(1501, 1103), mpp=0.2473, seed=2)
    with open_slide(made.path, settings()) as slide:
        assert slide.size == (1501, 1103)
        assert slide.mpp == pytest.approx(0.2473, rel=1e-4)
    with pytest.raises(ValueError, match="cannot draw"):
        write_synthetic_slide(tmp_path / "none.tif", size=(10, 10))
