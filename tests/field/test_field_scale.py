"""Scale: what files state of it in all the places where programs write it, and a user who knows better."""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import field_slides as slides
import numpy as np
import pytest
import tifffile
from field_slides import Maker, Picture
from typer.testing import CliRunner
from web_client import predict_body, served, store_result, task

from backend.cli import app
from backend.commands.doctor import examine
from backend.commands.import_slides import import_slides
from backend.errors import MppUnknown, SlideUnreadable
from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.labeling_config import load_template
from backend.learning.project_owner import Owner
from backend.results.bag import Bag
from backend.settings import Settings
from backend.slides.reader import open_slide
from backend.slides.tiling import make_bag, slide_mpp

Case = Callable[[Maker], Path]
GREY = np.full((600, 600, 3), 180, np.uint8)


def bag_of(path: Path, settings: Settings, mpp: float | None = None, *, force: bool = False) -> Bag:
    with open_slide(path, settings) as slide:
        return make_bag(slide, settings, task_mpp=mpp, mpp_override=force)


def same_tiles(first: Bag, second: Bag) -> bool:
    return np.array_equal(first.grid, second.grid) and np.array_equal(first.coords, second.coords)


def test_ome_xml_and_its_levels_in_sub_ifds_are_read(case: Case, anywhere: Settings) -> None:
    path = case(slides.subifd)
    with open_slide(path, anywhere) as slide:
        assert slide.mpp == pytest.approx(0.499)
        assert slide.level_downsamples == (1, 2, 4)
        assert slide.notes == ()
        level = np.asarray(tifffile.imread(path, series=0, level=2))
        half = slide.read_region(400, 800, 4 * 224, 224)
        assert np.array_equal(half, level[200:424, 100:324])  # exactly the file's own pixels of its third level
        assert np.array_equal(slide.read_region(333, 444, 224, 224), tifffile.imread(path, key=0)[444:668, 333:557])
    assert same_tiles(bag_of(path, anywhere), bag_of(case(slides.plain), anywhere, 0.499, force=True))


def test_a_picture_of_a_slide_with_sub_ifds_does_not_decode_the_whole_slide(tmp_path: Path, anywhere: Settings) -> None:
    """Level 0 has no readable tile but the middle one: whoever makes the overview out of it finds damage."""
    path = tmp_path / "big.ome.tif"
    scale = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        kind = {"tile": (256, 256), "compression": "zlib", "photometric": "rgb"}
        tiff.write(GREY.repeat(4, 0).repeat(4, 1), subifds=1, metadata={"axes": "YXS"} | scale, **kind)
        tiff.write(GREY, subfiletype=1, **kind)
    with tifffile.TiffFile(path) as tiff:
        offsets = list(tiff.pages[0].dataoffsets)
    data = bytearray(path.read_bytes())
    for number, offset in enumerate(offsets):
        if number not in (0, len(offsets) // 2):
            data[offset : offset + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    with open_slide(path, anywhere) as slide:
        assert (slide.overview(600) == 180).all()


def ome(x: str, y: str | None = None, unit: str | None = None, head: str = "") -> str:
    units = "" if unit is None else f' PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"'
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>{head}<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        f'<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="600" SizeY="600" '
        f'SizeC="3" SizeZ="1" SizeT="1" PhysicalSizeX="{x}" PhysicalSizeY="{y or x}"{units}>'
        f'<Channel ID="Channel:0:0" SamplesPerPixel="3"/></Pixels></Image></OME>'
    )


def tiff(
    path: Path, text: str | None, per_unit: float | None = None, unit: str | int = "NONE", *, tiled: bool = True
) -> Path:
    kind: dict[str, Any] = {"tile": (256, 256)} if tiled else {"rowsperstrip": 64}
    resolution = {"resolution": (per_unit, per_unit), "resolutionunit": unit} if per_unit else {}
    description = text.encode() if text else None
    tifffile.imwrite(path, GREY, photometric="rgb", metadata=None, description=description, **kind, **resolution)
    return path


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "strips"])
@pytest.mark.parametrize(
    ("text", "mpp"),
    [
        (ome("0.25"), 0.25),
        (ome("250", unit="nm"), 0.25),
        (ome("0.00025", unit="mm"), 0.25),
        (ome("0.25", unit="µm"), 0.25),
        (ome("0.25", unit="\u03bcm"), 0.25),  # the Greek letter
        ("Aperio Image Library v11\r\n600x600|AppMag = 20|MPP = 0.2500|Left = 1", 0.25),
        ("Aperio Image Library v11\r\n600x600|AppMag = 20|MPP = 0,2500", 0.25),  # as a German Windows writes it
        ("Written by another program|MPP=0.25", 0.25),
    ],
)
def test_texts_state_the_scale(tmp_path: Path, anywhere: Settings, text: str, mpp: float, tiled: bool) -> None:
    with open_slide(tiff(tmp_path / "slide.tif", text, tiled=tiled), anywhere) as slide:
        assert slide.mpp == pytest.approx(mpp)


@pytest.mark.parametrize("unit", ["micron", "\\u00B5m", "um"])
def test_imagej_states_pixels_per_its_own_unit(tmp_path: Path, anywhere: Settings, unit: str) -> None:
    with open_slide(tiff(tmp_path / "slide.tif", f"ImageJ=1.54f\nunit={unit}\n", 4.0), anywhere) as slide:
        assert slide.mpp == pytest.approx(0.25)


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "strips"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no scale"),
        (ome("0.25", unit="pixel"), "no scale"),
        (ome("quarter"), "PhysicalSizeX = 'quarter' in the OME-XML"),
        (ome("0.25", unit="cubit"), "'cubit'"),
        ("Aperio|MPP = unknown", "MPP = 'unknown' in the Aperio text"),
        (ome("1000"), "1000 x 1000 µm per pixel, which is not believed"),
        (ome("0.25")[:-30] + "</OME>", "not well formed"),
        (ome("&mpp;", head='<!DOCTYPE OME [<!ENTITY a "0.25"><!ENTITY mpp "&a;">]>'), "has a document type"),
    ],
)
def test_no_scale_is_said_only_where_it_is_so(
    tmp_path: Path, anywhere: Settings, text: str | None, words: str, tiled: bool
) -> None:
    with (
        open_slide(tiff(tmp_path / "slide.tif", text, 1.0, tiled=tiled), anywhere) as slide,
        pytest.raises(MppUnknown) as error,
    ):
        slide_mpp(slide, anywhere, task_mpp=None)
    assert words in error.value.message
    assert (words == "no scale") == ("no scale" in error.value.message)


def test_the_ome_xml_holds_against_the_tags_and_that_is_said(tmp_path: Path, anywhere: Settings) -> None:
    differing = tiff(tmp_path / "differing.tif", ome("0.25"), 10_000 / 0.5, "CENTIMETER")
    with open_slide(differing, anywhere) as slide:
        assert slide.mpp == pytest.approx(0.25)
        (note,) = slide.notes
        assert "0.25 x 0.25" in note and "0.5 x 0.5" in note
    for name, per_unit, unit in (("same", 10_000 / 0.2501, "CENTIMETER"), ("screen", 72, "INCH")):
        with open_slide(tiff(tmp_path / f"{name}.tif", ome("0.25"), per_unit, unit), anywhere) as slide:
            assert (slide.mpp, slide.notes) == (pytest.approx(0.25), ())
    broken = tiff(tmp_path / "broken.tif", ome("0"), 10_000 / 0.5, "CENTIMETER")
    with open_slide(broken, anywhere) as slide:
        assert slide.mpp == pytest.approx(0.5)
        assert "not believed" in slide.notes[0]


def test_aperio_text_without_tags_is_read(case: Case, anywhere: Settings) -> None:
    bag = bag_of(case(slides.aperio_strips), anywhere)
    assert bag.mpp == pytest.approx(0.497)
    assert bag.mpp_source == "slide"
    assert same_tiles(bag, bag_of(case(slides.plain), anywhere, 0.497, force=True))


def test_dicom_that_contradicts_itself_is_said(test_data: Path, tmp_path: Path, anywhere: Settings) -> None:
    for path in (test_data / "slides" / "cmu1-dicom").glob("*.dcm"):
        data = bytearray(path.read_bytes())
        at = data.find(b"\x48\0\x01\0FL\4\0")
        if at > 0:
            (width,) = struct.unpack_from("<f", data, at + 8)
            struct.pack_into("<f", data, at + 8, 10 * width)
        (tmp_path / path.name).write_bytes(data)
    with open_slide(tmp_path / "03.dcm", anywhere) as slide:
        assert slide.mpp == pytest.approx(0.499)
        assert any("imaged volume" in note and "4.99 x 0.499" in note for note in slide.notes)


def test_a_scale_that_is_wrong_by_ten_can_be_forced(case: Case, anywhere: Settings) -> None:
    path = case(slides.scale_by_ten)
    forced = bag_of(path, anywhere, 0.5, force=True)
    assert (forced.mpp, forced.mpp_source) == (0.5, "forced")
    assert same_tiles(forced, bag_of(case(slides.plain), anywhere, 0.5, force=True))
    assert len(forced) > 10 * len(bag_of(path, anywhere))
    (note,) = forced.notes
    assert "0.5 µm" in note and "0.05 x 0.05" in note


def test_a_given_scale_that_is_not_used_is_said(case: Case, anywhere: Settings) -> None:
    path = case(slides.plain)
    (note,) = bag_of(path, anywhere, 0.25).notes
    assert "0.25 µm" in note and "0.499 x 0.499" in note and "--force" in note and "mpp_override" in note
    assert bag_of(path, anywhere, 0.4999).notes == ()  # the same, rounded
    unlikely = bag_of(
        slides.write_tiff(path.with_name("unlikely.tif"), [tifffile.imread(path)], mpp=1000), anywhere, 0.499
    )
    assert "1000 x 1000" in unlikely.notes[0]


def test_pixels_that_are_said_to_be_oblong_are_taken_for_square_by_force_alone(
    picture: Picture, tmp_path: Path, anywhere: Settings
) -> None:
    path = tmp_path / "oblong.tif"
    resolution = {"resolution": (1e4 / 0.5, 1e4 / 0.25), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, picture, tile=(256, 256), photometric="rgb", compression="zlib", **resolution)
    for given in (None, 0.5):
        with pytest.raises(SlideUnreadable, match=r"not square: 0\.5 x 0\.25.*--force"):
            bag_of(path, anywhere, given)
    bag = bag_of(path, anywhere, 0.5, force=True)
    assert bag.mpp == 0.5 and "0.5 x 0.25" in bag.notes[0]


def test_doctor_says_that_a_scale_was_forced_or_not_used(case: Case, anywhere: Settings) -> None:
    path = case(slides.scale_by_ten)

    def told(force: bool) -> str:
        return "\n".join(f.text for f in examine(anywhere, [path], 0.5, force=force) if f.subject == path.name)

    assert "0.5000 µm/px (forced by --mpp)" in told(True) and "states 0.05 x 0.05" in told(True)
    assert "0.0500 µm/px (from the slide)" in told(False) and "0.5 µm per pixel is not used" in told(False)


def test_predict_takes_force_and_tells_it(
    picture: Picture, stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    y, x = np.unravel_index(np.argmin(picture[:-480:16, :-480:16].sum(axis=2)), picture[:-480:16, :-480:16].shape[:2])
    small = picture[16 * y : 16 * y + 480, 16 * x : 16 * x + 480]
    path = slides.write_tiff(tmp_path / "small.tif", [small], mpp=0.05)
    for name, value in {"MODEL": stand_in, "MODEL_DIR": tmp_path / "md", "MMM_LICENSE_ACCEPTED": "i accept"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("backend.cli.console.width", 200)
    done = CliRunner().invoke(app, ["predict", str(path), "-o", str(tmp_path / "out"), "--mpp", "0.5", "--force"])
    assert done.exit_code == 0, done.output
    assert "0.5000 (forced)" in done.output
    assert "small.tif: The scale was forced to 0.5 µm per pixel; the slide states 0.05 x 0.05" in done.output
    refused = CliRunner().invoke(app, ["predict", str(path), "-o", str(tmp_path / "out"), "--force"])
    assert refused.exit_code == 2 and "--mpp" in refused.output


def test_a_task_forces_its_scale_however_a_table_spells_it(
    case: Case, stand_in: Path, embedded_redis: EmbeddedRedis, tmp_path: Path
) -> None:
    with served(tmp_path, embedded_redis, stand_in) as (client, services):
        path = tmp_path / "slides" / "slide.tif"
        path.write_bytes(case(slides.scale_by_ten).read_bytes())

        numbers = count(1)

        def ask(**data: Any) -> Any:
            return client.post("/predict", json=predict_body(task(next(numbers), image=str(path), **data)))

        store_result(services, path, mpp=0.5)  # not forced: another bag
        assert ask(mpp=0.5).json()["results"][0]
        ref = services.resolver.resolve(str(path), mpp=0.5, mpp_override=True)
        unforced = services.store.get(services.key(services.resolver.resolve(str(path), mpp=0.5)))
        assert unforced is not None
        services.store.put(services.key(ref), unforced)
        for yes in (True, "true", "True", 1, "1", 1.0, "yes"):
            assert ask(mpp="0.5", mpp_override=yes).json()["results"][0], yes
        for no in (False, "false", 0, "0", "", None):
            assert ask(mpp="0.5", mpp_override=no).json()["results"][0], no
        for wrong in ({"mpp": 0.5, "mpp_override": "perhaps"}, {"mpp": "", "mpp_override": True}):
            answer = ask(**wrong)
            assert answer.status_code == 422 and "mpp_override" in answer.text


class Studio:
    """What an import asks Label Studio for, kept."""

    url = "http://studio"

    def __init__(self) -> None:
        self.tasks: list[dict[str, Any]] = []

    def find_project(self, _: str) -> Any:
        return type("Project", (), {"id": 7, "label_config": load_template("triage")})

    def task_field_values(self, _: int, field: str) -> set[str]:
        return {task[field] for task in self.tasks}

    def import_tasks(self, _: int, tasks: list[dict[str, Any]]) -> None:
        self.tasks += tasks

    def owner(self, _: int) -> Owner:
        return Owner(1, "", "Slides")

    def connect_backend(self, *_: Any) -> None: ...
    def secure_webhook(self, *_: Any) -> None: ...
    def close(self) -> None: ...


def test_import_writes_a_forced_scale_into_tasks_and_says_what_it_does_not_do(
    case: Case, stand_in: Path, embedded_redis: EmbeddedRedis, tmp_path: Path
) -> None:
    with served(tmp_path, embedded_redis, stand_in) as (client, services):
        first, second = (tmp_path / "slides" / name for name in ("first.tif", "second.tif"))
        for path in (first, second):
            path.write_bytes(case(slides.scale_by_ten).read_bytes())
        studio, said = Studio(), list[str]()
        services.__dict__["client"] = studio  # a real Label Studio is in tests/e2e

        def bring(*paths: Path, **options: Any) -> list[str]:
            said.clear()
            import_slides(services, paths, project="7", retrieve=False, say=said.append, **options)
            return list(said)

        assert any("0.5 µm" in line and "0.05 x 0.05" in line for line in bring(first, mpp=0.5))
        assert "mpp" not in studio.tasks[0]
        assert any("forced to 0.5" in line for line in bring(second, mpp=0.5, force=True))
        imported = studio.tasks[1]
        assert (imported["mpp"], imported["mpp_override"]) == (0.5, True)
        # The panel of that task looks for the bag that /predict makes of it, at that scale.
        facts = client.get(f"/panel/slide?{imported['panel'].split('?')[1]}").json()
        assert (facts["mpp"], facts["mpp_source"]) == (0.5, "forced")
        again = bring(first, second, mpp=0.25, force=True)
        assert any("2 slides were tasks already" in line and "0.25" in line for line in again)
        assert len(studio.tasks) == 2
