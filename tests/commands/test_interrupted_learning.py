"""What is away or dies while a project learns: nothing that it had is taken from it, and what was left undone is made up for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotated_studio import PROJECT
from conftest import Project

from backend.errors import DownloadFailed, HeadDamaged, ResultDamaged, StoreUnavailable
from backend.label_studio import trainer
from backend.label_studio.labeling_config import parse_config
from backend.label_studio.teaching import Teacher
from backend.label_studio.trainer import TrainingReport, put_in_use, train
from backend.learning.tile_labels import TileLabels
from backend.slides.source import SlideRef


def nothing(*_: Any) -> None:
    pass


def training(project: Project) -> TrainingReport:
    """In a process that has not read an embedding yet."""
    trainer._teacher_of.cache_clear()
    return train(project.services, PROJECT, nothing)


@pytest.fixture
def taught(project: Project) -> Project:
    """Its heads have learnt of four slides, and nothing waits to be pushed."""
    project.label(0, 1, 2, 3)
    assert training(project).version.endswith("-h1")
    pushed(project)
    return project


def pushed(project: Project) -> None:
    for key in project.keys.values():
        project.services.queue.drain_waiting(key)
    assert project.pushes() == 0


def result_file(project: Project, task: int) -> Path:
    key = project.keys[task]
    return project.services.settings.model_dir / "results" / key[:2] / f"{key}.h5"


# --- away -------------------------------------------------------------------------------------------------------------


def test_a_store_that_is_away_fails_the_training_and_the_heads_stay(taught: Project) -> None:
    for task in taught.tasks:
        file = result_file(taught, task)
        file.unlink()
        file.symlink_to(file)  # the system refuses to open it
    with pytest.raises(StoreUnavailable):
        training(taught)
    assert taught.services.versions.version(PROJECT).endswith("-h1")
    assert str(taught.studio.project["model_version"]).endswith("-h1")
    assert taught.pushes() == 0
    with pytest.raises(StoreUnavailable):
        put_in_use(taught.services, PROJECT, None, nothing)
    assert taught.services.versions.version(PROJECT).endswith("-h1"), "not by command either"


def away(project: Project, *tasks: int) -> None:
    """The servers of these slides do not answer."""
    resolve = project.services.resolver.resolve
    silent = {project.studio.tasks[task]["image"] for task in tasks}

    def asked(value: str, **more: Any) -> SlideRef:
        if value in silent:
            raise DownloadFailed(f"{value} did not answer in time.")
        return resolve(value, **more)

    project.services.resolver.resolve = asked  # type: ignore[method-assign, assignment]


def test_a_labelled_slide_whose_server_is_away_fails_the_training(taught: Project) -> None:
    away(taught, taught.tasks[2])
    with pytest.raises(DownloadFailed, match="slide-02"):
        training(taught)
    assert taught.services.versions.version(PROJECT).endswith("-h1")


def test_a_slide_without_a_label_whose_server_is_away_waits_for_the_next_training(taught: Project) -> None:
    taught.label(4, 5)
    away(taught, taught.tasks[11])
    report = training(taught)
    assert report.version.endswith("-h2")
    assert (report.slides, report.unanalysed) == (len(taught.tasks) - 1, 1)


def test_heads_whose_slides_are_gone_stay_and_those_whose_labels_are_gone_do_not(taught: Project) -> None:
    hidden = {}
    for task in taught.tasks[:4]:
        file = Path(taught.studio.tasks[task]["image"])
        hidden[file] = file.rename(file.with_suffix(".away"))  # as on a disk that is not mounted
    report = training(taught)
    assert report.version.endswith("-h1") and report.pushed == 0
    assert {issue["code"] for issue in report.issues} == {"no_embedding"}
    for file, here in hidden.items():
        here.rename(file)
    taught.studio.annotations.clear()
    assert training(taught).version == taught.services.model.model_version


def test_tiles_are_not_learnt_from_fewer_slides_than_the_lesson_says(taught: Project) -> None:
    teacher = Teacher(taught.services)
    lesson = teacher.lesson(PROJECT, parse_config(str(taught.studio.project["label_config"])), nothing)
    entries = [(slide, TileLabels(slide.task, "tiles", np.array([0]), ("Dark",))) for slide in lesson.slides[:2]]
    assert len(list(teacher.labelled_tiles(entries))) == 2
    result_file(taught, lesson.slides[1].task).write_bytes(b"broken")
    with pytest.raises(ResultDamaged, match="slide-01") as caught:
        list(teacher.labelled_tiles(entries))
    assert caught.value.retryable, "the next try reads the lesson anew"


# --- dies -------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


@contextmanager
def dying_before_its_snapshot() -> Iterator[None]:
    """What trains in this block ends when it is about to write down what it found."""

    def die(*_: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer, "write_snapshot", die)
        yield


def test_a_training_that_died_after_storing_its_heads_pushes_them_when_it_runs_again(taught: Project) -> None:
    taught.label(4, 5)
    taught.studio.annotate(taught.tasks[6], quality=3)
    with dying_before_its_snapshot():
        training(taught)
    assert taught.services.versions.version(PROJECT).endswith("-h2")
    report = training(taught)
    assert report.version.endswith("-h2") and report.previous.endswith("-h1")
    assert report.pushed == taught.pushes() == len(taught.tasks)
    assert {few["control"]: few["n_labels"] for few in report.too_few}["quality"] == 1, "as of the labels that it had"
    assert training(taught).pushed == 0, "it has settled"


def test_a_first_training_that_died_after_storing_its_heads_goes_on_with_them(project: Project) -> None:
    project.label(0, 1, 2, 3)
    for _ in range(3):
        with dying_before_its_snapshot():
            training(project)
    report = training(project)
    assert report.version.endswith("-h1"), "no new version at each try"
    assert report.pushed == len(project.tasks)


def test_retiring_that_died_in_the_middle_is_ended_by_the_next_training(taught: Project) -> None:
    taught.studio.annotations.clear()
    with dying_before_its_snapshot():
        training(taught)
    report = training(taught)
    assert report.version == taught.studio.project["model_version"] == taught.services.model.model_version
    assert report.pushed == len(taught.tasks)


@pytest.mark.parametrize("choice", ["h1", None])
def test_a_choice_that_died_in_the_middle_is_kept_and_ended_by_the_next_training(
    taught: Project, choice: str | None
) -> None:
    taught.label(4, 5)
    assert training(taught).version.endswith("-h2")
    pushed(taught)
    model = taught.services.model.model_version
    wanted = model if choice is None else f"{model}-{choice}"
    with dying_before_its_snapshot():
        put_in_use(taught.services, PROJECT, None if choice is None else wanted, nothing)
    report = training(taught)
    assert (report.version, report.previous) == (wanted, f"{model}-h2")
    assert taught.studio.project["model_version"] == wanted
    assert report.pushed == len(taught.tasks)


def test_heads_chosen_again_after_a_training_died_are_pushed_to_all(taught: Project) -> None:
    taught.label(4, 5)
    with dying_before_its_snapshot():
        training(taught)
    first = f"{taught.services.model.model_version}-h1"
    # Meanwhile slides may have been answered with the second version, though the last snapshot is of the first.
    assert put_in_use(taught.services, PROJECT, first, nothing).pushed == len(taught.tasks)


# --- damaged ----------------------------------------------------------------------------------------------------------


def damage_heads(project: Project) -> None:
    file = project.services.settings.model_dir / "heads" / str(PROJECT) / "h0001" / "arrays.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    project.services.__dict__.pop("versions")  # another process, which has not read them while they were whole


def test_damaged_heads_are_made_anew_by_a_training(taught: Project) -> None:
    damage_heads(taught)
    report = training(taught)
    assert (report.version[-3:], report.previous[-3:]) == ("-h2", "-h1")
    assert report.pushed == len(taught.tasks)


def test_damaged_heads_that_cannot_be_made_anew_are_an_error_and_label_studio_keeps_what_they_said(
    taught: Project,
) -> None:
    damage_heads(taught)
    for task in taught.tasks[:4]:
        Path(taught.studio.tasks[task]["image"]).unlink()
    with pytest.raises(HeadDamaged):
        training(taught)
    assert str(taught.studio.project["model_version"]).endswith("-h1")
    assert taught.services.versions.version(PROJECT).endswith("-h1")


def test_damaged_heads_without_labels_are_retired(taught: Project) -> None:
    damage_heads(taught)
    taught.studio.annotations.clear()
    assert training(taught).version == taught.services.model.model_version
    assert taught.services.versions.in_use(PROJECT) is None
