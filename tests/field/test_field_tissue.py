"""Tissue as users have it: stains, pens, glass and light of all kinds, and masks of their own."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from field_slides import (
    Maker,
    Picture,
    faded,
    faded_with_green_pen,
    giemsa,
    ihc,
    levels,
    offset,
    plain,
    tinted,
    tinted_empty,
    write_tiff,
)
from field_stains import PEN_ROWS, PENS, cases, found_and_false, stains, with_pen
from PIL import Image

from backend.commands.doctor import examine
from backend.commands.predict import predict_files
from backend.errors import BackendError, NoTissue, SourceRefused, TissueMaskInvalid
from backend.inference.blocks import NativeBlocks
from backend.inference.checkpoint import ModelIdentity, model_identity
from backend.inference.engine import Engine
from backend.inference.key import bag_key
from backend.label_studio.answers import slide_ref
from backend.label_studio.labeling_config import load_template, parse_config
from backend.label_studio.services import Services
from backend.label_studio.summary import summary_text
from backend.results.bag import Bag
from backend.results.hdf5 import read_hdf5, write_hdf5
from backend.settings import Settings
from backend.slides.discover import find_slides
from backend.slides.reader import open_slide
from backend.slides.source import SlideRef, SourceResolver
from backend.slides.tiling import make_bag
from backend.slides.tissue import find_tissue
from backend.slides.tissue_file import tissue_file_beside

Case = Callable[[Maker], Path]
Make = Callable[..., Settings]
GREEN = (20, 120, 60)


def bag_of(path: Path, settings: Settings) -> Bag:
    with open_slide(path, settings) as slide:
        return make_bag(slide, settings, task_mpp=None, tissue_file=tissue_file_beside(path))


def cells(bag: Bag) -> set[tuple[int, ...]]:
    return {tuple(cell) for cell in bag.grid.tolist()}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, picture: Picture) -> Callable[[], Path]:
    """The ordinary slide in a new folder, in which a mask can lie beside it."""
    source = plain(picture, tmp_path_factory.mktemp("plain"))

    def copy() -> Path:
        return Path(shutil.copy(source, tmp_path_factory.mktemp("own") / "slide.tif"))

    return copy


# --- what is found ------------------------------------------------------------------------------------------------


def test_a_pen_mark_changes_nothing_in_the_tissue_beside_it(case: Case, anywhere: Settings) -> None:
    without, with_mark = (bag_of(case(maker), anywhere) for maker in (faded, faded_with_green_pen))
    assert cells(without) == cells(with_mark)
    assert len(without) >= 53
    assert (with_mark.coords[:, 1] + with_mark.tile_size_level0 > 1000).all()


@pytest.mark.parametrize(
    "stain", ["H&E, a fifth of its density", "IHC: DAB, and negative stroma", "Giemsa", "Light green alone"]
)
def test_no_colour_of_pen_changes_which_tissue_is_found(picture: Picture, stain: str) -> None:
    seen = stains(picture)[stain]
    alone = find_tissue(with_pen(seen, None), 8.0, pen_rules=True).tissue[PEN_ROWS:]
    for name, colour in PENS.items():
        beside = find_tissue(with_pen(seen, colour), 8.0, pen_rules=True).tissue
        assert np.count_nonzero(beside[PEN_ROWS:] ^ alone) <= 0.005 * np.count_nonzero(alone), name
        if name != "purple":  # which is haematoxylin's hue
            assert not beside[: PEN_ROWS - 5].any(), name


def test_every_stain_is_found_and_glass_is_not_whatever_its_light(picture: Picture) -> None:
    for name, (overview, truth) in cases(picture).items():
        found, false = found_and_false(find_tissue(overview, 8.0, pen_rules=True).tissue, truth)
        assert not found < (0.75 if "silver" in name else 0.88), f"{name}: {found:.1%} found"
        if "purple pen beside" not in name:
            assert false < 0.002, f"{name}: {false:.1%} of glass taken for tissue"


def test_the_table_of_stains_is_what_the_code_finds(test_data: Path) -> None:
    rows = re.findall(
        r"^\| (.+?) \|.*\| ([\d.]*)(?: %)? \| ([\d.]+) % \|$", Path("docs/STAINS.md").read_text(), re.MULTILINE
    )
    real = np.asarray(tifffile.imread(test_data / "slides" / "CMU-1-Small-Region.svs", key=0))
    measured = cases(real)
    assert [name for name, *_ in rows] == list(measured)
    for name, found_said, false_said in rows:
        overview, truth = measured[name]
        found, false = found_and_false(find_tissue(overview, 8.0, pen_rules=True).tissue, truth)
        assert false == pytest.approx(float(false_said) / 100, abs=0.005), name
        if found_said:
            assert found == pytest.approx(float(found_said) / 100, abs=0.005), name


@pytest.mark.parametrize("maker", [giemsa, ihc, tinted])
def test_a_slide_in_another_stain_or_tint_has_the_tiles_of_the_plain_one(
    maker: Maker, case: Case, anywhere: Settings
) -> None:
    ordinary, other = (cells(bag_of(case(m), anywhere)) for m in (plain, maker))
    assert len(other) >= 51
    # At its borders the palest stain may lose some.
    assert len(ordinary ^ other) <= (2 if maker is not ihc else 8)


def test_empty_glass_is_empty_however_yellow(case: Case, anywhere: Settings) -> None:
    with pytest.raises(NoTissue, match=r"it covers 0\.0 % of the slide.*looks empty"):
        bag_of(case(tinted_empty), anywhere)


# --- what is said -------------------------------------------------------------------------------------------------


def test_what_was_taken_as_ink_is_said_wherever_people_look(
    case: Case, settings: Make, stand_in: Path, tmp_path: Path
) -> None:
    path = case(faded_with_green_pen)
    few = settings(tissue_min_fraction=0.999, model=str(stand_in))
    said = "what is not glass on the slide was taken as pen ink and left out"
    assert any(said in finding.text for finding in examine(few, [path]) if finding.subject == path.name)
    engine = Engine(NativeBlocks(stand_in, "cpu"), model_identity(few))
    (outcome,) = predict_files([path], tmp_path, few, engine)
    assert outcome.error is None and outcome.folder is not None
    result = read_hdf5(outcome.folder / "result.h5")
    assert said in summary_text(result, "v")
    assert said in str(result.provenance["notes"])
    pen = 400 * 1800 / (3967 * 2220)  # of the slide
    share = float(result.provenance["tissue_ink_share"])
    assert share == pytest.approx(pen / (pen + float(result.provenance["tissue_share"])), abs=0.02)
    drawn = np.asarray(Image.open(outcome.folder / "tissue.png").convert("RGB")).astype(int)
    ink = np.asarray(Image.open(outcome.folder / "heatmap.png").convert("RGB")).astype(int)
    y, x = round(500 * drawn.shape[1] / 2220), drawn.shape[1] // 2
    assert drawn[y, x, 0] - ink[y, x, 0] > 80, "the pen mark is painted over"
    kept = result.bag.tissue
    assert kept is not None
    assert kept.labels[round(500 / 3967 * len(kept.labels)), kept.labels.shape[1] // 2] == 2
    assert set(np.unique(kept.labels)) == {0, 1, 2}


def test_a_slide_that_is_all_pen_is_never_advised_to_analyse_the_pen(tmp_path: Path, anywhere: Settings) -> None:
    marked = np.full((1600, 2400, 3), 243, np.uint8)
    for top in (200, 700, 1200):
        marked[top : top + 250, 100:2300] = GREEN
    path = write_tiff(tmp_path / "pen.tif", levels(marked, 1, 4))
    with pytest.raises(NoTissue, match=r"taken as ink.*doctor --picture.*mask") as caught:
        bag_of(path, anywhere)
    assert "TISSUE_PEN_RULES" not in str(caught.value)
    findings = list(examine(anywhere, [path], pictures=tmp_path / "pictures"))
    assert findings[-1].text.endswith("pen.tif-tissue.png")
    shown = np.asarray(Image.open(tmp_path / "pictures" / "pen.tif-tissue.png").convert("RGB"))
    assert not np.array_equal(shown[300, 500], GREEN), "the ink is coloured in the picture"


def test_small_pieces_of_tissue_are_advised_a_lower_fraction(tmp_path: Path, anywhere: Settings) -> None:
    little = np.full((1200, 1200, 3), 243, np.uint8)
    little[369:529, 369:529] = (190, 120, 160)  # across four tiles
    with pytest.raises(NoTissue, match=r"TISSUE_MIN_FRACTION below 0\.\d"):
        bag_of(write_tiff(tmp_path / "little.tif", levels(little, 1, 4)), anywhere)


# --- masks of one's own -------------------------------------------------------------------------------------------


def qupath(*rings: list[list[float]], kind: str = "Polygon") -> str:
    """A collection as QuPath 0.5 exports it: one annotation of an outline and its holes."""
    coordinates = list(rings) if kind == "Polygon" else [[ring] for ring in rings]
    feature = {
        "type": "Feature",
        "id": "7d9ff1a8-7ad9-4b1a-8e4f-2d4a0b1c9e11",
        "geometry": {"type": kind, "coordinates": coordinates},
        "properties": {"objectType": "annotation", "classification": {"name": "Tumor", "color": [200, 0, 0]}},
    }
    return json.dumps({"type": "FeatureCollection", "features": [feature]})


def box(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def in_tiles(bag: Bag, *ring: list[float]) -> np.ndarray:
    """Whether the middle of each tile lies in a box."""
    (x0, y0), (x1, y1) = ring
    middle = bag.coords + bag.tile_size_level0 / 2
    return (middle > (x0, y0)).all(axis=1) & (middle < (x1, y1)).all(axis=1)


def test_annotations_out_of_qupath_beside_the_slide_are_its_tissue_with_their_holes(
    own: Callable[[], Path], settings: Make
) -> None:
    path, half = own(), settings(tissue_min_fraction=0.5)
    path.with_name("slide.tissue.geojson").write_text(qupath(box(0, 0, 2000, 2000), box(900, 900, 1800, 1800)))
    bag = bag_of(path, half)
    assert in_tiles(bag, [0, 0], [2000, 2000]).all()
    assert not in_tiles(bag, [1010, 1010], [1690, 1690]).any()
    assert {(0, 0), (8, 0), (1, 7)} <= cells(bag), "glass as well: it is used as it is"
    assert any("slide.tissue.geojson as it is" in note for note in bag.notes)
    assert bag.tissue is not None and bag.tissue.source == "slide.tissue.geojson"
    path.with_name("slide.tissue.geojson").write_text(
        qupath(box(0, 0, 500, 500), box(1500, 1500, 2000, 2000), kind="MultiPolygon")
    )
    assert cells(bag_of(path, half)) == {(0, 0), (1, 0), (0, 1), (1, 1), (7, 7), (8, 7), (7, 8), (8, 8)}


@pytest.mark.parametrize("scale", [1, 20, 160])
def test_a_png_beside_the_slide_is_its_tissue_at_any_scale(
    own: Callable[[], Path], anywhere: Settings, scale: int
) -> None:
    path = own()
    mask = Image.new("L", (round(2220 / scale), round(2967 / scale)))
    mask.paste(1, (0, 0, mask.width // 2, mask.height // 2))
    mask.save(path.with_name("slide.tif.tissue.png"))
    bag = bag_of(path, anywhere)
    assert in_tiles(bag, [0, 0], [2220 / 2 + 113, 2967 / 2 + 113]).all()
    assert 28 <= len(bag) <= 36  # 5 columns and 6.6 rows, to half a pixel of the mask
    assert find_slides([path.parent]).slides == [path], "the mask is no slide"


def test_qupath_counts_from_the_scanned_areas_corner(case: Case, anywhere: Settings, tmp_path: Path) -> None:
    path = Path(shutil.copy(case(offset), tmp_path / "slide.scn"))
    path.with_name("slide.tissue.geojson").write_text(qupath(box(0, 0, 500, 500)))
    bag = bag_of(path, anywhere)
    assert in_tiles(bag, [1200 - 113, 800 - 113], [1700 + 113, 1300 + 113]).all()
    assert any("(1200, 800), as QuPath" in note for note in bag.notes)
    plain_geometry = {"type": "Polygon", "coordinates": [box(0, 0, 500, 500)]}
    path.with_name("slide.tissue.geojson").write_text(json.dumps(plain_geometry))
    assert in_tiles(bag_of(path, anywhere), [0, 0], [613, 613]).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (qupath(box(8.1, 47.2, 8.3, 47.4)), "look like degrees"),
        (qupath(box(0, 0, 40_000, 30_000)), "far beyond the slide of 2220 x 2967.*another scale"),
        (qupath(box(-900, -900, -500, -500)), "far beyond the slide"),
        (json.dumps({"type": "FeatureCollection", "features": []}), "holds no polygon"),
        (json.dumps({"type": "Point", "coordinates": [1000, 1000]}), "holds no polygon"),
        (json.dumps({"type": "Polygon", "coordinates": [[[1, 2], [3]]]}), "holds a 'Polygon' that is none"),
        ('{"type": "FeatureCollection", "features": [', "neither a PNG nor GeoJSON"),
        ("[" * 100_000, "neither a PNG nor GeoJSON"),
        (Image.new("L", (100, 100), 1), "another shape than the slide's 2220 x 2967"),
        (Image.new("L", (111, 148)), "marks no pixel"),
        (Image.new("1", (8000, 10692)), "has 8000 x 10692 pixels, and 67 million are the most"),
        (
            json.dumps({"type": "Polygon", "coordinates": [[[10**400, 1], [2, 2], [3, 1]]]}),
            "holds a 'Polygon' that is none",
        ),
        (b"\x89PNG\r\n\x1a\n and no more", "cannot be decoded"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_a_mask_that_cannot_be_used_says_why(
    own: Callable[[], Path], anywhere: Settings, content: str | bytes | Image.Image, message: str
) -> None:
    path = own()
    mask = path.with_name("slide.tissue.geojson")
    if isinstance(content, Image.Image):
        content.save(mask, "PNG")  # what it is counts, not its name
    else:
        mask.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TissueMaskInvalid, match=message) as caught:
        bag_of(path, anywhere)
    assert caught.value.hint and "slide.tissue.geojson" in caught.value.message


def key_of(ref: SlideRef, settings: Settings) -> str:
    return bag_key(ref, ModelIdentity("wsc", "0" * 64, "1.6.3", "float32", stand_in=False), settings)


def test_a_mask_is_part_of_what_a_result_belongs_to(own: Callable[[], Path], settings: Make) -> None:
    path = own()
    here = settings(slide_roots=(path.parent,))
    resolver = SourceResolver(here)
    keys = [key_of(resolver.resolve(str(path)), here)]
    mask = path.with_name("slide.tissue.geojson")
    for content in (qupath(box(0, 0, 500, 500)), qupath(box(0, 0, 900, 900))):
        mask.write_text(content)
        ref = resolver.resolve(str(path))
        keys.append(key_of(ref, here))
        assert resolver.fetch_with_tissue(SlideRef.from_json(ref.to_json())) == ((path,), mask)
    assert len(set(keys)) == 3
    mask.write_text(qupath(box(0, 0, 1200, 900)))
    with pytest.raises(BackendError, match=r"slide\.tissue\.geojson' has changed"):
        resolver.fetch_with_tissue(ref)
    mask.unlink()
    assert key_of(resolver.resolve(str(path)), here) == keys[0]
    assert key_of(resolver.with_tissue_beside(ref), here) == keys[0]


def test_a_task_names_its_mask_by_the_rules_of_slides(own: Callable[[], Path], settings: Make, tmp_path: Path) -> None:
    path = own()
    services = Services(settings(slide_roots=(path.parent,)))
    config = parse_config(load_template("triage"))
    mask = path.parent / "drawn by A.geojson"
    mask.write_text(qupath(box(0, 0, 500, 500)))
    data = {"image": str(path), "slide": str(path)}
    assert slide_ref(services, config, {**data, "tissue": str(mask)}).tissue == str(mask)
    assert slide_ref(services, config, {**data, "tissue": "lung"}).tissue is None, "the field means something else here"
    by_studio = "/data/local-files/?d=drawn%20by%20A.geojson"
    assert slide_ref(services, config, {**data, "tissue": by_studio}).tissue == str(mask)
    masks = path.parent / "masks" / "slide.tissue.geojson"  # named as one beside the slide would be
    masks.parent.mkdir()
    shutil.copy(mask, masks)
    theirs = slide_ref(services, config, {**data, "tissue": str(masks)})
    assert services.resolver.with_tissue_beside(theirs) == theirs
    assert slide_ref(services, config, {**data, "tissue": "http://[see note"}).tissue is None
    outside = tmp_path / "secret.geojson"
    outside.write_text(qupath(box(0, 0, 500, 500)))
    (path.parent / "link.geojson").symlink_to(outside)
    for place in (str(outside), str(path.parent / "link.geojson"), "https://elsewhere.example/mask.png"):
        with pytest.raises(SourceRefused):
            slide_ref(services, config, {**data, "tissue": place})
    path.with_name("slide.tissue.png").symlink_to(outside)
    with pytest.raises(SourceRefused):
        slide_ref(services, config, data)


def test_results_of_earlier_releases_without_a_record_of_tissue_are_read(tmp_path: Path) -> None:
    from synthetic_bags import synthetic_result

    write_hdf5(synthetic_result(), tmp_path / "old.h5")
    assert read_hdf5(tmp_path / "old.h5").bag.tissue is None
