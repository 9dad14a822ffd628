"""What a training found out about the slides, as a file: damage is told from a disk that refuses, and killed writers leave nothing for ever."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from unwilling_disk import no_file_can_be_opened

from backend.errors import BackendError, HeadDamaged, StoreUnavailable
from backend.learning.snapshot import FILE_NAME, ProjectSnapshot, read_snapshot, write_snapshot

DAY_S = 86_400


def snapshot(version: str = "wsc-3f2a1c-h1") -> ProjectSnapshot:
    n = 3
    return ProjectSnapshot(
        about={"version": version, "fingerprint": "f", "too_few": []},
        tasks=np.arange(n, dtype=np.int64),
        keys=("a", "b", "c"),
        names=("a.svs", "b.svs", "c.svs"),
        labels=({"diagnosis": "Tumour"}, {}, {}),
        suggestions=("", "Tumour", ""),
        confidence=np.array([np.nan, 0.5, 0.75]),
        priority=np.array([0, 1, 2], dtype=np.int64),
        novelty=np.array([0.0, 0.25, 0.5]),
        cluster=np.zeros(n, dtype=np.int64),
        labelled=np.array([0], dtype=np.int64),
        embeddings=np.ones((1, 4), dtype=np.float32),
    )


def test_a_snapshot_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "7" / FILE_NAME
    assert read_snapshot(file) is None
    write_snapshot(snapshot(), file)
    found = read_snapshot(file)
    assert found is not None
    assert (found.about, found.keys, found.labels) == (snapshot().about, snapshot().keys, snapshot().labels)
    np.testing.assert_array_equal(found.confidence, snapshot().confidence)


def test_any_changed_byte_is_damage_or_does_not_matter(tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    write_snapshot(snapshot(), file)
    whole = file.read_bytes()
    damaged = 0
    for at in range(0, len(whole), 3):
        for changed in (whole[at] ^ 0xFF, whole[at] ^ 0x01):
            file.write_bytes(whole[:at] + bytes([changed]) + whole[at + 1 :])
            try:
                read_snapshot(file)
            except HeadDamaged as error:
                damaged += 1
                assert "cannot be read" in error.message
    assert damaged > len(whole) / 3
    for length in range(0, len(whole), 50):
        file.write_bytes(whole[:length])
        with pytest.raises(HeadDamaged):
            read_snapshot(file)


def test_a_snapshot_that_cannot_be_opened_now_is_not_damaged(tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    write_snapshot(snapshot(), file)
    for attempt in (lambda: read_snapshot(file), lambda: write_snapshot(snapshot("wsc-3f2a1c-h2"), file)):
        said: BackendError | OSError | None = None
        with no_file_can_be_opened():
            try:
                attempt()
            except (BackendError, OSError) as error:
                said = error
        assert isinstance(said, StoreUnavailable), said
    found = read_snapshot(file)
    assert found is not None and found.about["version"] == "wsc-3f2a1c-h1"
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_what_killed_writers_left_is_removed_a_day_later_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    theirs = tmp_path / f".{FILE_NAME}.bak"
    abandoned, being_written = (tmp_path / f".{FILE_NAME}.{digit * 32}" for digit in "ab")
    for path in (theirs, abandoned, being_written):
        path.write_bytes(b"half of it")
    for path in (theirs, abandoned):
        os.utime(path, (time.time() - DAY_S - 60,) * 2)
    write_snapshot(snapshot(), file)
    assert not abandoned.exists()
    assert theirs.exists() and being_written.exists()
