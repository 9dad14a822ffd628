"""Every benchmark runs, in its smallest size, and says finite figures; the table and the JSON hold them and the machine."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from openslide import OpenSlide
from rich.console import Console
from typer.testing import CliRunner

from backend.bench import numerics, pictures
from backend.bench.decode import single_tile
from backend.bench.encoder import make_engine
from backend.bench.growth import PeakMemory, run
from backend.bench.material import drawing, grid_bag, some_tiles, write_big_pyramid
from backend.bench.measure import Figure, Plan, at_least, below, interleaved, percentile
from backend.bench.numerics import cosine
from backend.bench.report import machine, save, table, written
from backend.cli import app
from backend.commands.bench import BENCHMARKS, chosen, run_benchmarks
from backend.errors import SettingsError
from backend.inference.blocks import NativeBlocks
from backend.settings import Settings
from backend.slides.reader import open_slide
from backend.slides.synthetic import SyntheticSlide
from backend.slides.tiles import read_tiles


@pytest.fixture
def bench_settings(settings: Callable[..., Settings], stand_in: Path, tmp_path: Path) -> Settings:
    """As a user has them who has run the backend before: the stand-in model is built."""
    made = settings()
    models = made.model_dir / "cache" / "models"
    models.mkdir(parents=True)
    (models / stand_in.name).symlink_to(stand_in)
    return made


@pytest.fixture
def plan(bench_settings: Settings, tmp_path: Path) -> Plan:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return Plan(bench_settings, "cpu", "smallest", folder)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_runs_and_its_figures_are_finite(bench_settings: Settings, name: str, tmp_path: Path) -> None:
    figures = run_benchmarks([name], bench_settings, "cpu", "smallest", scratch=tmp_path)
    assert figures
    assert {figure.benchmark for figure in figures} == {name}
    assert all(figure.value is None or (math.isfinite(figure.value) and figure.value >= 0) for figure in figures)
    assert any(figure.value is not None for figure in figures)
    assert len({figure.name for figure in figures}) == len(figures), "no two figures have one name"
    assert all((figure.met is None) == (figure.target == "") for figure in figures)


def test_numerics_hold_their_bounds_even_with_random_weights(plan: Plan) -> None:
    figures = numerics.run(plan)
    assert all(figure.met for figure in figures), [figure for figure in figures if not figure.met]


def test_growth_is_linear_in_work_and_flat_in_memory(plan: Plan) -> None:
    """Time is not asserted. Four times the tiles are four times the work, and hold no more memory beside their latents."""
    figures = {figure.name: figure for figure in run(plan)}
    assert {"slide of 36 tiles", "slide of 144 tiles"} <= figures.keys()
    assert figures["device memory, 144 tiles"].value is None
    small, large = (figures[f"host memory beside latents, {tiles} tiles"].value for tiles in (36, 144))
    # The larger slide has 108 tiles more: held, they would be 16 MiB as pixels and 62 MiB as what the encoder is given.
    assert large - small < 60


class CountingTiles:
    """Chunks of noise that are made when asked for, and how many are alive."""

    def __init__(self, count: int) -> None:
        self.left, self.made = count, 0

    def __iter__(self):
        rng = np.random.default_rng(0)
        while self.left:
            self.left -= 1
            self.made += 1
            yield rng.integers(0, 256, (32, 224, 224, 3), np.uint8)


def test_host_memory_of_a_bag_does_not_grow_with_its_tiles(stand_in: Path) -> None:
    engine = make_engine(NativeBlocks(stand_in, "cpu"), "float32", 32)
    engine.encode(CountingTiles(2), 64)
    beside = []
    for chunks in (4, 32):
        with PeakMemory() as memory:
            latents = engine.encode(CountingTiles(chunks), 32 * chunks)
        beside.append((memory.peak - latents.nbytes) / 2**20)
    assert beside[1] - beside[0] < 60, "896 tiles more are 129 MiB of pixels"


@pytest.mark.parametrize(("mpp", "edge"), [(0.5, 2048), (0.25, 3000)])
def test_the_big_pyramid_is_what_openslide_reads(plan: Plan, mpp: float, edge: int) -> None:
    picture = drawing(plan.folder, mpp, 640)
    path = write_big_pyramid(plan.folder / "big.tif", picture, edge, mpp)
    with OpenSlide(str(path)) as slide:
        assert slide.dimensions == (edge, edge)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(mpp)
        assert slide.level_downsamples[1] == pytest.approx(4, rel=0.01)
        shown = np.asarray(slide.read_region((640, 1280), 0, (640, 640)).convert("RGB"), np.float64)
    assert np.abs(shown - picture).mean() < 6, "copies of the picture, through JPEG"
    assert picture.std() > 10


def test_our_reader_and_single_reads_see_the_same_tiles(plan: Plan) -> None:
    path = write_big_pyramid(plan.folder / "big.tif", drawing(plan.folder, 0.5, 640), 2048, 0.5)
    bag = grid_bag((2048, 2048), 0.5, plan.settings, limit=9)
    with open_slide(path, plan.settings) as slide:
        ours = np.concatenate(list(read_tiles(slide, bag, chunk=4, threads=2)))
    with OpenSlide(str(path)) as slide:
        theirs = np.stack([single_tile(slide, x, y, bag) for x, y in bag.coords.tolist()])
    assert len(bag) == 9
    assert np.abs(ours.astype(int) - theirs).mean() < 3


def test_tiles_to_measure_on_are_tissue_and_none_is_empty(plan: Plan) -> None:
    tiles = some_tiles(plan, 10)
    assert tiles.shape == (10, 224, 224, 3)
    assert tiles.reshape(10, -1).std(axis=1).min() > 3


def test_a_grid_bag_holds_only_tiles_that_lie_on_the_slide(
    settings: Callable[..., Settings], synthetic_slide: SyntheticSlide
) -> None:
    bag = grid_bag(synthetic_slide.size, 0.5, settings())
    assert len(bag) == 81
    assert bag.coords.max() + 224 <= 2048


def test_ways_are_timed_in_turns_after_a_warm_up() -> None:
    calls: list[str] = []
    timings = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=5)
    assert calls == list("ab" + "ab" + "ba" + "ab" + "ba" + "ab")
    assert all(len(seconds) == 5 for seconds in timings.seconds.values())
    assert timings.median("a") == statistics.median(timings.seconds["a"])


def test_percentiles_targets_and_numbers_read_as_they_should() -> None:
    assert percentile(list(range(1, 101)), 99) == 99
    assert percentile([3.0], 50) == 3.0
    assert at_least("b", "n", 1.3, 1.3).met and not at_least("b", "n", 1.29, 1.3).met
    assert below("b", "n", 9.9, 10, "ms").target == "< 10 ms" and not below("b", "n", 10, 10).met
    assert (written(12345.6), written(16.484), written(0.99987654)) == ("12,346", "16.48", "0.999877")
    assert cosine([[1, 0]], [[1, 1]])[0] == pytest.approx(math.sqrt(0.5))


def test_table_and_json_hold_every_figure_and_the_machine(tmp_path: Path) -> None:
    figures = [
        Figure("decode", "ours", 123.4, "tiles/s"),
        at_least("decode", "ratio", 2.0, 3.0, "x", "a note"),
        Figure("growth", "device memory", None, "MiB"),
    ]
    facts = machine("cpu")
    assert {"processor", "cores", "torch", "device", "date", "load_before"} <= facts.keys()
    save(tmp_path / "results.json", figures, facts, {"slide": "OSError: no disk"})
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["machine"] == facts
    assert saved["failed"] == {"slide": "OSError: no disk"}
    assert saved["figures"][2]["value"] is None
    assert saved["figures"][1] == {
        "benchmark": "decode", "name": "ratio", "value": 2.0, "unit": "x", "target": ">= 3 x", "met": False, "note": "a note"
    }  # fmt: skip
    screen = io.StringIO()
    Console(file=screen, width=200).print(table(figures, facts))
    for words in ("ours", "123.4 tiles/s", ">= 3 x", "missed", "a note", "–", facts["torch"]):
        assert words in screen.getvalue()


def test_a_benchmark_that_fails_takes_no_figures_with_it(
    bench_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(plan: Plan) -> list[Figure]:
        raise OSError("no disk")

    monkeypatch.setattr(numerics, "run", broken)
    monkeypatch.setattr(pictures, "run", lambda _: [Figure("pictures", "regions", 1.0, "ms")])
    for name, value in (("MODEL_DIR", bench_settings.model_dir), ("COLUMNS", 200)):
        monkeypatch.setenv(name, str(value))
    out = tmp_path / "results.json"
    ran = CliRunner().invoke(app, ["bench", "--only", "numerics,pictures", "--device", "cpu", "--out", str(out)])
    assert ran.exit_code == 1
    assert "numerics failed: OSError: no disk" in ran.stderr
    assert "regions" in ran.stdout
    saved = json.loads(out.read_text())
    assert [figure["name"] for figure in saved["figures"]] == ["regions"]
    assert saved["failed"] == {"numerics": "OSError: no disk"}
    with pytest.raises(OSError, match="no disk"):
        run_benchmarks(["numerics"], bench_settings, "cpu", "smallest", scratch=tmp_path)


def test_benchmarks_are_chosen_by_name() -> None:
    assert chosen("") == BENCHMARKS
    assert chosen("decode, encoder") == ("encoder", "decode")
    with pytest.raises(SettingsError, match="no benchmark 'speed'"):
        chosen("speed")
