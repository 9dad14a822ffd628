"""What annotators say of a slide, and what becomes of disagreement."""

from __future__ import annotations

from typing import Any

import pytest

from backend.learning.labels import Target, read_annotations, slide_labels

DIAGNOSIS = Target("diagnosis", "Choices", ("tumour", "normal"))
FINDINGS = Target("findings", "Choices", ("necrosis", "mitoses", "fat"), multiple=True)
GRADE = Target("grade", "Number")
STARS = Target("quality", "Rating")


def annotation(number: int, user: int, *results: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": number, "completed_by": user, "was_cancelled": False, "result": list(results), **more}


def said(control: str, key: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"from_name": control, "to_name": "image", "type": key, "value": {key: value}, "origin": "manual", **more}


def chose(*choices: str, control: str = "diagnosis", **more: Any) -> dict[str, Any]:
    return said(control, "choices", list(choices), **more)


def learnt(target: Target, *tasks: list[dict[str, Any]]) -> tuple[dict[int, Any], list[str]]:
    """Value by task and all issue codes, for tasks numbered from 1."""
    exported = [{"id": i, "annotations": annotations} for i, annotations in enumerate(tasks, start=1)]
    annotations, issues = read_annotations(exported)
    labels, more = slide_labels(annotations, target)
    return {label.task_id: label.value for label in labels}, [issue.code for issue in (*issues, *more)]


def test_a_single_annotators_choice_is_the_label() -> None:
    assert learnt(DIAGNOSIS, [annotation(1, 1, chose("tumour"))], [annotation(2, 1, chose("normal"))]) == (
        {1: "tumour", 2: "normal"},
        [],
    )


def test_the_majority_decides_and_the_disagreement_is_reported() -> None:
    votes = [annotation(i, i, chose(c)) for i, c in enumerate(("tumour", "normal", "tumour"))]
    assert learnt(DIAGNOSIS, votes) == ({1: "tumour"}, ["disagreement"])


def test_a_tie_teaches_nothing_and_is_reported() -> None:
    votes = [annotation(1, 1, chose("tumour")), annotation(2, 2, chose("normal"))]
    assert learnt(DIAGNOSIS, votes) == ({}, ["tie"])


def test_submitting_twice_does_not_outvote_others() -> None:
    votes = [
        annotation(1, 1, chose("normal"), updated_at="2026-01-01T10:00:00Z"),
        annotation(2, 1, chose("tumour"), updated_at="2026-01-02T10:00:00Z"),
        annotation(3, 2, chose("tumour"), updated_at="2026-01-01T11:00:00Z"),
    ]
    assert learnt(DIAGNOSIS, votes) == ({1: "tumour"}, [])


def test_an_author_given_as_a_record_is_the_same_person() -> None:
    votes = [
        annotation(1, 1, chose("normal")),
        {**annotation(2, 1, chose("tumour")), "completed_by": {"id": 1, "email": "a@b.c"}},
    ]
    assert learnt(DIAGNOSIS, votes) == ({1: "tumour"}, [])


def test_a_skipped_task_teaches_nothing() -> None:
    assert learnt(DIAGNOSIS, [annotation(1, 1, chose("tumour"), was_cancelled=True)]) == ({}, ["skipped"])


def test_a_choice_that_the_config_no_longer_offers_teaches_nothing_and_is_named() -> None:
    annotations, _ = read_annotations([{"id": 7, "annotations": [annotation(1, 1, chose("sarcoma"))]}])
    labels, issues = slide_labels(annotations, DIAGNOSIS)
    assert labels == []
    assert [(i.code, i.task_id, i.control, i.annotation_id) for i in issues] == [("label_removed", 7, "diagnosis", 1)]
    assert "sarcoma" in issues[0].detail


def test_a_submitted_suggestion_counts_unless_that_is_switched_off_and_read_only_never_does() -> None:
    suggested, fixed = chose("tumour", origin="prediction"), chose("tumour", origin="manual", readonly=True)
    tasks = [
        {"id": 1, "annotations": [annotation(1, 1, suggested)]},
        {"id": 2, "annotations": [annotation(2, 1, fixed)]},
    ]
    annotations, _ = read_annotations(tasks)
    assert [label.task_id for label in slide_labels(annotations, DIAGNOSIS)[0]] == [1]
    assert slide_labels(annotations, DIAGNOSIS, accept_suggestions=False)[0] == []


def test_each_of_several_choices_is_voted_on_by_itself() -> None:
    votes = [
        annotation(1, 1, chose("necrosis", "fat", control="findings")),
        annotation(2, 2, chose("necrosis", control="findings")),
    ]
    assert learnt(FINDINGS, votes) == ({1: {"necrosis": True, "mitoses": False}}, ["tie"])


def test_choosing_nothing_of_several_choices_is_an_answer() -> None:
    assert learnt(FINDINGS, [annotation(1, 1, chose(control="findings"))])[0] == {
        1: {"necrosis": False, "mitoses": False, "fat": False}
    }


def test_numbers_are_the_median() -> None:
    votes = [annotation(i, i, said("grade", "number", n)) for i, n in enumerate((1, 2, 9))]
    assert learnt(GRADE, votes) == ({1: 2.0}, ["disagreement"])


def test_a_rating_is_a_number() -> None:
    assert learnt(STARS, [annotation(1, 1, said("quality", "rating", 4))]) == ({1: 4.0}, [])


@pytest.mark.parametrize("number", [None, "7", True, float("nan"), [1]])
def test_a_number_that_is_none_is_reported(number: object) -> None:
    assert learnt(GRADE, [annotation(1, 1, said("grade", "number", number))]) == ({}, ["malformed"])


@pytest.mark.parametrize(
    "raw", [None, 3, {"id": "x"}, {"id": 1, "result": None}, {"id": 1, "result": [3]}, {"id": 1, "result": "[]"}]
)
def test_what_is_no_annotation_is_reported(raw: object) -> None:
    annotations, issues = read_annotations([{"id": 1, "annotations": [raw]}])
    assert annotations == []
    assert [issue.code for issue in issues] == ["malformed"]


def test_two_choices_where_one_is_allowed_teach_nothing() -> None:
    assert learnt(DIAGNOSIS, [annotation(1, 1, chose("tumour", "normal"))]) == ({}, ["malformed"])


def test_an_annotation_without_the_control_says_nothing_of_it() -> None:
    assert learnt(DIAGNOSIS, [annotation(1, 1, said("grade", "number", 3))]) == ({}, [])
