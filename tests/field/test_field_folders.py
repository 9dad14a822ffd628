"""Folders as they occur in the field, and what `predict` makes of them: one entry a slide, nothing replaced, nothing
done twice, nothing stopped.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import field_slides
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import backend.commands.predict as predict_module
from backend.cli import app
from backend.commands.doctor import examine
from backend.commands.predict import Outcome, predict_files
from backend.errors import OutputUnusable, SlideNotFound, SlideUnreadable
from backend.inference.engine import Engine, load_engine
from backend.inference.key import bag_key
from backend.results.hdf5 import read_end, read_hdf5, write_hdf5
from backend.results.store import ResultStore
from backend.settings import Settings
from backend.slides.discover import Found, Why, find_slides
from backend.slides.images import image_size, load_image, read_patch
from backend.slides.reader import open_slide
from backend.slides.source import SourceResolver, file_identity
from backend.slides.tiling import make_bag

Make = Callable[..., Settings]


@pytest.fixture(scope="session")
def dicom(test_data: Path) -> Path:
    """A DICOM slide: five levels, label, overview and thumbnail."""
    return test_data / "slides" / "cmu1-dicom"


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, picture: field_slides.Picture) -> Path:
    """Tissue of a few tiles, so that an encoder on a CPU is done with it at once."""
    folder = tmp_path_factory.mktemp("small")
    return field_slides.write_tiff(folder / "small.tif", field_slides.levels(picture[1000:1600, 600:1200], 1, 2))


@pytest.fixture(scope="session")
def engine(stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    from backend.settings import load_settings

    return load_engine(load_settings(model=str(stand_in), model_dir=tmp_path_factory.mktemp("engine")), "cpu")


@pytest.fixture
def ours(settings: Make, stand_in: Path) -> Settings:
    return settings(model=str(stand_in))


def put(slide: Path, *places: Path) -> list[Path]:
    """Copies of a slide; what they show differs by one pixel each, so that results cannot be mistaken for each other's."""
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(slide, place)
        with place.open("ab") as file:
            file.write(str(place).encode())
    return list(places)


def names(found: Found) -> list[str]:
    return [path.name for path in found.slides]


def passed(found: Found, why: Why) -> list[str]:
    return [entry.path.name for entry in found.passed_over if entry.why is why]


# --- DICOM ----------------------------------------------------------------------------------------------------------


def test_two_dicom_slides_in_a_folder_are_two(dicom: Path, tmp_path: Path, anywhere: Settings) -> None:
    """wsidicom#91"""
    found = find_slides(field_slides.dicom_two_slides(dicom, tmp_path))
    assert [name[0] for name in names(found)] == ["A", "B"] and not found.passed_over
    for path in found.slides:
        with open_slide(path, anywhere) as slide:
            assert len(make_bag(slide, anywhere, task_mpp=None)) >= 51


def test_annotations_in_a_dicom_folder_are_no_slide(dicom: Path, tmp_path: Path, anywhere: Settings) -> None:
    """wsidicomizer#106"""
    found = find_slides(field_slides.dicom_with_annotation(dicom, tmp_path))
    assert len(found.slides) == 1
    assert (
        found.summary == "Passed over: 1 DICOM file that shows no slide (Microscopy Bulk Simple Annotations)."
    )  # and no more: the other files are the slide's
    with open_slide(found.slides[0], anywhere) as slide:
        assert slide.size == (2220, 2967)


def test_dicom_is_known_whatever_its_files_are_called(dicom: Path, tmp_path: Path, anywhere: Settings) -> None:
    """Archives export `IM000001` or bare UIDs, and the label may come first (openslide#478)."""
    kinds = {"04.dcm": "a_label", "07.dcm": "b_overview", "03.dcm": "2.25.77"}
    for path in dicom.iterdir():
        shutil.copy(path, tmp_path / kinds.get(path.name, f"IM0{path.stem}"))
    found = find_slides([tmp_path])
    assert names(found) == ["2.25.77"]
    assert find_slides(sorted(tmp_path.iterdir())).slides == found.slides  # as a shell gives them
    with open_slide(found.slides[0], anywhere) as slide:
        assert slide.size == (2220, 2967)


def test_a_label_without_its_slide_is_passed_over_and_said(dicom: Path, tmp_path: Path) -> None:
    for folder, name in (("slide", "03.dcm"), ("pictures", "04.dcm"), ("pictures", "07.dcm")):
        (tmp_path / folder).mkdir(exist_ok=True)
        shutil.copy(dicom / name, tmp_path / folder / name)
    found = find_slides(tmp_path)
    assert names(found) == ["03.dcm"]
    assert "1 DICOM series without the slide itself (label and overview)" in found.summary
    with pytest.raises(SlideNotFound, match="label and overview"):
        find_slides(tmp_path / "pictures")


def test_a_copy_of_a_dicom_slide_is_the_same_slide(dicom: Path, tmp_path: Path) -> None:
    for folder in ("a", "backup"):
        shutil.copytree(dicom, tmp_path / folder)
    found = find_slides(tmp_path)
    assert [path.parent.name for path in found.slides] == ["a"]
    assert "1 copy of a DICOM slide" in found.summary


def test_another_slide_in_its_folder_does_not_change_a_dicom_slide(dicom: Path, tmp_path: Path, settings: Make) -> None:
    """Its result would be computed again whenever the archive adds a slide."""
    folder = field_slides.dicom_two_slides(dicom, tmp_path)
    resolver = SourceResolver(settings(slide_roots=(tmp_path,)))
    first, second = find_slides(folder).slides
    before = [resolver.resolve(str(slide)).identity for slide in (first, second)]
    os.utime(folder / "B_01.dcm", (1, 1))
    shutil.copy(dicom.parent / "ezwsi_camelyon_multiframe.dcm", folder / "C.dcm")
    after = [resolver.resolve(str(slide)).identity for slide in (first, second)]
    assert before[0] == after[0] and before[1] != after[1]


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["slide", "slide.btf", "slide.tf8", "slide.qptiff", "slide.ome.tif", "scan 2024.01.05", "slide.SVS_old"]
)
def test_a_slide_of_any_name_is_found(small: Path, tmp_path: Path, name: str, anywhere: Settings) -> None:
    """tiffslide#60, bioformats' .btf and .tf8, PerkinElmer's .qptiff; a name with dots has no ending at all."""
    shutil.copy(small, tmp_path / name)
    found = find_slides(tmp_path)
    assert names(found) == [name] and not found.passed_over
    with open_slide(found.slides[0], anywhere) as slide:
        assert slide.size == (600, 600)


def test_a_damaged_slide_is_found_by_its_ending_so_that_it_is_named(tmp_path: Path, small: Path) -> None:
    """An LFS pointer, an interrupted copy: nobody should think that all is well."""
    (tmp_path / "pointer.svs").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "empty.ndpi").touch()
    shutil.copy(small, tmp_path / "whole.tif")
    assert names(find_slides(tmp_path)) == ["empty.ndpi", "pointer.svs", "whole.tif"]


def test_what_accompanies_slides_is_passed_over_and_said(small: Path, tmp_path: Path) -> None:
    put(small, tmp_path / "a.tif", tmp_path / "b.tiff", tmp_path / "train" / "c.tiff")
    for name in (
        "a_thumbnail.jpg",
        "a.jpg",
        "b.tissue.png",
        "label.png",
        "masks/a.png",
        "c_tissue_mask.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (600, 400), "pink").save(tmp_path / name)
    shutil.copy(small, tmp_path / "c_mask.tiff")
    (tmp_path / "a.tissue.geojson").write_text("{}")
    for name in ("a.xml", "b.xml", "a.geojson", "features.h5", ".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"<?xml?>")
    found = find_slides(tmp_path)
    assert names(found) == ["a.tif", "b.tiff", "c.tiff"]
    assert found.summary == (
        "Passed over: 5 files of no slide format (.xml 2, .db 1, .geojson 1, .h5 1), 6 pictures that accompany slides "
        "(a.jpg, a_thumbnail.jpg, c_mask.tiff, c_tissue_mask.png, …), 2 masks of tissue (a.tissue.geojson, b.tissue.png)."
    )


def test_pictures_that_accompany_nothing_are_slides(tmp_path: Path) -> None:
    """A folder of photographs is analysed as such, also where their names hold one of those words."""
    expected = ["a_overview.jpg", "b.png", "case 3.jpeg", "tissue.png"]
    for name in expected:
        Image.new("RGB", (600, 400), "pink").save(tmp_path / name)
    found = find_slides(tmp_path)
    assert names(found) == expected and not found.passed_over


def test_the_pictures_of_a_vms_belong_to_it(tmp_path: Path) -> None:
    """openslide's Hamamatsu-1.zip: an index, its pictures, a map and an optimisation file."""
    parts = {
        "ImageFile": "s-0-0.jpg",
        "ImageFile(1,0)": "s-1-0.jpg",
        "MapFile": "s_map2.jpg",
        "MacroImage": "s_macro.jpg",
    }
    lines = ["[Virtual Microscope Specimen]", "NoLayers=1", "OptimisationFile=s.opt"]
    (tmp_path / "s.vms").write_text("\n".join([*lines, *(f"{entry}={name}" for entry, name in parts.items())]))
    for name in (*parts.values(), "photo.jpg"):
        Image.new("RGB", (300, 300), "pink").save(tmp_path / name)
    (tmp_path / "s.opt").write_bytes(b"optimisation")
    assert names(find_slides(tmp_path)) == ["photo.jpg", "s.vms"]
    before = file_identity(tmp_path / "s.vms")
    (tmp_path / "photo.jpg").unlink()
    assert file_identity(tmp_path / "s.vms") == before
    (tmp_path / "s-1-0.jpg").unlink()
    assert file_identity(tmp_path / "s.vms") != before


def test_the_data_of_an_mrxs_belong_to_it_wherever_it_lies(tmp_path: Path) -> None:
    """openslide#154: the folder without its .mrxs cannot be opened, and each file in it is none."""
    for name in ("whole", "lone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "Slidedat.ini").write_text("[GENERAL]")
        for number in range(3):
            Image.new("RGB", (300, 300), "pink").save(tmp_path / name / f"Data000{number}.dat", "JPEG")
    Image.new("RGB", (90, 90), "pink").save(tmp_path / "whole.mrxs", "JPEG")
    found = find_slides(tmp_path)
    assert names(found) == ["whole.mrxs"]
    assert found.summary == "Passed over: 1 data folder without its .mrxs (lone)."
    assert names(find_slides(tmp_path / "whole")) == ["whole.mrxs"]  # the folder itself was given
    with pytest.raises(SlideNotFound, match=r"without its \.mrxs \(lone\)"):
        find_slides(tmp_path / "lone")


# --- links ----------------------------------------------------------------------------------------------------------


def test_a_slide_under_several_names_is_one(tmp_path: Path, picture: field_slides.Picture, small: Path) -> None:
    """qupath#1110, and a link to its own parent in which a search never ended."""
    folder = field_slides.linked(picture, tmp_path)
    os.link(folder / "slide.tif", folder / "zweitname.tif")
    (folder / "gone.svs").symlink_to("nowhere.svs")
    found = find_slides(folder)
    assert names(found) == ["slide.tif"]
    assert found.summary == (
        "Passed over: 2 second names of slides (alias.tif of slide.tif, zweitname.tif of slide.tif), "
        "1 link to a folder that is searched anyway (up), 1 broken link (gone.svs)."
    )
    assert names(find_slides([folder / "alias.tif", folder / "slide.tif"])) == ["slide.tif"]
    assert names(find_slides([folder / "alias.tif"])) == ["alias.tif"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "dataset").symlink_to(folder)  # links to other places are followed
    (elsewhere / "up").symlink_to(tmp_path)  # and those above what was asked for are not
    put(small, tmp_path / "not asked for.tif")
    assert names(find_slides(elsewhere)) == ["slide.tif"]


def test_a_missing_slide_among_others_is_refused_alone(small: Path, tmp_path: Path) -> None:
    assert names(find_slides([str(small), str(tmp_path / "typo.svs")])) == ["small.tif", "typo.svs"]
    with pytest.raises(SlideNotFound, match=r"typo\.svs"):
        find_slides([tmp_path / "typo.svs"])
    (tmp_path / "notes").write_text("hello")
    assert names(find_slides(tmp_path / "notes")) == ["notes"]  # named by hand: opening it says what it is not


@contextmanager
def without_rights(*paths: Path) -> Iterator[None]:
    """Take the rights to read away, and those of the superuser with them."""
    user = os.geteuid()
    for path in paths:
        path.chmod(0)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(0)
        for path in paths:
            path.chmod(0o700)


def test_what_may_not_be_read_is_said_and_not_called_damaged(small: Path, anywhere: Settings) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o755)
        put(small, folder / "open.tif", folder / "closed.tif", folder / "drawer" / "inside.tif")
        with without_rights(folder / "closed.tif", folder / "drawer"):
            found = find_slides(folder)
            assert names(found) == ["closed.tif", "open.tif"]
            assert "1 path that may not be read (drawer: Permission denied)" in found.summary
            for path in (folder / "closed.tif", folder / "drawer" / "inside.tif"):
                with pytest.raises(SlideUnreadable, match=r"cannot be read: Permission denied") as refused:
                    open_slide(path, anywhere)
                assert "damaged" not in str(refused.value)


# --- predict --------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def folders(outcomes: list[Outcome]) -> list[str]:
    assert all(outcome.error is None for outcome in outcomes), outcomes
    return [outcome.folder.name for outcome in outcomes if outcome.folder is not None]


def no_model() -> Engine:
    raise AssertionError("the model was loaded")


def test_slides_of_one_name_keep_their_results_apart(
    small: Path, tmp_path: Path, engine: Engine, ours: Settings
) -> None:
    """CLAM#113: the second of two `1.svs` replaced the first, unless both were in one call."""
    a, b, c = put(small, *(tmp_path / patient / "1.tif" for patient in ("anna", "bert", "carl")))
    out = tmp_path / "out"
    assert folders(predict_files([a], out, ours, engine)) == ["1"]
    before = contents(out)
    (of_b,) = folders(predict_files([b], out, ours, engine))
    assert of_b.startswith("1-")
    assert folders(predict_files([c, b, a], out, ours, no_model_for(engine, c)))[1:] == [of_b, "1"]
    assert {name: data for name, data in contents(out).items() if name.startswith("1/")} == before
    # In a folder of their own, in another order, and one after the other: the suffix is the slide's.
    together = folders(predict_files([b, a], tmp_path / "together", ours, engine))
    assert together[0] == of_b and together[1].startswith("1-")
    assert folders(predict_files([a], tmp_path / "together", ours, no_model)) == [together[1]]


def no_model_for(engine: Engine, slide: Path) -> Callable[[], Engine]:
    """A model that is loaded once at most: for ``slide``, the only one that is new."""
    calls: list[Path] = []

    def load() -> Engine:
        calls.append(slide)
        assert len(calls) == 1
        return engine

    return load


def test_results_that_others_put_there_are_left_alone(
    small: Path, tmp_path: Path, engine: Engine, ours: Settings
) -> None:
    """A result of an earlier release does not say of which slide it is; a file has the slide's name."""
    (slide,) = put(small, tmp_path / "in" / "s.tif")
    out = tmp_path / "out"
    (done,) = predict_files([slide], out, ours, engine)
    assert done.folder is not None
    result = read_hdf5(done.folder / "result.h5")
    older = {name: value for name, value in result.provenance.items() if name not in ("slide_id", "bag_key")}
    write_hdf5(type(result)(**{**vars(result), "provenance": older}), done.folder / "result.h5")
    before = contents(out / "s")
    (again,) = predict_files([slide], out, ours, engine)
    assert again.folder is not None and again.folder.name.startswith("s-")
    assert contents(out / "s") == before
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "s").write_text("a file")
    assert folders(predict_files([slide], plain, ours, engine)) == [again.folder.name]


def test_two_calls_at_a_time_do_not_replace_each_others_results(
    small: Path, tmp_path: Path, engine: Engine, ours: Settings
) -> None:
    """Jobs of a cluster, one for each patient, into one folder: both find the name free."""
    a, b = put(small, tmp_path / "anna" / "1.tif", tmp_path / "bert" / "1.tif")
    out = tmp_path / "out"
    other: list[Outcome] = []

    def meanwhile(stage: str, done: int, total: int) -> None:
        if stage == "encode" and not other:
            other.extend(predict_files([b], out, ours, engine))

    (first,) = predict_files([a], out, ours, engine, progress=meanwhile)
    assert sorted(len(name) for name in folders([first, *other])) == [1, 10]
    for outcome, slide in ((first, a), (other[0], b)):
        assert outcome.folder is not None
        (there,) = predict_files([slide], out, ours, no_model)
        assert (there.folder, there.origin) == (outcome.folder, "folder")


def test_what_is_there_is_not_analysed_again_and_what_is_missing_is_completed(
    small: Path, tmp_path: Path, engine: Engine, ours: Settings
) -> None:
    (slide,) = put(small, tmp_path / "s.tif")
    out = tmp_path / "out"
    (first,) = predict_files([slide], out, ours, engine)
    whole = contents(out / "s")
    assert sorted(whole) == ["heatmap.png", "regions.json", "result.h5", "tiles.geojson", "tissue.png"]
    for name in ("tissue.png", "tiles.geojson"):  # as a call leaves it that was killed
        (out / "s" / name).unlink()
    (second,) = predict_files([str(slide)], str(out), ours, no_model)
    assert (first.origin, second.origin) == ("analysed", "folder")
    assert contents(out / "s") == whole
    # Other settings are another analysis, a changed slide is another; both take the place of the slide's own.
    (third,) = predict_files([slide], out, ours.model_copy(update={"tissue_min_fraction": 0.5}), engine)
    assert (third.origin, third.folder) == ("analysed", out / "s")
    (asked,) = predict_files([slide], out, ours, no_model, again=True)
    assert "the model was loaded" in str(asked.error)
    os.utime(slide, (1, 1))
    (fourth,) = predict_files([slide], out, ours, engine)
    assert (fourth.origin, fourth.folder) == ("analysed", out / "s")


def test_what_the_store_has_is_taken_from_there(
    small: Path, tmp_path: Path, engine: Engine, settings: Make, stand_in: Path
) -> None:
    """Slides that Label Studio's workers have analysed."""
    (slide,) = put(small, tmp_path / "slides" / "s.tif")
    ours = settings(model=str(stand_in), slide_roots=(tmp_path / "slides",))
    (first,) = predict_files([slide], tmp_path / "first", ours, engine)
    assert first.folder is not None
    key = bag_key(SourceResolver(ours).resolve(slide), engine.identity, ours)
    ResultStore(ours.results_location).put(key, read_hdf5(first.folder / "result.h5"))
    (second,) = predict_files(
        [slide], tmp_path / "second", ours, no_model, mpp=0.3
    )  # not used: the slide states its own
    assert second.origin == "store" and second.folder is not None
    assert np.array_equal(
        read_end(first.folder / "result.h5").embedding, read_end(second.folder / "result.h5").embedding
    )


def test_results_inside_the_folder_of_slides_are_no_slides(
    small: Path, tmp_path: Path, engine: Engine, ours: Settings
) -> None:
    put(small, tmp_path / "a.tif", tmp_path / "b.tif")
    slides = find_slides(tmp_path).slides
    predict_files(slides, tmp_path / "results", ours, engine)
    found = find_slides(tmp_path)
    assert found.slides == slides
    assert passed(found, Why.RESULT) == ["heatmap.png", "tissue.png", "heatmap.png", "tissue.png"]


def test_one_bad_slide_stops_nothing(
    small: Path, tmp_path: Path, engine: Engine, ours: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, cut, odd, gone = put(small, *(tmp_path / f"{name}.tif" for name in ("good", "cut", "odd", "gone")))
    cut.write_bytes(cut.read_bytes()[:5000])
    Image.new("RGB", (800, 800), "pink").save(no_scale := tmp_path / "no scale.png")
    analyse = predict_module.analyse_file

    def of_a_library(path: Path, *args: object, **kwargs: object) -> object:
        if path.name == "odd.tif":
            raise ZeroDivisionError("in a codec")
        return analyse(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(predict_module, "analyse_file", of_a_library)
    order: list[str] = []

    def on_slide(_: int, slide: Path) -> None:
        order.append(slide.name)
        gone.unlink(missing_ok=True)

    outcomes = predict_files(
        [cut, gone, odd, no_scale, tmp_path / "typo.svs", good],
        tmp_path / "out",
        ours,
        engine,
        on_slide=on_slide,
        on_error=lambda outcome: order.append(f"{outcome.slide.name}: {type(outcome.error).__name__}"),
    )
    # What opening shows is said before anything is analysed.
    assert order == [
        "cut.tif: SlideUnreadable",
        "no scale.png: MppUnknown",
        "typo.svs: SlideNotFound",
        "gone.tif",
        "gone.tif: SlideNotFound",
        "odd.tif",
        "odd.tif: UnexpectedFailure",
        "good.tif",
    ]
    assert [outcome.error is None for outcome in outcomes] == [False] * 5 + [True]
    assert "ZeroDivisionError: in a codec" in str(outcomes[2].error)


@pytest.mark.parametrize("place", ["file", "file/results", "slides/s.tif"])
def test_a_bad_place_for_results_is_said_before_the_work(
    small: Path, tmp_path: Path, ours: Settings, place: str
) -> None:
    (tmp_path / "file").write_text("")
    put(small, tmp_path / "slides" / "s.tif")
    with pytest.raises(OutputUnusable, match="is no folder") as refused:
        predict_files([tmp_path / "slides" / "s.tif"], tmp_path / place, ours, no_model)
    assert "--out" in refused.value.hint


def test_a_place_that_takes_no_more_is_said_before_the_work(small: Path, tmp_path: Path, ours: Settings) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OutputUnusable, match="File too large"):
            predict_files([small], tmp_path / "out", ours, no_model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_name_as_long_as_names_can_be_is_analysed(
    small: Path, tmp_path: Path, engine: Engine, ours: Settings
) -> None:
    """It leaves no room for the ending of a mask."""
    slide = tmp_path / f"{'l' * 251}.tif"
    shutil.copy(small, slide)
    [outcome] = predict_files([slide], tmp_path / "out", ours, engine)
    assert outcome.error is None and outcome.folder is not None


def test_a_mask_that_is_no_use_is_said_before_the_work(small: Path, tmp_path: Path, ours: Settings) -> None:
    put(small, tmp_path / "a.tif", tmp_path / "b.tif")
    (tmp_path / "a.tissue.geojson").write_text("{}")
    (tmp_path / "b.tissue.png").mkdir()
    slides = [tmp_path / "a.tif", tmp_path / "b.tif"]
    a, b = predict_files(slides, tmp_path / "out", ours, no_model)
    assert "holds no polygon" in str(a.error)
    assert "b.tissue.png' is a folder. It must be one file." in str(b.error)


def test_a_result_that_is_replaced_by_one_of_another_scale_is_said(
    small: Path, tmp_path: Path, engine: Engine, ours: Settings
) -> None:
    def predict(**options: float | bool) -> tuple[str, ...]:
        [outcome] = predict_files([small], tmp_path / "out", ours, engine, **options)  # type: ignore[arg-type]
        return outcome.notes

    assert not any("replaced" in note for note in predict())
    assert not any("replaced" in note for note in predict(again=True))
    assert any("An earlier result was replaced" in note for note in predict(mpp=0.4, force=True))


def test_doctor_looks_into_folders(small: Path, tmp_path: Path, ours: Settings) -> None:
    put(small, tmp_path / "slides" / "a.tif", tmp_path / "slides" / "deep" / "b.tif")
    (tmp_path / "slides" / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    findings = list(examine(ours, [tmp_path / "slides", tmp_path / "empty"]))
    said = [(finding.verdict, finding.subject, finding.text) for finding in findings]
    at = said.index(("ok", "slides", "2 slides in this folder. Passed over: 1 file of no slide format (.txt 1)."))
    assert [subject for _, subject, _ in said[at + 1 :]] == ["a.tif", "b.tif", "empty"]
    assert said[-1][0] == "problem" and "No slide was found" in said[-1][2]


def test_doctor_doubts_cuda_devices_that_are_not_there(ours: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    asked = ours.model_copy(update={"devices": "cpu,cuda:0,cuda:7"})
    said = [finding.text for finding in examine(asked, []) if finding.subject == "devices"]
    assert said[1] == "cuda:7 may not be there: CUDA_VISIBLE_DEVICES='0'. Correct DEVICES, or set it to auto"


# --- the command ----------------------------------------------------------------------------------------------------


def test_predict_says_what_it_passed_over_and_names_its_own_options(
    small: Path, tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "[old]"
    put(small, folder / "[b]s[red].tif", folder / "[/b]" / "[b]s[red].tif")
    Image.new("RGB", (800, 800), "pink").save(folder / "photo.png")
    Image.new("RGB", (100, 100), "pink").save(folder / "stamp.png")
    (folder / "notes.txt").write_text("")
    for name, value in {"MODEL": stand_in, "MODEL_DIR": tmp_path, "COLUMNS": 400, "TERM": "dumb"}.items():
        monkeypatch.setenv(name, str(value))
    arguments = ["predict", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1, done.output  # two of four failed
    assert "Passed over: 1 file of no slide format (.txt 1)." in done.output
    rows = [line for line in done.output.splitlines() if line.startswith("│")]
    assert sum(str(folder) in row and "[b]s[red].tif" in row and "[b]s[red]-" in row for row in rows) == 2, done.output
    assert "--mpp" in next(row for row in rows if "photo.png" in row)
    assert "task" not in done.output
    again = CliRunner().invoke(app, arguments)
    assert again.output.count("was there already") == 2


def test_the_licence_is_asked_for_first(tmp_path: Path) -> None:
    """Before seconds of imports, before slides and folders are looked at, and before a model is downloaded."""
    environment = {**os.environ, "MMM_LICENSE_ACCEPTED": "", "MODEL_DIR": str(tmp_path), "MODEL": "wsc-mtl-tiny"}
    code = "import sys; from backend.cli import main; sys.argv[1:] = {0}\n"
    code += "try: main()\nfinally: print('h5py' in sys.modules)"
    for arguments in (["predict", "a.svs", "--out", str(tmp_path / "file")], ["serve", "--port", "0"]):
        done = subprocess.run(
            [sys.executable, "-c", code.format(arguments)], capture_output=True, text=True, env=environment, timeout=120
        )
        assert done.returncode == 2 and "LicenceNotAccepted" in done.stderr, done.stderr
        assert arguments[0] != "predict" or done.stdout.strip() == "False"
    assert not (tmp_path / "file").exists()


# --- paths as text --------------------------------------------------------------------------------------------------


def test_a_path_may_be_text(small: Path, tmp_path: Path, engine: Engine, ours: Settings) -> None:
    from backend.inference.blocks import NativeBlocks
    from backend.inference.pipeline import analyse_file, analyse_patches

    slide = str(small)
    with open_slide(slide, ours) as opened:
        assert opened.size == load_image(slide, ours).rgb.size == image_size(slide, ours)
    assert read_patch(slide, 224, ours)[1] == (600, 600)
    assert find_slides(slide).slides == find_slides([slide]).slides == [small]
    assert file_identity(slide) == file_identity(small)
    result = analyse_file(slide, ours, engine, lambda *_: None)
    assert len(analyse_patches([slide], ours, engine, lambda *_: None).bag) == 1
    write_hdf5(result, str(tmp_path / "result.h5"))
    assert len(read_hdf5(str(tmp_path / "result.h5")).bag) == len(result.bag)
    ResultStore(tmp_path / "store").put("0" * 40, result)
    assert ResultStore(str(tmp_path / "store")).has("0" * 40)
    assert NativeBlocks(ours.model, "cpu").embedding_dim == 768


_PUBLIC = [
    "commands.doctor",
    "commands.export",
    "commands.import_slides",
    "commands.predict",
    "inference.blocks",
    "inference.checkpoint",
    "inference.pipeline",
    "inference.standin",
    "results.export",
    "results.hdf5",
    "results.slide_table",
    "results.store",
    "slides.discover",
    "slides.images",
    "slides.reader",
    "slides.source",
    "slides.synthetic",
    "slides.tiles",
]


@pytest.mark.parametrize("name", _PUBLIC)
def test_no_public_function_insists_on_a_path_object(name: str) -> None:
    module = importlib.import_module(f"backend.{name}")
    functions = {
        thing.__qualname__: thing.__init__ if inspect.isclass(thing) else thing  # type: ignore[misc]
        for name, thing in vars(module).items()
        if not name.startswith("_") and callable(thing) and getattr(thing, "__module__", "") == module.__name__
        # What only holds data is made by functions, not by people.
        if not hasattr(thing, "__dataclass_fields__")
    }
    assert functions
    for function in functions.values():
        taken = {k: v for k, v in getattr(function, "__annotations__", {}).items() if k != "return"}
        assert not {k for k, v in taken.items() if re.search(r"(?<!Str)Path\b", str(v)) and "Callable" not in str(v)}
