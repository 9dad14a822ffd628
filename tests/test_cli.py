"""The command as a person types it: in a process of its own, with what it prints and the files it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from backend.slides.synthetic import SyntheticSlide


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m backend …`` in a wide terminal; an empty variable counts as unset."""
    env = {**os.environ, "COLUMNS": "200", **environment}
    return subprocess.run(
        [sys.executable, "-m", "backend", *arguments],
        capture_output=True,
        text=True,
        env={name: value for name, value in env.items() if value},
        timeout=300,
    )


def test_help_names_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    commands = "demo serve workers import predict doctor bench train heads export export-features simulate settings"
    for command in commands.split():
        assert f" {command} " in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [["predict", "a.svs", "--out", "x"], ["workers"], ["demo", "--dir", "DIR"], ["bench"]],
    ids=lambda arguments: arguments[0],
)
def test_without_the_licence_one_message_says_what_to_read_and_set(arguments: list[str], tmp_path: Path) -> None:
    done = run(*[a.replace("DIR", str(tmp_path)) for a in arguments], MMM_LICENSE_ACCEPTED="", MODEL_DIR=str(tmp_path))
    assert done.returncode == 2, done.stderr
    said = done.stderr + "".join(log.read_text() for log in tmp_path.glob("demo.log"))
    assert "LicenceNotAccepted" in said
    assert "license.md" in said
    assert 'MMM_LICENSE_ACCEPTED="i accept"' in said
    assert "Traceback" not in said


def test_predict_writes_heatmap_regions_geojson_and_hdf5(
    synthetic_slide: SyntheticSlide, stand_in: Path, tmp_path: Path
) -> None:
    absent_scale = tmp_path / "photo.png"
    Image.new("RGB", (500, 500), (220, 150, 180)).save(absent_scale)
    out = tmp_path / "out"
    done = run(
        "predict",
        str(synthetic_slide.path),
        str(absent_scale),
        "--out",
        str(out),
        "--layout",
        "clam",
        MODEL=str(stand_in),
        MODEL_DIR=str(tmp_path),
    )
    assert done.returncode == 1, done.stderr  # one of the two failed, and is named; the other is there
    assert "DEFAULT_MPP" in done.stdout
    assert "stand-in model" in done.stdout
    folder = out / synthetic_slide.path.stem
    assert sorted(path.name for path in folder.iterdir()) == [
        "heatmap.png",
        "regions.json",
        "result.h5",
        "tiles.geojson",
        "tissue.png",
    ]
    with h5py.File(folder / "result.h5") as h5:
        tiles = len(h5["coords"])
    features = json.loads((folder / "tiles.geojson").read_text())["features"]
    assert len(features) == tiles > 0
    assert json.loads((folder / "regions.json").read_text())["model_version"].startswith("stand-in-")
    with Image.open(folder / "heatmap.png") as picture:
        assert max(picture.size) >= 2000
    (features,) = (out / "clam").glob("features_*/h5_files/*.h5")
    with h5py.File(features) as h5, h5py.File(folder / "result.h5") as result:
        assert features.stem == synthetic_slide.path.stem and h5["features"].dtype == np.float32
        assert np.array_equal(h5["features"], np.float32(result["features"]))


def test_doctor_says_what_is_there_and_what_is_missing(synthetic_slide: SyntheticSlide, tmp_path: Path) -> None:
    done = run("doctor", str(synthetic_slide.path), str(tmp_path / "absent.svs"), MODEL_DIR=str(tmp_path))
    assert done.returncode == 1  # a slide is absent
    for words in (
        "torch ",
        "MMM_LICENSE_ACCEPTED",
        "stand-in model",
        "0.5000 µm/px (from the slide)",
        "absent.svs",
        "SLIDE_ROOTS",
    ):
        assert words in done.stdout, words


def test_doctor_opens_the_store_of_results(tmp_path: Path) -> None:
    done = run("doctor", MODEL_DIR=str(tmp_path), RESULTS_URL="gs://bucket/results")
    assert done.returncode == 1
    assert "RESULTS_URL" in done.stdout and "gcsfs" in done.stdout


def test_a_bad_setting_is_named(tmp_path: Path) -> None:
    done = run("doctor", TILE_PX="huge", MODEL_DIR=str(tmp_path))
    assert done.returncode == 2
    assert "TILE_PX" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_named(tmp_path: Path, stand_in: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run("serve", "--port", port, MODEL_DIR=str(tmp_path), MODEL=str(stand_in))
    assert done.returncode == 2
    assert port in done.stderr
    assert "PORT" in done.stderr


def test_simulate_draws_learning_curves(tmp_path: Path) -> None:
    done = run("simulate", "--quick", "--seeds", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "learning-curves.png") as picture:
        assert picture.width > 400
    assert json.loads((tmp_path / "learning-curves.json").read_text())


def test_what_a_person_has_named_with_brackets_is_printed_as_it_is(tmp_path: Path) -> None:
    done = run("bench", "--only", "[/b]", MODEL_DIR=str(tmp_path))
    assert done.returncode == 2 and "[/b]" in done.stderr and "Traceback" not in done.stderr
    assert "learning" in done.stderr, "all that there are are named"
