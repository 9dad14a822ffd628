"""An export is read task by task, and what is none is said to be none."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from backend.errors import LabelStudioError
from backend.label_studio.export_stream import tasks_of
from backend.learning.labels import read_annotations

TASKS = [
    {"id": 1, "data": {"mpp": 0.25}, "annotations": [{"id": 5, "result": [{"value": {"number": 2.5}}]}]},
    {"id": 2},
]


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_tasks_come_one_by_one_however_the_answer_is_cut(size):
    text = json.dumps(TASKS).encode()
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    assert list(tasks_of(iter([b"", b" ", *parts]), "project 7")) == TASKS
    assert list(tasks_of(iter([b"[]"]), "project 7")) == []


@pytest.mark.parametrize("text", [b"", b"<html>", b'[{"id": 1}', b'{"detail": "no"}', b"[1, 2]", b"null", b'"text"'])
def test_what_is_no_list_of_tasks_is_an_error(text):
    with pytest.raises(LabelStudioError, match="export of project 7 is no"):
        list(tasks_of(iter([text]), "project 7"))


def test_an_export_of_large_machine_regions_is_never_in_memory_whole():
    heatmap = {"readonly": True, "from_name": "attention", "value": {"rle": [7] * 50_000}}
    said = {"from_name": "diagnosis", "origin": "manual", "value": {"choices": ["Tumour"]}}

    def parts():
        yield b"["
        for number in range(200):
            task = {"id": number, "annotations": [{"id": number, "completed_by": 1, "result": [heatmap, said]}]}
            yield (b"," if number else b"") + json.dumps(task).encode()
        yield b"]"

    tracemalloc.start()
    annotations, issues = read_annotations(tasks_of(parts(), "project 7"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(annotations) == 200 and not issues
    assert [item["from_name"] for item in annotations[0].results] == ["diagnosis"]
    assert peak < 10_000_000, f"{peak} bytes, of an export of {200 * 150_000}"
