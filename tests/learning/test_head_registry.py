"""Versions of heads: stored without pickle, promoted at once, restorable, and never half there."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from unwilling_disk import no_file_can_be_opened

from backend.errors import BackendError, HeadDamaged, HeadMismatch, HeadNotFound, StoreUnavailable
from backend.learning.heads import Head, predict
from backend.learning.registry import HeadRegistry
from backend.learning.training import fit_choice_head, fit_choices_head, fit_number_head

MODEL = "wsc-3f2a1c"
X = np.random.default_rng(0).normal(size=(60, 12))


def choice_head(fingerprint: str = "3f2a1c", shift: float = 0.0) -> Head:
    labels = ["tumour" if x > shift else "normal" for x in X[:, 0]]
    head = fit_choice_head("diagnosis", ("normal", "tumour"), X, labels, fingerprint=fingerprint)
    assert isinstance(head, Head)
    return head


def all_heads() -> list[Head]:
    several = fit_choices_head("findings", ("fat",), X, [{"fat": bool(x > 0)} for x in X[:, 1]], fingerprint="3f2a1c")
    number = fit_number_head("grade", X, X[:, 2].tolist(), fingerprint="3f2a1c")
    assert isinstance(several, Head)
    assert isinstance(number, Head)
    return [choice_head(), several, number]


def test_versions_are_named_after_model_and_number(tmp_path: Path) -> None:
    registry = HeadRegistry(tmp_path)
    assert registry.current(7) is None
    assert registry.versions(7) == []
    assert [registry.add(7, [choice_head()], model_version=MODEL).version for _ in range(2)] == [
        "wsc-3f2a1c-h1",
        "wsc-3f2a1c-h2",
    ]
    assert [(v.version, v.current) for v in registry.versions(7)] == [("wsc-3f2a1c-h2", True), ("wsc-3f2a1c-h1", False)]
    assert HeadRegistry(tmp_path).add(8, [choice_head()], model_version=MODEL).version == "wsc-3f2a1c-h1"


def test_heads_of_every_kind_say_the_same_after_a_round_trip(tmp_path: Path) -> None:
    stored = {head.control: head for head in all_heads()}
    HeadRegistry(tmp_path).add(1, list(stored.values()), model_version=MODEL)
    found = HeadRegistry(tmp_path).current(1)
    assert found is not None
    assert set(found.heads) == {"diagnosis", "findings", "grade"}
    for control, head in found.heads.items():
        before, after = predict(stored[control], X), predict(head, X)
        assert after.values == before.values
        np.testing.assert_array_equal(after.confidence, before.confidence)
        assert head.metrics == json.loads(json.dumps(stored[control].metrics))
        assert head.label_counts == stored[control].label_counts


def test_a_moved_folder_is_readable_by_a_process_without_scikit_learn(tmp_path: Path) -> None:
    HeadRegistry(tmp_path / "here").add(1, [choice_head()], model_version=MODEL)
    (tmp_path / "here").rename(tmp_path / "there")
    script = f"""
        import sys
        from pathlib import Path
        sys.modules["sklearn"] = sys.modules["scipy"] = None
        import numpy as np
        from backend.learning.heads import probabilities
        from backend.learning.registry import HeadRegistry
        head = HeadRegistry(Path({str(tmp_path / "there")!r})).current(1).heads["diagnosis"]
        print(probabilities(head, np.zeros((1, 12)))[0, 1])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = predict(choice_head(), np.zeros((1, 12))).probabilities
    assert expected is not None
    assert float(done.stdout) == pytest.approx(expected[0, 1])


def test_an_earlier_version_can_be_restored_and_numbers_go_on(tmp_path: Path) -> None:
    registry = HeadRegistry(tmp_path)
    for shift in (0.0, 0.1, 0.2):
        registry.add(1, [choice_head(shift=shift)], model_version=MODEL)
    assert registry.restore(1, "wsc-3f2a1c-h1").number == 1
    current = registry.current(1)
    assert current is not None
    assert current.version == "wsc-3f2a1c-h1"
    assert registry.add(1, [choice_head()], model_version=MODEL).version == "wsc-3f2a1c-h4"


def test_a_number_is_not_used_again_after_its_folder_was_deleted(tmp_path: Path) -> None:
    registry = HeadRegistry(tmp_path)
    for _ in range(2):
        registry.add(1, [choice_head()], model_version=MODEL)
    for file in (tmp_path / "1" / "h0002").iterdir():
        file.unlink()
    (tmp_path / "1" / "h0002").rmdir()
    assert registry.add(1, [choice_head()], model_version=MODEL).number == 3


def test_heads_of_another_model_are_not_used(tmp_path: Path) -> None:
    registry = HeadRegistry(tmp_path)
    registry.add(1, [choice_head("old")], model_version="wsc-old111")
    assert registry.current(1, fingerprint="new") is None
    with pytest.raises(HeadMismatch, match="wsc-old111"):
        registry.restore(1, "wsc-old111-h1", fingerprint="new")
    assert registry.add(1, [choice_head("new")], model_version="wsc-new222").version == "wsc-new222-h2"
    assert registry.current(1, fingerprint="new") is not None


def test_a_candidate_is_stored_without_being_used(tmp_path: Path) -> None:
    registry = HeadRegistry(tmp_path)
    registry.add(1, [choice_head()], model_version=MODEL)
    registry.add(1, [choice_head()], model_version=MODEL, promote=False)
    current = registry.current(1)
    assert current is not None
    assert current.number == 1
    assert len(registry.versions(1)) == 2


def test_retired_heads_are_kept_and_not_used(tmp_path: Path) -> None:
    registry = HeadRegistry(tmp_path)
    registry.add(1, [choice_head()], model_version=MODEL)
    registry.retire(1)
    assert registry.current(1) is None
    assert registry.restore(1, "wsc-3f2a1c-h1").number == 1


@pytest.mark.parametrize("version", ["wsc-3f2a1c-h9", "wsc-3f2a1c", "other-h1", "../../etc-h1", "", "wsc-3f2a1c-h01"])
def test_an_unknown_version_is_not_found_and_the_known_are_named(tmp_path: Path, version: str) -> None:
    registry = HeadRegistry(tmp_path)
    registry.add(1, [choice_head()], model_version=MODEL)
    with pytest.raises(HeadNotFound, match=r"Stored: wsc-3f2a1c-h1\."):
        registry.load(1, version)


@pytest.mark.parametrize("project", ["1", "../1", -1, True, None])
def test_a_project_is_a_number_and_never_a_path(tmp_path: Path, project: object) -> None:
    with pytest.raises(ValueError, match="project"):
        HeadRegistry(tmp_path).current(project)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["heads.json", "arrays.safetensors", "current.json"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "gone"])
def test_damage_is_named_and_training_again_mends_it(tmp_path: Path, name: str, damage: str) -> None:
    registry = HeadRegistry(tmp_path)
    registry.add(1, [choice_head()], model_version=MODEL)
    path = tmp_path / "1" / name if name == "current.json" else tmp_path / "1" / "h0001" / name
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "truncated" else data[:20] + b"\xff" + data[21:])
    if (name, damage) == ("current.json", "gone"):
        assert registry.current(1) is None
    else:
        with pytest.raises(HeadDamaged):
            registry.current(1)
    assert registry.add(1, [choice_head()], model_version=MODEL).version == "wsc-3f2a1c-h2"
    current = registry.current(1)
    assert current is not None
    assert current.number == 2


def test_heads_that_cannot_be_opened_now_are_not_damaged(tmp_path: Path) -> None:
    registry = HeadRegistry(tmp_path)
    head = choice_head()
    registry.add(1, [head], model_version=MODEL)
    asked = (
        lambda: registry.current(1),
        lambda: registry.load(1, "wsc-3f2a1c-h1"),
        lambda: registry.versions(1),
        lambda: registry.add(1, [head], model_version=MODEL),
        lambda: registry.retire(1),
    )
    for ask in asked:
        said: BackendError | OSError | None = None
        with no_file_can_be_opened():
            try:
                ask()
            except (BackendError, OSError) as error:
                said = error
        assert isinstance(said, StoreUnavailable) and said.retryable
        assert "Too many open files" in said.message and "ulimit" in said.hint
    current = registry.current(1)
    assert current is not None and current.number == 1, "nothing has changed"


@pytest.mark.parametrize("name", ["heads.json", "arrays.safetensors"])
def test_a_file_that_leads_nowhere_stops_a_list_of_versions_instead_of_shortening_it(tmp_path: Path, name: str) -> None:
    registry = HeadRegistry(tmp_path)
    registry.add(1, [choice_head()], model_version=MODEL)
    path = tmp_path / "1" / "h0001" / name
    path.unlink()
    path.symlink_to(path)  # the system refuses to open it, whoever asks
    with pytest.raises(StoreUnavailable):
        registry.current(1)
    if name == "heads.json":
        with pytest.raises(StoreUnavailable):
            registry.versions(1)


def test_what_somebody_chose_is_known_until_a_training_replaces_it(tmp_path: Path) -> None:
    registry = HeadRegistry(tmp_path)
    assert registry.chosen_for(1) == ""
    registry.add(1, [choice_head()], model_version=MODEL)
    registry.retire(1, chosen_for="these labels")
    assert registry.chosen_for(1) == "these labels"
    registry.restore(1, "wsc-3f2a1c-h1", chosen_for="those labels")
    assert registry.chosen_for(1) == "those labels"
    registry.add(1, [choice_head()], model_version=MODEL)
    assert registry.chosen_for(1) == ""


def _add_some(root: str, n: int) -> None:
    for _ in range(n):
        HeadRegistry(Path(root)).add(1, [choice_head()], model_version=MODEL)


def test_two_processes_never_take_the_same_number(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_add_some, args=(str(tmp_path), 4)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert [v.number for v in HeadRegistry(tmp_path).versions(1)] == [8, 7, 6, 5, 4, 3, 2, 1]
    current = HeadRegistry(tmp_path).current(1)
    assert current is not None
    assert current.number == 8


def test_a_writer_that_is_killed_leaves_the_version_before_in_use(tmp_path: Path) -> None:
    HeadRegistry(tmp_path).add(1, [choice_head()], model_version=MODEL)
    script = f"""
        import time
        from pathlib import Path
        from backend.learning import registry
        store = registry.HeadRegistry(Path({str(tmp_path)!r}))
        heads = list(store.current(1).heads.values())
        def hang(path):
            print("writing", flush=True)
            time.sleep(600)
        registry._flush = hang
        store.add(1, heads, model_version={MODEL!r})
    """
    writer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    with writer.stdout:
        assert writer.stdout.readline() == "writing\n"
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    registry = HeadRegistry(tmp_path)
    assert [v.version for v in registry.versions(1)] == ["wsc-3f2a1c-h1"]
    assert any(path.name.startswith(".new-") for path in (tmp_path / "1").iterdir())
    assert registry.add(1, [choice_head()], model_version=MODEL).version == "wsc-3f2a1c-h2"
    assert not any(path.name.startswith(".new-") for path in (tmp_path / "1").iterdir())
