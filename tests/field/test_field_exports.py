"""Exports as their readers take them: QuPath's frame and geometry, CLAM's and TRIDENT's files, shared names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import openslide
import pytest
import shapely
import torch
from field_slides import Picture, levels, offset, plain, write_tiff
from synthetic_bags import PROVENANCE, synthetic_patches

from backend.commands.export_features import export_features, results_in
from backend.commands.predict import write_derived
from backend.errors import ExportUnsupported, FileExists, OutputUnusable, ResultDamaged, ResultNotFound
from backend.results.bag import Bag, BagResult
from backend.results.export import write_json
from backend.results.features import magnifications
from backend.results.hdf5 import read_hdf5, write_hdf5
from backend.settings import Settings
from backend.slides.geojson import to_geojson
from backend.slides.grid import Grid
from backend.slides.reader import open_slide
from backend.slides.tiling import make_bag

Case = Callable[[Callable[[Picture, Path], Path]], Path]


def said_of(bag: Bag, *, slide: str = "slide.svs", seed: int = 0) -> BagResult:
    """A result with made-up features and attention for these tiles."""
    rng = np.random.default_rng(seed)
    return BagResult(
        bag,
        rng.normal(size=(len(bag), 768)).astype(np.float16),
        rng.normal(size=(len(bag), 8)).astype(np.float32),
        rng.normal(size=768).astype(np.float32),
        {**PROVENANCE, "slide": slide, "slide_ref": json.dumps({"locations": ["/secret/place.svs"]})},
    )


def every_tile(size: tuple[int, int], mpp: float, *, bounds: tuple[int, int, int, int] | None = None) -> Bag:
    """All tiles of a slide of this size, those that stick out included."""
    edge = 224 * 0.5 / mpp
    grid = Grid.covering(size, edge)
    cells = np.stack([a.ravel() for a in np.meshgrid(np.arange(grid.columns), np.arange(grid.rows))], axis=1)
    return Bag(
        kind="slide",
        coords=grid.coords_of(cells),
        grid=cells,
        grid_size=(grid.columns, grid.rows),
        tile_size_level0=edge,
        slide_size=size,
        tile_px=224,
        tile_mpp=0.5,
        mpp=mpp,
        mpp_source="slide",
        bounds=bounds,
    )


def analysed(path: Path, settings: Settings) -> BagResult:
    """The tiles that our reader finds on a slide, with a made-up result."""
    with open_slide(path, settings) as slide:
        return said_of(make_bag(slide, settings, task_mpp=None), slide=path.name)


def polygons(result: BagResult, **kind: bool) -> np.ndarray:
    return np.array([shapely.geometry.shape(f["geometry"]) for f in to_geojson(result, "s", **kind)["features"]])


def predicted(folder: Path, result: BagResult) -> Path:
    """A folder as ``predict`` leaves it, as far as exports care."""
    folder.mkdir(parents=True)
    write_hdf5(result, folder / "result.h5")
    return folder


# --- QuPath ---------------------------------------------------------------------------------------------------------


def test_in_qupath_the_tiles_of_a_slide_with_bounds_lie_on_its_tissue(
    case: Case, picture: Picture, anywhere: Settings
) -> None:
    result = analysed(case(offset), anywhere)
    collection = to_geojson(result, "offset.scn")
    corners = np.array([f["geometry"]["coordinates"][0][0] for f in collection["features"]])
    np.testing.assert_array_equal(corners, result.bag.coords - (1200, 800))
    assert collection["frame"] == "qupath" and collection["origin"] == [1200, 800]
    for x, y in corners.tolist():  # what QuPath shows is the scanned area alone
        assert (picture[y : y + 224, x : x + 224].min(axis=2) < 235).mean() > 0.15, "in the slide's frame: 0 for many"
    assert result.bag.coords.min(axis=0).tolist() >= [1200, 800], "other files keep the slide's frame"


def test_the_slides_own_frame_is_to_be_had_and_the_file_says_which_it_is_in(case: Case, anywhere: Settings) -> None:
    result = analysed(case(offset), anywhere)
    collection = to_geojson(result, "offset.scn", level0=True)
    corners = [f["geometry"]["coordinates"][0][0] for f in collection["features"]]
    assert corners == result.bag.coords.tolist()
    assert collection["frame"] == "level0" and collection["origin"] == [0, 0]


def test_predict_writes_the_frame_that_is_asked_for(case: Case, anywhere: Settings, tmp_path: Path) -> None:
    result = analysed(case(offset), anywhere)
    for level0, corner in ((False, result.bag.coords[0] - (1200, 800)), (True, result.bag.coords[0])):
        write_derived(case(offset), result, tmp_path, anywhere, level0=level0)
        written = json.loads((tmp_path / "tiles.geojson").read_text())
        assert written["features"][0]["geometry"]["coordinates"][0][0] == corner.tolist()


@pytest.mark.parametrize("mpp", [0.499, 0.5031, 0.2461, 0.2527, 0.2325, 0.25])
def test_tiles_in_qupath_neither_overlap_nor_leave_gaps_nor_leave_the_slide(mpp: float) -> None:
    size = (9_001, 7_003)
    tiles = polygons(said_of(every_tile(size, mpp)))
    assert shapely.area(tiles).sum() == size[0] * size[1], "no overlap"
    assert shapely.union_all(tiles).equals(shapely.box(0, 0, *size)), "no gap, and cut at the edge"


def test_the_tiles_of_a_part_of_the_slide_are_the_cells_of_the_grid() -> None:
    bag = every_tile((9_001, 7_003), 0.2527)
    kept = np.random.default_rng(0).random(len(bag)) < 0.6
    part = replace(bag, coords=bag.coords[kept], grid=bag.grid[kept])
    grid = Grid.of_bag(part)
    cells = np.array([shapely.box(*grid.rectangle(*cell)) for cell in part.grid.tolist()])
    tiles = polygons(said_of(part))
    assert shapely.union_all(tiles).equals(shapely.union_all(cells))
    pairs = shapely.STRtree(tiles).query(tiles, predicate="intersects").T
    shared = shapely.intersection(*(tiles[pairs[pairs[:, 0] < pairs[:, 1]]].T))
    assert len(shared) and shapely.area(shared).max() == 0


def test_tiles_are_cut_at_the_bounds_and_none_is_lost() -> None:
    bounds = (1_234, 777, 5_000, 4_000)
    bag = every_tile((9_001, 7_003), 0.2527, bounds=bounds)
    tiles = polygons(said_of(bag))
    shown = shapely.box(0, 0, *bounds[2:])
    inside = shapely.area(shapely.intersection(tiles, shown)) > 0
    assert shapely.union_all(tiles[inside]).equals(shown)
    assert len(tiles) == len(bag) and (shapely.area(tiles) > 0).all()
    assert shapely.area(tiles[~inside]).max() == 443 * 443 or shapely.area(tiles[~inside]).max() == 444 * 444


def test_odd_names_and_values_that_are_no_numbers_make_a_file_that_opens(tmp_path: Path) -> None:
    result = said_of(every_tile((2_000, 2_000), 0.5))
    logits = result.attention_logits.copy()
    logits[3, 0] = np.nan
    name = os.fsdecode("Präparat 7 “H&E” ".encode() + b"caf\xe9.svs")
    write_json(tmp_path / "t.geojson", to_geojson(replace(result, attention_logits=logits), name))
    read = json.loads((tmp_path / "t.geojson").read_text(encoding="utf-8"))
    assert read["name"] == "Präparat 7 “H&E” caf\ufffd.svs"
    measured = read["features"][3]["properties"]["measurements"]
    assert "Attention head 0" not in measured and np.isclose(measured["Attention head 1"], result.attention[3, 1])
    assert "Attention" not in measured and "classification" not in read["features"][3]["properties"]


# --- HDF5 -----------------------------------------------------------------------------------------------------------


def test_result_h5_states_the_bounds_beside_coordinates_of_level_0(
    case: Case, anywhere: Settings, tmp_path: Path
) -> None:
    result = analysed(case(offset), anywhere)
    write_hdf5(result, tmp_path / "result.h5")
    with h5py.File(tmp_path / "result.h5") as h5:
        assert h5["coords"].attrs["bounds"].tolist() == [1200, 800, 2220, 2967]
        np.testing.assert_array_equal(h5["coords"], result.bag.coords)
    assert read_hdf5(tmp_path / "result.h5").bag.bounds == (1200, 800, 2220, 2967)
    write_hdf5(analysed(case(plain), anywhere), tmp_path / "plain.h5")
    with h5py.File(tmp_path / "plain.h5") as h5:
        assert "bounds" not in h5["coords"].attrs


# --- CLAM and TRIDENT: what their code asks of a file -----------------------------------------------------------------


def test_clam_finds_what_its_loaders_ask_for(case: Case, anywhere: Settings, tmp_path: Path) -> None:
    result = analysed(case(offset), anywhere)
    out = tmp_path / "clam"
    (done,) = export_features(results_in([predicted(tmp_path / "results" / "offset", result)]), out, "clam")
    assert done.error is None and done.name == "offset"
    with h5py.File(out / "patches" / "offset.h5") as h5:  # Whole_Slide_Bag_FP
        attributes = h5["coords"].attrs
        assert attributes["patch_level"] == 0 and attributes["patch_size"] == 224
        assert attributes["patch_size_level0"] == 224
        assert {attributes[a].dtype.kind for a in ("patch_level", "patch_size", "patch_size_level0")} == {"i"}
        assert attributes["level_dim"].tolist() == [6000, 6000] and attributes["downsample"].tolist() == [1, 1]
        assert attributes["name"] == "offset" and attributes["bounds"].tolist() == [1200, 800, 2220, 2967]
        np.testing.assert_array_equal(h5["coords"], result.bag.coords)
        with openslide.OpenSlide(case(offset)) as slide:
            patch = np.asarray(slide.read_region(h5["coords"][0], attributes["patch_level"], (224, 224)))
        assert patch[..., 3].min() == 255, "the patch lies on what was scanned"
    features = out / "features_WSC-test-1"
    with h5py.File(features / "h5_files" / "offset.h5") as h5:  # Generic_MIL_Dataset, load_from_h5(True)
        assert h5["features"].dtype == np.float32 and h5["features"].shape == (len(result.bag), 768)
        np.testing.assert_array_equal(h5["features"], result.latents.astype(np.float32))
        np.testing.assert_array_equal(h5["coords"], result.bag.coords)
        np.testing.assert_array_equal(h5["attention"], result.attention)
        np.testing.assert_array_equal(h5["attention_scores"], result.mean_attention[:, None])
        np.testing.assert_array_equal(h5["slide_embedding"], result.slide_embedding)
        assert "/secret" not in json.dumps({**h5.attrs})
        tensor = torch.load(features / "pt_files" / "offset.pt", weights_only=True)  # Generic_MIL_Dataset
        np.testing.assert_array_equal(tensor.numpy(), h5["features"])
        assert tensor.dtype == torch.float32


def test_trident_finds_what_its_code_asks_for(case: Case, anywhere: Settings, tmp_path: Path) -> None:
    result = analysed(case(offset), anywhere)
    export_features(results_in([predicted(tmp_path / "results" / "offset", result)]), tmp_path / "job", "trident")
    job = tmp_path / "job" / "20x_224px_0px_overlap"
    expected = {"patch_size": 224, "patch_size_level0": 224, "level0_magnification": 20, "target_magnification": 20}
    expected |= {"overlap": 0, "level0_width": 6000, "level0_height": 6000}
    for name in (
        "patches/offset_patches.h5",
        "features_WSC-test-1/offset.h5",
        "slide_features_WSC-test-1/offset.h5",
    ):
        with h5py.File(job / name) as h5:
            attributes = h5["coords"].attrs
            assert {key: int(attributes[key]) for key in expected} == expected
            assert {attributes[key].dtype.kind for key in expected} == {"i"}
            assert attributes["name"] == "offset" and "/" not in attributes["savetodir"]
            assert h5["coords"].dtype == np.int64
            np.testing.assert_array_equal(h5["coords"], result.bag.coords)
    with h5py.File(job / "features_WSC-test-1" / "offset.h5") as h5:
        assert h5["features"].dtype == np.float32
        np.testing.assert_array_equal(h5["features"], result.latents.astype(np.float32))
        np.testing.assert_array_equal(h5["attention"], result.attention)
        assert h5["features"].attrs["encoder"] == "WSC-test-1"
    with h5py.File(job / "slide_features_WSC-test-1" / "offset.h5") as h5:
        np.testing.assert_array_equal(h5["features"], result.slide_embedding)
        assert h5["features"].dtype == np.float32


# TRIDENT's own integer where it leads to the right size, else the exact one: to it, 0.3 and 0.45 µm/px are "20x".
@pytest.mark.parametrize(
    ("mpp", "magnification", "edge"),
    [(0.25, 40, 448), (0.5, 20, 224), (1.0, 10, 112), (0.499, 20, 224), (0.1, 100, 1120), (0.2527, 39.573, 443),
     (0.2325, 43.011, 482), (0.3, 33.333, 373), (0.45, 22.222, 249), (4.0, 2.5, 28)],
)  # fmt: skip
def test_trident_cuts_the_tiles_of_the_bag_at_any_scale(mpp: float, magnification: float, edge: int) -> None:
    bag = every_tile((20_000, 15_000), mpp)
    level0, target = magnifications(bag)
    assert level0 == pytest.approx(magnification, abs=1e-3) and target == 20
    assert isinstance(target, int) and (isinstance(level0, int) or magnification != round(magnification))
    # As its WSIPatcher does: a pixel has 10 µm divided by the magnification.
    assert round(224 * (10 / target) / (10 / level0)) == edge == round(bag.tile_size_level0)


def test_sizes_are_whole_and_starts_are_true_where_a_tile_is_no_whole_number_of_pixels(tmp_path: Path) -> None:
    bag = every_tile((20_000, 15_000), 0.2527)
    folder = predicted(tmp_path / "results" / "a", said_of(bag, slide="a.svs"))
    for layout, path, size in (
        ("clam", "patches/a.h5", "patch_size"),
        ("trident", "20x_224px_0px_overlap/patches/a_patches.h5", "patch_size_level0"),
    ):
        export_features(results_in([folder]), tmp_path / layout, layout)
        with h5py.File(tmp_path / layout / path) as h5:
            assert h5["coords"].attrs[size] == 443 and h5["coords"].attrs[size].dtype.kind == "i"
            assert h5["coords"].attrs["tile_size_level0"] == 224 * 0.5 / 0.2527
            np.testing.assert_array_equal(h5["coords"], np.rint(bag.grid * bag.tile_size_level0))
            steps = np.diff(np.unique(h5["coords"][:, 0]))
            assert abs(steps - 443).max() <= 1


def test_a_bag_of_patches_is_exported_without_coordinates(tmp_path: Path) -> None:
    result = synthetic_patches([(300, 200)] * 5, hot=2)
    sources = results_in([predicted(tmp_path / "results" / "core", result)])
    for layout, path in (("clam", "features_WSC-test-1/h5_files"), ("trident", "patches_of_224px/features_WSC-test-1")):
        (done,) = export_features(sources, tmp_path / layout, layout)
        assert done.error is None and not done.placed and done.tiles == 5
        assert not list((tmp_path / layout).rglob("patches/*"))
        with h5py.File(tmp_path / layout / path / "core.h5") as h5:
            assert h5["features"].shape == (5, 768) and "coords" not in h5
            assert h5["attention_scores"][:, 0].argmax() == 2
    with pytest.raises(ExportUnsupported, match="no coordinates"):
        to_geojson(result, "core")


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_of_a_name(tmp_path: Path) -> list[Path]:
    """Results of two slides that are both called a.ome.tif, and a copy of the first."""
    bag = every_tile((2_000, 2_000), 0.5)
    first, second = said_of(bag, slide="a.ome.tif", seed=1), said_of(bag, slide="a.ome.tif", seed=2)
    made = {"one": first, "two": second, "copy": first}
    return [predicted(tmp_path / "results" / folder, result) for folder, result in made.items()]


def test_slides_of_one_name_keep_apart_and_their_names_stay(two_of_a_name: list[Path], tmp_path: Path) -> None:
    def exported(out: str, folders: list[Path]) -> dict[str, np.ndarray]:
        done = export_features(results_in(folders), tmp_path / out, "clam")
        assert [one.passed_over.startswith("the same as") for one in done if not one.files] == [True]
        found = {}
        for path in (tmp_path / out).glob("features_*/h5_files/*.h5"):
            with h5py.File(path) as h5:
                found[path.stem] = h5["features"][:]
        return found

    there = exported("there", two_of_a_name)
    back = exported("back", two_of_a_name[::-1])
    assert len(there) == 2 and there.keys() == back.keys() and all(name.startswith("a.ome-") for name in there)
    assert all(np.array_equal(there[name], back[name]) for name in there)


def test_the_suffix_is_that_of_the_slides_folder_where_predict_made_one(tmp_path: Path) -> None:
    bag, ids = every_tile((2_000, 2_000), 0.5), ("1" * 40, "2" * 40)
    for seed, slide in enumerate(ids):
        result = said_of(bag, slide="a.svs", seed=seed)
        predicted(tmp_path / "results" / f"a-{slide[:8]}", replace(result, provenance={**result.provenance, "slide_id": slide}))  # fmt: skip
    done = export_features(results_in([str(tmp_path / "results")]), str(tmp_path / "out"), "trident")
    assert sorted(one.name for one in done) == ["a-11111111", "a-22222222"]


def test_each_program_finds_the_slide_by_the_name_it_has_for_it(two_of_a_name: list[Path], tmp_path: Path) -> None:
    (clam,) = export_features(results_in(two_of_a_name[:1]), tmp_path / "clam", "clam")
    (trident,) = export_features(results_in(two_of_a_name[:1]), tmp_path / "trident", "trident")
    assert (clam.name, trident.name) == ("a.ome", "a")  # os.path.splitext in CLAM; TRIDENT takes .ome.tif whole


@pytest.mark.parametrize("file", ["1.dcm", "00000001", "1.2.276.0.7230010"])
def test_the_files_of_a_dicom_slide_have_numbers_for_names_and_its_folder_has_the_name(
    file: str, tmp_path: Path
) -> None:
    result = said_of(every_tile((2_000, 2_000), 0.5), slide=file)
    (done,) = export_features(
        results_in([predicted(tmp_path / "results" / "case 7.b", result)]), tmp_path / "x", "clam"
    )
    assert done.name == "case 7.b"


@pytest.mark.parametrize(
    "slide", ["Präparat “7”.svs", os.fsdecode(b"caf\xe9.svs"), "é" * 112 + ".svs", "../../up.svs", ".svs"]
)
def test_odd_slide_names_are_exported(slide: str, tmp_path: Path) -> None:
    result = said_of(every_tile((2_000, 2_000), 0.5), slide=slide)
    for layout in ("clam", "trident"):
        folder, out = predicted(tmp_path / layout / "results" / "s", result), tmp_path / layout / "x"
        (done,) = export_features(results_in([folder]), out, layout)
        assert done.error is None and len(done.files) == 3
        assert all(path.is_file() and path.resolve().is_relative_to(out) for path in done.files)


def test_what_is_there_is_kept_unless_it_is_the_same_or_to_be_replaced(
    two_of_a_name: list[Path], tmp_path: Path
) -> None:
    first, second, _ = ([source] for source in results_in(two_of_a_name))
    out = tmp_path / "out"
    (done,) = export_features(first, out, "clam")
    assert done.written == 3
    before = {path: path.read_bytes() for path in done.files}
    (again,) = export_features(first, out, "clam")
    assert again.error is None and again.written == 0
    (refused,) = export_features(second, out, "clam")
    assert isinstance(refused.error, FileExists) and "--overwrite" in str(refused.error)
    assert {path: path.read_bytes() for path in done.files} == before
    (replaced,) = export_features(second, out, "clam", overwrite=True)
    assert replaced.error is None and replaced.written == 2, "the coordinates are the same"


def test_what_cannot_be_exported_is_named_and_stops_nothing(two_of_a_name: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "results" / "broken"
    broken.mkdir()
    (broken / "result.h5").write_bytes(b"no HDF5")
    done = export_features(results_in([tmp_path / "results"]), tmp_path / "out", "trident")
    assert sum(bool(one.files) for one in done) == 2
    (failed,) = [one for one in done if one.error]
    assert isinstance(failed.error, ResultDamaged) and "broken" in failed.source.place
    with pytest.raises(ResultNotFound, match="There is no file or folder"):
        results_in([tmp_path / "absent"])
    with pytest.raises(ResultNotFound, match=r"No result\.h5"):
        results_in([tmp_path / "out"])
    with pytest.raises(ExportUnsupported, match="'qupath'"):
        export_features([], tmp_path / "out", "qupath")
    with pytest.raises(OutputUnusable, match="is no folder"):
        export_features([], broken / "result.h5", "clam")


def test_the_command_says_what_it_wrote_and_how_it_is_read(two_of_a_name: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "job"
    line = [sys.executable, "-m", "backend", "export-features", str(tmp_path / "results"), "-o", str(out), "--layout"]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([*line, "trident"], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 slides" in done.stdout and "6 files written" in done.stdout and f"--job_dir {out}" in done.stdout
    assert "the same as" in done.stderr
    done = subprocess.run([*line, "hdf5"], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 2 and "ExportUnsupported" in done.stderr and "--layout clam" in done.stderr


# --- their own code, where it is -------------------------------------------------------------------------------------


def read_by(program: str, case: Case, maker: Callable[[Picture, Path], Path], settings: Settings, work: Path) -> dict:
    """What the program's own code makes of the export of a slide; see ``read_by_….py``."""
    path = os.environ.get(f"WSC_TEST_{program.upper()}", "")
    if not path:
        pytest.skip(
            f"set WSC_TEST_{program.upper()} to a checkout of {program} (and, after a colon, to packages it needs)"
        )
    slide = case(maker)
    folder = predicted(work / "results" / slide.stem, analysed(slide, settings))
    export_features(results_in([folder]), work / "export", program)
    script = Path(__file__).with_name(f"read_by_{program}.py")
    done = subprocess.run(
        [sys.executable, str(script), str(work / "export"), str(slide), slide.stem, str(work)],
        cwd=path.split(":")[0],
        env={**os.environ, "PYTHONPATH": path, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads((work / f"{program}.json").read_text())
    bag = read_hdf5(folder / "result.h5", latents=False).bag
    assert said["coords"] == bag.coords.tolist()
    assert said["painted"] == bag.coords.min(axis=0).tolist(), "the heatmap begins where the tiles begin"
    with openslide.OpenSlide(slide) as opened:
        edge = round(bag.tile_size_level0)
        ours = [np.asarray(opened.read_region(xy, 0, (edge, edge)).convert("RGB")) for xy in bag.coords.tolist()]
    np.testing.assert_allclose(said["mean"], [patch.mean() / 255 for patch in ours], atol=0.003)
    return said


def finer(rgb: Picture, out: Path) -> Path:
    """With a scale that makes tiles of 443.2 px, and that TRIDENT takes for 40x.

    Its sizes are even, since TRIDENT takes a downsample of 1.9997 for 1.
    """
    return write_tiff(out / "finer.tif", levels(rgb[:2960], 1, 2), mpp=0.2527)


@pytest.mark.parametrize("maker", [offset, plain, finer], ids=lambda maker: maker.__name__)
def test_clam_itself_reads_our_files(maker: Callable, case: Case, anywhere: Settings, tmp_path: Path) -> None:
    said = read_by("clam", case, maker, anywhere, tmp_path)
    assert said["features"] == [[len(said["coords"]), 768], "torch.float32", "torch.float32", True]
    assert said["coords_same"] and said["patches"] == len(said["coords"])


@pytest.mark.parametrize("maker", [offset, plain, finer], ids=lambda maker: maker.__name__)
def test_trident_itself_reads_our_files(maker: Callable, case: Case, anywhere: Settings, tmp_path: Path) -> None:
    said = read_by("trident", case, maker, anywhere, tmp_path)
    assert said["cut"] == said["attributes"]["patch_size_level0"] == (443 if maker is finer else 224)
    assert said["features"] == [[len(said["coords"]), 768], "float32"]
    assert said["slide"] == [[768], [768], "float32"] and said["dumped"] == 3
