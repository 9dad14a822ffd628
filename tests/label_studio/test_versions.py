"""What a project is at while its heads cannot be read: never one without heads, as that would take better predictions away."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from backend.errors import HeadDamaged, StoreUnavailable
from backend.inference.checkpoint import ModelIdentity
from backend.label_studio.versions import ProjectVersions
from backend.learning.heads import Head
from backend.learning.snapshot import ProjectSnapshot, write_snapshot
from backend.learning.training import fit_choice_head

MODEL = ModelIdentity("model", "3f2a1c" + "0" * 58, "1.0", "float32", False)
HEADS = f"{MODEL.model_version}-h1"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of a project 7 that uses the heads of its first training."""
    x = np.random.default_rng(0).normal(size=(30, 6))
    labels = ["Tumour" if value > 0 else "No tumour" for value in x[:, 0]]
    head = fit_choice_head("diagnosis", ("Tumour", "No tumour"), x, labels, fingerprint=MODEL.fingerprint)
    assert isinstance(head, Head)
    versions = ProjectVersions(tmp_path, MODEL)
    versions.registry.add(7, [head], model_version=MODEL.model_version)
    nothing = np.zeros(0, dtype=np.int64)
    snapshot = ProjectSnapshot(
        about={"version": HEADS, "fingerprint": MODEL.fingerprint},
        tasks=nothing,
        keys=(),
        names=(),
        labels=(),
        suggestions=(),
        confidence=np.zeros(0),
        priority=nothing,
        novelty=np.zeros(0),
        cluster=nothing,
        labelled=nothing,
        embeddings=np.zeros((0, 1), np.float32),
    )
    write_snapshot(snapshot, versions.snapshot_file(7))
    return tmp_path


@pytest.mark.parametrize("name", ["current.json", "h0001/heads.json", "h0001/arrays.safetensors", "slides.npz"])
def test_a_file_that_cannot_be_opened_now_is_asked_for_again_and_then_right(root: Path, name: str) -> None:
    versions = ProjectVersions(root, MODEL)
    file, kept = root / "7" / name, root / "kept"
    file.rename(kept)
    file.symlink_to(file)  # the system refuses to open it
    with pytest.raises(StoreUnavailable) as caught:
        versions.version(7) if name != "slides.npz" else versions.snapshot(7)
    assert caught.value.retryable
    file.unlink()
    kept.rename(file)
    assert versions.version(7) == HEADS
    assert versions.snapshot(7) is not None


def test_damaged_heads_leave_the_version_as_it_is_and_are_told_once(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = root / "7" / "h0001" / "arrays.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    versions = ProjectVersions(root, MODEL)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert versions.version(7) == HEADS, "what Label Studio has of them is still the best there is"
            assert versions.heads(7) is None, "slides are pre-labelled without heads"
            with pytest.raises(HeadDamaged, match="checksum"):
                versions.in_use(7)
    (record,) = caplog.records
    assert "project 7" in record.message and "cannot be read" in record.message
    file.write_bytes(whole)
    heads = versions.in_use(7)
    assert heads is not None and heads.version == HEADS, "a file put back from a backup is read at once"


def test_damage_of_both_files_leaves_the_model(root: Path) -> None:
    for name in ("current.json", "slides.npz"):
        (root / "7" / name).write_bytes(b"{")
    versions = ProjectVersions(root, MODEL)
    assert versions.version(7) == MODEL.model_version
    assert versions.snapshot(7) is None
    with pytest.raises(HeadDamaged):
        versions.in_use(7)


def test_heads_of_another_model_do_not_count_damaged_or_not(root: Path) -> None:
    other = replace(MODEL, sha256="abcdef" + "0" * 58)
    assert ProjectVersions(root, other).version(7) == other.model_version
    (root / "7" / "h0001" / "arrays.safetensors").write_bytes(b"")
    assert ProjectVersions(root, other).version(7) == other.model_version
