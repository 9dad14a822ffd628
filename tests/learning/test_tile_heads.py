"""Heads on tile latents: any number of tiles, tested on slides not seen."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from backend.errors import EmbeddingInvalid, HeadMismatch
from backend.learning.heads import Head, tile_probabilities
from backend.learning.tile_training import LabelledTiles, fit_tile_head
from backend.learning.training import TooFewLabels, fit_choice_head

CLASSES = ("tumour", "stroma")


def pieces(slides: int, tiles: int, *, batch_effect: float = 0.0, share: float = 0.3) -> Iterator[LabelledTiles]:
    """Slides of 16 latents a tile; the first value tells tumour, the second which slide it is."""
    for slide in range(slides):
        rng = np.random.default_rng(slide)
        tumour = np.arange(tiles) < round(share * tiles)
        latents = rng.normal(size=(tiles, 16))
        latents[:, 0] += 4 * tumour
        latents[:, 1] += batch_effect * rng.normal()
        yield LabelledTiles(
            f"slide-{slide}", latents.astype(np.float16), [CLASSES[0] if t else CLASSES[1] for t in tumour]
        )


def test_the_probability_of_each_tile_tells_the_planted_ones() -> None:
    head = fit_tile_head("tissue", CLASSES, pieces(4, 200), fingerprint="f")
    assert isinstance(head, Head)
    (probe,) = pieces(1, 100)
    p = tile_probabilities(head, probe.latents)
    assert p.shape == (100, 2)
    assert p.dtype == np.float32
    assert ((p[:, 0] > 0.5) == (np.arange(100) < 30)).mean() > 0.93
    assert head.metrics["balanced_accuracy"][0] > 0.93


def test_only_a_sample_is_fitted_and_all_labels_are_counted() -> None:
    head = fit_tile_head("tissue", CLASSES, pieces(10, 2000), fingerprint="f", sample_tiles=400)
    assert isinstance(head, Head)
    assert head.n_labels == 20_000
    assert dict(head.label_counts) == {"tumour": 6000, "stroma": 14_000}
    assert head.metrics["per_class"]["stroma"]["n"] == 200
    assert head.metrics["balanced_accuracy"][0] > 0.93


def test_a_sample_takes_tiles_of_every_slide() -> None:
    # With tumour on the last slide alone, a head that kept only the first tiles could not know it.
    def late() -> Iterator[LabelledTiles]:
        yield from (LabelledTiles(p.slide, p.latents[300:], ["stroma"] * 700) for p in pieces(5, 1000))
        yield LabelledTiles("last", next(pieces(1, 1000)).latents[:300], ["tumour"] * 300)

    head = fit_tile_head("tissue", CLASSES, late(), fingerprint="f", sample_tiles=500)
    assert isinstance(head, Head)
    assert tile_probabilities(head, next(pieces(1, 10, share=1)).latents)[:, 0].mean() > 0.7


def test_tiles_of_one_slide_are_not_tested_on_each_other() -> None:
    head = fit_tile_head("tissue", CLASSES, pieces(1, 300), fingerprint="f")
    assert isinstance(head, Head)
    assert head.metrics["measured"] is False
    assert "two slides" in head.metrics["reason"]


def test_too_few_tiles_say_how_many_more() -> None:
    refused = fit_tile_head("tissue", CLASSES, pieces(1, 10), fingerprint="f")
    assert isinstance(refused, TooFewLabels)
    assert "10 so far" in refused.message
    assert isinstance(fit_tile_head("tissue", CLASSES, [], fingerprint="f"), TooFewLabels)


def test_a_broken_latent_names_its_slide() -> None:
    broken = next(pieces(1, 50))
    broken.latents[7, 2] = np.nan
    with pytest.raises(EmbeddingInvalid, match="tile 7 of the labelled ones of slide slide-0"):
        fit_tile_head("tissue", CLASSES, [broken], fingerprint="f")


def test_a_slide_head_does_not_judge_tiles() -> None:
    x = np.random.default_rng(0).normal(size=(8, 16))
    head = fit_choice_head("d", CLASSES, x, ["tumour", "stroma"] * 4, fingerprint="f")
    assert isinstance(head, Head)
    with pytest.raises(HeadMismatch, match="whole slides"):
        tile_probabilities(head, x)
