"""Patients and prevalence: figures that hold for patients who were not seen, and confidence that holds for an
archive."""

from __future__ import annotations

import csv
import json
import logging
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patient_project import CLASSES, PatientProject, everything_kept, patient_project
from synthetic_bags import synthetic_result

from backend.commands.export import export_project
from backend.commands.head_tables import ISSUE_WORDS
from backend.commands.heads import stored_versions
from backend.errors import LabelConfigUnsupported
from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.answers import Answers
from backend.label_studio.labeling_config import parse_config
from backend.learning.figures import class_figures, suggestion_words
from backend.learning.heads import Head, predict, probabilities
from backend.learning.registry import HeadRegistry
from backend.learning.simulate import from_file
from backend.learning.tile_training import LabelledTiles, fit_tile_head
from backend.learning.training import fit_choice_head, fit_choices_head, fit_number_head
from backend.settings import Settings
from backend.web.panel_extras import suggestion_json
from backend.web.project_extras import ProjectLearning

PRINT = "f" * 40


def patients_of_slides(seed: int, patients: int = 40, each: int = 3) -> tuple[Any, Any, Any]:
    """Embeddings of nearly identical slides of each patient, a label at random for each patient, and whose each slide
    is."""
    rng = np.random.default_rng(seed)
    whose = np.repeat(np.arange(patients), each)
    look = rng.normal(size=(patients, 64))
    return look[whose] + 0.1 * rng.normal(size=(len(whose), 64)), rng.permutation(patients) % 2, whose


def archive(seed: int, n: int, *, prevalence: float = 0.05, apart: float = 1.2) -> tuple[Any, Any]:
    """Slides of which a part has a tumour, which they look like or not."""
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < prevalence).astype(int)
    x = rng.normal(size=(n, 32))
    x[:, 0] += apart * y
    return x, y


@pytest.fixture
def project(
    settings: Callable[..., Settings], embedded_redis: EmbeddedRedis, redis: Any, tmp_path: Path
) -> Iterator[PatientProject]:
    with patient_project(settings, embedded_redis, tmp_path / "project") as made:
        yield made


def add_patients(project: PatientProject, *, name: Callable[[int], Any], patients: int = 12, each: int = 3) -> None:
    """Slides with labels at random by patient; ``name`` gives what the task's field says, ``None`` for no field."""
    x, y, whose = patients_of_slides(1, patients, each)
    for row, patient in enumerate(whose):
        named = name(int(patient))
        task = project.add(np.pad(x[row], (0, 704)), **({} if named is None else {"patient": named}))
        project.studio.annotate(task, diagnosis=CLASSES[y[patient]])


# --- validation never parts a patient -------------------------------------------------------------------------------


def test_labels_at_random_by_patient_teach_nothing_about_other_patients() -> None:
    scores, areas = [], []
    for seed in range(4):
        x, y, whose = patients_of_slides(seed)
        head = fit_choice_head("d", CLASSES, x, [CLASSES[k] for k in y[whose]], fingerprint=PRINT, groups=whose)
        assert isinstance(head, Head)
        value, low, high = head.metrics["balanced_accuracy"]
        assert low < 0.5 and value < 0.7, (seed, value)
        assert high - low > 0.25, "forty patients, not a hundred and twenty slides"
        scores.append(value)
        areas.append(head.metrics["auroc"][0])
    assert 0.35 < np.mean(scores) < 0.6 and 0.35 < np.mean(areas) < 0.6


def test_several_choices_and_numbers_of_a_patient_are_not_parted_either() -> None:
    x, y, whose = patients_of_slides(2)
    chosen = [{"Necrosis": bool(y[patient])} for patient in whose]
    several = fit_choices_head("seen", ("Necrosis",), x, chosen, fingerprint=PRINT, groups=whose)
    assert isinstance(several, Head)
    assert several.metrics["choices"]["Necrosis"]["balanced_accuracy"][0] < 0.65
    numbers = np.random.default_rng(5).normal(size=40)
    number = fit_number_head("grade", x, numbers[whose].tolist(), fingerprint=PRINT, groups=whose)
    assert isinstance(number, Head)
    assert number.metrics["r2"][0] < 0.2
    # It knows the numbers of these patients by heart, and is not sure of those of others for that.
    others = predict(number, patients_of_slides(77)[0]).confidence
    right = np.abs(np.random.default_rng(6).normal(size=120) - np.array(predict(number, x).values)) <= number.tolerance
    assert others.mean() == pytest.approx(right.mean(), abs=0.15)


def test_tiles_drawn_on_several_slides_of_a_patient_are_not_parted() -> None:
    def pieces(*, by_patient: bool) -> Iterator[LabelledTiles]:
        rng = np.random.default_rng(3)
        for patient in range(12):
            look = rng.normal(size=24)
            for slide in range(3):
                latents = look + 0.2 * rng.normal(size=(30, 24))
                label = CLASSES[patient % 2]
                yield LabelledTiles(f"{patient}-{slide}", latents, [label] * 30, patient if by_patient else None)

    apart = fit_tile_head("tissue", CLASSES, pieces(by_patient=True), fingerprint=PRINT)
    parted = fit_tile_head("tissue", CLASSES, pieces(by_patient=False), fingerprint=PRINT)
    assert isinstance(apart, Head) and isinstance(parted, Head)
    assert apart.metrics["balanced_accuracy"][0] < 0.7 < parted.metrics["balanced_accuracy"][0]


def test_a_project_with_the_field_is_measured_by_patient_and_one_without_says_that_it_is_not(
    settings: Callable[..., Settings], embedded_redis: EmbeddedRedis, redis: Any, tmp_path: Path
) -> None:
    with patient_project(settings, embedded_redis, tmp_path / "with") as project:
        add_patients(project, name=lambda patient: f"P-{patient}")
        told = project.told_by_train()
        assert "Slides of 12 patients, each on one side of the validation." in told
        assert project.head().metrics["balanced_accuracy"][0] < 0.7
        assert project.head().metrics["patients"] == {"slides": 36, "unknown": 0, "patients": 12}
    with patient_project(settings, embedded_redis, tmp_path / "without") as project:
        add_patients(project, name=lambda _: None)
        unknown = "patients unknown: slides of one patient may stand on both sides"
        assert unknown in project.told_by_train().lower()
        assert unknown in project.told_by_heads().lower()
        stored = stored_versions(project.services, "7").as_dict()
        assert stored["versions"][0]["heads"][0]["metrics"]["patients"]["unknown"] == 36
        (head,) = ProjectLearning(project.services)(7)["heads"]
        assert head["patients"].startswith(unknown) and head["score"] > 0.9
        said = suggestion_json(project.head(), np.zeros(768, dtype=np.float32))
        assert any(unknown in note.lower() for note in said["notes"])
        config = project.studio.project["label_config"].replace("</View>", '<TextArea name="t" toName="image"/></View>')
        key = project.services.key(project.services.resolver.resolve(str(project.files[0])))
        data = {"image": str(project.files[0]), "slide": str(project.files[0])}
        prediction = Answers(project.services).prediction(key, data, config, project=7)
        assert prediction is not None
        (text,) = (r["value"]["text"][0] for r in prediction["result"] if r["type"] == "textarea")
        assert unknown in text.lower() and "Suggested for 'diagnosis'" in text


def test_slides_without_a_patient_among_others_are_counted_and_said(project: PatientProject) -> None:
    add_patients(project, name=lambda patient: f"P-{patient}" if patient < 8 else (None, "", 7, ["x"])[patient - 8])
    told = project.told_by_train()
    # Eight names and the number 7; no field, an empty one, and a list, which is no name, for three slides each.
    assert "Slides of 9 patients" in told
    assert "9 of 36 slides have no patient, each counts as one of its own" in told
    assert ISSUE_WORDS["patient_unclear"] in told and "its field 'patient' holds ['x']" in told


def test_too_few_patients_are_not_measured_and_it_says_how_many_are_needed(project: PatientProject) -> None:
    add_patients(project, name=lambda patient: f"P-{patient}", patients=4, each=8)
    project.train()
    assert project.head().metrics["measured"] is False
    assert "slides of at least three patients each" in project.head().metrics["reason"]
    assert "at least three patients each" in project.told_by_heads()


def test_changing_who_the_patient_is_trains_again_and_nothing_else_does(project: PatientProject) -> None:
    add_patients(project, name=lambda patient: f"P-{patient}", patients=6)
    first = project.train().version
    assert project.train().version == first
    for task, data in project.studio.tasks.items():
        data["patient"] = f" p-{(task - 101) // 3}"  # the same, written otherwise
    assert project.train().version == first
    project.studio.tasks[101]["patient"] = "P-5"
    assert project.train().version != first


# --- whose slide it is, by its file ---------------------------------------------------------------------------------


def dicom_of(patient: str) -> bytes:
    """The head of a DICOM file (PS3.10, 7.1) in explicit VR little endian, with a Patient ID."""

    def element(group: int, number: int, vr: bytes, value: bytes) -> bytes:
        value += b" " * (len(value) % 2)
        return struct.pack("<HH2sH", group, number, vr, len(value)) + value

    syntax = element(0x0002, 0x0010, b"UI", b"1.2.840.10008.1.2.1\0")
    meta = element(0x0002, 0x0000, b"UL", struct.pack("<I", len(syntax))) + syntax
    return bytes(128) + b"DICM" + meta + element(0x0010, 0x0020, b"LO", patient.encode())


def exported_patients(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return [row["patient"] for row in csv.DictReader(file)]


def test_the_file_says_whose_slide_it_is_only_where_a_setting_asks_and_nobody_reads_the_name_elsewhere(
    settings: Callable[..., Settings],
    embedded_redis: EmbeddedRedis,
    redis: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    x, y, whose = patients_of_slides(1, 12)

    def slides(project: PatientProject) -> None:
        for row, patient in enumerate(whose):
            dicom = patient < 6
            name = f"{row}/slide.dcm" if dicom else f"TCGA-A1-{patient:04}-01Z-00-DX{row}.svs"
            task = project.add(np.pad(x[row], (0, 704)), name, dicom_of(f"Doe^{patient}") if dicom else b"")
            project.studio.annotate(task, diagnosis=CLASSES[y[patient]])
        project.train()

    with patient_project(settings, embedded_redis, tmp_path / "asked", patient_from=("dicom", "tcga")) as project:
        slides(project)
        assert project.head().metrics["patients"] == {"slides": 36, "unknown": 0, "patients": 12}
        out = tmp_path / "asked.csv"
        export_project(project.services, "7", out)
        column = exported_patients(out)
        assert len(set(column)) == 12 and "" not in column and column[0] == column[1] == column[2]
        kept = everything_kept(project.services.settings.model_dir) | {"export": out.read_bytes()}
        assert [name for name, contents in kept.items() if b"Doe" in contents] == []
    with patient_project(settings, embedded_redis, tmp_path / "not") as project:
        slides(project)
        assert project.head().metrics["patients"]["patients"] == 0
    assert "Doe" not in caplog.text


def test_the_tasks_own_field_is_exported_as_it_is(project: PatientProject, tmp_path: Path) -> None:
    add_patients(project, name=lambda patient: f"Case {patient}" if patient else None, patients=2, each=2)
    export_project(project.services, "7", tmp_path / "out.csv")
    assert exported_patients(tmp_path / "out.csv") == ["", "", "Case 1", "Case 1"]


# --- one slide in two tasks -----------------------------------------------------------------------------------------


def test_a_slide_in_two_tasks_counts_once_and_is_not_measured_by_itself(project: PatientProject) -> None:
    rng = np.random.default_rng(2)
    labels = rng.permutation(30) % 2
    for i in range(30):
        task = project.add(rng.normal(size=768))
        for shown in (task, project.again(i)):
            project.studio.annotate(shown, diagnosis=CLASSES[labels[i]])
    report = project.train()
    assert list(report.issues) == []
    (head,) = report.heads
    assert head["n_labels"] == 30
    value, low, _ = head["metrics"]["balanced_accuracy"]
    assert low < 0.5 and value < 0.75


def test_annotators_of_both_tasks_vote_on_one_slide_and_contradictions_are_said(project: PatientProject) -> None:
    tasks = [project.add(np.eye(768)[i]) for i in range(6)]
    for i, task in enumerate(tasks):
        project.studio.annotate(task, 1, diagnosis=CLASSES[i % 2])
    twin = [project.again(i) for i in range(3)]
    project.studio.annotate(twin[0], 2, diagnosis=CLASSES[1])  # against the first annotator: a tie
    project.studio.annotate(twin[1], 1, diagnosis=CLASSES[0])  # against what they said themselves before
    project.studio.annotate(twin[2], 1, quality=3)  # another question: nothing is lost
    issues = project.train().issues
    said = {(issue["code"], issue["task_id"]): issue["detail"] for issue in issues}
    assert set(said) == {("tie", tasks[0]), ("contradiction", tasks[1])}
    assert all(
        f"tasks {task}, {other} show one slide" in text
        for (_, task), text in said.items()
        for other in twin
        if other - 106 == task - 100
    )
    snapshot = project.services.versions.snapshot(7)
    assert snapshot is not None
    label = [snapshot.labels[snapshot.row_of_task[task]] for task in (tasks[1], twin[1], tasks[2], twin[2])]
    assert label == [{"diagnosis": CLASSES[0]}] * 2 + [{"diagnosis": CLASSES[0], "quality": 3.0}] * 2
    assert all(
        "priority" not in project.studio.tasks[task] or not project.studio.tasks[task]["priority"] for task in twin
    )


def test_a_copy_of_a_slide_under_another_name_is_never_on_the_other_side(project: PatientProject) -> None:
    rng = np.random.default_rng(4)
    labels = rng.permutation(30) % 2
    for label, embedding in zip(labels, rng.normal(size=(30, 768)), strict=True):
        for _ in range(2):
            project.studio.annotate(project.add(embedding), diagnosis=CLASSES[label])
    project.train()
    assert project.head().metrics["balanced_accuracy"][0] < 0.75


# --- prevalence -----------------------------------------------------------------------------------------------------


def test_at_five_percent_confidence_in_a_tumour_is_how_often_it_is_one() -> None:
    sure, right, inside, honest = [], [], 0, []
    for seed in range(10):
        x, y = archive(seed, 400)
        head = fit_choice_head("d", ("Normal", "Tumour"), x, [("Normal", "Tumour")[k] for k in y], fingerprint=PRINT)
        assert isinstance(head, Head)
        others, truth = archive(seed + 1000, 4000)
        output = predict(head, others)
        said = np.array([value == "Tumour" for value in output.values])
        sure += output.confidence[said].tolist()
        right += truth[said].tolist()
        low, high = head.metrics["per_class"]["Tumour"]["precision"][1:]
        inside += low <= truth[said].mean() <= high
        assert output.probabilities is not None
        honest.append(output.probabilities[:, 1].mean())
    assert np.mean(sure) == pytest.approx(np.mean(right), abs=0.05)
    assert np.mean(sure) < 0.2, "not 0.69"
    assert np.mean(right) > 0.05, "a rare class is suggested all the same"
    assert np.mean(honest) == pytest.approx(0.05, abs=0.02)
    assert inside >= 7, "the interval of the precision holds, with slack for the luck of ten draws"


def test_a_suggestion_of_which_few_are_right_says_so_with_the_prevalence() -> None:
    x, y = archive(3, 600)
    labels = [("Normal", "Tumour")[k] for k in y]
    head = fit_choice_head("d", ("Normal", "Tumour"), x, labels, fingerprint=PRINT)
    assert isinstance(head, Head)
    tumour, normal = (suggestion_words(vars(head), said)[0] for said in ("Tumour", "Normal"))
    assert tumour.startswith("Few are right at this prevalence:")
    assert f"a prevalence of {100 * y.mean():.0f} % (as among the labelled)" in tumour
    assert "Few" not in normal and "of those called 'Normal' are right" in normal
    figures = {found.name: found for found in class_figures(vars(head))}
    assert figures["Tumour"].assumed == figures["Tumour"].labelled == pytest.approx(y.mean())
    assert figures["Tumour"].recall is not None and figures["Tumour"].recall[0] > 0.4


def test_stated_frequencies_decide_the_confidence_and_training_follows_them(project: PatientProject) -> None:
    rng = np.random.default_rng(0)
    for i in range(40):
        embedding = 0.3 * rng.normal(size=768)
        embedding[0] += i % 2
        project.studio.annotate(project.add(embedding), diagnosis=CLASSES[i % 2], seen=["Folds"] if i % 2 else [])
    first = project.train().version
    probe = 0.3 * rng.normal(size=(5, 768))
    alike = probabilities(project.head(), probe)
    project.state(Tumour=0.05, Folds=0.2)
    second = project.train().version
    assert second != first and project.train().version == second
    assert project.head().prior_stated == ("Tumour",)
    p = probabilities(project.head(), probe)
    odds = (p[:, 0] / p[:, 1]) / (alike[:, 0] / alike[:, 1])
    np.testing.assert_allclose(odds, 0.05 / 0.95, rtol=1e-6)
    assert predict(project.head(), probe).values == tuple(CLASSES[k] for k in alike.argmax(axis=1))
    folds = project.head("seen")
    index = folds.classes.index("Folds")
    assert folds.prior is not None and folds.prior[index] == 0.2
    told = project.told_by_heads()
    assert "5 % (as the project states)" in told and "20 % (as the project states)" in told
    assert "50 %" in told, "among the labelled"


@pytest.mark.parametrize("stated", ['"0"', '"1"', '"5 %"', '"nan"', '"0.6" other="0.7"'])
def test_frequencies_that_cannot_be_leave_the_control_unused_and_say_why(stated: str) -> None:
    first, _, second = stated.partition(" other=")
    more = f" model_prior={second}" if second else ""
    xml = f"""<View><Image name="image" value="$image"/><Choices name="diagnosis" toName="image">
      <Choice value="Tumour" model_prior={first}/><Choice value="No tumour"{more}/></Choices>"""
    (unused,) = parse_config(f'{xml}<Rating name="quality" toName="image"/></View>').unused
    assert unused.name == "diagnosis" and "model_prior" in unused.reason
    with pytest.raises(LabelConfigUnsupported, match="model_prior"):
        parse_config(f"{xml}</View>")


def test_label_studio_takes_a_config_with_stated_frequencies() -> None:
    label_config = pytest.importorskip("label_studio_sdk._extensions.label_studio_tools.core.label_config")
    xml = """<View><Image name="image" value="$image"/><Choices name="diagnosis" toName="image">
      <Choice value="Tumour" model_prior="0.05"/><Choice value="No tumour"/></Choices></View>"""
    assert label_config.parse_config(xml)["diagnosis"]["labels"] == ["Tumour", "No tumour"]
    assert parse_config(xml).controls[0].priors == (("Tumour", 0.05),)


# --- beside it ------------------------------------------------------------------------------------------------------


def test_a_like_slide_of_the_same_patient_is_marked(project: PatientProject) -> None:
    add_patients(project, name=lambda patient: f"P-{patient}", patients=4)
    project.train()
    snapshot = project.services.versions.snapshot(7)
    assert snapshot is not None
    near = snapshot.neighbours(snapshot.keys[0], snapshot.embeddings[0], k=4)
    assert [neighbour.same_patient for neighbour in near] == [True, True, False, False]


def test_heads_of_an_earlier_release_are_read_and_weigh_the_classes_alike(tmp_path: Path) -> None:
    x, y = archive(1, 200, apart=3)
    head = fit_choice_head("d", ("Normal", "Tumour"), x, [("Normal", "Tumour")[k] for k in y], fingerprint=PRINT)
    assert isinstance(head, Head)
    registry = HeadRegistry(tmp_path)
    registry.add(1, [head], model_version="wsc-ffffff")
    file = tmp_path / "1" / "h0001" / "heads.json"
    stored = json.loads(file.read_text())
    for name in ("prior", "prior_stated"):
        del stored["heads"][0][name]
    for entry in stored["heads"][0]["metrics"]["per_class"].values():
        del entry["prevalence"], entry["groups"]
    file.write_text(json.dumps(stored))
    found = registry.current(1)
    assert found is not None
    old = found.heads["d"]
    np.testing.assert_array_equal(probabilities(old, x), probabilities(head, x, alike=True))
    assert class_figures(vars(old)) == []
    assert any("atients unknown" in line for line in suggestion_words(vars(old), "Tumour"))


def test_learning_curves_of_ones_own_slides_hold_whole_patients_out(tmp_path: Path) -> None:
    x, y, whose = patients_of_slides(0)
    np.savez(tmp_path / "own.npz", embeddings=x, labels=y[whose], patients=np.array([f"P-{p}" for p in whose]))
    known = from_file(tmp_path / "own.npz")(3)
    assert not set(whose[known.held_out]) & set(whose[~known.held_out])
    assert 0.2 < known.held_out.mean() < 0.5


def test_drawn_regions_are_judged_by_patient(project: PatientProject) -> None:
    project.studio.project["label_config"] = project.studio.project["label_config"].replace(
        "</View>",
        '<RectangleLabels name="drawn" toName="image"><Label value="A"/><Label value="B"/></RectangleLabels></View>',
    )
    rng = np.random.default_rng(0)
    for patient in range(6):
        look = rng.normal(size=768)
        for _ in range(2):
            bag = synthetic_result((2400, 2400), seed=patient)
            latents = (look + 0.2 * rng.normal(size=(len(bag.bag), 768))).astype(np.float16)
            made = type(bag)(bag.bag, latents, bag.attention_logits, bag.slide_embedding, bag.provenance)
            task = project.add(rng.normal(size=768), bag=made, patient=f"P-{patient}")
            value = {"x": 0, "y": 0, "width": 100, "height": 100, "rotation": 0, "rectanglelabels": ["AB"[patient % 2]]}
            project.studio.annotate(task)
            project.studio.annotations[task][0]["result"] = [
                {
                    "from_name": "drawn",
                    "to_name": "image",
                    "type": "rectanglelabels",
                    "origin": "manual",
                    "value": value,
                }
            ]
    project.train()
    head = project.head("drawn")
    assert head.metrics["patients"] == {"slides": 12, "unknown": 0, "patients": 6}
    assert head.metrics["balanced_accuracy"][0] < 0.75
