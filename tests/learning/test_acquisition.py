"""What to label next: uncertain and diverse with a head, typical and diverse without."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from backend.errors import EmbeddingInvalid
from backend.learning.acquisition import choice_like, labelling_order, margins, nearest_labelled
from backend.learning.heads import Head, predict
from backend.learning.training import fit_choice_head, fit_choices_head, fit_number_head


def kinds(n: int = 200, k: int = 4, dim: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = 4 * np.random.default_rng(1).normal(size=(k, dim))
    y = np.arange(n) % k
    return (centres[y] + rng.normal(size=(n, dim))).astype(np.float32), y


def nobody(n: int) -> np.ndarray:
    return np.zeros(n, dtype=bool)


def test_without_labels_the_first_slides_are_one_of_each_kind() -> None:
    x, y = kinds()
    order = labelling_order(x, nobody(200), None, batch_size=4)
    assert set(y[np.argsort(order.priority)[:4]]) == {0, 1, 2, 3}


def test_without_labels_an_outlier_is_not_among_the_first() -> None:
    x, _ = kinds()
    x[17] += 100 * np.random.default_rng(5).normal(size=64)
    order = labelling_order(x, nobody(200), None, batch_size=4)
    assert order.priority[17] > 4


def test_every_unlabelled_slide_has_one_rank_and_labelled_ones_have_none() -> None:
    x, _ = kinds()
    labelled = np.arange(200) < 50
    for probabilities in (None, np.random.default_rng(0).dirichlet([1, 1], 200)):
        order = labelling_order(x, labelled, probabilities, batch_size=10)
        assert (order.priority[:50] == 0).all()
        assert sorted(order.priority[50:]) == list(range(1, 151))


def test_with_a_head_the_batch_is_uncertain_and_not_all_alike() -> None:
    x, y = kinds()
    confident = np.full((200, 2), (0.99, 0.01))
    unsure = np.isin(y, (1, 2)) & (np.arange(200) < 100)  # 50 slides of two kinds
    confident[unsure] = (0.52, 0.48)
    chosen = np.argsort(labelling_order(x, nobody(200), confident, batch_size=4).priority)[:4]
    assert unsure[chosen].all()
    assert set(y[chosen]) == {1, 2}


def test_after_the_batch_the_least_certain_comes_first() -> None:
    x, _ = kinds()
    p = np.linspace(0.5, 1, 200)
    order = labelling_order(x, nobody(200), np.stack([p, 1 - p], axis=1), batch_size=5)
    after = np.argsort(order.priority)[5:]
    assert (np.diff(after) > 0).all()


def test_novelty_is_high_for_kinds_without_a_label() -> None:
    x, y = kinds()
    assert (labelling_order(x, nobody(200), None).novelty == 1).all()
    labelled = nobody(200)
    labelled[[0, 4, 8]] = True  # all of kind 0
    novelty = labelling_order(x, labelled, None).novelty
    assert novelty[y == 0].max() < novelty[y != 0].min()
    assert ((novelty >= 0) & (novelty <= 1)).all()


def test_slides_alike_are_in_one_cluster() -> None:
    x, y = kinds()
    cluster = labelling_order(x, nobody(200), None).cluster
    assert cluster.dtype == np.int64
    assert all(len(set(y[cluster == c])) == 1 for c in np.unique(cluster))


def test_the_same_question_has_the_same_answer() -> None:
    x, _ = kinds()
    p = np.random.default_rng(0).dirichlet([1, 1, 1], 200)
    a, b = (labelling_order(x, nobody(200), p) for _ in range(2))
    np.testing.assert_array_equal(a.priority, b.priority)
    np.testing.assert_array_equal(a.cluster, b.cluster)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 25])
@pytest.mark.parametrize("with_head", [False, True])
def test_projects_of_any_size_are_ranked(n: int, with_head: bool) -> None:
    x = np.random.default_rng(0).normal(size=(n, 8)).astype(np.float32)
    order = labelling_order(x, nobody(n), np.full((n, 2), 0.5) if with_head else None)
    assert sorted(order.priority) == list(range(1, n + 1))


@pytest.mark.parametrize("with_head", [False, True])
def test_slides_that_are_all_the_same_are_ranked(with_head: bool) -> None:
    p = np.full((30, 2), 0.5) if with_head else None
    assert sorted(labelling_order(np.ones((30, 8)), nobody(30), p, batch_size=5).priority) == list(range(1, 31))


def test_a_project_that_is_labelled_throughout_has_nothing_to_rank() -> None:
    x, _ = kinds(20)
    order = labelling_order(x, np.ones(20, dtype=bool), np.full((20, 2), 0.5))
    assert (order.priority == 0).all()


def test_more_slides_than_are_compared_with_each_other_are_ranked() -> None:
    x, y = kinds(4400, dim=8)
    chosen = np.argsort(labelling_order(x, nobody(4400), None, batch_size=4).priority)[:4]
    assert set(y[chosen]) == {0, 1, 2, 3}


def test_a_broken_embedding_is_refused_by_name() -> None:
    x, _ = kinds(20)
    x[3, 0] = np.nan
    with pytest.raises(EmbeddingInvalid, match="task 3"):
        labelling_order(x, nobody(20), None, names=[f"task {i}" for i in range(20)])


def test_heads_of_all_kinds_say_how_sure_they_are() -> None:
    x = np.random.default_rng(0).normal(size=(40, 4))
    heads = [
        fit_choice_head("a", ("n", "y"), x, ["y" if v > 0 else "n" for v in x[:, 0]], fingerprint="f"),
        fit_choices_head("b", ("n", "y"), x, [{"n": bool(v < 0), "y": bool(v > 0)} for v in x[:, 0]], fingerprint="f"),
        fit_number_head("c", x, (x[:, 0] + x[:, 1] ** 2).tolist(), fingerprint="f"),
    ]
    for head in heads:
        assert isinstance(head, Head)
        output = predict(head, x)
        sure = margins(choice_like(head, output))
        alike = predict(replace(head, prior=None), x).confidence  # what looks like a rare class is not passed over
        assert (np.argsort(sure, kind="stable") == np.argsort(alike, kind="stable")).mean() > 0.9


def test_the_nearest_labelled_slides_are_those_of_the_same_direction() -> None:
    labelled = np.array([[1.0, 0], [0, 1], [10, 1], [-1, 0]])
    rows, cosine = nearest_labelled(np.array([5.0, 0]), labelled, k=2)
    assert rows.tolist() == [0, 2]
    assert cosine == pytest.approx([1, 10 / np.sqrt(101)])
    assert nearest_labelled(np.zeros(2), labelled)[1].tolist() == [0, 0, 0, 0]
    assert len(nearest_labelled(np.ones(2), np.zeros((0, 2)))[0]) == 0
