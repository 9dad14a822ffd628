"""A key that is too short to be one signs nothing."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from backend import kept_key as module
from backend.errors import SettingsError
from backend.kept_key import KEY_BYTES, KeyDamaged, kept_key
from backend.label_studio.services import Services
from backend.slides.source import SlideRef
from backend.web.signing import SlideSigner


@pytest.mark.parametrize("content", [b"", b"\n", b"short", b"x" * (KEY_BYTES - 1)])
def test_a_file_with_less_than_a_key_is_refused_and_to_be_deleted(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "signing.key").write_bytes(content)
    with pytest.raises(KeyDamaged, match="Delete the file") as refused:
        SlideSigner(tmp_path).token(SlideRef("file", ("/a.svs",), "a"))
    assert isinstance(refused.value, SettingsError) and str(tmp_path / "signing.key") in str(refused.value)
    assert (tmp_path / "signing.key").read_bytes() == content, (
        "it is not replaced by itself: addresses were made with it"
    )
    (tmp_path / "signing.key").unlink()
    assert SlideSigner(tmp_path).token(SlideRef("file", ("/a.svs",), "a"))


def test_an_empty_webhook_key_does_not_open_the_webhook(tmp_path: Path, settings: Any) -> None:
    made = settings(model_dir=tmp_path)
    (tmp_path / "webhook.key").touch()
    with pytest.raises(KeyDamaged):
        _ = Services(made).webhook_secret


def test_a_key_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, link = os.fsync, os.link
    monkeypatch.setattr(module.os, "fsync", lambda *a: (done.append("fsync"), sync(*a)))
    monkeypatch.setattr(module.os, "link", lambda *a: (done.append("link"), link(*a)))
    assert len(kept_key(tmp_path / "a.key")) == KEY_BYTES
    assert done == ["fsync", "link"]


def test_of_many_who_ask_at_once_all_get_the_same(tmp_path: Path) -> None:
    found: set[bytes] = set()
    askers = [threading.Thread(target=lambda: found.add(kept_key(tmp_path / "deep" / "a.key"))) for _ in range(8)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(found) == 1
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.key"]
