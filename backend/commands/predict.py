"""``wsc-backend predict``: slides on disk → heatmap, regions, HDF5, GeoJSON. Neither Label Studio nor Redis."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from backend.errors import BackendError
from backend.inference.engine import Engine
from backend.inference.pipeline import StageProgress, analyse_file
from backend.label_studio.check import check_prediction
from backend.label_studio.labeling_config import load_template, parse_config
from backend.label_studio.regions import predict_regions
from backend.results.bag import BagResult
from backend.results.export import to_geojson, write_json
from backend.results.hdf5 import write_hdf5
from backend.settings import Settings
from backend.slides.reader import open_slide
from backend.slides.render import SHOWN_MAX_PX, overlay, shown_size


@dataclass(frozen=True)
class Outcome:
    """What became of one slide: the folder of its files and its result, or the error."""

    slide: Path
    folder: Path | None = None
    result: BagResult | None = None
    error: BackendError | None = None


def predict_files(
    slides: Sequence[Path],
    out: Path,
    settings: Settings,
    engine: Engine,
    *,
    mpp: float | None = None,
    on_slide: Callable[[int, Path], None] = lambda *_: None,
    progress: StageProgress = lambda *_: None,
) -> list[Outcome]:
    """Analyse each slide and write its files into ``out/<name of the slide>/``.

    Written are ``heatmap.png`` (attention over the slide), ``regions.json`` (a Label Studio prediction for the default
    labelling config), ``tiles.geojson`` (for QuPath) and ``result.h5``. A slide that fails does not stop the others.

    Parameters
    ----------
    mpp
        µm per pixel of slides that do not say.
    on_slide
        Called with number and path of each slide before it is analysed.
    """
    outcomes = []
    taken: set[str] = set()
    for number, slide in enumerate(slides):
        on_slide(number, slide)
        try:
            result = analyse_file(slide, settings, engine, progress, task_mpp=mpp)
            folder = out / _free_name(slide, taken)
            progress("write", len(result.bag), len(result.bag))
            write_outputs(slide, result, folder, settings)
            outcomes.append(Outcome(slide, folder, result))
        except BackendError as error:
            outcomes.append(Outcome(slide, error=error))
    return outcomes


def write_outputs(slide: Path, result: BagResult, folder: Path, settings: Settings) -> None:
    """The four files of one result; see :func:`predict_files`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open_slide(slide, settings) as opened:
        picture = overlay(Image.fromarray(opened.overview(SHOWN_MAX_PX)), result)
    temporary = folder / ".heatmap.png"
    picture.save(temporary, "PNG")
    temporary.replace(folder / "heatmap.png")
    config_xml = load_template("triage")
    size = shown_size(result.bag.slide_size)
    prediction = predict_regions(
        result,
        parse_config(config_xml),
        image_size=size,
        model_version=str(result.provenance["model_version"]),
        settings_top_k=settings.top_k,
    )
    check_prediction(prediction, config_xml, image_size=size)
    write_json(folder / "regions.json", json.loads(json.dumps(prediction)))
    write_json(folder / "tiles.geojson", to_geojson(result, slide.name))
    temporary = folder / ".result.h5"
    write_hdf5(result, temporary)
    temporary.replace(folder / "result.h5")


def _free_name(slide: Path, taken: set[str]) -> str:
    """The slide's name without its ending, with a number where two slides share one."""
    # The files of a DICOM slide have numbers for names; its folder has the name.
    stem = slide.resolve().parent.name if slide.suffix.lower() == ".dcm" else slide.stem
    number = 2
    name = stem
    while name in taken:
        name = f"{stem}-{number}"
        number += 1
    taken.add(name)
    return name
