"""`train` and `heads`: what a person is told, and what the project is at afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest
from conftest import SLIDES, Project
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from backend.cli import app
from backend.commands.head_tables import training_lines
from backend.commands.heads import stored_versions, use_version
from backend.commands.train import train_project
from backend.errors import HeadNotFound, LabelStudioUnreachable, ProjectNotFound, TrainingFailed, TrainingRuns
from backend.label_studio.events import take_event
from backend.label_studio.predictor import Predictor
from backend.label_studio.trainer import train
from backend.web.app import create_app


def nothing(*_: Any) -> None:
    pass


def training(project: Project) -> str:
    """Train as an event does; returns the version."""
    return train(project.services, 7, nothing).version


def test_train_says_what_was_learnt_and_what_is_still_needed(project: Project) -> None:
    project.label(*range(8))
    for i in range(8):
        project.studio.annotate(project.tasks[i], 2, diagnosis="Tumour" if i in (0, 2, 3) else "No tumour", quality=3)
    done = project.command("train", "Lymph nodes")
    assert done.returncode == 0, done.stderr
    version = project.services.versions.version(7)
    assert version.endswith("-h1")
    assert f"{project.services.model.model_version} → {version}" in done.stdout
    row = next(line for line in done.stdout.splitlines() if "diagnosis" in line)
    assert "5 (2 Tumour, 3 No tumour)" in row and "slide" in row
    assert "Still needed: 'quality': a slide with another number than 3 needed." in done.stdout
    tie = next(line for line in done.stdout.splitlines() if "no majority" in line)
    assert "3" in tie and "task 104, diagnosis" in tie
    assert f"8 of {SLIDES} slides annotated" in done.stdout
    assert f"{SLIDES} predictions queued" in done.stdout and project.pushes() == SLIDES
    assert "wait for `wsc-backend workers`" in done.stdout
    assert "Research use only" in done.stdout
    assert "training here" in done.stderr
    assert project.studio.project["model_version"] == project.studio.connection["title"] == version


def test_train_names_the_controls_that_are_not_used(project: Project) -> None:
    config = project.studio.project["label_config"]
    dynamic = '<RectangleLabels name="parts" toName="image" value="$labels"/>'
    project.studio.project["label_config"] = config.replace("</View>", f"{dynamic}</View>")
    done = project.command("train", "7")
    assert done.returncode == 0, done.stderr
    assert "Not used: <RectangleLabels name='parts'> takes its labels from each task ($labels)" in done.stdout


def test_doctor_names_what_of_a_project_cannot_be_used(project: Project) -> None:
    config = project.studio.project["label_config"]
    dynamic = '<RectangleLabels name="parts" toName="image" value="$labels"/>'
    project.studio.project["label_config"] = config.replace("</View>", f"{dynamic}</View>")
    said = project.command("doctor", "--project", "Lymph nodes").stdout
    assert "“Lymph nodes” is connected to this backend at http://ours:1" in said
    assert "<Choices name='diagnosis'> is filled" in said
    assert "note" in next(line for line in said.splitlines() if "takes its labels from each task ($labels)" in line)
    project.studio.connection |= {"url": "http://others", "title": "another backend"}
    assert "“Lymph nodes” is not connected to this backend" in project.command("doctor", "-p", "7").stdout
    assert "There is no project 'Livers'" in project.command("doctor", "-p", "Livers").stdout


def test_a_project_connected_by_hand_can_teach_afterwards(project: Project) -> None:
    project.studio.connection |= {"url": "http://elsewhere:2/"}  # ours by its title
    project.studio.webhooks.append({"id": 1, "url": "http://elsewhere:2/webhook", "headers": {"X-Theirs": "kept"}})
    project.studio.webhooks.append({"id": 2, "url": "http://others/webhook", "headers": {}})
    train_project(project.services, "7")
    ours, others = project.studio.webhooks
    assert ours["headers"] == {"X-Theirs": "kept", "X-WSC-Webhook-Secret": project.services.webhook_secret}
    assert others["headers"] == {}


def test_a_project_that_is_not_connected_is_told(project: Project) -> None:
    project.studio.connection |= {"url": "http://others", "title": "another backend"}
    said: list[str] = []
    train_project(project.services, "7", say=said.append)
    assert "not connected" in said[0] and project.studio.webhooks == []


def test_a_project_that_is_not_connected_learns_and_nothing_is_sent_to_label_studio(project: Project) -> None:
    project.studio.connection |= {"url": "http://others", "title": "another backend"}
    project.label(*range(6))
    before = json.dumps([project.studio.project, project.studio.tasks])
    told = [str(line) for line in training_lines(train_project(project.services, "7"))]
    assert any(line.startswith("The project is not connected to this backend") for line in told)
    assert project.services.versions.version(7).endswith("-h1")
    assert json.dumps([project.studio.project, project.studio.tasks]) == before and project.pushes() == 0
    project.studio.connection |= {"url": "http://ours:1", "title": project.services.model.model_version}
    assert train(project.services, 7, nothing).pushed == SLIDES


def test_events_of_a_project_that_has_disconnected_us_do_nothing_until_it_is_connected_again(
    project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    services, created = project.services, {"project": {"id": 7}}
    project.studio.connection |= {"url": "http://others", "title": "another backend"}
    assert take_event(services, "ANNOTATION_CREATED", 7, created) == "scheduled"
    for _ in range(2):
        training(project)
    assert caplog.text.count("is not connected to this backend") == 1
    for action in ("ANNOTATION_CREATED", "TASKS_DELETED", "PROJECT_UPDATED"):
        assert take_event(services, action, 7, created) == "nothing to do"
    Predictor(services).predict([], project=7, label_config=str(project.studio.project["label_config"]))
    assert take_event(services, "ANNOTATION_CREATED", 7, created) in ("scheduled", "again", "queued")
    services.training.note_connection(7, False)
    with TestClient(create_app(services), base_url="http://localhost") as client:
        assert client.post("/setup", json={"project": "7.1"}).status_code == 200, "as when it is connected again"
    assert take_event(services, "ANNOTATION_CREATED", 7, created) in ("scheduled", "again", "queued")


def test_without_annotations_nothing_is_trained_and_that_is_no_error(project: Project) -> None:
    told = [str(line) for line in training_lines(train_project(project.services, "7"))]
    assert "No heads yet." in told
    assert any(f"0 of {SLIDES} slides annotated" in line for line in told)
    assert stored_versions(project.services, "7").versions == []


def test_without_analysed_slides_nothing_is_trained_and_that_is_said(project: Project) -> None:
    project.label(*range(8))
    for key in project.keys.values():
        (project.services.settings.model_dir / "results" / key[:2] / f"{key}.h5").unlink()
    done = project.command("train", "7")
    assert done.returncode == 0, done.stderr
    assert f"8 of {SLIDES} slides annotated; {SLIDES} without a result" in done.stdout
    assert "labelled slides without a result" in done.stdout


def test_an_unknown_project_is_an_error_that_names_those_there_are(project: Project) -> None:
    done = project.command("train", "99")
    assert done.returncode == 2
    assert "ProjectNotFound" in done.stderr and "7 'Lymph nodes'" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(ProjectNotFound):
        stored_versions(project.services, "Kidneys")


def test_a_worker_trains_if_there_is_one(project: Project) -> None:
    project.label(*range(6))
    line = [sys.executable, "-m", "backend.jobs.worker", "--queues", "train"]
    log = (project.services.settings.model_dir / "worker.log").open("w")
    with log, subprocess.Popen(line, env=project.environment, stdout=log, stderr=log) as worker:
        try:
            deadline = time.monotonic() + 120
            while not project.services.queue.workers():
                assert worker.poll() is None and time.monotonic() < deadline, "the worker has not come up"
                time.sleep(0.1)
            said: list[str] = []
            stages: list[str] = []
            trained = train_project(
                project.services, "7", say=said.append, progress=lambda stage, _done, _total: stages.append(stage)
            )
            assert said == [] and stages
            assert trained.report.version.endswith("-h1") and trained.report.pushed == SLIDES
            assert [head["control"] for head in trained.report.heads] == ["diagnosis"]
            assert not trained.publishers
            # Nothing has changed since: it runs again, and says so.
            assert train_project(project.services, "7").report.previous == trained.report.version
            # While Label Studio answers the command, and not the worker.
            project.services.client.label_config = lambda _: ""  # type: ignore[method-assign]
            project.studio.project["label_config"] = "<View/>"
            with pytest.raises(TrainingFailed, match="label"):
                train_project(project.services, "7")
        finally:
            worker.kill()


# --- versions -------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_versions(project: Project) -> Project:
    project.label(0, 1, 2, 3)
    assert training(project).endswith("-h1")
    project.label(4, 5)
    assert training(project).endswith("-h2")
    return project


def test_heads_lists_versions_for_people_and_for_scripts(two_versions: Project) -> None:
    model = two_versions.services.model.model_version
    shown = two_versions.command("heads", "7").stdout
    newest, oldest = (line for line in shown.splitlines() if f"{model}-h" in line)
    assert "●" in newest and "-h2" in newest and "6 (3 Tumour, 3 No tumour)" in newest
    assert "●" not in oldest and "-h1" in oldest and "4 (2 Tumour, 2 No tumour)" in oldest
    told = json.loads(two_versions.command("heads", "Lymph nodes", "--json").stdout)
    assert told["version"] == f"{model}-h2"
    assert [(v["version"], v["in_use"], v["usable"]) for v in told["versions"]] == [
        (f"{model}-h2", True, True),
        (f"{model}-h1", False, True),
    ]
    assert told["versions"][0]["heads"][0]["metrics"]["measured"] in (True, False)


def test_a_restored_version_is_followed_everywhere_and_stays_until_a_label_changes(two_versions: Project) -> None:
    project, versions = two_versions, two_versions.services.versions
    first = f"{project.services.model.model_version}-h1"
    done = project.command("heads", "7", "--restore", first)
    assert done.returncode == 0, done.stderr
    assert f"{SLIDES} predictions queued" in done.stderr
    assert "●" in next(line for line in done.stdout.splitlines() if first in line)
    assert project.studio.project["model_version"] == project.studio.connection["title"] == first
    assert {w.model_version for key in project.keys.values() for w in project.services.queue.waiting(key)} >= {first}
    assert versions.snapshot(7).about["version"] == first
    assert training(project) == first, "labels are what they were when somebody chose it"
    assert training(project) == first, "and once more"
    project.label(6)
    assert training(project).endswith("-h3")
    assert versions.snapshot(7).about["version"].endswith("-h3")


def test_retired_heads_stay_away_until_a_label_changes(two_versions: Project) -> None:
    project, model = two_versions, two_versions.services.model.model_version
    done = project.command("heads", "7", "--retire", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["version"] == model and not any(v["in_use"] for v in told["versions"])
    assert project.studio.project["model_version"] == model
    assert training(project) == model
    project.label(6)
    assert training(project).endswith("-h3")


def test_a_version_that_is_not_there_changes_nothing(two_versions: Project) -> None:
    for version in ("wsc-123456-h9", "latest"):
        with pytest.raises(HeadNotFound) as caught:
            use_version(two_versions.services, "7", version)
        assert "-h1" in caught.value.hint
    assert two_versions.services.versions.version(7).endswith("-h2")


def test_restore_and_retire_exclude_each_other() -> None:
    done = CliRunner().invoke(app, ["heads", "7", "--restore", "x-h1", "--retire"])
    assert done.exit_code == 2 and "exclude each other" in done.output


def test_heads_are_not_replaced_under_a_running_training(two_versions: Project) -> None:
    two_versions.services.training.train_now(7)
    two_versions.services.redis.hset("rq:job:train-7", "status", "started")
    with pytest.raises(TrainingRuns):
        use_version(two_versions.services, "7", None)
    assert two_versions.services.versions.version(7).endswith("-h2")


def test_a_training_that_died_before_its_pushes_makes_them_when_it_runs_again(project: Project) -> None:
    project.label(0, 1, 2, 3)
    follow = project.services.client.follow_version

    def away(*arguments: Any) -> bool:
        project.studio.down = True
        return follow(*arguments)

    project.services.client.follow_version = away  # type: ignore[method-assign]
    with pytest.raises(LabelStudioUnreachable):
        training(project)
    assert project.pushes() == 0
    project.studio.down = False
    project.services.client.follow_version = follow  # type: ignore[method-assign]
    assert training(project).endswith("-h1")
    assert project.pushes() == SLIDES
    assert train(project.services, 7, nothing).pushed == 0, "it has settled"
