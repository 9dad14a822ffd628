"""A push whose prediction is deleted by somebody else in the same moment. The stub is there because a real Label Studio cannot be made to race."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from label_studio_stub import StudioStub

from backend.label_studio.client import LabelStudioClient
from backend.settings import Settings


@pytest.fixture
def studio() -> Iterator[StudioStub]:
    stub = StudioStub()
    yield stub
    stub.stop()


def prediction(text: str) -> dict[str, object]:
    region = {"from_name": "summary", "to_name": "image", "type": "textarea", "value": {"text": [text]}}
    return {"model_version": "wsc-3f2a1c", "result": [region]}


def test_a_prediction_that_is_deleted_while_it_is_updated_is_created_anew(studio: StudioStub, tmp_path: Path) -> None:
    task = studio.add_task(tmp_path / "slide.tif")
    client = LabelStudioClient(
        Settings(label_studio_url=studio.url, label_studio_api_key="a-legacy-token-of-a-stub", model_dir=tmp_path)
    )
    assert client.push_prediction(task, prediction("first")) == "created"

    def deletes_first(method: str, _path: str) -> None:
        if method == "PATCH":
            studio.forget(task)

    with studio.choosing(deletes_first):
        assert client.push_prediction(task, prediction("second")) == "created"
    (stored,) = studio.of(task)
    assert stored["result"] == prediction("second")["result"]
    client.close()
