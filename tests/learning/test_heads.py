"""Heads: what they need, what they say, how honest they are about it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from backend.errors import EmbeddingInvalid, HeadMismatch
from backend.learning.heads import Head, predict, probabilities, uncalibrated_probabilities
from backend.learning.metrics import expected_calibration_error, mean_of_proportions, weighted_auroc, wilson
from backend.learning.training import TooFewLabels, fit_choice_head, fit_choices_head, fit_number_head

CLASSES = ("normal", "tumour", "necrosis")
PRINT = "f" * 40


def planted(n: int, kinds: int = 2, dim: int = 48, apart: float = 3.0, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """n embeddings of ``kinds`` planted kinds in turn, whose centres are the same for every seed."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(kinds, dim))
    centres *= apart / np.linalg.norm(centres, axis=1, keepdims=True)
    y = np.arange(n) % kinds
    return (centres[y] + rng.normal(size=(n, dim)) + 5).astype(np.float32), [CLASSES[i] for i in y]


def head_of(n: int, kinds: int = 2, **more: Any) -> Head:
    x, y = planted(n, kinds)
    head = fit_choice_head("diagnosis", CLASSES[: max(kinds, 2)], x, y, fingerprint=PRINT, **more)
    assert isinstance(head, Head)
    return head


@pytest.mark.parametrize("kinds", [2, 3])
@pytest.mark.parametrize("n", [12, 90])
def test_numpy_says_what_scikit_learns_pipeline_says(kinds: int, n: int) -> None:
    x, y = planted(n, kinds, apart=1.5)
    head = fit_choice_head("d", CLASSES[:kinds], x, y, fingerprint=PRINT)
    assert isinstance(head, Head)
    regression = LogisticRegression(C=head.metrics["penalty"], class_weight="balanced", max_iter=2000)
    pipeline = make_pipeline(StandardScaler(), regression).fit(x.astype(np.float64), y)
    expected = pipeline.predict_proba(x.astype(np.float64))
    order = [list(pipeline.classes_).index(name) for name in head.classes]
    np.testing.assert_allclose(uncalibrated_probabilities(head, x), expected[:, order], rtol=0, atol=1e-6)


def test_six_slides_of_two_planted_kinds_are_enough_to_be_right_on_others() -> None:
    x, y = planted(6, apart=8)
    head = fit_choice_head("diagnosis", ("normal", "tumour"), x, y, fingerprint=PRINT)
    assert isinstance(head, Head)
    unseen, truth = planted(40, apart=8, seed=5)
    assert predict(head, unseen).values == tuple(truth)


def test_a_class_of_one_in_twenty_is_not_ignored() -> None:
    x, y = planted(400, apart=3)
    rows = [i for i, name in enumerate(y) if name == "normal" or i % 20 == 1]
    head = fit_choice_head("d", ("normal", "tumour"), x[rows], [y[i] for i in rows], fingerprint=PRINT)
    assert isinstance(head, Head)
    unseen, truth = planted(400, apart=3, seed=5)
    said = np.array(predict(head, unseen).values)
    assert (said[np.array(truth) == "tumour"] == "tumour").mean() > 0.7


@pytest.mark.parametrize(
    ("labels", "missing"),
    [
        ([], {"normal": 2, "tumour": 2}),
        (["tumour"] * 10, {"normal": 2}),
        (["tumour", "normal"], {"tumour": 1, "normal": 1}),
        (["tumour", "tumour", "tumour", "normal"], {"normal": 1}),
    ],
)
def test_with_too_few_labels_it_says_how_many_more(labels: list[str], missing: dict[str, int]) -> None:
    x = np.random.default_rng(0).normal(size=(len(labels), 8))
    refused = fit_choice_head("diagnosis", ("normal", "tumour"), x, labels, fingerprint=PRINT)
    assert isinstance(refused, TooFewLabels)
    assert dict(refused.missing) == missing
    assert "'diagnosis'" in refused.message
    for name, count in missing.items():
        assert f"{count} labelled '{name}'" in refused.message


def test_the_least_number_of_labels_is_a_setting() -> None:
    x, y = planted(6)
    refused = fit_choice_head("d", ("normal", "tumour"), x, y, fingerprint=PRINT, min_labels=10)
    assert isinstance(refused, TooFewLabels)
    assert dict(refused.missing) == {"": 4}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_embedding_is_refused_by_name(bad: float) -> None:
    x, y = planted(12)
    x[7, 3] = bad
    with pytest.raises(EmbeddingInvalid, match="slide-7"):
        fit_choice_head("d", CLASSES, x, y, fingerprint=PRINT, names=[f"slide-{i}" for i in range(12)])
    with pytest.raises(EmbeddingInvalid, match="task 7"):
        predict(head_of(12), x, names=[f"task {i}" for i in range(12)])


def test_embeddings_of_another_length_are_refused() -> None:
    with pytest.raises(HeadMismatch, match="length 48, not 7"):
        predict(head_of(12), np.zeros((2, 7)))


def test_a_choice_never_seen_is_listed_and_never_said() -> None:
    x, y = planted(40)
    head = fit_choice_head("d", CLASSES, x, y, fingerprint=PRINT)
    assert isinstance(head, Head)
    assert head.classes == ("normal", "tumour")
    assert head.metrics["unseen"] == ["necrosis"]


def test_a_class_with_a_single_label_is_learnt_and_not_measured() -> None:
    x, y = planted(41, kinds=2)
    y[0], x[0] = "necrosis", 40
    head = fit_choice_head("d", CLASSES, x, y, fingerprint=PRINT)
    assert isinstance(head, Head)
    assert predict(head, x[:1]).values == ("necrosis",)
    assert head.metrics["measured"]
    assert head.metrics["not_measured"] == ["necrosis"]


def test_with_few_labels_nothing_is_measured_and_it_says_when() -> None:
    head = head_of(8)
    assert head.metrics["measured"] is False
    assert "5 labels each" in head.metrics["reason"]
    assert not head.calibrated


def test_metrics_are_those_of_slides_not_seen() -> None:
    rng = np.random.default_rng(0)
    x, y = (
        rng.normal(size=(60, 300)),
        [CLASSES[i % 2] for i in range(60)],
    )  # nothing to learn, and easily learnt by heart
    head = fit_choice_head("d", CLASSES[:2], x, y, fingerprint=PRINT)
    assert isinstance(head, Head)
    assert np.mean([a == b for a, b in zip(predict(head, x).values, y, strict=True)]) > 0.95
    low, high = head.metrics["balanced_accuracy"][1:]
    assert low < 0.5 < high
    low, high = head.metrics["auroc"][1:]
    assert low < 0.5 < high


def test_intervals_contain_the_value_and_shrink_with_labels() -> None:
    few, many = (head_of(n, apart) for n, apart in ((40, 2), (1000, 2)))
    for head in (few, many):
        for name in ("balanced_accuracy", "auroc", "ece", "ece_as_labelled"):
            value, low, high = head.metrics[name]
            assert 0 <= low <= value <= high <= 1
        assert set(head.metrics["per_class"]) == {"normal", "tumour"}
    width = [head.metrics["balanced_accuracy"][2] - head.metrics["balanced_accuracy"][1] for head in (few, many)]
    assert width[1] < width[0]


def test_being_right_about_every_one_of_a_few_slides_is_no_certainty() -> None:
    x, y = planted(12, apart=30)
    head = fit_choice_head("d", CLASSES[:2], x, y, fingerprint=PRINT)
    assert isinstance(head, Head)
    value, low, high = head.metrics["balanced_accuracy"]
    assert (value, high) == (1, 1)
    assert low < 0.85


def test_the_interval_of_the_balanced_accuracy_holds_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    for recalls in ((0.95, 0.9), (0.7, 0.99, 0.8)):
        counts = np.array([12, 25, 8][: len(recalls)])
        drawn = rng.binomial(counts, recalls, size=(2000, len(recalls)))
        limits = [mean_of_proportions(hits, counts) for hits in drawn]
        held = np.mean([low <= np.mean(recalls) <= high for low, high in limits])
        assert 0.91 < held <= 0.995  # hits are whole numbers: no interval holds exactly 95 %


def test_confidence_is_how_often_it_is_right() -> None:
    x, y = planted(400, kinds=3, dim=200, apart=2.0)
    head = fit_choice_head("d", CLASSES, x, y, fingerprint=PRINT)
    assert isinstance(head, Head)
    assert head.calibrated
    unseen, truth = planted(3000, kinds=3, dim=200, apart=2.0, seed=9)
    output = predict(head, unseen)
    right = np.array([a == b for a, b in zip(output.values, truth, strict=True)])
    assert expected_calibration_error(output.confidence, right, np.ones(3000)) < 0.06
    assert output.probabilities is not None
    said = [CLASSES.index(str(value)) for value in output.values]
    np.testing.assert_array_equal(output.confidence, output.probabilities[np.arange(3000), said])
    np.testing.assert_allclose(output.probabilities.sum(axis=1), 1)


def test_training_twice_gives_the_same_head() -> None:
    a, b = head_of(60), head_of(60)
    np.testing.assert_array_equal(a.coef, b.coef)
    assert a.metrics == b.metrics


def test_several_choices_are_told_each_by_itself() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 10))
    labels = [{"fat": bool(a > 0), "necrosis": bool(b > 0), "mitoses": False} for a, b in x[:, :2]]
    del labels[3]["fat"]  # annotators tied on it
    head = fit_choices_head("findings", ("fat", "necrosis", "mitoses"), x, labels, fingerprint=PRINT)
    assert isinstance(head, Head)
    assert head.classes == ("fat", "necrosis")
    assert head.metrics["unseen"] == ["mitoses"]
    probe = np.zeros((4, 10))
    probe[:, :2] = [[3, 3], [3, -3], [-3, 3], [-3, -3]]
    output = predict(head, probe)
    assert output.values == (("fat", "necrosis"), ("fat",), ("necrosis",), ())
    assert output.probabilities is not None
    assert (output.confidence <= np.maximum(output.probabilities, 1 - output.probabilities).min(axis=1) + 1e-12).all()
    assert set(head.metrics["choices"]) == {"fat", "necrosis"}


def test_several_choices_without_any_known_both_ways_are_too_few() -> None:
    refused = fit_choices_head("findings", ("fat",), np.zeros((5, 3)), [{"fat": True}] * 5, fingerprint=PRINT)
    assert isinstance(refused, TooFewLabels)
    assert dict(refused.missing) == {"fat": 2}


def test_a_number_is_predicted_and_unlike_slides_are_less_certain() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 20))
    head = fit_number_head("grade", x, (10 + 3 * x[:, 0] + 0.5 * rng.normal(size=80)).tolist(), fingerprint=PRINT)
    assert isinstance(head, Head)
    probe = np.zeros((2, 20))
    probe[0, 0], probe[1, 5] = 2, 60
    output = predict(head, probe)
    assert output.values[0] == pytest.approx(16, abs=1)
    assert output.confidence[1] < output.confidence[0] <= 1
    assert head.metrics["r2"][0] > 0.8
    unseen = rng.normal(size=(500, 20))
    truth = 10 + 3 * unseen[:, 0] + 0.5 * rng.normal(size=500)
    judged = predict(head, unseen)
    within = np.abs(np.array(judged.values, dtype=float) - truth) <= head.tolerance
    assert within.mean() == pytest.approx(judged.confidence.mean(), abs=0.06)


def test_a_rating_is_a_whole_number_of_the_stars_that_were_given() -> None:
    x = np.linspace(-2, 2, 30)[:, None] * np.ones((1, 4))
    stars = np.clip(np.rint(3 + x[:, 0]), 1, 5).tolist()
    head = fit_number_head("quality", x, stars, fingerprint=PRINT, rating=True)
    assert isinstance(head, Head)
    said = predict(head, np.array([[-50.0] * 4, [0.0] * 4, [50.0] * 4])).values
    assert said == (1.0, 3.0, 5.0)


def test_the_same_number_everywhere_is_too_few() -> None:
    refused = fit_number_head("grade", np.eye(6), [3.0] * 6, fingerprint=PRINT)
    assert isinstance(refused, TooFewLabels)
    assert "another number than 3" in refused.message


def test_numbers_that_are_fitted_without_error_do_not_make_infinities() -> None:
    x = np.random.default_rng(0).normal(size=(40, 3))
    head = fit_number_head("n", x, (1e6 * x[:, 0]).tolist(), fingerprint=PRINT)
    assert isinstance(head, Head)
    assert np.isfinite(predict(head, x).confidence).all()


def test_far_away_embeddings_do_not_overflow() -> None:
    p = probabilities(head_of(60), np.full((1, 48), 1e30))
    assert np.isfinite(p).all()


def test_our_auroc_is_scikit_learns_with_ties_and_weights() -> None:
    rng = np.random.default_rng(0)
    scores, positive, weights = rng.integers(0, 5, 200) / 5, rng.random(200) < 0.3, rng.integers(0, 4, 200) * 1.0
    expected = roc_auc_score(positive, scores, sample_weight=weights)
    assert weighted_auroc(scores, positive)(weights) == pytest.approx(expected)


def test_wilsons_interval_is_the_published_one() -> None:
    # Newcombe 1998, table I: 81 of 263 is 0.2553 to 0.3662.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 0) == (0, 1)
