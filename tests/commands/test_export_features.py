"""`export-features` of what is stored: a project's slides, or all of the model in use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
from conftest import SLIDES, Project
from synthetic_bags import synthetic_result


def test_a_projects_slides_are_written_by_the_names_of_their_files(project: Project, tmp_path: Path) -> None:
    late = project.services.settings.slide_roots[0] / "late.svs"
    late.write_bytes(b"late")
    project.studio.add_task(image=str(late))
    out = tmp_path / "job"
    done = project.command("export-features", "--project", "Lymph nodes", "-o", str(out), "--layout", "trident")
    assert done.returncode == 0, done.stderr
    assert f"{SLIDES} slides" in done.stdout and "1 tasks without a result" in done.stderr
    found = {path.stem: path for path in out.glob("20x_*/slide_features_*/*.h5")}
    assert sorted(found) == [f"slide-{i:02}" for i in range(SLIDES)]
    for i, task in enumerate(project.tasks):
        with h5py.File(found[f"slide-{i:02}"]) as h5:
            np.testing.assert_array_equal(h5["features"], project.embeddings[task])


def test_everything_that_is_stored_is_of_the_model_in_use(project: Project, tmp_path: Path) -> None:
    store, fingerprint = project.services.store, project.services.model.fingerprint
    for i, slide in enumerate(("mine.svs", "other.svs")):
        result = synthetic_result((2000, 1500), seed=50 + i)
        said = {**result.provenance, "slide": slide, "fingerprint": "e" * 40 if i else fingerprint}
        store.put(f"{i}" * 40, replace(result, provenance=said))
    done = project.command("export-features", "--all", "-o", str(tmp_path / "clam"), "--layout", "clam")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "clam").glob("features_*/pt_files/*")] == ["mine.pt"]
    assert done.stderr.count("of another model") == SLIDES + 1


def test_where_results_are_is_said_once(project: Project, tmp_path: Path) -> None:
    for where in ([], ["--all", "--project", "7"], [str(tmp_path), "--all"]):
        done = project.command("export-features", *where, "-o", str(tmp_path / "x"), "--layout", "clam")
        assert done.returncode == 2 and "--project" in done.stderr and not (tmp_path / "x").exists()
