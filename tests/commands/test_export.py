"""`export`: files that other programs read back, with the embeddings as they are stored and the labels as they were given."""

from __future__ import annotations

import csv
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SLIDES, Project
from synthetic_bags import synthetic_result

from backend.commands.export import export_project
from backend.errors import ExportUnsupported, ExtraMissing, FileExists, ProjectNotFound, ResultNotFound
from backend.label_studio.trainer import train


def embeddings(project: Project) -> np.ndarray[Any, Any]:
    return np.stack([project.embeddings[task] for task in project.tasks])


@pytest.fixture
def taught(project: Project) -> Project:
    """Six slides labelled, two by several annotators; trained; then one more label, and a task without a result."""
    project.label(*range(6))
    for annotator in (2, 3):
        project.studio.annotate(project.tasks[0], annotator, diagnosis="No tumour" if annotator == 2 else "Tumour")
    for i in (0, 1, 2, 3):
        answers: dict[str, Any] = {"diagnosis": "No tumour" if i % 2 else "Tumour"}
        project.studio.annotate(project.tasks[i], seen=["Ink/pen"] if i < 2 else [], quality=i + 1, **answers)
    train(project.services, 7, lambda *_: None)
    project.label(6)
    late = project.services.settings.slide_roots[0] / "late.svs"
    late.write_bytes(b"late")
    project.studio.add_task(image=str(late))
    return project


def read_h5ad(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "anndata will no longer support zarr v2", DeprecationWarning)
        import anndata

    return anndata.read_h5ad(path)


def test_h5ad_holds_embeddings_labels_and_provenance(taught: Project, tmp_path: Path) -> None:
    done = taught.command("export", "Lymph nodes", "--format", "h5ad", "-o", str(tmp_path / "out" / "nodes.h5ad"))
    assert done.returncode == 0, done.stderr
    assert f"{SLIDES} slides written" in done.stdout and "1 tasks without a result" in done.stdout
    found = read_h5ad(tmp_path / "out" / "nodes.h5ad")
    assert found.X.dtype == np.float32
    np.testing.assert_array_equal(found.X, embeddings(taught))
    obs = found.obs
    assert obs["task"].tolist() == taught.tasks and found.obs_names.tolist() == [str(task) for task in taught.tasks]
    assert obs["slide"].tolist() == [f"slide-{i:02}.svs" for i in range(SLIDES)]
    slides = taught.services.settings.slide_roots[0]
    assert obs["location"].tolist() == [str(slides / f"slide-{i:02}.svs") for i in range(SLIDES)]
    assert obs["bag"].tolist() == [taught.keys[task] for task in taught.tasks]
    told = ["Tumour", "No tumour"] * 3 + ["Tumour"]
    assert obs["label.diagnosis"].tolist()[:7] == told and obs["label.diagnosis"].isna().tolist()[7:] == [True] * 5
    assert obs["annotators.diagnosis"].tolist()[:2] == [3, 1]
    assert obs["agreement.diagnosis"].tolist()[:2] == pytest.approx([2 / 3, 1])
    assert obs["label.seen.Ink_pen"].tolist()[:4] == [True, True, False, False]
    assert obs["label.seen.Ink_pen"].isna().tolist()[4:] == [True] * 8
    assert obs["label.quality"].tolist()[:4] == [1, 2, 3, 4] and np.isnan(obs["label.quality"].tolist()[4:]).all()
    assert obs["annotated"].tolist() == [True] * 7 + [False] * 5
    assert obs["suggestion.diagnosis"].tolist() == ["Tumour", "No tumour"] * 6
    p = obs[["probability.diagnosis.Tumour", "probability.diagnosis.No tumour"]].to_numpy()
    np.testing.assert_allclose(p.sum(axis=1), 1)
    np.testing.assert_array_equal(p.max(axis=1), obs["confidence.diagnosis"].to_numpy())
    every = obs[["confidence.diagnosis", "confidence.seen", "confidence.quality"]].to_numpy()
    np.testing.assert_array_equal(obs["confidence"].to_numpy(), every.min(axis=1))
    # As Label Studio has them since the training, in which the seventh had no label yet.
    data = [taught.studio.tasks[task] for task in taught.tasks]
    assert [
        None if np.isnan(n) else n for n in obs["priority"].astype("Float64").to_numpy(np.float64, na_value=np.nan)
    ] == [values.get("priority") for values in data]
    np.testing.assert_allclose(obs["novelty"], [values["novelty"] for values in data], atol=5e-4)
    assert found.uns["model_version"].endswith("-h1")
    assert set(obs["model_version"]) == {found.uns["model_version"]}
    assert found.uns["fingerprint"] == taught.services.model.fingerprint
    assert "Research use only" in found.uns["note"]
    assert not found.uns["stand_in"]


def test_parquet_holds_the_same_with_typed_columns(taught: Project, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    export_project(taught.services, "7", tmp_path / "nodes.parquet")
    found = parquet.read_table(tmp_path / "nodes.parquet")
    assert found.schema.field("embedding").type == pa.list_(pa.float32(), 768)
    np.testing.assert_array_equal(np.stack(found["embedding"].to_numpy()), embeddings(taught))
    assert found["task"].to_pylist() == taught.tasks
    assert found["label.diagnosis"].to_pylist() == ["Tumour", "No tumour"] * 3 + ["Tumour"] + [None] * 5
    assert found["label.seen.Folds"].to_pylist() == [False] * 4 + [None] * 8
    assert found["label.seen.Ink/pen"].to_pylist() == [True, True, False, False] + [None] * 8
    priority = found["priority"].to_pylist()
    assert priority[:6] == [None] * 6 and sorted(priority[6:]) == list(range(1, 7))
    assert found.schema.field("cluster").type == pa.int64() and None not in found["cluster"].to_pylist()
    about = {name.decode(): value.decode() for name, value in found.schema.metadata.items()}
    assert about["title"] == "Lymph nodes" and json.loads(about["project"]) == 7
    assert "Research use only" in about["note"]


def test_csv_needs_nothing_and_loses_no_digit(taught: Project, tmp_path: Path) -> None:
    export_project(taught.services, "7", tmp_path / "nodes.CSV")
    with (tmp_path / "nodes.CSV").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    read = np.array([[row[f"e{i}"] for i in range(768)] for row in rows], dtype=np.float32)
    np.testing.assert_array_equal(read, embeddings(taught))
    assert [int(row["task"]) for row in rows] == taught.tasks
    assert [row["label.diagnosis"] for row in rows] == ["Tumour", "No tumour"] * 3 + ["Tumour"] + [""] * 5
    assert [row["label.seen.Ink/pen"] for row in rows][:5] == ["true", "true", "false", "false", ""]
    assert [row["annotated"] for row in rows] == ["true"] * 7 + ["false"] * 5


def test_an_untaught_project_has_embeddings_and_no_more(project: Project, tmp_path: Path) -> None:
    said: list[str] = []
    done = export_project(project.services, "7", tmp_path / "nodes.h5ad", say=said.append)
    found = read_h5ad(tmp_path / "nodes.h5ad")
    np.testing.assert_array_equal(found.X, embeddings(project))
    assert "suggestion.diagnosis" not in done.columns
    assert found.obs["label.diagnosis"].isna().all() and found.obs["priority"].isna().all()
    assert said == [f"{SLIDES} slides have no rank: `wsc-backend train 7` ranks them"]


def test_slides_of_one_name_are_told_apart(project: Project, tmp_path: Path) -> None:
    twin = project.services.settings.slide_roots[0] / "again" / "slide-00.svs"
    twin.parent.mkdir()
    twin.write_bytes(b"another slide")
    task = project.studio.add_task(image=str(twin))
    services = project.services
    services.store.put(services.key(services.resolver.resolve(str(twin))), synthetic_result((2000, 1500), seed=99))
    export_project(services, "7", tmp_path / "nodes.csv")
    with (tmp_path / "nodes.csv").open(newline="", encoding="utf-8") as file:
        rows = {int(row["task"]): row for row in csv.DictReader(file)}
    first = rows[project.tasks[0]]
    assert first["slide"] == rows[task]["slide"] == "slide-00.svs"
    assert [first["location"], rows[task]["location"]] == [str(twin.parent.parent / "slide-00.svs"), str(twin)]


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_file_that_is_there_is_replaced_only_by_force(project: Project, tmp_path: Path) -> None:
    out = tmp_path / "nodes.csv"
    out.write_text("precious")
    done = project.command("export", "7", "-o", str(out))
    assert done.returncode == 2
    assert "FileExists" in done.stderr and "--force" in done.stderr and "Traceback" not in done.stderr
    assert out.read_text() == "precious"
    export_project(project.services, "7", out, overwrite=True)
    assert out.read_text().startswith("task,slide,bag,")
    with pytest.raises(FileExists, match="folder"):
        export_project(project.services, "7", tmp_path, kind="csv", overwrite=True)


def test_unknown_formats_and_projects_are_named(project: Project, tmp_path: Path) -> None:
    done = project.command("export", "7", "-o", str(tmp_path / "nodes.csv"), "--format", "xlsx")
    assert done.returncode == 2
    assert "'xlsx' is no format" in done.stderr and "h5ad, parquet, csv" in done.stderr
    for name in ("nodes", "nodes.xlsx"):
        with pytest.raises(ExportUnsupported, match="is no format"):
            export_project(project.services, "7", tmp_path / name)
    with pytest.raises(ProjectNotFound):
        export_project(project.services, "Kidneys", tmp_path / "nodes.csv")
    assert list(tmp_path.glob("nodes*")) == []


def test_a_project_without_results_leaves_no_file(project: Project, tmp_path: Path) -> None:
    for key in project.keys.values():
        (project.services.settings.model_dir / "results" / key[:2] / f"{key}.h5").unlink()
    with pytest.raises(ResultNotFound, match=f"{SLIDES} tasks"):
        export_project(project.services, "7", tmp_path / "new" / "nodes.csv")
    assert not (tmp_path / "new").exists()


def test_a_missing_package_is_named_before_anything_is_read(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    project.studio.down = True
    with pytest.raises(ExtraMissing, match="pyarrow") as caught:
        export_project(project.services, "7", tmp_path / "nodes.parquet")
    assert "wsc-label-studio-backend[export]" in caught.value.hint
    assert list(tmp_path.glob("*parquet*")) == []
