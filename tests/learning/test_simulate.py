"""Replayed labelling: our way of choosing needs fewer labels, and the report says how many."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backend.learning.simulate import Curves, from_file, imbalanced, simulate, write_report


def test_a_quick_replay_is_reported_as_picture_and_table(tmp_path: Path) -> None:
    lines: list[str] = []
    curves = simulate(quick=True, progress=lines.append)
    picture, table = write_report(curves, tmp_path / "new folder")
    assert len(lines) == 4
    with Image.open(picture) as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 100
    report = json.loads(table.read_text())
    assert [(entry["dataset"], entry["seeds"]) for entry in report] == [("digits", 2), ("imbalanced", 2)]
    assert set(report[0]["strategies"]) == {"random", "uncertainty", "default"}


def test_our_default_needs_at_most_half_of_the_labels_of_random_on_rare_positives() -> None:
    (curves,) = simulate({"rare": lambda seed: imbalanced(seed, n=1500, dim=96)}, seeds=3, budget=160, batch_size=20)
    needed = curves.labels_to_match_random("default")
    assert needed is not None
    assert needed <= 80


def test_one_in_twenty_of_the_imbalanced_set_is_positive_and_held_out_items_are_apart() -> None:
    known = imbalanced(3)
    assert known.embeddings.shape == (7500, 768)
    assert (~known.held_out).sum() == 5000
    assert known.labels.mean() == pytest.approx(0.05)


def test_the_labels_needed_are_the_first_with_which_random_is_matched() -> None:
    accuracy = {"random": np.array([[0.5, 0.6, 0.8]] * 2), "default": np.array([[0.5, 0.9, 0.7]] * 2)}
    curves = Curves("x", np.array([10, 20, 30]), {**accuracy, "bad": np.array([[0.1, 0.2, 0.3]])})
    assert curves.labels_to_match_random("default") == 20
    assert curves.labels_to_match_random("random") == 30
    assert curves.labels_to_match_random("bad") is None


def test_a_file_of_ones_own_can_be_replayed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(60, 8)), rng.normal(size=(60, 8)) + 4])
    np.savez(tmp_path / "mine.npz", embeddings=x, labels=np.array(["a"] * 60 + ["b"] * 60))
    (curves,) = simulate({"mine": from_file(tmp_path / "mine.npz")}, seeds=1, budget=20, batch_size=10)
    assert curves.accuracy["default"][0, -1] > 0.9


def test_nothing_to_replay_is_said() -> None:
    with pytest.raises(ValueError, match="nothing to replay"):
        simulate(seeds=0)
