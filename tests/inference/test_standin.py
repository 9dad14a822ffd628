"""The stand-in model: a NativeBlocks checkpoint whose attention finds the planted region."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from backend.inference.blocks import NativeBlocks
from backend.inference.checkpoint import ModelIdentity, file_sha256, mmm_release
from backend.inference.engine import Engine
from backend.inference.pipeline import analyse_file
from backend.results.bag import BagResult
from backend.settings import Settings, load_settings
from backend.slides.synthetic import write_synthetic_slide


@pytest.fixture(scope="module")
def engine(stand_in: Path) -> Engine:
    identity = ModelIdentity("stand-in", file_sha256(stand_in), mmm_release(), "float32", stand_in=True)
    return Engine(NativeBlocks(stand_in, "cpu"), identity, batch_tiles=16)


@pytest.fixture(scope="module")
def analysed(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[np.ndarray, BagResult]]:
    """(part of each tile that is planted, result) of slides that the stand-in was not trained on, at two scales."""
    folder = tmp_path_factory.mktemp("planted")
    settings: Settings = load_settings()
    done = []
    for seed, size, mpp in ((0, (2048, 2048), 0.5), (7, (2300, 1900), 0.5), (11, (4096, 4096), 0.25)):
        slide = write_synthetic_slide(folder / f"{seed}.tif", size=size, mpp=mpp, seed=seed)
        result = analyse_file(slide.path, settings, engine, lambda *_: None)
        done.append((slide.planted_fraction(result.bag.coords, result.bag.tile_size_level0), result))
    return done


def test_it_has_the_shape_of_the_real_model_and_says_what_it_is(engine: Engine) -> None:
    assert engine.blocks.embedding_dim == 768
    assert engine.blocks.num_heads == 8
    assert engine.identity.model_version.startswith("stand-in-")


def test_its_attention_finds_the_planted_region(analysed) -> None:
    for planted, result in analysed:
        assert roc_auc_score(planted > 0.5, result.mean_attention) >= 0.9


def test_every_head_finds_it_and_the_heads_differ(analysed) -> None:
    for planted, result in analysed:
        scores = [roc_auc_score(planted > 0.5, result.attention[:, head]) for head in range(8)]
        assert min(scores) >= 0.9
        least = result.attention.min(axis=0)  # what a head leaves to the least attended tile
        assert least.max() > 10 * least.min()


def test_its_results_say_that_they_have_no_medical_meaning(analysed) -> None:
    _, result = analysed[0]
    assert result.provenance["stand_in"] is True
    assert str(result.provenance["model_version"]).startswith("stand-in-")
