"""Answers written as JSON once: the same text, for as long as there is room."""

from __future__ import annotations

import json

import pytest

from backend.label_studio.json_texts import JsonTexts


def test_the_text_is_what_the_slot_holds() -> None:
    slot = {"result": [{"value": {"rle": [0, 255, 3]}, "text": "µm ✓", "score": 0.1 + 0.2}], "score": None}
    assert json.loads(JsonTexts().of(slot)) == slot
    assert JsonTexts().of([]) == b"[]"


def test_slots_that_are_equal_or_follow_each_other_are_never_mixed_up() -> None:
    texts = JsonTexts(max_bytes=200)
    for round_ in range(50):  # far more than fit: what was forgotten is written anew, also where memory is used again
        slots = [{"task": f"{round_}-{i}", "filling": "x" * 50} for i in range(5)]
        assert [json.loads(texts.of(slot)) for slot in slots] == slots
        assert [json.loads(texts.of(slot)) for slot in reversed(slots)] == slots[::-1]


def test_a_kept_text_is_not_written_again() -> None:
    texts, slot = JsonTexts(), {"result": [1, 2, 3]}
    assert texts.of(slot) is texts.of(slot)


@pytest.mark.parametrize("limits", [{"max_answers": 3}, {"max_bytes": 3_300}])
def test_what_was_not_asked_for_lately_is_let_go(limits: dict[str, int]) -> None:
    texts = JsonTexts(**limits)
    slots = [{"filling": "x" * 1000, "task": str(i)} for i in range(5)]
    kept = [texts.of(slot) for slot in slots]
    assert [texts.of(slot) is text for slot, text in zip(slots[2:], kept[2:], strict=True)] == [True] * 3
    assert texts.of(slots[0]) is not kept[0]
