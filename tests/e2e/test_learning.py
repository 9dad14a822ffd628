"""Annotators label slides of two kinds in a real Label Studio, and the backend learns: everything through the parts that users have."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running_backend import Backend, running_backend, wait_for
from studio import Studio

from backend.commands.import_slides import import_slides
from backend.slides.synthetic import write_synthetic_slide

pytestmark = pytest.mark.e2e

CONFIG = """<View>
  <Image name="image" value="$image"/>
  <BrushLabels name="attention" toName="image"><Label value="Attention"/></BrushLabels>
  <Choices name="diagnosis" toName="image"><Choice value="Tumour"/><Choice value="No tumour"/></Choices>
  <TextArea name="summary" toName="image"/>
</View>"""
TUMOUR = [f"tumour-{i}" for i in range(5)]
PLAIN = [f"plain-{i}" for i in range(5)]
TAUGHT = [*TUMOUR[:3], *PLAIN[:3]]


@pytest.fixture(scope="module")
def backend(label_studio: Studio, stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    folder = tmp_path_factory.mktemp("backend")
    with running_backend(label_studio, stand_in, folder, TRAIN_DEBOUNCE_N="6", TRAIN_DEBOUNCE_S="2") as backend:
        backend.pool.start()
        yield backend


class Project:
    """The project as its annotators see it."""

    def __init__(self, studio: Studio, number: int) -> None:
        self.studio, self.number = studio, number
        self.tasks = {Path(t["data"]["slide"]).stem: int(t["id"]) for t in self.listed()}
        self.annotations: dict[str, int] = {}

    def listed(self) -> list[dict[str, Any]]:
        return list(self.studio.call("GET", f"/api/tasks/?project={self.number}&fields=all")["tasks"])

    def data(self) -> dict[str, dict[str, Any]]:
        return {Path(t["data"]["slide"]).stem: t["data"] for t in self.listed()}

    @property
    def version(self) -> str:
        return str(self.studio.project(self.number)["model_version"])

    def predictions(self) -> dict[str, list[dict[str, Any]]]:
        return {name: self.studio.predictions(task) for name, task in self.tasks.items()}

    def all_at(self, version: str) -> dict[str, dict[str, Any]]:
        """One prediction a slide, all of ``version``, once that is so."""

        def settled() -> dict[str, dict[str, Any]] | None:
            found = self.predictions()
            right = all([p["model_version"] for p in theirs] == [version] for theirs in found.values())
            return {name: theirs[0] for name, theirs in found.items()} if right else None

        found: dict[str, dict[str, Any]] = wait_for(f"one prediction a slide, all of {version}", settled)
        return found

    def label(self, name: str, choice: str) -> None:
        region = {"from_name": "diagnosis", "to_name": "image", "type": "choices", "value": {"choices": [choice]}}
        self.annotations[name] = self.studio.annotate(self.tasks[name], [region])

    def forget(self, name: str) -> None:
        self.studio.call("DELETE", f"/api/annotations/{self.annotations.pop(name)}/")


@pytest.fixture(scope="module")
def project(backend: Backend, label_studio: Studio) -> Project:
    root = backend.services.settings.slide_roots[0]
    slides = [
        write_synthetic_slide(root / f"{name}.tif", size=(1400, 1200), seed=seed, planted=name in TUMOUR).path
        for seed, name in enumerate((*TUMOUR, *PLAIN))
    ]
    number = label_studio.create_project("Learning", CONFIG)
    import_slides(backend.services, slides, project=str(number))
    return Project(label_studio, number)


def choice(prediction: dict[str, Any]) -> str | None:
    return next((r["value"]["choices"][0] for r in prediction["result"] if r["type"] == "choices"), None)


def test_before_anybody_labels_the_slides_are_ranked_and_nothing_is_suggested(
    project: Project, backend: Backend
) -> None:
    predictions = project.all_at(backend.version)
    assert all(p["score"] is None and choice(p) is None for p in predictions.values())
    data = wait_for("the ranks", lambda: (d := project.data()) and all("priority" in x for x in d.values()) and d)
    assert sorted(x["priority"] for x in data.values()) == list(range(1, 11))
    assert all(x["novelty"] == 1 and "confidence" not in x for x in data.values())
    assert all(Path(x["slide"]).stem == name and "panel" in x for name, x in data.items()), "nothing else has changed"
    wait_for("the clusters", lambda: all(p[0]["cluster"] is not None for p in project.predictions().values()))


def test_six_labels_make_a_head_and_every_task_is_scored_with_it(project: Project, backend: Backend) -> None:
    for name in TAUGHT:
        project.label(name, "Tumour" if name in TUMOUR else "No tumour")
    version = f"{backend.version}-h1"
    wait_for("the version to move", lambda: project.version == version)
    predictions = project.all_at(version)
    assert all(0 <= p["score"] <= 1 for p in predictions.values())
    said = {name: choice(p) for name, p in predictions.items()}
    assert said == {name: "Tumour" if name in TUMOUR else "No tumour" for name in project.tasks}
    (connection,) = project.studio.call("GET", f"/api/ml/?project={project.number}")
    assert connection["title"] == version, "Label Studio compares title, project and predictions"
    text = next(r["value"]["text"][0] for r in predictions[TUMOUR[4]]["result"] if r["type"] == "textarea")
    assert "Labelled slides most like it (cosine): tumour-" in text


def test_uncertainty_sampling_hands_out_the_least_certain_slide(project: Project, backend: Backend) -> None:
    studio, number = project.studio, project.number
    studio.call("PATCH", f"/api/projects/{number}/", json={"sampling": "Uncertainty sampling"})
    scores = {name: p["score"] for name, p in project.all_at(f"{backend.version}-h1").items() if name not in TAUGHT}
    handed_out = int(studio.call("GET", f"/api/projects/{number}/next/")["id"])
    assert handed_out == project.tasks[min(scores, key=scores.__getitem__)]


def test_the_ranks_follow(project: Project) -> None:
    def ranked() -> dict[str, Any] | None:
        data = project.data()
        return data if all(data[name]["priority"] is None for name in TAUGHT) else None

    data = wait_for("labelled slides to lose their rank", ranked)
    assert sorted(data[name]["priority"] for name in data if name not in TAUGHT) == [1, 2, 3, 4]
    assert all(0 <= x["confidence"] <= 1 and 0 <= x["novelty"] <= 1 for x in data.values())


def test_the_panel_says_what_is_suggested_and_what_is_alike(project: Project, backend: Backend) -> None:
    address = project.data()[TUMOUR[4]]["panel"].replace("/panel?", "/panel/state?")
    state = project.studio.http.get(address, headers={"Authorization": ""}).json()
    assert "Tumour" in str(state["suggestion"])
    assert "similar_page" in state


def test_two_quick_requests_for_training_make_one_more_at_most(project: Project, backend: Backend) -> None:
    training, studio = backend.services.training, project.studio

    def idle() -> bool:
        state = training.state(project.number)
        return state is not None and state.settled and not training.again(project.number)

    wait_for("nothing to be under way", idle)
    before = training.runs()[project.number]
    (connection,) = studio.call("GET", f"/api/ml/?project={project.number}")
    for _ in range(3):
        studio.call("POST", f"/api/ml/{connection['id']}/train")
    wait_for("the trainings", lambda: training.runs()[project.number] > before and idle())
    time.sleep(2)
    assert training.runs()[project.number] - before in (1, 2), "one, and one more for all that was asked meanwhile"
    assert project.version == f"{backend.version}-h1", "the same labels make no new version"
    assert backend.services.versions.versions(project.number) == [backend.version, f"{backend.version}-h1"]


def test_a_deleted_annotation_is_forgotten(project: Project, backend: Backend) -> None:
    project.forget(TUMOUR[0])
    version = f"{backend.version}-h2"
    wait_for("the version to move", lambda: project.version == version)
    heads = backend.services.versions.heads(project.number)
    assert heads is not None and heads.heads["diagnosis"].label_counts == {"Tumour": 2, "No tumour": 3}
    project.all_at(version)


def test_without_labels_there_is_no_head_and_no_score(project: Project, backend: Backend) -> None:
    for name in list(project.annotations):
        project.forget(name)
    wait_for("the version to go back", lambda: project.version == backend.version)
    predictions = project.all_at(backend.version)
    assert all(p["score"] is None and choice(p) is None for p in predictions.values())
